//! Reads and verifies certificates and keys from PEM text, so that an unusable file is an error here and not at the
//! first handshake.

use std::io;

use rustls::{
    RootCertStore,
    crypto::ring,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    sign::CertifiedKey,
};

#[derive(Debug, thiserror::Error)]
pub enum PemError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Pem(pem::Error),
    /// Well formed, but not a usable certificate or key.
    #[error("{0}")]
    Tls(rustls::Error),
    #[error("the key does not match the certificate")]
    Mismatch,
}

impl From<rustls::Error> for PemError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InconsistentKeys(_) => Self::Mismatch,
            error => Self::Tls(error),
        }
    }
}

impl From<pem::Error> for PemError {
    fn from(error: pem::Error) -> Self {
        Self::Pem(error)
    }
}

/// The certificates of the text, in order; at least one.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>()?;
    if certificates.is_empty() { Err(pem::Error::NoItemsFound.into()) } else { Ok(certificates) }
}

/// The CA certificates of the text, at least one, for verifying a server's certificate.
pub fn roots(text: &[u8]) -> Result<RootCertStore, PemError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(text)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

/// The first key of the text.
pub fn key(text: &[u8]) -> Result<PrivateKeyDer<'static>, PemError> {
    let key = PrivateKeyDer::from_pem_slice(text)?;
    ring::sign::any_supported_type(&key)?;
    Ok(key)
}

/// A certificate, its intermediate certificates, and the matching key.
pub fn certified_key(certificate: &[u8], key_text: &[u8]) -> Result<CertifiedKey, PemError> {
    Ok(CertifiedKey::from_der(certificates(certificate)?, key(key_text)?, &ring::default_provider())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_must_match_its_certificate() {
        let made = |name: &str| rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let (one, other) = (made("one"), made("other"));
        let (certificate, key_text) = (one.cert.pem(), one.signing_key.serialize_pem());
        assert_eq!(certificates(certificate.as_bytes()).unwrap(), [one.cert.der().clone()]);
        assert_eq!(certified_key(certificate.as_bytes(), key_text.as_bytes()).unwrap().cert.len(), 1);
        let error = certified_key(certificate.as_bytes(), other.signing_key.serialize_pem().as_bytes()).unwrap_err();
        assert!(matches!(error, PemError::Mismatch), "{error}");
        let both = format!("{certificate}{}", other.cert.pem());
        assert_eq!(certificates(both.as_bytes()).unwrap().len(), 2);
    }

    #[test]
    fn invalid_pem_is_an_error() {
        let made = rcgen::generate_simple_self_signed(["one".to_owned()]).unwrap();
        let (certificate, key_text) = (made.cert.pem(), made.signing_key.serialize_pem());
        for text in ["", "no certificate", &key_text, &certificate[..certificate.len() / 2]] {
            assert!(certificates(text.as_bytes()).is_err(), "{text:?}");
        }
        // PEM with other content than a certificate.
        assert!(roots(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").is_err());
        assert_eq!(roots(certificate.as_bytes()).unwrap().len(), 1);
        let no_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        for text in ["", &certificate, no_key] {
            assert!(key(text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
