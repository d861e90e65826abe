//! `cargo xtask test`: from a fresh clone to every test run. Nothing is skipped: where the kernel does not permit what a
//! test needs, that test fails and says so.

use anyhow::Result;

use crate::{
    command::{cargo, find, run},
    ebpf,
    progress::Steps,
    repeat, setup,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run the tests so many times, with every core loaded meanwhile, and print each failure with its runs
    #[arg(long, value_name = "N")]
    repeat: Option<u32>,
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
    let tests = |more: &[&str]| {
        let mut tests = cargo();
        tests.args(runner).args(more);
        if !nextest && !args.runner.is_empty() {
            tests.arg("--");
        }
        tests.args(&args.runner);
        tests
    };
    if let Some(times) = args.repeat {
        return steps.step("tests, repeated", || repeat::tests(times, || tests(&["--no-fail-fast"])));
    }
    steps.step("tests", || run(&mut tests(&[])))?;
    // Neither runner above runs them, and a filter for the tests says nothing about them.
    if args.runner.is_empty() {
        steps.step("tests in documentation", || run(cargo().args(["test", "--doc"])))?;
    }
    Ok(())
}
