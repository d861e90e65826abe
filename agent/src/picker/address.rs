//! Where a replica of an EPP is reached: by TCP, or at a Unix socket of this machine.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use anyhow::Context as _;
use http::uri::Authority;
use rustls::pki_types::ServerName;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReplicaAddress {
    Tcp(SocketAddr),
    /// The path of the socket.
    Unix(Arc<Path>),
}

/// Begins the address of a Unix socket in the configuration.
pub const UNIX: &str = "unix:";

impl ReplicaAddress {
    /// The path of `unix:/path`.
    pub fn unix(text: &str) -> Option<Self> {
        text.strip_prefix(UNIX).map(|path| Self::Unix(Path::new(path).into()))
    }

    /// The same machine at another port. A Unix socket has none.
    pub fn at_port(&self, port: u16) -> Self {
        match self {
            Self::Tcp(address) => Self::Tcp(SocketAddr::new(address.ip(), port)),
            Self::Unix(_) => self.clone(),
        }
    }
}

impl From<SocketAddr> for ReplicaAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for ReplicaAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

/// A configured `host:port` or `unix:/path`.
#[derive(Debug)]
pub struct ReplicaEntry {
    /// The text of the address, for a Unix socket.
    pub host: String,
    pub port: u16,
    pub authority: Authority,
    pub name: ServerName<'static>,
}

impl ReplicaEntry {
    /// Fails on an invalid address.
    pub fn new(address: &str, server_name: Option<&str>) -> anyhow::Result<Self> {
        if address.starts_with(UNIX) {
            // The name by which gRPC calls a server at a Unix socket.
            let authority = Authority::from_static("localhost");
            let name = ServerName::try_from(server_name.unwrap_or("localhost").to_owned())?;
            return Ok(Self { host: address.to_owned(), port: 0, authority, name });
        }
        let authority: Authority = address.parse().with_context(|| format!("the EPP's address {address:?}"))?;
        let port = authority.port_u16().with_context(|| format!("the EPP's address {address} has no port"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(server_name.unwrap_or(&host).to_owned())
            .with_context(|| format!("the name of the EPP at {address}"))?;
        Ok(Self { host, port, authority, name })
    }

    /// Its replica, if that needs no DNS.
    pub fn known(&self) -> Option<ReplicaAddress> {
        let at_ip = || self.host.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, self.port).into());
        ReplicaAddress::unix(&self.host).or_else(at_ip)
    }
}
