//! Checks the certificates and keys that settings name. Each function takes the section and key of a setting, reads the file, and
//! reports what is wrong as an error of that setting.

use std::{fs, path::Path};

use super::document::Section;
use crate::pem::{self, PemError};

/// A file with certificates of CAs.
pub(super) fn check_roots(section: &Section<'_>, key: &str, file: &Path) {
    check(section, key, file, "a PEM file with a certificate", |text| pem::roots(text).map(drop));
}

/// A file with a certificate, and one with its key.
pub(super) fn check_key_pair(section: &Section<'_>, certificate: (&str, &Path), key: (&str, &Path)) {
    let is_certificate = |text: &[u8]| pem::certificates(text).map(drop);
    let text = check(section, certificate.0, certificate.1, "a PEM file with a certificate", is_certificate);
    let expected = format!("a PEM file with the key of {}", certificate.0);
    check(section, key.0, key.1, &expected, |key| match &text {
        Some(certificate) => pem::certified_key(certificate, key).map(drop),
        None => pem::key(key).map(drop),
    });
}

/// The text of the file, if it can be read and `check` accepts it.
fn check(
    section: &Section<'_>,
    key: &str,
    file: &Path,
    expected: &str,
    check: impl FnOnce(&[u8]) -> Result<(), PemError>,
) -> Option<Vec<u8>> {
    let text = fs::read(file).map_err(PemError::from).and_then(|text| check(&text).map(|()| text));
    text.map_err(|why| section.reject(key, format_args!("{} ({why})", file.display()), expected)).ok()
}
