//! TLS to servers: the replicas of an EPP, and endpoints. Makes a connector from the settings, or none without TLS.
//!
//! EPPs often have a self-signed certificate without a name: `insecure` verifies nothing, `pinned` accepts known keys, `ca`
//! verifies everything. Files are reloaded when they change, for new connections. An invalid file changes nothing.

pub mod session;
mod verify;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use rustls::{ClientConfig, crypto::ring};
use tokio_rustls::TlsConnector;

use self::verify::ByKey;
use crate::{
    config::{ClientCertificate, ServerTls},
    pem::{self, PemError},
};

/// How often the files are read.
const READ_INTERVAL: Duration = Duration::from_secs(1);

/// The ALPN name of HTTP/2.
pub const H2: &[u8] = b"h2";
/// The ALPN name of HTTP/1.1.
pub const HTTP11: &[u8] = b"http/1.1";

/// The TLS settings toward one EPP, or the endpoints of one pool.
pub struct Connectors {
    mode: ServerTls,
    client: Option<ClientCertificate>,
    protocol: &'static [u8],
    current: RwLock<Connector>,
    /// The content of the files when they were last read, or why that failed.
    seen: Mutex<Result<Vec<Vec<u8>>, String>>,
}

/// What the files said when they were last valid.
#[derive(Clone)]
pub struct Connector {
    pub tls: TlsConnector,
    /// Distinguishes it from every other one of the process.
    pub id: u64,
}

impl Connector {
    fn new(tls: TlsConnector) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { tls, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Connectors {
    /// Reads the files, which blocks. Returns `None` if TLS is off. Fails if a file cannot be read or is invalid. `protocol` is
    /// offered by ALPN.
    pub fn new(
        mode: &ServerTls,
        client: Option<&ClientCertificate>,
        protocol: &'static [u8],
    ) -> anyhow::Result<Option<Self>> {
        if *mode == ServerTls::Off {
            return Ok(None);
        }
        let read = |file: PathBuf| std::fs::read(&file).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()));
        let texts = files(mode, client).into_iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
        let current = RwLock::new(Connector::new(connector(mode, &texts, protocol)?));
        let (mode, client) = (mode.clone(), client.cloned());
        Ok(Some(Self { mode, client, protocol, current, seen: Mutex::new(Ok(texts)) }))
    }

    /// The connector for the current files.
    pub fn current(&self) -> Connector {
        self.current.read().clone()
    }

    /// Reloads the files whenever they change, on the runtime's blocking threads. Returns only if there are no files.
    pub async fn follow_files(&self) {
        let files = files(&self.mode, self.client.as_ref());
        if files.is_empty() {
            return;
        }
        loop {
            tokio::time::sleep(READ_INTERVAL).await;
            let found = read_all(&files).await;
            // Log each change once, not once a second.
            if found == *self.seen.lock() {
                continue;
            }
            let made = found.as_deref().map_err(Clone::clone);
            let made =
                made.and_then(|texts| connector(&self.mode, texts, self.protocol).map_err(|error| error.to_string()));
            *self.seen.lock() = found;
            match made {
                Ok(connector) => {
                    *self.current.write() = Connector::new(connector);
                    tracing::info!(?files, "TLS files reloaded");
                }
                Err(error) => tracing::warn!(?files, error, "reload of TLS files failed, keeping the current ones"),
            }
        }
    }
}

/// A connector for HTTP/2 that accepts any certificate.
pub fn unverified() -> Option<TlsConnector> {
    connector(&ServerTls::Insecure, &[], H2).ok()
}

/// The files, in the order in which [`connector`] takes their texts.
fn files(mode: &ServerTls, client: Option<&ClientCertificate>) -> Vec<PathBuf> {
    let ca = if let ServerTls::Ca(file) = mode { Some(file.clone()) } else { None };
    let client = client.map(|client| [client.certificate.clone(), client.key.clone()]);
    ca.into_iter().chain(client.into_iter().flatten()).collect()
}

async fn read_all(files: &[PathBuf]) -> Result<Vec<Vec<u8>>, String> {
    let mut texts = Vec::with_capacity(files.len());
    for file in files {
        texts.push(tokio::fs::read(file).await.map_err(|error| format!("{}: {error}", file.display()))?);
    }
    Ok(texts)
}

fn connector(mode: &ServerTls, texts: &[Vec<u8>], protocol: &[u8]) -> Result<TlsConnector, PemError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let mut texts = texts.iter();
    let builder = match mode {
        ServerTls::Ca(_) => builder.with_root_certificates(pem::roots(texts.next().map_or(&[], Vec::as_slice))?),
        ServerTls::Pinned(pins) => {
            let verifier = ByKey { pins: Some(pins.clone()), provider };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
        ServerTls::Insecure | ServerTls::Off => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(ByKey { pins: None, provider }))
        }
    };
    let mut config = match (texts.next(), texts.next()) {
        (Some(certificate), Some(key)) => {
            pem::certified_key(certificate, key)?;
            builder.with_client_auth_cert(pem::certificates(certificate)?, pem::key(key)?)?
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests;
