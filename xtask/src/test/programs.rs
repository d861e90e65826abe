//! Runs the test programs, several at once.
//!
//! `cargo test` runs them one after the other, and most tests wait for most of their time.

use std::{
    collections::VecDeque,
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use serde::Deserialize;

use crate::{
    command::{cargo, line, root},
    progress::seconds,
};

/// Tests that load the machine or measure it under load. Nothing runs beside them. `.config/nextest.toml` has the same names.
const ALONE: [&str; 4] = ["load", "soak", "stalled", "stress"];

pub(super) struct TestProgram {
    name: String,
    path: PathBuf,
    /// Where `cargo test` runs it: its package's folder.
    folder: PathBuf,
}

/// A line of cargo's `--message-format=json`.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    profile: Option<Profile>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

impl TestProgram {
    fn of(message: Message) -> Option<Self> {
        let (path, manifest) = (message.executable?, message.manifest_path?);
        message.profile?.test.then_some(())?;
        Some(Self { name: message.target?.name, path, folder: manifest.parent()?.to_owned() })
    }

    fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(&self.path);
        command.args(arguments).current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// How many tests it would run, as the measure of how long it takes.
    fn size(&self, arguments: &[String]) -> usize {
        let listed = self.command(arguments).args(["--list", "--format=terse"]).output();
        listed.map_or(0, |listed| listed.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).count())
    }
}

/// Every program with tests, built.
pub(super) fn all() -> Result<Vec<TestProgram>> {
    let mut command = cargo();
    command.args(["test", "--tests", "--no-run", "--message-format=json-render-diagnostics"]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("starting {}", line(&command)))?;
    if !output.status.success() {
        bail!("{} ended with {}", line(&command), output.status);
    }
    parse(&output.stdout)
}

fn parse(messages: &[u8]) -> Result<Vec<TestProgram>> {
    let mut programs = Vec::new();
    for line in messages.split(|&byte| byte == b'\n').filter(|line| line.starts_with(b"{")) {
        programs.extend(TestProgram::of(serde_json::from_slice(line).context("a message of cargo")?));
    }
    if programs.is_empty() {
        bail!("cargo names no program with tests");
    }
    Ok(programs)
}

/// Runs `programs` with the arguments of a test harness, `at_once` at a time, the longest first. Fails with the names of those that
/// fail.
pub(super) fn run(mut programs: Vec<TestProgram>, arguments: &[String], threads: usize, at_once: usize) -> Result<()> {
    programs.sort_by_cached_key(|program| std::cmp::Reverse(program.size(arguments)));
    let (alone, together): (Vec<_>, Vec<_>) =
        programs.into_iter().partition(|program| ALONE.contains(&program.name.as_str()));
    let failed = Mutex::new(Vec::new());
    for (programs, at_once) in [(together, at_once), (alone, 1)] {
        let waiting = Mutex::new(VecDeque::from(programs));
        thread::scope(|scope| {
            for _ in 0..at_once {
                scope.spawn(|| {
                    while let Some(program) = { waiting.lock().pop_front() } {
                        if let Err(error) = run_one(&program, arguments, threads) {
                            failed.lock().push(format!("{}: {error:#}", program.name));
                        }
                    }
                });
            }
        });
    }
    let failed = failed.into_inner();
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
}

/// Runs one program and prints all it said when it has ended, so that the lines of two do not mix.
fn run_one(program: &TestProgram, arguments: &[String], threads: usize) -> Result<()> {
    let started = Instant::now();
    let mut command = program.command(arguments);
    if std::env::var_os("RUST_TEST_THREADS").is_none() {
        command.env("RUST_TEST_THREADS", threads.to_string());
    }
    let (output, writer) = std::io::pipe()?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("starting {}", program.path.display()))?;
    // `command` holds its ends of the pipe open until it is dropped.
    drop(command);
    let mut said = header(program);
    for line in BufReader::new(output).split(b'\n') {
        said.extend(line?);
        said.push(b'\n');
    }
    let status = child.wait()?;
    writeln!(said, "{}: {}", program.name, seconds(started.elapsed()))?;
    std::io::stdout().lock().write_all(&said)?;
    if status.success() { Ok(()) } else { bail!("{status}") }
}

