//! The demo's processes: three model servers, a picker, and agents that ask it. Each takes free loopback ports and prints them;
//! each gets SIGTERM on drop, agents first.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::ops::Deref;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::client::{Client, Request};
use crate::process::Process;

const SERVERS: usize = 3;
/// Timeout for a process to be ready, and for a log line to appear.
const SOON: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);

pub(super) struct Child(Process);

impl Deref for Child {
    type Target = Process;
    fn deref(&self) -> &Process {
        &self.0
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // If a process cannot be signalled, nothing more can be done.
        let _ = self.0.stop(END);
    }
}

pub(super) struct Fleet {
    pub(super) agent: AgentProcess,
    epp: Child,
    servers: Vec<Child>,
    folder: TempDir,
}

pub(super) struct AgentProcess {
    process: Child,
    pub(super) address: SocketAddr,
    pub(super) admin: SocketAddr,
    /// As the agent logs it: `steering: active (ingress)`.
    steering: String,
}

/// The agent's log line about one request.
#[derive(Debug, Deserialize)]
pub(super) struct Access {
    pub(super) endpoint: String,
    pub(super) reason: String,
    pub(super) carried_by: String,
    pub(super) carried_why: String,
    pub(super) bytes_kernel: u64,
    pub(super) bytes_user: u64,
    pub(super) pick_us: u64,
}

impl Access {
    pub(super) fn by_kernel(&self) -> bool {
        matches!(self.carried_by.as_str(), "local" | "ingress")
    }
}

impl Fleet {
    pub(super) async fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (mut servers, mut endpoints) = (Vec::new(), Vec::new());
        for number in 1..=SERVERS {
            let waiting = Waiting::begin(&format!("model server {number}"));
            let args = ["--listen", "127.0.0.1:0", "--interval-us", "20000", "--tokens", "40"];
            let mut server = child("penstock-model-server", &args, &[])?;
            let address = server.0.listening(SOON).await?;
            waiting.done(address);
            servers.push(server);
            endpoints.push(address);
        }

        let waiting = Waiting::begin("picker: penstock epp, gRPC over TLS");
        let mut args = vec!["epp", "--listen", "127.0.0.1:0", "--tls", "self-signed", "--log-format", "json"];
        let texts: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
        args.extend(texts.iter().flat_map(|endpoint| ["--endpoint", endpoint]));
        let mut epp = child("penstock", &args, &[])?;
        let address: SocketAddr = field(&epp.0.line("penstock epp", SOON).await?, "address")?;
        waiting.done(address);

        let mut config = String::from("[listen]\naddress = \"127.0.0.1:0\"\n\n[admin]\naddress = \"127.0.0.1:0\"\n\n");
        config.push_str("[timeouts]\nlame_duck = \"off\"\n\n");
        let _ = write!(config, "[[pools]]\nname = \"demo\"\nendpoints = {texts:?}\n\n[pools.picker]\nkind = \"epp\"\n");
        let _ = write!(config, "address = \"{address}\"\ntls = \"insecure\"\n");
        std::fs::write(folder.path().join("penstock.toml"), config)?;
        let agent = AgentProcess::start(&folder, "agent", "auto").await?;
        Ok(Self { agent, epp, servers, folder })
    }

    /// Another agent over the same picker and servers that relays every byte.
    pub(super) async fn relaying_agent(&self) -> Result<AgentProcess> {
        AgentProcess::start(&self.folder, "second agent, PENSTOCK_STEERING=off", "off").await
    }

    /// CPU time of everything but the agents.
    pub(super) fn others_cpu(&self) -> Result<Duration> {
        self.servers.iter().chain([&self.epp]).map(|process| process.cpu_time_exact()).sum()
    }
}

impl AgentProcess {
    async fn start(folder: &TempDir, name: &str, steering: &str) -> Result<Self> {
        let mut waiting = Waiting::begin(name);
        let config = folder.path().join("penstock.toml");
        let config = config.to_str().context("the temporary folder's name is not UTF-8")?;
        let args = ["run", "--config", config, "--log", "info", "--log-format", "json"];
        let mut process = child("penstock", &args, &[("PENSTOCK_STEERING", steering)])?;
        let started = process.0.line("\"workers\"", SOON).await?;
        let (address, admin) = (field(&started, "address")?, field(&started, "admin")?);
        let steering = field(&process.0.line("steering: ", SOON).await?, "message")?;
        loop {
            // The admin server closes the connection after each response.
            let ready = Client::connect(admin).await?.request(&Request::get("/readyz")).await?;
            if ready.status() == 200 {
                break;
            }
            waiting.note(ready.text().trim())?;
            tokio::time::sleep(LOOK).await;
        }
        waiting.done(address);
        Ok(Self { process, address, admin, steering })
    }

    /// Why the kernel cannot steer, if so.
    pub(super) fn unavailable(&self) -> Option<String> {
        self.steering.strip_prefix("steering: unavailable: ").map(str::to_owned)
    }

    pub(super) fn cpu(&self) -> Result<Duration> {
        self.process.cpu_time_exact()
    }

    /// What the agent logged about the request; waits for the line.
    pub(super) async fn access(&mut self, id: &str) -> Result<Access> {
        let line = self.process.0.line(&format!("\"request_id\":\"{id}\""), SOON).await?;
        serde_json::from_str(&line).with_context(|| format!("access log line {line}"))
    }
}

/// Starts a workspace binary without this shell's `PENSTOCK_*` settings.
fn child(name: &str, args: &[&str], environment: &[(&str, &str)]) -> Result<Child> {
    let mut command = Command::new(Process::binary(name)?);
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("PENSTOCK_") {
            command.env_remove(variable);
        }
    }
    command.args(args).envs(environment.iter().copied());
    Process::spawn(command).map(Child)
}

/// A field of a log line.
fn field<T: std::str::FromStr>(line: &str, name: &str) -> Result<T> {
    let fields: Value = serde_json::from_str(line).with_context(|| format!("log line {line}"))?;
    let value = fields[name].as_str().and_then(|text| text.parse().ok());
    value.with_context(|| format!("the log line {line} lacks {name}"))
}

/// Prints what is awaited on one line, which is completed when it is done.
struct Waiting {
    begin: Instant,
    last: String,
}

impl Waiting {
    fn begin(what: &str) -> Self {
        print!("waiting for {what:<40} ");
        let _ = std::io::stdout().flush();
        Self { begin: Instant::now(), last: String::new() }
    }

    fn note(&mut self, what: &str) -> Result<()> {
        ensure!(self.begin.elapsed() < SOON, "still {what} after {SOON:?}");
        if self.last != what {
            print!("({what}) ");
            what.clone_into(&mut self.last);
        }
        Ok(())
    }

    fn done(self, address: SocketAddr) {
        println!("ready on {address} after {} ms", self.begin.elapsed().as_millis());
    }
}
