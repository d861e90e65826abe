//! Long mixed traffic with faults; reports lost bytes and leaks. Started by `cargo xtask soak`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use penstock_agent::config::SteeringMode;
use penstock_tests::Random;
use penstock_tests::soak::{self, Options};

/// Mixed traffic with faults through agents in each steering mode; whatever is left at the end is a failure.
#[derive(Parser)]
#[command(name = "cargo xtask soak")]
struct Args {
    /// Duration of the traffic
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Seed of the requests and faults (not of their timing)
    #[arg(long)]
    seed: Option<u64>,
    /// Only an agent in this mode
    #[arg(long)]
    mode: Option<SteeringMode>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(Random::fresh_seed);
    println!("seed {seed}, {} minutes", args.minutes);
    let time = Duration::from_secs_f64(args.minutes * 60.0);
    let report = match soak::run(Options { time, seed, mode: args.mode }, |line| println!("{line}")).await {
        Ok(report) => report,
        Err(error) => {
            eprintln!("penstock-soak: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    println!();
    for line in &report.lines {
        println!("{line}");
    }
    for complaint in &report.complaints {
        println!("FAILED {complaint}");
    }
    println!("{} complaints; seed {seed}", report.complaints.len());
    if report.complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
