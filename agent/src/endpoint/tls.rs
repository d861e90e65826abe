//! TLS to the endpoints of a pool (`app_protocol = "https"`): the handshake, and the sending side of a connection. Nothing of it is
//! steered, because the kernel would redirect encrypted bytes.

use std::{io, net::SocketAddr, rc::Rc};

use anyhow::Context as _;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::{
    config::{Pool, PoolTls},
    kernel::socket,
    server_tls::{self, Connectors, session::TlsSession},
};

/// The TLS settings of a pool, with the present content of its files.
pub struct EndpointTls {
    settings: PoolTls,
    connectors: Connectors,
    /// `None`: that of the endpoint's IP address.
    name: Option<ServerName<'static>>,
}

impl EndpointTls {
    /// Reads the files, which blocks. Returns `None` if the pool has no TLS settings. Fails if a file is invalid.
    pub fn new(pool: &Pool) -> anyhow::Result<Option<Self>> {
        let Some(settings) = pool.tls.clone() else { return Ok(None) };
        let client = settings.client_certificate.as_ref();
        let connectors = Connectors::new(&settings.verify, client, server_tls::HTTP11)
            .and_then(|connectors| connectors.context("tls is off"))
            .with_context(|| format!("cannot set up TLS to the endpoints of pool {}", pool.name))?;
        let name = settings.server_name.clone().map(ServerName::try_from).transpose().context("server_name")?;
        Ok(Some(Self { settings, connectors, name }))
    }

    /// Whether it was made from these settings.
    pub fn is_of(&self, pool: &Pool) -> bool {
        pool.tls.as_ref() == Some(&self.settings)
    }

    /// Distinguishes the present settings and files from all others: a connection serves only requests of the same.
    pub fn id(&self) -> u64 {
        self.connectors.current().id
    }

    /// Reloads the files whenever they change. Returns only if there are no files.
    pub async fn follow_files(&self) {
        self.connectors.follow_files().await;
    }

    /// Performs the handshake with the endpoint at `address`.
    pub async fn connect(&self, tcp: TcpStream, address: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
        let name = self.name.clone().unwrap_or_else(|| ServerName::IpAddress(address.ip().into()));
        self.connectors.current().tls.connect(name, tcp).await
    }
}

/// Whether connecting failed in the handshake: the endpoint speaks no TLS, or its certificate is refused.
pub fn is_handshake_error(error: &io::Error) -> bool {
    error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()).is_some()
}

/// The sending side of a connection to an endpoint, with or without TLS.
#[derive(Clone)]
pub struct EndpointWriter {
    pub(super) tcp: Rc<TcpStream>,
    pub(super) tls: Option<Rc<TlsSession>>,
}

impl EndpointWriter {
    /// Takes a part of `out`. `WouldBlock` if the endpoint takes nothing now.
    pub fn try_write(&self, out: &[u8]) -> io::Result<usize> {
        match &self.tls {
            None => self.tcp.try_write(out),
            Some(tls) => tls.try_write(&self.tcp, out),
        }
    }

    /// `WouldBlock` until the socket has everything that was taken.
    pub fn try_flush(&self) -> io::Result<()> {
        self.tls.as_ref().map_or(Ok(()), |tls| tls.try_flush(&self.tcp))
    }

    /// Bytes that the endpoint's kernel has acknowledged, as
    /// [`EndpointConnection::acknowledged`](super::connection::EndpointConnection::acknowledged) counts them.
    pub fn acknowledged(&self) -> Option<u64> {
        socket::acknowledged(&*self.tcp).ok()
    }

    /// Waits until the endpoint takes more.
    pub async fn writable(&self) -> io::Result<()> {
        self.tcp.writable().await
    }

    /// Writes all of `out`.
    pub async fn write_all(&self, mut out: &[u8]) -> io::Result<()> {
        while !out.is_empty() {
            match self.try_write(out) {
                Ok(taken) => out = &out[taken..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(error) => return Err(error),
            }
        }
        self.flush().await
    }

    async fn flush(&self) -> io::Result<()> {
        loop {
            match self.try_flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                flushed => return flushed,
            }
        }
    }

    /// Ends the sending side.
    pub async fn shut_down(&self) -> io::Result<()> {
        if let Some(tls) = &self.tls {
            tls.say_goodbye(&self.tcp);
            self.flush().await?;
        }
        socket::shut_down(&*self.tcp)
    }
}
