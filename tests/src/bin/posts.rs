//! POSTs to real servers in each steering mode, all sizes. Started by `cargo xtask posts`.

use std::process::ExitCode;

use clap::Parser;
use penstock_agent::config::SteeringMode;
use penstock_tests::{
    posts::{self, MODES, SHORT, WHOLE},
    servers::{Kind, RealServer},
};

/// POSTs of 1 kB to 32 MiB, slow and fast, plain, chunked and with Expect, to real servers on this machine, in each mode
#[derive(Parser)]
#[command(name = "cargo xtask posts")]
struct Args {
    /// Only these servers
    #[arg(long)]
    server: Vec<Kind>,
    /// Only this mode
    #[arg(long)]
    mode: Option<SteeringMode>,
    /// Fewer sizes and connections, as in the tests
    #[arg(long)]
    short: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let kinds = if args.server.is_empty() { <Kind as clap::ValueEnum>::value_variants().to_vec() } else { args.server };
    let extent = if args.short { SHORT } else { WHOLE };
    let mut failed = 0;
    for kind in kinds {
        let server = match RealServer::start(kind).await {
            Ok(server) => server,
            Err(error) => {
                println!("FAILED {kind:?}: {error:#}");
                failed += 1;
                continue;
            }
        };
        for mode in MODES.into_iter().filter(|mode| args.mode.is_none_or(|only| only == *mode)) {
            match posts::run(&server, mode, extent).await {
                Ok(tally) => println!("ok     {kind:?} {mode:?}: {tally}"),
                Err(error) => {
                    println!("FAILED {kind:?} {mode:?}: {error:#}");
                    failed += 1;
                }
            }
        }
    }
    println!("{failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
