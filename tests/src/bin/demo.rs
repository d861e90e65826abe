//! Runs model servers, a picker and the agent as separate processes, sends real requests and prints what became of every byte.
//! Started by `cargo xtask demo`.

use std::process::ExitCode;

use clap::Parser;
use penstock_tests::demo::{self, Options};
use tokio::signal::unix::{SignalKind, signal};

/// Starts three model servers, a picker and an agent, and shows what happens to requests.
#[derive(Parser)]
struct Args {
    /// Leave everything running until Ctrl-C, for your own requests
    #[arg(long)]
    keep: bool,
    /// Accept a kernel that cannot steer
    #[arg(long)]
    allow_relay: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        eprintln!("penstock-demo: could not install the signal handlers");
        return ExitCode::FAILURE;
    };
    let stopped = async {
        tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} }
    };
    let outcome = demo::run(Options { keep: args.keep, allow_relay: args.allow_relay }, stopped).await;
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("penstock-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
