//! The servers of a soak run: stable endpoints, one that dies, one behind a link, and an EPP.

use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::faults::Faults;
use crate::model_server::Options;
use crate::scripted_epp::{LlmdRouter, Setup};
use crate::tls::Certificate;
use crate::{ModelServer, Namespace, ScriptedEpp};

pub(super) struct World {
    /// Never faulted.
    pub(super) stable: Vec<ModelServer>,
    /// Stops and restarts at the same address.
    pub(super) mortal: RefCell<Option<ModelServer>>,
    pub(super) mortal_addr: SocketAddr,
    /// In its own network namespace.
    pub(super) linked: ModelServer,
    pub(super) link: Link,
    pub(super) epp: RefCell<Option<ScriptedEpp>>,
    pub(super) epp_addr: SocketAddr,
    pub(super) faults: Faults,
    pub(super) certificate: Certificate,
    pub(super) cert_file: PathBuf,
    pub(super) key_file: PathBuf,
    /// The highest number of streams left open at an EPP when the agents were idle.
    pub(super) streams_left: Cell<usize>,
    /// Clients so far.
    clients: Cell<usize>,
    _folder: TempDir,
}

/// A pair of interfaces, with one end in the namespace.
pub(super) struct Link {
    namespace: Namespace,
    name: String,
}

impl Link {
    pub(super) fn set(&self, state: &str) -> Result<()> {
        self.namespace.ip(&format!("link set {} {state}", self.name))
    }
}

pub(super) fn endpoint(listen: SocketAddr) -> Options {
    Options { listen, idle_close: None, keep_requests: false, ..Options::default() }
}

impl World {
    pub(super) async fn start() -> Result<Self> {
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let stable = vec![ModelServer::start(endpoint(local)).await?, ModelServer::start(endpoint(local)).await?];
        let mortal = ModelServer::start(endpoint(local)).await?;

        // Benchmark addresses (RFC 2544), which hide no real host; one pair per process.
        let pair = std::process::id() % (1 << 14);
        let [here, there] = [1, 2].map(|host| Ipv4Addr::from(0xc613_0000 + pair * 4 + host));
        let name = format!("soak{pair}");
        let namespace = Namespace::connected(&name, &format!("{here}/30"), &format!("{there}/30"))?;
        let linked = served_in(&namespace, SocketAddr::from((there, 0))).await?;

        let addrs: Vec<_> = stable.iter().map(|server| server.addr).collect();
        let epp = ScriptedEpp::start(LlmdRouter::new(&addrs)).await?;
        let folder = tempfile::tempdir()?;
        // The agent reads the certificate as a user other than root.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let certificate = Certificate::new("localhost")?;
        let (cert_file, key_file) = certificate.write(folder.path())?;
        Ok(Self {
            mortal_addr: mortal.addr,
            mortal: RefCell::new(Some(mortal)),
            linked,
            link: Link { namespace, name },
            epp_addr: epp.addr,
            epp: RefCell::new(Some(epp)),
            stable,
            faults: Faults::default(),
            certificate,
            cert_file,
            key_file,
            streams_left: Cell::new(0),
            clients: Cell::new(0),
            _folder: folder,
        })
    }

    /// A unique number per client, used as prefix of its request ids.
    pub(super) fn number(&self) -> usize {
        self.clients.replace(self.clients.get() + 1)
    }

    pub(super) fn stable_addrs(&self) -> Vec<SocketAddr> {
        self.stable.iter().map(|server| server.addr).collect()
    }

    pub(super) async fn mortal_returns(&self) -> Result<()> {
        let server = ModelServer::start(endpoint(self.mortal_addr)).await?;
        *self.mortal.borrow_mut() = Some(server);
        Ok(())
    }

    /// Restarts a server at the same address, without its history.
    pub(super) async fn epp_returns(&self) -> Result<()> {
        let setup = Setup { address: self.epp_addr, ..Setup::default() };
        let epp = ScriptedEpp::start_with(setup, LlmdRouter::new(&self.stable_addrs())).await?;
        *self.epp.borrow_mut() = Some(epp);
        Ok(())
    }

    pub(super) fn streams_open(&self) -> usize {
        self.epp.borrow().as_ref().map_or(0, ScriptedEpp::streams_open)
    }

    /// Connections of agents to the servers.
    pub(super) fn connections_open(&self) -> u64 {
        let mortal = self.mortal.borrow();
        let servers = self.stable.iter().chain([&self.linked]).chain(mortal.as_ref());
        servers.map(ModelServer::connections_open).sum()
    }

    /// What is wrong after a run of this length.
    pub(super) fn complaints(&self, time: Duration) -> Vec<String> {
        let mut complaints = self.faults.complaints(time);
        let left = self.streams_left.get();
        if left > 0 {
            complaints.push(format!("{left} streams at the EPP were not closed"));
        }
        complaints
    }
}

/// The server's thread inherits the namespace of the thread that starts it.
async fn served_in(namespace: &Namespace, listen: SocketAddr) -> Result<ModelServer> {
    let started = namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(ModelServer::start(endpoint(listen)))
    })?;
    started.context("could not start a server in a network namespace")
}
