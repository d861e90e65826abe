//! Shows long work in plain lines, for terminals and CI logs alike.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::command::line;

/// Interval of progress lines for a command whose output is not shown.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Lines of its output that are shown if it fails.
const TAIL: usize = 40;

/// Runs a command whose output matters only if it fails. Prints the command, every ten seconds the time it has taken and its last
/// line, and its last lines if it fails.
pub(crate) fn quietly(what: &str, command: &mut Command) -> Result<()> {
    watch(what, command).map(drop)
}

/// Like [`quietly`]; returns the command's last lines.
pub(crate) fn watch(what: &str, command: &mut Command) -> Result<VecDeque<String>> {
    let started = Instant::now();
    eprintln!("{what}: {}", line(command));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", line(command)))?;

    let (sender, lines) = mpsc::channel();
    forward(child.stdout.take().expect("stdout is piped"), sender.clone());
    forward(child.stderr.take().expect("stderr is piped"), sender);

    let mut tail = VecDeque::with_capacity(TAIL + 1);
    let mut beat = Instant::now() + HEARTBEAT;
    loop {
        match lines.recv_timeout(beat.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                tail.push_back(line);
                if tail.len() > TAIL {
                    tail.pop_front();
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                let last = tail.back().map_or("", String::as_str);
                eprintln!("  {:>4} s  {what}: {}", started.elapsed().as_secs(), last.trim());
                beat += HEARTBEAT;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }

    let status = child.wait()?;
    if !status.success() {
        for line in &tail {
            eprintln!("  | {line}");
        }
        bail!("{what}: {} ended with {status} after {}", line(command), seconds(started.elapsed()));
    }
    eprintln!("{what}: done in {}", seconds(started.elapsed()));
    Ok(tail)
}

/// Sends each line of a child's output until the child closes it.
fn forward(pipe: impl Read + Send + 'static, lines: Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if !line.is_empty() && lines.send(line).is_err() {
                break;
            }
        }
    });
}

/// The steps of a command with their times, printed on drop.
#[derive(Default)]
pub(crate) struct Steps(Vec<(&'static str, Duration, bool)>);

impl Steps {
    pub(crate) fn step<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("== {name}");
        let started = Instant::now();
        let result = work();
        self.0.push((name, started.elapsed(), result.is_ok()));
        result
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        eprintln!("== times");
        for (name, time, ok) in &self.0 {
            eprintln!("  {:>8}  {name}{}", seconds(*time), if *ok { "" } else { ": FAILED" });
        }
    }
}

pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
