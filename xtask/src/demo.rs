//! `cargo xtask demo -- ARGUMENTS`: builds the kernel program, the agent and the model servers, then becomes the demo.

use anyhow::Result;

use crate::{
    command::{cargo, exec, run},
    ebpf,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Optimised, as it is deployed
    #[arg(long)]
    release: bool,
    /// For the demo
    #[arg(last = true)]
    demo: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    ebpf::build(ebpf::Warnings::Allow)?;
    let profile = args.release.then_some("--release");
    run(cargo().args(["build", "--package", "penstock-agent", "--package", "penstock-tests", "--bins"]).args(profile))?;
    let mut demo = cargo();
    demo.args(["run", "--package", "penstock-tests", "--bin", "penstock-demo"]).args(profile);
    exec(demo.arg("--").args(&args.demo))
}
