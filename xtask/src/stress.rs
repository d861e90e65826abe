//! `cargo xtask stress ARGUMENTS`: builds the kernel program, the agent and the tests' programs, then runs `penstock-stress` in
//! this process's place.

use anyhow::Result;

use crate::{command::exec, optimised};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// Arguments of the run: --seconds, --seed, --mode; see --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    stress: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    optimised::build()?;
    exec(optimised::program("penstock-stress").args(&args.stress))
}
