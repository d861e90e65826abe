//! TLS toward the EPP.
//!
//! Given the settings it gives a connector and the name to ask for, or nothing for plain HTTP/2. EPPs come with a certificate
//! that they signed themselves, for no name: `insecure` encrypts and verifies nothing, `ca` verifies everything.

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio_rustls::TlsConnector;

use crate::config::EppTls;

/// `host` is the host part of the EPP's address.
pub fn connector(tls: &EppTls, host: &str) -> anyhow::Result<Option<(TlsConnector, ServerName<'static>)>> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let (mut config, name) = match tls {
        EppTls::Off => return Ok(None),
        EppTls::Insecure => {
            let verifier = Arc::new(Unverified(provider));
            (builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth(), host)
        }
        EppTls::Ca { file, server_name } => {
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(file)? {
                roots.add(certificate?)?;
            }
            anyhow::ensure!(!roots.is_empty(), "no certificate in {}", file.display());
            let name = server_name.as_deref().unwrap_or(host);
            (builder.with_root_certificates(roots).with_no_client_auth(), name)
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Some((TlsConnector::from(Arc::new(config)), ServerName::try_from(name.to_owned())?)))
}

/// Takes any certificate, from a server that holds its key.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
