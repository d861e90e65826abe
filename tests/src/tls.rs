//! TLS for tests: a self-signed certificate, in files for the agent, clients that trust only it, and a server in front of another.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::pki_types::{PrivateKeyDer, pem::PemObject as _};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::ring};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::own_runtime::OwnRuntime;

pub use tokio_rustls::client::TlsStream;

#[derive(Clone)]
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

    /// SHA-256 of the public key.
    pub fn pin(&self) -> [u8; 32] {
        let key =
            rustls::server::ParsedCertificate::try_from(&self.der).expect("a certificate").subject_public_key_info();
        ring_digest(&key)
    }

    /// The settings of a server with this certificate, which requires a certificate of `client` if there is one.
    pub fn server(&self, client: Option<&Self>) -> Result<Arc<ServerConfig>> {
        let provider = Arc::new(ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = match client {
            None => builder.with_no_client_auth(),
            Some(client) => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(client.roots()?), provider).build()?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())?;
        let mut config = builder.with_single_cert(vec![self.der.clone()], key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone())?;
        Ok(roots)
    }

    /// Like [`Self::connect`], with a client's certificate.
    pub async fn connect_showing(
        &self,
        peer: SocketAddr,
        shown: &Self,
        protocols: &[&str],
    ) -> Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(peer).await?;
        tcp.set_nodelay(true)?;
        let key = PrivateKeyDer::from_pem_slice(shown.key_pem.as_bytes())?;
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions()?.with_root_certificates(self.roots()?);
        let mut config = builder.with_client_auth_cert(vec![shown.der.clone()], key)?;
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        let name = ServerName::try_from(self.name.clone())?;
        TlsConnector::from(Arc::new(config)).connect(name, tcp).await.context("the TLS handshake failed")
    }

    fn connector(&self, protocols: &[&str]) -> Result<TlsConnector> {
        let roots = self.roots()?;
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let mut config =
            builder.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

fn ring_digest(bytes: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(::ring::digest::digest(&::ring::digest::SHA256, bytes).as_ref());
    digest
}

/// Speaks TLS in front of another server. An end passes as an end, with close_notify, and a reset as a reset.
pub struct TlsFront {
    pub addr: SocketAddr,
    _runtime: OwnRuntime,
}

impl TlsFront {
    /// Returns once it accepts connections.
    pub async fn start(server: SocketAddr, config: Arc<ServerConfig>) -> Result<Self> {
        let listen = move || async move {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let addr = listener.local_addr()?;
            let acceptor = TlsAcceptor::from(config);
            tokio::spawn(async move {
                while let Ok((tcp, _)) = listener.accept().await {
                    let acceptor = acceptor.clone();
                    tokio::spawn(async move { pass_on(tcp, acceptor, server).await });
                }
            });
            Ok(addr)
        };
        let (addr, runtime) = OwnRuntime::start("tls-front", listen).await?;
        Ok(Self { addr, _runtime: runtime })
    }
}

async fn pass_on(tcp: TcpStream, acceptor: TlsAcceptor, server: SocketAddr) -> Result<()> {
    tcp.set_nodelay(true)?;
    let tls = acceptor.accept(tcp).await?;
    let to = TcpStream::connect(server).await?;
    to.set_nodelay(true)?;
    let (mut client_reads, mut client_writes) = split(tls);
    let (mut server_reads, mut server_writes) = split(to);
    let both = async {
        tokio::try_join!(copy(&mut client_reads, &mut server_writes), copy(&mut server_reads, &mut client_writes))
    };
    let ended = both.await;
    if ended.is_err() {
        // The other side shall see a reset, too.
        let (tls, to) = (client_reads.unsplit(client_writes), server_reads.unsplit(server_writes));
        for socket in [tls.get_ref().0, &to] {
            socket2::SockRef::from(socket).set_linger(Some(std::time::Duration::ZERO))?;
        }
    }
    Ok(())
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    let mut buf = vec![0; 16 << 10];
    loop {
        let n = from.read(&mut buf).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buf[..n]).await?;
        to.flush().await?;
    }
}
