//! TLS to servers: `tls` and its keys in `[pools.picker]`, and `[pools.tls]`.

use std::{fmt, path::PathBuf};

use rustls::pki_types::ServerName;
use serde_json::json;

use super::{
    document::Section,
    files,
    settings::{Group, choice, keys, settings},
    value::{self, OneOrMore, Value},
};

pub(super) const UNUSED: &str = "a setting without effect";

/// How the agent connects to a server: an EPP or an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerTls {
    /// Without TLS.
    Off,
    /// TLS without verification of the certificate.
    Insecure,
    /// TLS, verified against this PEM file of CA certificates, which is reloaded when it changes.
    Ca(PathBuf),
    /// TLS with a certificate that has one of these public keys; nothing else in it is verified. At least one.
    Pinned(Vec<KeyPin>),
}

impl ServerTls {
    /// The keys `ca_file` and `pins`.
    fn files_and_pins(&self) -> (Option<PathBuf>, Vec<KeyPin>) {
        match self {
            Self::Off | Self::Insecure => (None, Vec::new()),
            Self::Ca(file) => (Some(file.clone()), Vec::new()),
            Self::Pinned(pins) => (None, pins.clone()),
        }
    }
}

settings! {
    /// The keys of [`ServerTls`].
    pub(super) struct EppTlsKeys {
        /// How the agent connects to the EPP.
        tls: EppTlsMode = EppTlsMode::Off => value::choice(),
        /// With `tls = "ca"` only: PEM file of CA certificates. It is reloaded when it changes. A relative path is resolved against
        /// the folder of this file.
        ca_file: Option<PathBuf> = None => value::file().example("ca.pem"),
        /// With `tls = "pinned"` only: SHA-256 of each accepted public key, in hexadecimal:
        /// `openssl x509 -in epp.pem -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256`
        pins: Vec<KeyPin> = Vec::new()
            => pins().example(json!(["0000000000000000000000000000000000000000000000000000000000000000"])),
    }
}

choice! {
    /// The values of `tls`.
    enum EppTlsMode {
        /// HTTP/2 without TLS.
        Off = "off",
        /// TLS without verification of the certificate: an EPP's default certificate is self-signed and names no host.
        Insecure = "insecure",
        /// TLS, verified against `ca_file`.
        Ca = "ca",
        /// TLS with a certificate that has one of the public keys in `pins`; nothing else in it is verified.
        Pinned = "pinned",
    }
}

/// SHA-256 of a public key (the SubjectPublicKeyInfo, DER), 64 hexadecimal digits:
/// `openssl x509 -in epp.pem -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyPin(pub [u8; 32]);

impl fmt::Display for KeyPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn pins() -> OneOrMore<KeyPin> {
    let parse = |text: &str| {
        let mut pin = [0; 32];
        for (byte, digits) in pin.iter_mut().zip(Some(text).filter(|text| text.len() == 64)?.as_bytes().chunks(2)) {
            let digit = |at: usize| char::from(digits[at]).to_digit(16).map(|digit| digit as u8);
            *byte = digit(0)? << 4 | digit(1)?;
        }
        Some(KeyPin(pin))
    };
    let value = Value::text("the SHA-256 of a public key, 64 hexadecimal digits", parse, ToString::to_string);
    value.schema(json!({ "type": "string", "pattern": "^[0-9A-Fa-f]{64}$" })).one_or_more()
}

impl Group for EppTlsKeys {
    type Value = ServerTls;

    fn resolve(self, section: &Section<'_>) -> ServerTls {
        resolve(section, "tls", self.tls, self.ca_file, self.pins)
    }

    fn of(value: &ServerTls) -> Self {
        let tls = match value {
            ServerTls::Off => EppTlsMode::Off,
            ServerTls::Insecure => EppTlsMode::Insecure,
            ServerTls::Ca(_) => EppTlsMode::Ca,
            ServerTls::Pinned(_) => EppTlsMode::Pinned,
        };
        let (ca_file, pins) = value.files_and_pins();
        Self { tls, ca_file, pins }
    }
}

settings! {
    /// The keys of [`ServerTls`] toward endpoints.
    struct VerifyKeys {
        /// How the certificate of an endpoint is verified.
        verify: Verify = Verify::Ca => value::choice(),
        /// With `verify = "ca"` only: PEM file of CA certificates, such as `/etc/ssl/certs/ca-certificates.crt`. It is reloaded when
        /// it changes. A relative path is resolved against the folder of this file.
        ca_file: Option<PathBuf> = None => value::file().example("ca.pem"),
        /// With `verify = "pinned"` only: SHA-256 of each accepted public key, in hexadecimal, as `picker.pins`.
        pins: Vec<KeyPin> = Vec::new()
            => pins().example(json!(["0000000000000000000000000000000000000000000000000000000000000000"])),
    }
}

choice! {
    /// The values of `verify`.
    enum Verify {
        /// Against `ca_file`. The certificate must be for `server_name`, or for the endpoint's IP address if that is unset.
        Ca = "ca",
        /// The certificate must have one of the public keys in `pins`; nothing else in it is verified.
        Pinned = "pinned",
        /// Not at all: whoever answers at the address gets the requests.
        Insecure = "insecure",
    }
}

