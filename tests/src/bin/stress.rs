//! Random requests to agents in each steering mode for a given time; every byte is compared. Started by `cargo xtask stress`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use penstock_agent::config::SteeringMode;
use penstock_tests::Random;
use penstock_tests::stress::{self, Options};

/// Random framings, sizes, pauses, buffers, clients and faults against agents in each steering mode.
#[derive(Parser)]
#[command(name = "cargo xtask stress")]
struct Args {
    /// How long to start requests, in all modes together
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Seed of the cases; a failure names the seed and mode that reproduce it
    #[arg(long)]
    seed: Option<u64>,
    /// Only this mode
    #[arg(long)]
    mode: Option<SteeringMode>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(Random::fresh_seed);
    println!("seed {seed}, {} s", args.seconds);
    let options = Options { time: Duration::from_secs(args.seconds), seed, mode: args.mode };
    let tallies = stress::run(options, |round| {
        println!(
            "{} {} requests, {} bytes read, {} failed",
            round.name(),
            round.requests(),
            round.read,
            round.failed()
        );
        // At once, for a run that is ended early.
        round.failures.iter().for_each(|failure| println!("FAILED {failure}"));
    });
    let tallies = match tallies.await {
        Ok(tallies) => tallies,
        Err(error) => {
            eprintln!("penstock-stress: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    println!();
    let mut complaints = Vec::new();
    for tally in &tallies {
        println!("{tally}");
        complaints.extend(tally.complaints());
    }
    for complaint in &complaints {
        println!("FAILED {complaint}");
    }
    let (read, wrong) = tallies.iter().fold((0, 0), |(read, wrong), tally| (read + tally.read, wrong + tally.wrong));
    println!("{read} bytes read, {wrong} streams with a wrong byte, {} complaints; seed {seed}", complaints.len());
    if complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
