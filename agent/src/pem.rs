//! Certificates and keys out of PEM text. A file that only looks right is an error here, not at the first handshake.

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
    /// Well formed, but no certificate or key that can be used.
    #[error("{0}")]
    Tls(rustls::Error),
    #[error("the key is not the certificate's")]
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

/// At least one, in the order of the text.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>()?;
    if certificates.is_empty() { Err(pem::Error::NoItemsFound.into()) } else { Ok(certificates) }
}

/// The CA certificates of the text, at least one, as what a server's certificate is verified against.
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

/// A certificate, those between it and a CA, and the key that belongs to it.
pub fn certified_key(certificate: &[u8], key_text: &[u8]) -> Result<CertifiedKey, PemError> {
    Ok(CertifiedKey::from_der(certificates(certificate)?, key(key_text)?, &ring::default_provider())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_belongs_to_its_certificate() {
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
    fn what_is_none_of_them_is_an_error() {
        let made = rcgen::generate_simple_self_signed(["one".to_owned()]).unwrap();
        let (certificate, key_text) = (made.cert.pem(), made.signing_key.serialize_pem());
        for text in ["", "no certificate", &key_text, &certificate[..certificate.len() / 2]] {
            assert!(certificates(text.as_bytes()).is_err(), "{text:?}");
        }
        // PEM of something else than a certificate.
        assert!(roots(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").is_err());
        assert_eq!(roots(certificate.as_bytes()).unwrap().len(), 1);
        let no_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        for text in ["", &certificate, no_key] {
            assert!(key(text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
