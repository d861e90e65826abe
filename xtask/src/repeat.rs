//! `cargo xtask test --repeat N`: runs the tests N times on a loaded machine.
//!
//! A thread for each core spins meanwhile, unless other commands load the machine, so that tests which depend on timing fail. Every
//! run is completed; then each failure is printed with its runs. Fails if any test failed in any run.

use std::{
    collections::BTreeMap,
    hint::spin_loop,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};

use crate::{command::line, progress::seconds};

/// Who keeps the cores busy meanwhile.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Load {
    Ours,
    OtherCommands,
}

/// Runs the command that `command` makes `times` times. It must not stop at the first failed test.
pub(crate) fn tests(times: u32, load: Load, command: impl Fn() -> Command) -> Result<()> {
    // The test, and the runs in which it failed.
    let mut failures: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for number in 1..=times {
        eprintln!("== run {number} of {times}");
        let started = Instant::now();
        let Run { passed, failed, ended_well } =
            if load == Load::Ours { loaded(|| run(&mut command())) } else { run(&mut command()) }?;
        eprintln!("== run {number}: {passed} passed, {} failed, {}", failed.len(), seconds(started.elapsed()));
        if failed.is_empty() && !ended_well {
            failures.entry("the run itself".to_owned()).or_default().push(number);
        }
        for test in failed {
            failures.entry(test).or_default().push(number);
        }
    }
    for (test, runs) in &failures {
        let runs = runs.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        eprintln!("failed: {test} in run {runs} of {times}");
    }
    if !failures.is_empty() {
        bail!("{} tests failed in {times} runs", failures.len());
    }
    eprintln!("{times} runs without a failure");
    Ok(())
}

/// Does `work` while a thread for each core spins.
fn loaded<T>(work: impl FnOnce() -> T) -> T {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    spin_loop();
                }
            });
        }
        let _stop = Stop(&over);
        work()
    })
}

#[derive(Default)]
struct Run {
    passed: usize,
    failed: Vec<String>,
    ended_well: bool,
}

/// One run, with its output copied to this process's output.
fn run(command: &mut Command) -> Result<Run> {
    // One pipe for both: cargo names the binary on stderr, and the binary names its tests on stdout.
    let (output, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("starting {}", line(command)))?;
    // `command` holds its ends of the pipe open until they are replaced.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut reading = Reading::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        reading.take(&line);
    }
    let ended_well = child.wait()?.success();
    Ok(Run { ended_well, ..reading.run })
}

/// Parses the output of cargo's test runner and of nextest.
#[derive(Default)]
struct Reading {
    binary: String,
    run: Run,
}

impl Reading {
    fn take(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            // Running unittests src/lib.rs (target/debug/deps/penstock_agent-0123456789abcdef)
            ["Running", .., program] if program.starts_with('(') => {
                let name = program.trim_end_matches(')').rsplit('/').next().unwrap_or_default();
                self.binary = name.rsplit_once('-').map_or(name, |(name, _)| name).to_owned();
            }
            ["test", _, "...", "ok"] => self.run.passed += 1,
            ["test", name, "...", "FAILED"] => self.run.failed.push(format!("{} {name}", self.binary)),
            // PASS [   0.012s] (  1/345) penstock-tests::picking leases::name
            ["PASS", ..] if line.contains('[') => self.run.passed += 1,
            ["FAIL" | "TIMEOUT" | "SIGABRT" | "SIGSEGV", .., binary, name] if line.contains('[') => {
                let test = format!("{} {name}", binary.rsplit("::").next().unwrap_or_default());
                // nextest repeats failures at the end.
                if !self.run.failed.contains(&test) {
                    self.run.failed.push(test);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(output: &str) -> Run {
        let mut reading = Reading::default();
        output.lines().for_each(|line| reading.take(line));
        reading.run
    }

    #[test]
    fn failures_of_cargo_test_are_named_with_their_binary() {
        let run = read(
            "     Running unittests src/lib.rs (target/debug/deps/penstock_agent-0123456789abcdef)\n\
             test http::a ... ok\n\
             test http::b ... FAILED\n\
             failures:\n    http::b\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored\n\
             \x20    Running tests/picking/main.rs (target/debug/deps/picking-0123456789abcdef)\n\
             test leases::c ... FAILED\n",
        );
        assert_eq!((run.passed, run.failed), (1, vec!["penstock_agent http::b".into(), "picking leases::c".into()]));
    }

    #[test]
    fn failures_of_nextest_are_named_once() {
        let run = read(
            "        PASS [   0.012s] (1/3) penstock-tests::picking leases::a\n\
             \x20       FAIL [   0.112s] (2/3) penstock-tests::picking leases::b\n\
             \x20    TIMEOUT [ 240.112s] (3/3) penstock-agent http::c\n\
             \x20       FAIL [   0.112s] (2/3) penstock-tests::picking leases::b\n",
        );
        assert_eq!((run.passed, run.failed), (1, vec!["picking leases::b".into(), "penstock-agent http::c".into()]));
    }

    #[test]
    fn failing_command_is_reported_with_its_runs() {
        let failing = || {
            let mut command = Command::new("sh");
            command.args(["-c", "echo 'test a ... ok'; echo 'test b ... FAILED'; exit 101"]);
            command
        };
        let error = tests(2, Load::OtherCommands, failing).unwrap_err().to_string();
        assert_eq!(error, "1 tests failed in 2 runs");
        assert!(tests(1, Load::OtherCommands, || Command::new("true")).is_ok());
        assert!(
            tests(1, Load::OtherCommands, || Command::new("false")).is_err(),
            "a run that fails without a failed test"
        );
    }
}
