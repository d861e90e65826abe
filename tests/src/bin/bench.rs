//! Measures Penstock, Envoy and nginx under the same loads. Started by `cargo xtask bench`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use penstock_tests::bench::{self, Options, Programs};

/// Measures what a request and a token cost Penstock, Envoy and nginx, under the same loads
#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Args {
    /// Fewer and shorter rounds, under three minutes
    #[arg(long)]
    quick: bool,
    /// Only loads whose name contains this text
    #[arg(long)]
    only: Option<String>,
    /// Number of rounds
    #[arg(long)]
    rounds: Option<usize>,
    /// Also write docs/performance.md
    #[arg(long)]
    document: bool,
    /// Measure nothing: write docs/performance.md from target/bench/report.json
    #[arg(long)]
    render: bool,
    /// The agent to measure
    #[arg(long, default_value = "target/release/penstock")]
    penstock: PathBuf,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let (json, document) = (root.join("target/bench/report.json"), root.join("docs/performance.md"));
    let words: Vec<String> = std::env::args().skip(1).collect();
    let options = Options {
        programs: Programs { penstock: root.join(args.penstock), envoy: root.join("target/venv/bin/envoy") },
        rounds: args.rounds.unwrap_or(if args.quick { 5 } else { 15 }).max(1),
        time: Duration::from_millis(if args.quick { 800 } else { 2000 }),
        only: args.only,
        command: format!("cargo xtask bench {}", words.join(" ")).trim_end().to_owned(),
        json: json.clone(),
        document: args.document.then(|| document.clone()),
    };
    let done = if args.render { bench::render(&json, &document) } else { bench::run(&options).await };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