impl Group for VerifyKeys {
    type Value = ServerTls;

    fn resolve(self, section: &Section<'_>) -> ServerTls {
        let mode = match self.verify {
            Verify::Ca => EppTlsMode::Ca,
            Verify::Pinned => EppTlsMode::Pinned,
            Verify::Insecure => EppTlsMode::Insecure,
        };
        resolve(section, "verify", mode, self.ca_file, self.pins)
    }

    fn of(value: &ServerTls) -> Self {
        let verify = match value {
            ServerTls::Off | ServerTls::Insecure => Verify::Insecure,
            ServerTls::Ca(_) => Verify::Ca,
            ServerTls::Pinned(_) => Verify::Pinned,
        };
        let (ca_file, pins) = value.files_and_pins();
        Self { verify, ca_file, pins }
    }
}

/// `key` is that of `mode`.
fn resolve(
    section: &Section<'_>,
    key: &str,
    mode: EppTlsMode,
    ca_file: Option<PathBuf>,
    pins: Vec<KeyPin>,
) -> ServerTls {
    for (unused, name, needed) in [("ca_file", "ca", EppTlsMode::Ca), ("pins", "pinned", EppTlsMode::Pinned)] {
        if section.has(unused) && mode != needed {
            section.reject(unused, UNUSED, format_args!("{key} = {name:?}"));
        }
    }
    match mode {
        EppTlsMode::Off => ServerTls::Off,
        EppTlsMode::Insecure => ServerTls::Insecure,
        EppTlsMode::Ca => {
            if ca_file.is_none() {
                section.reject("ca_file", "nothing", "the file with the CA's certificate");
            }
            ServerTls::Ca(ca_file.unwrap_or_default())
        }
        EppTlsMode::Pinned => {
            if !section.has("pins") {
                section.reject("pins", "nothing", "the SHA-256 of at least one public key");
            }
            ServerTls::Pinned(pins)
        }
    }
}

settings! {
    /// TLS to endpoints.
    pub struct PoolTls {
        /// How certificates of endpoints are verified.
        pub verify: ServerTls = ServerTls::Ca(PathBuf::new()) => keys::<VerifyKeys>(),
        /// Server name to send (SNI) and to verify. Unset: the endpoint's IP address is verified, and no name is sent.
        pub server_name: Option<String> = None => value::non_empty().optional("models.example.com"),
        /// The certificate that the agent presents to endpoints.
        pub client_certificate: Option<ClientCertificate> = None => keys::<ClientCertificateKeys>(),
    }
}

impl PoolTls {
    pub(super) fn check(&self, section: &Section<'_>) {
        if let Some(name) = self.server_name.as_deref().filter(|name| ServerName::try_from(*name).is_err()) {
            section.reject("server_name", format_args!("{name:?}"), "a DNS name or an IP address");
        }
        check_client_certificate(section);
    }
}

/// Reports a certificate without a key, and the other way round.
pub(super) fn check_client_certificate(section: &Section<'_>) {
    for (one, other) in [("client_cert_file", "client_key_file"), ("client_key_file", "client_cert_file")] {
        if section.has(one) && !section.has(other) {
            section.reject(one, format_args!("no {other}"), "both or neither");
        }
    }
}

/// Reads the files that the section names.
pub(super) fn check_files(section: &Section<'_>, tls: &ServerTls, client: Option<&ClientCertificate>) {
    if let ServerTls::Ca(file) = tls {
        files::check_roots(section, "ca_file", file);
    }
    if let Some(ClientCertificate { certificate, key }) = client {
        files::check_key_pair(section, ("client_cert_file", certificate), ("client_key_file", key));
    }
}

/// Two PEM files, which are reloaded when they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The certificate, followed by the intermediate certificates up to the CA.
    pub certificate: PathBuf,
    /// The private key of `certificate`.
    pub key: PathBuf,
}

settings! {
    /// The keys of [`ClientCertificate`].
    pub(super) struct ClientCertificateKeys {
        /// With TLS only: PEM file of the certificate that the agent presents, followed by its intermediate certificates. It is
        /// reloaded when it changes. A relative path is resolved against the folder of this file.
        client_cert_file: Option<PathBuf> = None => value::file().example("client.pem"),
        /// PEM file of the private key of `client_cert_file`. It is reloaded when it changes. A relative path is resolved against
        /// the folder of this file.
        client_key_file: Option<PathBuf> = None => value::file().example("client.key"),
    }
}

impl Group for ClientCertificateKeys {
    type Value = Option<ClientCertificate>;

    fn resolve(self, _: &Section<'_>) -> Option<ClientCertificate> {
        Some(ClientCertificate { certificate: self.client_cert_file?, key: self.client_key_file? })
    }

    fn of(value: &Option<ClientCertificate>) -> Self {
        let files = value.clone().map(|ClientCertificate { certificate, key }| (certificate, key));
        let (client_cert_file, client_key_file) = files.unzip();
        Self { client_cert_file, client_key_file }
    }
}
