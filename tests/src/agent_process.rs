//! The agent as its own process, for tests that measure, signal or kill it.

use std::{
    collections::HashSet,
    fs::Permissions,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tempfile::{NamedTempFile, TempDir};

use crate::{Client, Process, Request, agent};

const SOON: Duration = Duration::from_secs(20);
/// Longer than a delayed acknowledgement, and shorter than the second between two idle checks.
const REST: Duration = Duration::from_millis(250);

pub struct AgentProcess {
    pub process: Process,
    pub addr: SocketAddr,
    pub admin: SocketAddr,
    /// The address for TLS clients.
    pub tls: Option<SocketAddr>,
    config: NamedTempFile,
    /// The folder of the binary, if it is not that of the build.
    _folder: Option<TempDir>,
    listen: SocketAddr,
    steering: String,
}

impl AgentProcess {
    /// Starts `penstock run` at `listen` (port 0 takes a free one) over one pool; `settings` are further sections of the
    /// configuration, and `steering` is its mode. Returns an error with the reason on a machine that cannot steer as configured.
    pub async fn start(listen: SocketAddr, endpoint: SocketAddr, steering: &str, settings: &str) -> Result<Self> {
        let agent = Self::start_through(&[], listen, endpoint, steering, settings).await?;
        let wanted = match steering {
            "off" => "steering: off",
            "local" => "steering: active (local",
            _ => "steering: active",
        };
        let output = agent.process.output();
        ensure!(output.iter().any(|line| line.contains(wanted)), "this test needs steering: {output:#?}");
        Ok(agent)
    }

    /// Like [`start`](Self::start) through another command, such as `setpriv`. Does not check that steering is active. Every user
    /// can read the binary and the configuration.
    pub async fn start_through(
        through: &[&str],
        listen: SocketAddr,
        endpoint: SocketAddr,
        steering: &str,
        settings: &str,
    ) -> Result<Self> {
        let text = text(listen, endpoint, steering, settings);
        let mut agent = Self::start_text(through, &text).await?;
        (agent.listen, agent.steering) = (listen, steering.to_owned());
        Ok(agent)
    }

    /// Starts `penstock run` with this configuration, whose `admin.address` must have a free port.
    pub async fn start_with_text(text: &str) -> Result<Self> {
        Self::start_text(&[], text).await
    }

    /// Like [`start_with_text`](Self::start_with_text), with the access log.
    pub async fn start_logging(text: &str) -> Result<Self> {
        Self::start_text(&["env", "PENSTOCK_LOG=info"], text).await
    }

    /// Like [`start_with_text`](Self::start_with_text) through another command.
    pub async fn start_through_with_text(through: &[&str], text: &str) -> Result<Self> {
        Self::start_text(through, text).await
    }

    async fn start_text(through: &[&str], text: &str) -> Result<Self> {
        let config = NamedTempFile::new()?;
        std::fs::write(config.path(), text)?;
        config.as_file().set_permissions(Permissions::from_mode(0o644))?;
        let binary = Process::binary("penstock")?;
        let mut folder = None;
        let mut command = match through {
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(folder.insert(for_everyone(&binary)?).path().join("penstock"));
                command
            }
            [] => Command::new(binary),
        };
        // As environment variables, which `through` may override.
        command.env("PENSTOCK_LOG", "info,penstock::access=off").env("PENSTOCK_LOG_FORMAT", "json");
        command.args(["run", "--config"]);
        command.arg(config.path());
        let mut process = Process::spawn(command)?;
        let line = process.line("\"admin\":", SOON).await?;
        let started: serde_json::Value = serde_json::from_str(&line)?;
        let address = |name: &str| -> Result<SocketAddr> {
            let text = started[name].as_str().with_context(|| format!("no {name} in {line}"))?;
            text.parse().with_context(|| format!("{name} in {line}"))
        };
        let (addr, admin) = (address("address")?, address("admin")?);
        let tls = started.get("tls").is_some().then(|| address("tls")).transpose()?;
        Ok(Self { process, addr, admin, tls, config, _folder: folder, listen: addr, steering: String::new() })
    }

    /// Writes the configuration for the next reload.
    pub fn write_config(&self, endpoint: SocketAddr, settings: &str) -> Result<()> {
        Ok(std::fs::write(self.config.path(), text(self.listen, endpoint, &self.steering, settings))?)
    }

    /// Like [`write_config`](Self::write_config), with the complete text.
    pub fn write_text(&self, text: &str) -> Result<()> {
        Ok(std::fs::write(self.config.path(), text)?)
    }

    /// The path of its configuration file.
    pub fn config_path(&self) -> &Path {
        self.config.path()
    }

    /// Status and body of the admin server's response.
    pub async fn ask_admin(&self, path: &str) -> Result<(u16, String)> {
        let response = Client::connect(self.admin).await?.request(&Request::get(path)).await?;
        Ok((response.status(), response.text()))
    }

    /// Sum of the samples of a metric whose labels contain all of `labels`; 0 without samples.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(agent::sum(&self.ask_admin("/metrics").await?.1, name, labels))
    }

    /// Returns once the workers have been idle for a while: by then everything handed to them has gone as far as it can, and an
    /// eligible flow is armed.
    pub async fn until_idle(&self) -> Result<()> {
        let begin = Instant::now();
        let (mut since, mut before) = (begin, None);
        while since.elapsed() < REST {
            ensure!(begin.elapsed() < SOON, "the agent's workers did not become idle");
            tokio::time::sleep(Duration::from_millis(5)).await;
            let sleeps = self.process.sleeps("penstock-")?;
            if sleeps.is_none() || sleeps != before {
                (since, before) = (Instant::now(), sleeps);
            }
        }
        Ok(())
    }

    /// Ids of the kernel programs that it holds (`/proc/pid/fdinfo`).
    pub fn programs(&self) -> Result<HashSet<u32>> {
        let mut ids = HashSet::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fdinfo", self.process.id()))? {
            // A descriptor may be closed between the listing and the read.
            let Ok(text) = std::fs::read_to_string(entry?.path()) else { continue };
            let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"));
            ids.extend(id.and_then(|id| id.trim().parse::<u32>().ok()));
        }
        Ok(ids)
    }
}

/// A folder with the binary that other users may enter, wherever the build is.
fn for_everyone(binary: &Path) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    let path = folder.path().join("penstock");
    std::fs::hard_link(binary, &path).or_else(|_| std::fs::copy(binary, &path).map(drop))?;
    Ok(folder)
}

/// Unless `settings` override it, the drain ends at once.
fn text(listen: SocketAddr, endpoint: SocketAddr, steering: &str, settings: &str) -> String {
    const AT_ONCE: &str = "[timeouts]\nlame_duck = \"off\"\n";
    let (before, settings) = if settings.contains("lame_duck") {
        ("", settings.to_owned())
    } else if settings.contains("[timeouts]\n") {
        ("", settings.replacen("[timeouts]\n", AT_ONCE, 1))
    } else {
        (AT_ONCE, settings.to_owned())
    };
    format!(
        "[listen]\naddress = \"{listen}\"\nworkers = 2\n[admin]\naddress = \"127.0.0.1:0\"\n{before}\
         [steering]\nmode = \"{steering}\"\nmax_flows = 1024\n{settings}\n\
         [[pools]]\nname = \"default\"\nendpoints = [\"{endpoint}\"]\n"
    )
}
