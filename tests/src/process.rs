//! A child process under test: its output line by line, its signals, and its CPU and memory usage from `/proc` (`proc(5)`).
//! Dropping it kills it.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use parking_lot::Mutex;

type Lines = Arc<Mutex<Vec<String>>>;

pub struct Process {
    name: String,
    child: Child,
    lines: Lines,
}

impl Process {
    /// The workspace's binary `name`, in cargo's folder of the running test.
    pub fn binary(name: &str) -> Result<PathBuf> {
        let test = std::env::current_exe()?;
        let found = test.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
        found.with_context(|| format!("found no binary {name} next to {}: build the workspace first", test.display()))
    }

    /// Starts one of the workspace's binaries.
    pub fn start<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut command = Command::new(Self::binary(name)?);
        command.args(args);
        Self::spawn(command)
    }

    /// Starts any command; captures standard output and error together; its input is empty.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let lines = Lines::default();
        capture(child.stdout.take(), &lines);
        capture(child.stderr.take(), &lines);
        Ok(Self { name, child, lines })
    }

    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its output so far.
    #[must_use]
    pub fn output(&self) -> Vec<String> {
        self.lines.lock().clone()
    }

    /// The first past or future line that contains `text`. An error if the process ends without it.
    pub async fn line(&mut self, text: &str, deadline: Duration) -> Result<String> {
        let begin = Instant::now();
        loop {
            // Checked before the lines, so that the last line of an ended process still counts.
            let ended = self.child.try_wait()?;
            if let Some(line) = self.lines.lock().iter().find(|line| line.contains(text)) {
                return Ok(line.clone());
            }
            let output = || self.output().join("\n");
            ensure!(begin.elapsed() < deadline, "{} did not print {text:?}; its output:\n{}", self.name, output());
            if let Some(status) = ended
                && Arc::strong_count(&self.lines) == 1
            {
                bail!("{} ended ({status}) without {text:?}:\n{}", self.name, output());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// The address in a `listening on ip:port` line.
    pub async fn listening(&mut self, deadline: Duration) -> Result<std::net::SocketAddr> {
        let line = self.line("listening on ", deadline).await?;
        let address = line.rsplit("listening on ").next().unwrap_or_default();
        address.trim().parse().with_context(|| format!("address in {line:?}"))
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.id().cast_signed());
        kill(pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// SIGTERM.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// SIGKILL, then waits for the exit.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// SIGTERM, then waits for the exit; SIGKILL after the deadline.
    #[expect(clippy::disallowed_methods, reason = "for destructors, which cannot await")]
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let begin = Instant::now();
        // An ended child keeps its id until it is waited for, so the signal cannot hit another process.
        self.terminate()?;
        while begin.elapsed() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.kill()
    }

    /// Waits for the process to exit.
    pub async fn ended(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(begin.elapsed() < deadline, "{} has not exited after {deadline:?}", self.name);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// User and system time so far, including ended threads, in clock ticks (10 ms).
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = self.proc("stat")?;
        // The name in parentheses may contain blanks; utime and stime are the line's 14th and 15th fields.
        let (_, fields) = stat.rsplit_once(") ").context("/proc/pid/stat has no name")?;
        let mut fields = fields.split(' ').skip(11).map(str::parse::<u64>);
        let (Some(Ok(user)), Some(Ok(system))) = (fields.next(), fields.next()) else {
            bail!("/proc/pid/stat is {stat:?}");
        };
        let per_second = sysconf(SysconfVar::CLK_TCK)?.context("_SC_CLK_TCK is unknown")?;
        Ok(Duration::from_secs_f64((user + system) as f64 / per_second as f64))
    }

    /// CPU time so far of the threads that are alive, to the nanosecond; ended threads are missing.
    pub fn cpu_time_exact(&self) -> Result<Duration> {
        let mut total = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.id()))? {
            // A thread may end between the listing and the read.
            let Ok(line) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
            let on_cpu = line.split(' ').next().unwrap_or_default();
            total += on_cpu.parse::<u64>().with_context(|| format!("schedstat {line:?}"))?;
        }
        Ok(Duration::from_nanos(total))
    }

    /// How often threads with this name prefix have fallen asleep so far; `None` while one of them is awake.
    pub fn sleeps(&self, name: &str) -> Result<Option<u64>> {
        let mut total = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.id()))? {
            // A thread may end between the listing and the read.
            let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else { continue };
            let field =
                |field: &str| status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default().trim();
            if !field("Name:").starts_with(name) {
                continue;
            }
            if !field("State:").starts_with('S') {
                return Ok(None);
            }
            total += field("voluntary_ctxt_switches:").parse::<u64>().context("voluntary_ctxt_switches")?;
        }
        Ok(Some(total))
    }

    /// Resident memory in bytes.
    pub fn rss(&self) -> Result<u64> {
        self.status_kib("VmRSS:")
    }

    /// Peak resident memory in bytes.
    pub fn peak_rss(&self) -> Result<u64> {
        self.status_kib("VmHWM:")
    }

    /// Open file descriptors.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.id()))?.count())
    }

    fn status_kib(&self, field: &str) -> Result<u64> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{field}{line}"))?;
        Ok(kib * 1024)
    }

    fn proc(&self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.id());
        std::fs::read_to_string(&path).with_context(|| format!("{} ended? {path}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Collects lines until the pipe's other end closes, then drops its share of `lines`.
fn capture(pipe: Option<impl Read + Send + 'static>, lines: &Lines) {
    let Some(pipe) = pipe else { return };
    let lines = Arc::clone(lines);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            lines.lock().push(line);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::spawn(command).expect("sh")
    }

    #[tokio::test]
    async fn lines_on_both_pipes_are_awaited() {
        let mut process = shell("echo one; echo two >&2; exec tail -f /dev/null");
        assert_eq!(process.line("one", SOON).await.unwrap(), "one");
        assert_eq!(process.line("wo", SOON).await.unwrap(), "two");
        assert!(process.rss().unwrap() > 0 && process.peak_rss().unwrap() > 0);
        assert!(process.descriptors().unwrap() >= 3);
    }

    #[tokio::test]
    async fn exit_before_expected_line_reports_output() {
        let mut process = shell("echo reason; exit 3");
        let error = process.line("listening", SOON).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("reason"), "{error}");
    }

    #[tokio::test]
    async fn terminate_and_kill_end_the_process() {
        let mut polite = shell("trap 'exit 7' TERM; echo up; while :; do :; done");
        polite.line("up", SOON).await.unwrap();
        let mut deaf = shell("trap '' TERM; echo up; while :; do :; done");
        deaf.line("up", SOON).await.unwrap();
        deaf.terminate().unwrap();
        crate::eventually(SOON, || deaf.cpu_time_exact().unwrap() > Duration::from_millis(20)).await;
        crate::eventually(SOON, || deaf.cpu_time().unwrap() > Duration::ZERO).await;
        assert_eq!(deaf.child.try_wait().unwrap(), None);
        assert!(!deaf.kill().unwrap().success());
        polite.terminate().unwrap();
        assert_eq!(polite.ended(SOON).await.unwrap().code(), Some(7));
    }
}