/// As cargo announces a program.
fn header(program: &TestProgram) -> Vec<u8> {
    let file = program.path.strip_prefix(root()).unwrap_or(&program.path);
    format!("     Running {} ({})\n", program.name, file.display()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that behaves like a test program: lists its tests, or does what `script` says.
    fn program(folder: &tempfile::TempDir, name: &str, tests: usize, script: &str) -> TestProgram {
        let path = folder.path().join(name);
        let list = "echo 'a: test'\n".repeat(tests);
        let text = format!("#!/bin/sh\nif [ \"$1\" = --list ]; then\n{list}exit 0; fi\n{script}\n");
        // Written by another process: while a test beside this one starts a program, that one would hold the file open for writing
        // for a moment, and the kernel starts no such file.
        let mut install = Command::new("install");
        install.args(["-m", "755", "/dev/stdin"]).arg(&path).stdin(Stdio::piped());
        let mut install = install.spawn().unwrap();
        install.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(install.wait().unwrap().success());
        TestProgram { name: name.to_owned(), path, folder: folder.path().to_owned() }
    }

    #[test]
    fn programs_with_tests_are_found_among_cargo_messages() {
        let messages = br#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"name":"front"},"profile":{"test":true},"executable":"/w/target/debug/deps/front-1"}
{"reason":"compiler-artifact","manifest_path":"/w/agent/Cargo.toml","target":{"name":"penstock"},"profile":{"test":false},"executable":"/w/target/debug/penstock"}
{"reason":"compiler-artifact","manifest_path":"/w/common/Cargo.toml","target":{"name":"penstock_common"},"profile":{"test":false},"executable":null}
{"reason":"build-finished","success":true}
"#;
        let found = parse(messages).unwrap();
        let found: Vec<_> = found.iter().map(|program| (&*program.name, program.folder.to_str().unwrap())).collect();
        assert_eq!(found, [("front", "/w/tests")]);
        assert!(parse(b"{}\n").is_err(), "no program");
        assert!(parse(b"{\n").is_err(), "not JSON");
    }

    #[test]
    fn every_program_runs_and_failed_ones_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let programs = [
            ("one", "touch one.ran"),
            ("two", "touch two.ran; exit 101"),
            ("three", "kill -9 $$"),
            ("load", "touch load.ran"),
        ]
        .map(|(name, script)| program(&folder, name, 1, script));
        let error = run(programs.into(), &[], 1, 2).unwrap_err().to_string();
        assert!(error.contains("two: exit status: 101") && error.contains("three: signal: 9"), "{error}");
        assert!(!error.contains("one") && !error.contains("load"), "{error}");
        for name in ["one.ran", "two.ran", "load.ran"] {
            assert!(folder.path().join(name).exists(), "{name}");
        }
    }

    #[test]
    fn longest_program_begins_first_and_measuring_ones_run_alone() {
        let folder = tempfile::tempdir().unwrap();
        let script = |name| format!("echo begin {name} >> log; sleep 0.3; echo end {name} >> log");
        let programs = [("short", 1), ("stalled", 9), ("long", 3), ("load", 5), ("middle", 2)]
            .map(|(name, tests)| program(&folder, name, tests, &script(name)));
        run(programs.into(), &[], 1, 2).unwrap();
        let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
        let lines: Vec<_> = log.lines().collect();
        assert!(lines[..2].contains(&"begin long") && lines[..2].contains(&"begin middle"), "{log}");
        assert_eq!(lines[6..], ["begin stalled", "end stalled", "begin load", "end load"], "{log}");
    }
}
