//! The proxies that are compared, each on a free loopback port with its own processes. All have as many threads as the machine has
//! cores, and none writes an access log. Dropping a proxy kills its processes.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use super::Programs;
use crate::client::{Client, Request};
use crate::eventually::within;
use crate::process::Process;

const SOON: Duration = Duration::from_secs(20);

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// With an EPP and this steering mode; the EPP sees the heads of responses.
    Penstock(&'static str),
    /// The same with the default `response_to_picker`: the EPP also sees what tells the usage.
    PenstockUsage,
    /// With the built-in picker and this steering mode.
    BuiltIn(&'static str),
    /// With an EPP, which sees the heads of responses.
    Envoy,
    /// With an EPP, which sees every byte of responses and returns it.
    EnvoyBodies,
    /// A reverse proxy to one endpoint, without a pick.
    Nginx,
}

impl Kind {
    pub(super) fn name(self) -> String {
        match self {
            Self::Penstock("auto") => "penstock, EPP".to_owned(),
            Self::Penstock(mode) => format!("penstock, EPP, steering {mode}"),
            Self::PenstockUsage => "penstock, EPP, usage".to_owned(),
            Self::BuiltIn("auto") => "penstock, built-in".to_owned(),
            Self::BuiltIn(mode) => format!("penstock, built-in, steering {mode}"),
            Self::Envoy => "envoy, EPP".to_owned(),
            Self::EnvoyBodies => "envoy, EPP, bodies".to_owned(),
            Self::Nginx => "nginx".to_owned(),
        }
    }
}

pub(super) struct Proxy {
    pub(super) kind: Kind,
    pub(super) address: SocketAddr,
    processes: Vec<Process>,
    _folder: TempDir,
}

impl Proxy {
    pub(super) async fn start(kind: Kind, programs: &Programs, epp: SocketAddr, endpoint: SocketAddr) -> Result<Self> {
        let folder = TempDir::new()?;
        let address = free_port()?;
        let at = folder.path();
        let mut processes = Vec::new();
        let ready = match kind {
            Kind::Nginx => {
                for number in 0..2 {
                    let own = at.join(number.to_string());
                    std::fs::create_dir(&own)?;
                    processes.push(Process::spawn(nginx(&own, address, endpoint)?)?);
                }
                address
            }
            Kind::Envoy | Kind::EnvoyBodies => {
                processes.push(Process::spawn(envoy(programs, at, address, epp, kind)?)?);
                address
            }
            Kind::Penstock(_) | Kind::PenstockUsage | Kind::BuiltIn(_) => {
                let admin = free_port()?;
                processes.push(Process::spawn(penstock(programs, at, [address, admin], epp, endpoint, kind)?)?);
                admin
            }
        };
        let proxy = Self { kind, address, processes, _folder: folder };
        proxy.wait(ready).await.with_context(|| format!("starting {}", kind.name()))?;
        Ok(proxy)
    }

    /// Until the port is open. If that is an admin port, until the agent is ready.
    async fn wait(&self, ready: SocketAddr) -> Result<()> {
        let open = within(SOON, || std::net::TcpStream::connect(ready).is_ok()).await;
        ensure!(open, "it does not listen: {:#?}", self.output());
        let begin = Instant::now();
        while ready != self.address
            && Client::connect(ready).await?.request(&Request::get("/readyz")).await?.status() != 200
        {
            ensure!(begin.elapsed() < SOON, "it does not become ready: {:#?}", self.output());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    fn output(&self) -> Vec<String> {
        self.processes.iter().flat_map(Process::output).collect()
    }

    pub(super) fn cpu(&self) -> Result<Duration> {
        self.processes.iter().map(Process::cpu_time_exact).sum()
    }

    /// Begins a new measurement of the peak of resident memory.
    pub(super) fn forget_peak(&self) -> Result<()> {
        for process in &self.processes {
            std::fs::write(format!("/proc/{}/clear_refs", process.id()), "5")?;
        }
        Ok(())
    }

    /// Bytes.
    pub(super) fn peak_rss(&self) -> Result<u64> {
        self.processes.iter().map(Process::peak_rss).sum()
    }
}

/// A port that was free a moment ago.
fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Writes a configuration from `tests/bench` into the folder, with its placeholders replaced.
fn configured(folder: &Path, name: &str, values: &[(&str, String)], more: &str) -> Result<PathBuf> {
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench").join(name);
    let mut text = std::fs::read_to_string(&template).with_context(|| template.display().to_string())?;
    for (placeholder, value) in values {
        text = text.replace(placeholder, value);
    }
    let path = folder.join(name);
    std::fs::write(&path, text + more)?;
    Ok(path)
}

fn nginx(folder: &Path, address: SocketAddr, endpoint: SocketAddr) -> Result<Command> {
    let values =
        [("FOLDER", folder.display().to_string()), ("LISTEN", address.to_string()), ("ENDPOINT", endpoint.to_string())];
    let mut command = Command::new("nginx");
    command.args(["-e", "stderr", "-c"]).arg(configured(folder, "nginx.conf", &values, "")?);
    Ok(command)
}

fn envoy(programs: &Programs, folder: &Path, address: SocketAddr, epp: SocketAddr, kind: Kind) -> Result<Command> {
    let bodies = kind == Kind::EnvoyBodies;
    let values = [
        ("LISTEN_PORT", address.port().to_string()),
        ("EPP_PORT", epp.port().to_string()),
        ("RESPONSE_BODY", if bodies { "FULL_DUPLEX_STREAMED" } else { "NONE" }.to_owned()),
        ("RESPONSE_TRAILERS", if bodies { "SEND" } else { "SKIP" }.to_owned()),
    ];
    let mut command = Command::new(&programs.envoy);
    let cores = std::thread::available_parallelism()?.to_string();
    command.args(["--disable-hot-restart", "--log-level", "error", "--concurrency", &cores, "-c"]);
    command.arg(configured(folder, "envoy.yaml", &values, "")?);
    Ok(command)
}

fn penstock(
    programs: &Programs,
    folder: &Path,
    [address, admin]: [SocketAddr; 2],
    epp: SocketAddr,
    endpoint: SocketAddr,
    kind: Kind,
) -> Result<Command> {
    let (steering, response) = match kind {
        Kind::Penstock(mode) => (mode, Some("headers")),
        Kind::BuiltIn(mode) => (mode, None),
        _ => ("auto", Some("usage")),
    };
    let picker = response.map_or_else(
        || "[pools.picker]\nkind = \"builtin\"\n".to_owned(),
        |response| {
            format!(
                "[pools.picker]\nkind = \"epp\"\naddress = \"{epp}\"\ntls = \"off\"\nresponse_to_picker = \"{response}\"\n"
            )
        },
    );
    let values = [
        ("LISTEN", address.to_string()),
        ("ADMIN", admin.to_string()),
        ("STEERING", steering.to_owned()),
        ("ENDPOINT", endpoint.to_string()),
    ];
    let mut command = Command::new(&programs.penstock);
    command.args(["run", "--log", "warn", "--config"]);
    command.arg(configured(folder, "penstock.toml", &values, &picker)?);
    Ok(command)
}
