//! `cargo xtask test`: installs what is missing, builds everything and runs every test. No test is skipped: if the kernel does not
//! permit what a test needs, that test fails and says so.

use std::{env, process::Command, thread};

use anyhow::Result;

use crate::{
    command::{cargo, find, root, run},
    ebpf,
    progress::Steps,
    repeat, setup,
};

mod programs;

/// How many tests a program runs at once. Most of them wait for most of their time, and some measure what a busy machine spoils.
const THREADS: usize = 4;

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

impl Args {
    /// Repeated tests are compiled with optimisations: the build takes longer, each run less than half the processor time.
    fn optimise<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        if self.repeat.is_some() {
            command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
        }
        command
    }
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let mut steps = Steps::default();
    steps.step("setup", || {
        setup::kernel_build()?;
        setup::test_needs()
    })?;
    steps.step("kernel program", || ebpf::build(ebpf::Warnings::Allow))?;
    // The tests start the agent and the model servers as processes. Built in one go with them, each crate is compiled once.
    steps.step("build", || run(args.optimise(&mut cargo()).args(["build", "--all-targets"])))?;
    if let Some(times) = args.repeat {
        let load = if args.beside_other_load { repeat::Load::OtherCommands } else { repeat::Load::Ours };
        return steps.step("tests, repeated", || {
            repeat::tests(times, load, || {
                // The step before may have replaced the file of this program.
                let mut tests = Command::new("/proc/self/exe");
                args.optimise(tests.current_dir(root())).arg("test").arg("--").args(&args.runner);
                tests
            })
        });
    }
    steps.step("tests", || tests(&args.runner))?;
    // Neither runner runs these, and the arguments are for the other tests.
    if args.runner.is_empty() {
        steps.step("tests in documentation", || run(cargo().args(["test", "--doc"])))?;
    }
    Ok(())
}

/// Runs every test: by nextest if it is installed, because it ends a test that hangs.
fn tests(arguments: &[String]) -> Result<()> {
    let cores = thread::available_parallelism().map_or(2, usize::from);
    if find("cargo-nextest").is_none() {
        return programs::run(programs::all()?, arguments, THREADS, cores);
    }
    let mut nextest = cargo();
    nextest.args(["nextest", "run", "--no-fail-fast"]).args(arguments);
    if env::var_os("NEXTEST_TEST_THREADS").is_none() {
        nextest.env("NEXTEST_TEST_THREADS", (THREADS * cores).to_string());
    }
    run(&mut nextest)
}
