//! `penstock`: the command line.

mod cli;
mod doctor;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    cli::Cli::parse().run()
}
