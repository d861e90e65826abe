//! Verifies servers by a pinned key, or not at all. Names, dates and issuers are ignored. The server always has to prove that it
//! holds the key of its certificate.

use std::sync::Arc;

use ring::digest::{SHA256, digest};
use rustls::{
    DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};

use crate::config::KeyPin;

#[derive(Debug)]
pub(super) struct ByKey {
    /// `None` accepts any key.
    pub(super) pins: Option<Vec<KeyPin>>,
    pub(super) provider: Arc<CryptoProvider>,
}

/// The pin of a certificate's key.
fn pin(certificate: &CertificateDer<'_>) -> Result<KeyPin, Error> {
    let key = ParsedCertificate::try_from(certificate)?.subject_public_key_info();
    let mut pin = [0; 32];
    pin.copy_from_slice(digest(&SHA256, &key).as_ref());
    Ok(KeyPin(pin))
}

impl ServerCertVerifier for ByKey {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(pins) = &self.pins {
            let shown = pin(certificate)?;
            if !pins.contains(&shown) {
                return Err(Error::General(format!("the server's key is {shown}, which is not pinned")));
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pem;

    /// Made with openssl; the pin was computed with the command in the documentation of [`KeyPin`].
    const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----
MIIBhjCCAS2gAwIBAgIUWecwmSX/BbPFD4UQtTyYWJXGDm8wCgYIKoZIzj0EAwIw
GDEWMBQGA1UECgwNSW5mZXJlbmNlIEV4dDAgFw0yNjExMjUxODAxMjRaGA8yMTI2
MTEwMTE4MDEyNFowGDEWMBQGA1UECgwNSW5mZXJlbmNlIEV4dDBZMBMGByqGSM49
AgEGCCqGSM49AwEHA0IABKzjuctpHWbnBxLXrh4YlbwiSRQvfkyHr3SS9vKR5lhd
mAm+bATC54GHZ6nFTN5uZnaAJ6VCENTcdeselE0XhHSjUzBRMB0GA1UdDgQWBBT/
I0Z7wowoHa3Rlu0T/QkfkbIMRTAfBgNVHSMEGDAWgBT/I0Z7wowoHa3Rlu0T/Qkf
kbIMRTAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0cAMEQCIGAouNd6ZmPH
zqu+5CdUsxzCIEBu+CMMsyXxJcFutzRBAiBhF9EjUrUwT4taMVQVYjoIzapXyPN2
ISairr5U02YKnw==
-----END CERTIFICATE-----";
    const PIN: &str = "36cf19931c73a4287a985eef1424b8ca03becd1034a4f893491b42d178e27a33";

    #[test]
    fn pin_matches_openssl() {
        let certificates = pem::certificates(CERTIFICATE.as_bytes()).unwrap();
        let pin = pin(&certificates[0]).unwrap();
        assert_eq!(pin.to_string(), PIN);
        let verify = |pins: Option<Vec<KeyPin>>| {
            let verifier = ByKey { pins, provider: Arc::new(rustls::crypto::ring::default_provider()) };
            let name = ServerName::try_from("whatever").unwrap();
            verifier.verify_server_cert(&certificates[0], &[], &name, &[], UnixTime::now())
        };
        let other = KeyPin([7; 32]);
        assert!(verify(None).is_ok() && verify(Some(vec![other, pin])).is_ok());
        let error = verify(Some(vec![other])).unwrap_err();
        assert!(error.to_string().contains(PIN), "{error}");
    }
}
