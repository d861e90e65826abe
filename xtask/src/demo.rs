//! `cargo xtask demo -- ARGUMENTS`: builds the kernel program, the agent and the model servers, then runs the demo in their place.

use anyhow::Result;

use crate::{command::exec, optimised};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Arguments of the demo
    #[arg(last = true)]
    demo: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    optimised::build()?;
    exec(optimised::program("penstock-demo").args(&args.demo))
}
