//! `cargo xtask run -- ARGUMENTS`: builds the kernel program and the agent, then runs `penstock run ARGUMENTS` in this process's
//! place.

use anyhow::Result;

use crate::{
    command::{cargo, exec},
    ebpf,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build the agent in release mode
    #[arg(long)]
    release: bool,
    /// Arguments of `penstock run`
    #[arg(last = true)]
    agent: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    ebpf::build(ebpf::Warnings::Allow)?;
    let mut run = cargo();
    run.args(["run", "--package", "penstock-agent", "--bin", "penstock"]);
    run.args(args.release.then_some("--release")).args(["--", "run"]).args(&args.agent);
    exec(&mut run)
}
