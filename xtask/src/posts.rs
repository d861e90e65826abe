//! `cargo xtask posts ARGUMENTS`: installs the servers, builds the kernel program, the agent and the tests' programs, then runs
//! `penstock-posts` in this process's place.

use anyhow::Result;

use crate::{command::exec, optimised, setup};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// Arguments of the run: --server, --mode, --short; see --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    posts: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    setup::test_needs()?;
    setup::post_needs()?;
    optimised::build()?;
    exec(optimised::program("penstock-posts").args(&args.posts))
}
