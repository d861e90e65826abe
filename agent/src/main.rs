//! `penstock`: the command line.

mod cli;
mod doctor;

use std::process::ExitCode;

use clap::Parser as _;

/// Takes less time than the C library's, and returns the memory of closed connections (docs/decisions/0012-release-build.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::Cli::parse().run()
}
