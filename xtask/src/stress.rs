//! `cargo xtask stress ARGUMENTS`: builds the kernel program, the agent and the tests' library, then becomes the stress run.

use anyhow::Result;

use crate::{command::exec, optimised};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// For the run: --seconds, --seed, --mode; --help says more
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    stress: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    optimised::build()?;
    exec(optimised::program("penstock-stress").args(&args.stress))
}
