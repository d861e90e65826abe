//! Runs qemu: two emulated processors, no network and no disk, and a serial console that is read through a pipe.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::console::Report;
use crate::{
    command::{command, line},
    setup::QEMU,
};

/// Limit of the whole run, for a machine that hangs; in the machine each program has its own limit.
const DEADLINE: Duration = Duration::from_secs(60 * 60);
/// Longest time without any output.
const SILENCE: Duration = Duration::from_secs(16 * 60);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cgroup {
    Mounted,
    Absent,
}

pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) cgroup: Cgroup,
}

impl Machine<'_> {
    /// Runs until the machine stops itself, and copies its output to `log`. Returns the parsed output and the run time.
    pub(crate) fn run(&self, log: &Path) -> Result<(Report, Duration)> {
        let mut append = String::from("console=ttyS0 loglevel=1 panic=-1");
        if self.cgroup == Cgroup::Absent {
            append.push_str(" penstock.cgroup=no");
        }
        // qemu can occupy both processors of a small host for minutes, so it runs with low priority. It is killed with this
        // process.
        let mut qemu = command("setpriv");
        qemu.args(["--pdeathsig", "KILL", "nice", QEMU]);
        qemu.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "2048", "-nic", "none", "-no-reboot"]);
        qemu.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
        qemu.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initramfs).args(["-append", &append]);
        let mut log = File::create(log).with_context(|| format!("writing {}", log.display()))?;

        let began = Instant::now();
        let child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = Running(child.with_context(|| format!("starting {}", line(&qemu)))?);
        let output = child.0.stdout.take().expect("stdout is piped");
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });

        let mut report = Report::default();
        loop {
            let left = DEADLINE.saturating_sub(began.elapsed());
            match lines.recv_timeout(left.min(SILENCE)) {
                Ok(line) => {
                    writeln!(log, "{line}")?;
                    if report.line(&line, began.elapsed()) {
                        eprintln!("  {:>4} s  {line}", began.elapsed().as_secs());
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!(
                    "the machine printed nothing for too long, or exceeded its time limit, after {:?}",
                    began.elapsed()
                ),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = child.0.wait()?;
        if !status.success() {
            bail!("{} ended with {status}", line(&qemu));
        }
        if report.sections.is_empty() {
            bail!("the kernel did not reach its first process");
        }
        Ok((report, began.elapsed()))
    }
}

/// Killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
