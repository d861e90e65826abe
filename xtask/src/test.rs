//! `cargo xtask test`: installs what is missing, builds everything and runs every test. No test is skipped: if the kernel does not
//! permit what a test needs, that test fails and says so.

use std::{env, thread};

use anyhow::Result;

use crate::{
    command::{cargo, find, run},
    ebpf,
    progress::Steps,
    repeat, setup,
};

/// Each runner's own variable for how many tests run at once.
const THREADS: [&str; 2] = ["RUST_TEST_THREADS", "NEXTEST_TEST_THREADS"];

/// How many tests run at once: most of them wait for most of their time, and some measure what a busy machine spoils.
fn threads() -> usize {
    2 * thread::available_parallelism().map_or(2, usize::from)
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run the tests N times with every core loaded, and print each failure with its runs
    #[arg(long, value_name = "N")]
    repeat: Option<u32>,
    /// With --repeat: other commands load the cores, such as `cargo xtask fuzz`
    #[arg(long, requires = "repeat")]
    beside_other_load: bool,
    /// Arguments of the test runner, such as a filter
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
    let nextest = find("cargo-nextest").is_some();
    let runner: &[&str] = if nextest { &["nextest", "run"] } else { &["test", "--tests"] };
    // The tests start the agent and the model servers as processes. Built in one go with them, each crate is compiled once.
    steps.step("build", || run(cargo().args(["build", "--all-targets"])))?;
    let threads = threads().to_string();
    let tests = |more: &[&str]| {
        let mut tests = cargo();
        tests.args(runner).args(more);
        for variable in THREADS.into_iter().filter(|variable| env::var_os(variable).is_none()) {
            tests.env(variable, &threads);
        }
        if !nextest && !args.runner.is_empty() {
            tests.arg("--");
        }
        tests.args(&args.runner);
        tests
    };
    if let Some(times) = args.repeat {
        let load = if args.beside_other_load { repeat::Load::OtherCommands } else { repeat::Load::Ours };
        return steps.step("tests, repeated", || repeat::tests(times, load, || tests(&["--no-fail-fast"])));
    }
    steps.step("tests", || run(&mut tests(&["--no-fail-fast"])))?;
    // Neither runner runs these, and the arguments are for the other tests.
    if args.runner.is_empty() {
        steps.step("tests in documentation", || run(cargo().args(["test", "--doc"])))?;
    }
    Ok(())
}
