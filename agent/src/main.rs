//! `penstock`: the command line.

mod cli;
mod doctor;

use std::process::ExitCode;

use clap::Parser as _;

/// Takes less time than the C library's, and returns the memory of closed connections (docs/decisions/0012-release-build.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cli::Cli::try_parse() {
        Ok(cli) => cli.run(),
        Err(error) => {
            // Fails if the output is closed.
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { cli::USAGE } else { 0 })
        }
    }
}
