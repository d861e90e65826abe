//! TLS for tests: a self-signed certificate, in files for the agent, and clients that trust only it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

pub use tokio_rustls::client::TlsStream;

pub struct Certificate {
    cert_pem: String,
    key_pem: String,
    der: CertificateDer<'static>,
    name: String,
}

impl Certificate {
    /// For a server of this name, of `other.example` and of this machine.
    pub fn new(name: &str) -> Result<Self> {
        let names = [name, "other.example", "127.0.0.1"].map(str::to_owned);
        let issued = rcgen::generate_simple_self_signed(names)?;
        let (cert_pem, key_pem) = (issued.cert.pem(), issued.signing_key.serialize_pem());
        Ok(Self { cert_pem, key_pem, der: issued.cert.der().clone(), name: name.to_owned() })
    }

    /// Writes certificate and key into `folder`, replacing existing ones; returns their paths.
    pub fn write(&self, folder: &Path) -> Result<(PathBuf, PathBuf)> {
        let paths = (folder.join("cert.pem"), folder.join("key.pem"));
        std::fs::write(&paths.1, &self.key_pem)?;
        std::fs::write(&paths.0, &self.cert_pem)?;
        Ok(paths)
    }

    /// Connects to a server with this certificate; fails with any other. `protocols` are offered by ALPN.
    pub async fn connect(&self, peer: SocketAddr, protocols: &[&str]) -> Result<TlsStream<TcpStream>> {
        self.connect_as(peer, &self.name, protocols).await
    }

    /// Like [`Self::connect`], with this server name; fails if the certificate lacks it.
    pub async fn connect_as(&self, peer: SocketAddr, name: &str, protocols: &[&str]) -> Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(peer).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(name.to_owned())?;
        self.connector(protocols)?.connect(name, tcp).await.context("the TLS handshake failed")
    }

    /// Like [`Self::connect`], over an existing connection.
    pub async fn over(&self, tcp: TcpStream, protocols: &[&str]) -> Result<TlsStream<TcpStream>> {
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(self.name.clone())?;
        self.connector(protocols)?.connect(name, tcp).await.context("the TLS handshake failed")
    }

    fn connector(&self, protocols: &[&str]) -> Result<TlsConnector> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone())?;
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let mut config =
            builder.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}
