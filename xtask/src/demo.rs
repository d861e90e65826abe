//! `cargo xtask demo -- ARGUMENTS`: builds the kernel program, the agent and the model servers, then becomes the demo.
//!
//! In the profile `demo`: optimised where it matters, and built in a few minutes.

use anyhow::Result;

use crate::{
    command::{cargo, exec, run},
    ebpf,
};

const PROFILE: [&str; 2] = ["--profile", "demo"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// For the demo
    #[arg(last = true)]
    demo: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    ebpf::build(ebpf::Warnings::Allow)?;
    run(cargo().arg("build").args(PROFILE).args([
        "--package",
        "penstock-agent",
        "--package",
        "penstock-tests",
        "--bins",
    ]))?;
    let mut demo = cargo();
    demo.args(["run", "--quiet"]).args(PROFILE).args(["--package", "penstock-tests", "--bin", "penstock-demo", "--"]);
    exec(demo.args(&args.demo))
}
