//! `cargo xtask bench ARGUMENTS`: installs the peers, builds the agent and `penstock-bench` with the profile `release`, which users run,
//! then runs `penstock-bench` in this process's place.

use anyhow::Result;

use crate::{
    command::{cargo, command, exec, run},
    ebpf, setup,
};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// Arguments of the run: --quick, --only, --document; see --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    bench: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    setup::bench_needs()?;
    ebpf::build(ebpf::Warnings::Allow)?;
    let programs =
        ["--package", "penstock-agent", "--bin", "penstock", "--package", "penstock-tests", "--bin", "penstock-bench"];
    run(cargo().args(["build", "--release"]).args(programs))?;
    exec(command("target/release/penstock-bench").args(&args.bench))
}
