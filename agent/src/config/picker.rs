//! `[pools.picker]`: the built-in picker, or an EPP, its replicas and the TLS to them. The files it names are read here once,
//! so that what is wrong with them is known before the first connection.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustls::pki_types::ServerName;

use super::{ClientCertificate, Epp, EppLimits, EppTls, Picker, ResponseToPicker, document::Section, value};
use crate::pem::{self, PemError};

const EPP_ONLY: [&str; 19] = [
    "address",
    "tls",
    "ca_file",
    "pins",
    "server_name",
    "client_cert_file",
    "client_key_file",
    "connect_timeout",
    "decision_timeout",
    "open_on_deadline",
    "response_timeout",
    "response_to_picker",
    "response_queue_bytes",
    "header",
    "health_interval",
    "health_port",
    "health_tls",
    "health_service",
    "limits",
];

pub(super) fn picker(section: &mut Section<'_>) -> Picker {
    #[derive(Clone, Copy)]
    enum Kind {
        Builtin,
        Epp,
    }
    const KINDS: &[(&str, Kind)] = &[("builtin", Kind::Builtin), ("epp", Kind::Epp)];
    let epp_settings: Vec<&str> = EPP_ONLY.into_iter().filter(|key| section.has(key)).collect();
    // A wrong `kind` beside settings of an EPP was meant to be one.
    let fallback = if section.has("kind") && !epp_settings.is_empty() { Kind::Epp } else { Kind::Builtin };
    match section.read("kind", value::one_of(KINDS)).unwrap_or(fallback) {
        Kind::Epp => Picker::Epp(epp(section)),
        Kind::Builtin => {
            for key in epp_settings {
                section.reject(key, "a setting of an EPP", r#"kind = "epp" beside it"#);
            }
            Picker::Builtin
        }
    }
}

pub(super) fn session_headers(section: &mut Section<'_>) -> Vec<http::HeaderName> {
    section.one_or_more("session_header", value::header_name)
}

fn epp(section: &mut Section<'_>) -> Epp {
    const TOLD: &[(&str, ResponseToPicker)] =
        &[("headers", ResponseToPicker::Headers), ("usage", ResponseToPicker::Usage), ("body", ResponseToPicker::Body)];
    let default = Epp::new("");
    let tls = tls(section);
    Epp {
        addresses: addresses(section),
        server_name: server_name(section, &tls),
        client_certificate: client_certificate(section, &tls),
        connect_timeout: section.read("connect_timeout", value::duration).unwrap_or(default.connect_timeout),
        decision_timeout: section.read("decision_timeout", value::duration_or_off).unwrap_or(default.decision_timeout),
        open_on_deadline: section.read("open_on_deadline", value::boolean).unwrap_or(default.open_on_deadline),
        response_timeout: section.read("response_timeout", value::duration_or_off).unwrap_or(default.response_timeout),
        response_to_picker: section
            .read("response_to_picker", value::one_of(TOLD))
            .unwrap_or(default.response_to_picker),
        response_queue_bytes: section
            .read("response_queue_bytes", value::integer(64 << 10..=1 << 30))
            .unwrap_or(default.response_queue_bytes),
        header: section.read("header", value::header_name).unwrap_or(default.header),
        health_interval: section.read("health_interval", value::duration_or_off).unwrap_or(default.health_interval),
        health_port: section.read("health_port", value::integer(1..=u16::MAX)),
        health_tls: health_tls(section, &tls),
        health_service: section.read("health_service", value::non_empty).unwrap_or(default.health_service),
        limits: section.section("limits", limits),
        tls,
    }
}

fn limits(section: &mut Section<'_>) -> EppLimits {
    let default = EppLimits::default();
    EppLimits {
        fields: section.read("fields", value::integer(16..=8192)).unwrap_or(default.fields),
        bytes: section.read("bytes", value::integer(1024..=4 << 20)).unwrap_or(default.bytes),
        messages: section.read("messages", value::integer(16..=1_000_000)).unwrap_or(default.messages),
        metadata_bytes: section
            .read("metadata_bytes", value::integer(1024..=16 << 20))
            .unwrap_or(default.metadata_bytes),
    }
}

fn addresses(section: &mut Section<'_>) -> Vec<String> {
    let addresses = section.one_or_more("address", value::host_port);
    if !section.has("address") {
        section.reject("address", "nothing", "host:port of the EPP");
    }
    for (index, address) in addresses.iter().enumerate() {
        if addresses[..index].contains(address) {
            section.reject(&format!("address[{index}]"), format_args!("{address:?} again"), "each address once");
        }
    }
    addresses
}

fn tls(section: &mut Section<'_>) -> EppTls {
    #[derive(Clone, Copy, PartialEq)]
    enum Mode {
        Off,
        Insecure,
        Ca,
        Pinned,
    }
    const MODES: &[(&str, Mode)] =
        &[("off", Mode::Off), ("insecure", Mode::Insecure), ("ca", Mode::Ca), ("pinned", Mode::Pinned)];
    let mode = section.read("tls", value::one_of(MODES)).unwrap_or(Mode::Off);
    let ca_file = file(section, "ca_file");
    let pins = section.one_or_more("pins", value::pin);
    for (key, needs, mode_of_key) in
        [("ca_file", r#"tls = "ca" beside it"#, Mode::Ca), ("pins", r#"tls = "pinned" beside it"#, Mode::Pinned)]
    {
        if section.has(key) && mode != mode_of_key {
            section.reject(key, UNUSED, needs);
        }
    }
    match mode {
        Mode::Off => EppTls::Off,
        Mode::Insecure => EppTls::Insecure,
        Mode::Ca => {
            match &ca_file {
                None => section.reject("ca_file", "nothing", "the file with the CA's certificate"),
                Some(file) => {
                    checked(section, "ca_file", file, "a PEM file with a certificate", |text| {
                        pem::roots(text).map(drop)
                    });
                }
            }
            EppTls::Ca(ca_file.unwrap_or_default())
        }
        Mode::Pinned => {
            if !section.has("pins") {
                section.reject("pins", "nothing", "the SHA-256 of at least one public key");
            }
            EppTls::Pinned(pins)
        }
    }
}

const UNUSED: &str = "a setting that nothing uses";
const NEEDS_TLS: &str = r#"tls beside it, and not "off""#;

fn server_name(section: &mut Section<'_>, tls: &EppTls) -> Option<String> {
    let name = section.read("server_name", value::non_empty);
    if section.has("server_name") && *tls == EppTls::Off {
        section.reject("server_name", UNUSED, NEEDS_TLS);
    }
    if let Some(name) = name.as_deref().filter(|name| ServerName::try_from(*name).is_err()) {
        section.reject("server_name", format_args!("{name:?}"), "a DNS name or an IP address");
    }
    name
}

fn client_certificate(section: &mut Section<'_>, tls: &EppTls) -> Option<ClientCertificate> {
    const CERTIFICATE: &str = "client_cert_file";
    const KEY: &str = "client_key_file";
    let (certificate, key) = (file(section, CERTIFICATE), file(section, KEY));
    for (one, other) in [(CERTIFICATE, KEY), (KEY, CERTIFICATE)] {
        if section.has(one) && *tls == EppTls::Off {
            section.reject(one, UNUSED, NEEDS_TLS);
        } else if section.has(one) && !section.has(other) {
            section.reject(one, format_args!("no {other} beside it"), "both or none");
        }
    }
    let (certificate, key) = (certificate?, key?);
    let text = checked(section, CERTIFICATE, &certificate, "a PEM file with a certificate", |text| {
        pem::certificates(text).map(drop)
    });
    checked(section, KEY, &key, "a PEM file with the key of client_cert_file", |key| match &text {
        Some(certificate) => pem::certified_key(certificate, key).map(drop),
        None => pem::key(key).map(drop),
    });
    Some(ClientCertificate { certificate, key })
}

fn health_tls(section: &mut Section<'_>, tls: &EppTls) -> bool {
    let health_tls = section.read("health_tls", value::boolean);
    if section.has("health_tls") && !section.has("health_port") {
        section.reject("health_tls", UNUSED, "health_port beside it");
    }
    if health_tls == Some(true) && *tls == EppTls::Off {
        section.reject("health_tls", r#"tls = "off""#, NEEDS_TLS);
    }
    health_tls.unwrap_or(false)
}

fn file(section: &mut Section<'_>, key: &'static str) -> Option<PathBuf> {
    section.read(key, value::non_empty).map(|file| section.folder().join(file))
}

/// The file's text, when it can be read and `check` finds nothing wrong with it.
fn checked(
    section: &Section<'_>,
    key: &str,
    file: &Path,
    expected: &str,
    check: impl FnOnce(&[u8]) -> Result<(), PemError>,
) -> Option<Vec<u8>> {
    let text = fs::read(file).map_err(PemError::from).and_then(|text| check(&text).map(|()| text));
    text.map_err(|why| section.reject(key, format_args!("{} ({why})", file.display()), expected)).ok()
}
