//! Clients and a model server in network namespaces of their own, with the namespace of the test between them: what an agent there
//! forwards arrives by one interface and leaves by another.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use tokio::net::TcpStream;

use crate::{Client, ModelServer, Namespace, model_server::Options};

pub struct Between {
    pub server: ModelServer,
    /// The address of the test's namespace that clients reach.
    pub front: Ipv4Addr,
    /// The interfaces of the test's namespace: towards the clients, and towards the model server.
    pub interfaces: [String; 2],
    clients: Arc<Namespace>,
    _endpoints: Namespace,
}

impl Between {
    pub fn new() -> Result<Self> {
        // Benchmark addresses (RFC 2544), which hide no real host; several per process.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let pair = std::process::id() % (1 << 9) * 16 + NUMBER.fetch_add(1, Ordering::Relaxed) % 16;
        let [front, client, back, endpoint] = [1, 2, 5, 6].map(|host| Ipv4Addr::from(0xc612_0000 + pair * 8 + host));
        let (near, far) = (format!("bc{pair}"), format!("be{pair}"));
        let clients = Namespace::connected(&near, &format!("{front}/30"), &format!("{client}/30"))?;
        let endpoints = Namespace::connected(&far, &format!("{back}/30"), &format!("{endpoint}/30"))?;
        let options = Options { listen: SocketAddr::from((endpoint, 0)), idle_close: None, ..Options::default() };
        let server = endpoints.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(ModelServer::start(options))
        })?;
        Ok(Self { server: server?, front, interfaces: [near, far], clients: Arc::new(clients), _endpoints: endpoints })
    }

    /// Takes the link to the model server away.
    pub fn cut_off_the_server(&self) -> Result<()> {
        let done = Command::new("ip").args(["link", "delete", &self.interfaces[1]]).status()?;
        ensure!(done.success(), "ip link delete {}: {done}", self.interfaces[1]);
        Ok(())
    }

    /// A connection from the clients' namespace.
    pub async fn connect(&self, to: SocketAddr) -> Result<Client> {
        let clients = Arc::clone(&self.clients);
        let connected = tokio::task::spawn_blocking(move || clients.run(|| std::net::TcpStream::connect(to)));
        let socket = connected.await?.context("entering the clients' namespace")??;
        socket.set_nonblocking(true)?;
        Ok(Client::over(TcpStream::from_std(socket)?, to))
    }
}
