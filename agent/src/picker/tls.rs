//! TLS to the replicas of an EPP. Makes a connector from the settings, or none for plain HTTP/2.
//!
//! EPPs often have a self-signed certificate without a name: `insecure` verifies nothing, `pinned` accepts known keys, `ca`
//! verifies everything. Files are reloaded when they change, for new connections. An invalid file changes nothing.

mod verify;

use std::{path::PathBuf, sync::Arc, time::Duration};

use parking_lot::{Mutex, RwLock};
use rustls::{ClientConfig, crypto::ring};
use tokio_rustls::TlsConnector;

use self::verify::ByKey;
use crate::{
    config::{ClientCertificate, Epp, EppTls},
    pem::{self, PemError},
};

/// How often the files are read.
const READ_INTERVAL: Duration = Duration::from_secs(1);

/// The TLS settings toward one EPP.
pub struct Tls {
    mode: EppTls,
    client: Option<ClientCertificate>,
    current: RwLock<TlsConnector>,
    /// The content of the files when they were last read, or why that failed.
    seen: Mutex<Result<Vec<Vec<u8>>, String>>,
}

impl Tls {
    /// Reads the files, which blocks. Returns `None` if TLS is off. Fails if a file cannot be read or is invalid.
    pub fn new(epp: &Epp) -> anyhow::Result<Option<Self>> {
        if epp.tls == EppTls::Off {
            return Ok(None);
        }
        let (mode, client) = (epp.tls.clone(), epp.client_certificate.clone());
        let read = |file: PathBuf| std::fs::read(&file).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()));
        let texts = files(&mode, client.as_ref()).into_iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
        let current = RwLock::new(connector(&mode, &texts)?);
        Ok(Some(Self { mode, client, current, seen: Mutex::new(Ok(texts)) }))
    }

    /// The connector for the current files.
    pub fn connector(&self) -> TlsConnector {
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
            let made = made.and_then(|texts| connector(&self.mode, texts).map_err(|error| error.to_string()));
            *self.seen.lock() = found;
            match made {
                Ok(connector) => {
                    *self.current.write() = connector;
                    tracing::info!(?files, "EPP TLS files reloaded");
                }
                Err(error) => tracing::warn!(?files, error, "EPP TLS reload failed, keeping the current files"),
            }
        }
    }
}

/// A connector that accepts any certificate.
pub fn unverified() -> Option<TlsConnector> {
    connector(&EppTls::Insecure, &[]).ok()
}

/// The files, in the order in which [`connector`] takes their texts.
fn files(mode: &EppTls, client: Option<&ClientCertificate>) -> Vec<PathBuf> {
    let ca = if let EppTls::Ca(file) = mode { Some(file.clone()) } else { None };
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

fn connector(mode: &EppTls, texts: &[Vec<u8>]) -> Result<TlsConnector, PemError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let mut texts = texts.iter();
    let builder = match mode {
        EppTls::Ca(_) => builder.with_root_certificates(pem::roots(texts.next().map_or(&[], Vec::as_slice))?),
        EppTls::Pinned(pins) => {
            let verifier = ByKey { pins: Some(pins.clone()), provider };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
        EppTls::Insecure | EppTls::Off => {
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
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests;
