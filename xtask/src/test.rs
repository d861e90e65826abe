//! `cargo xtask test`: from a fresh clone to every test run. Nothing is skipped: where the kernel does not permit what a
//! test needs, that test fails and says so.

use anyhow::Result;

use crate::{
    command::{cargo, find, run},
    ebpf,
    progress::Steps,
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// For the test runner: a filter, for example
    #[arg(last = true)]
    runner: Vec<String>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let mut steps = Steps::default();
    steps.step("setup", || {
        setup::kernel_build()?;
        setup::test_needs()
    })?;
    steps.step("kernel program", || ebpf::build(ebpf::Warnings::Allow))?;
    // The tests start the agent and the model servers as processes.
    steps.step("build", || run(cargo().args(["build", "--bins"])))?;

    let nextest = find("cargo-nextest").is_some();
    let runner: &[&str] = if nextest { &["nextest", "run"] } else { &["test", "--all-targets"] };
    steps.step("build of the tests", || run(cargo().args(runner).arg("--no-run")))?;
    steps.step("tests", || {
        let mut tests = cargo();
        tests.args(runner);
        if !nextest && !args.runner.is_empty() {
            tests.arg("--");
        }
        run(tests.args(&args.runner))
    })?;
    // Neither runner above runs them, and a filter for the tests says nothing about them.
    if args.runner.is_empty() {
        steps.step("tests in documentation", || run(cargo().args(["test", "--doc"])))?;
    }
    Ok(())
}
