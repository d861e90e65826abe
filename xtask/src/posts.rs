//! `cargo xtask posts ARGUMENTS`: builds the kernel program, the agent and the tests' library, then becomes the run of POSTs into
//! real servers.

use anyhow::Result;

use crate::{command::exec, optimised, setup};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// For the run: --server, --mode, --short; --help says more
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    posts: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    setup::test_needs()?;
    setup::post_needs()?;
    optimised::build()?;
    exec(optimised::program("penstock-posts").args(&args.posts))
}
