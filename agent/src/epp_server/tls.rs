//! A self-signed certificate without names, made at start. Clients of EPPs do not verify it.

use std::{fs, path::Path, sync::Arc};

use anyhow::Context as _;
use rustls::{RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier};
use tokio_rustls::TlsAcceptor;

use crate::{pem, tls::H2};

/// Reads the PEM file of the CAs that may sign client certificates. Fails, with the file's name, if it has no certificate.
pub fn client_ca(file: &Path) -> anyhow::Result<Vec<u8>> {
    let pem = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let expected = || format!("{}: expected one or more certificates (PEM)", file.display());
    pem::certificates(&pem).with_context(expected)?;
    Ok(pem)
}

/// Accepts TLS connections, with HTTP/2 in ALPN. `client_ca` is the PEM of the CAs that may sign client certificates.
pub(super) fn self_signed(client_ca: Option<&[u8]>) -> anyhow::Result<TlsAcceptor> {
    let made = rcgen::generate_simple_self_signed(Vec::new()).context("making a self-signed certificate")?;
    let (certificate, key) = (made.cert.der().clone(), made.signing_key.into());
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            for certificate in pem::certificates(pem)? {
                roots.add(certificate).context("a certificate of a CA was expected")?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![H2.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
