//! TLS toward the replicas of an EPP.
//!
//! Given the settings it gives a connector, or nothing for plain HTTP/2. EPPs come with a certificate that they signed
//! themselves, for no name: `insecure` encrypts and verifies nothing, `pinned` wants one of the keys it knows, `ca` verifies
//! everything. The files are read again when they change: connections that are made from then on use what they say, those
//! that are open stay. A file that is of no use changes nothing.

mod verify;

use std::{path::PathBuf, sync::Arc, time::Duration};

use parking_lot::RwLock;
use rustls::{ClientConfig, crypto::ring};
use tokio_rustls::TlsConnector;

use self::verify::ByKey;
use crate::{
    config::{ClientCertificate, Epp, EppTls},
    pem::{self, PemError},
};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);

pub struct Tls {
    mode: EppTls,
    client: Option<ClientCertificate>,
    current: RwLock<TlsConnector>,
    /// What the files said when the connector was made.
    made_of: Vec<Vec<u8>>,
}

impl Tls {
    /// Reads the files; blocks on them.
    pub fn new(epp: &Epp) -> anyhow::Result<Option<Self>> {
        if epp.tls == EppTls::Off {
            return Ok(None);
        }
        let (mode, client) = (epp.tls.clone(), epp.client_certificate.clone());
        let read = |file: PathBuf| std::fs::read(&file).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()));
        let made_of = files(&mode, client.as_ref()).into_iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
        let current = RwLock::new(connector(&mode, &made_of)?);
        Ok(Some(Self { mode, client, current, made_of }))
    }

    /// As the files are now.
    pub fn connector(&self) -> TlsConnector {
        self.current.read().clone()
    }

    /// Keeps the connector as the files say, for ever. Reads them on the runtime's threads for blocking work.
    pub async fn follow_files(&self) {
        let files = files(&self.mode, self.client.as_ref());
        if files.is_empty() {
            return;
        }
        let mut seen: Result<Vec<Vec<u8>>, String> = Ok(self.made_of.clone());
        loop {
            tokio::time::sleep(LOOK).await;
            let found = read_all(&files).await;
            if found == seen {
                continue;
            }
            // Once for each change, not once a second.
            seen = found;
            let made = seen
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|texts| connector(&self.mode, texts).map_err(|error| error.to_string()));
            match made {
                Ok(connector) => {
                    *self.current.write() = connector;
                    tracing::info!(?files, "TLS files have changed and are in use");
                }
                Err(error) => tracing::warn!(
                    ?files,
                    error,
                    "TLS files have changed and are of no use: what they said before holds"
                ),
            }
        }
    }
}

/// In the order in which [`connector`] takes their texts.
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
