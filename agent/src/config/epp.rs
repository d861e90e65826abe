//! `[pools.picker]` with `kind = "epp"`: an EPP, its replicas and the TLS to them.

use std::{fmt, path::PathBuf, time::Duration};

use http::HeaderName;
use rustls::pki_types::ServerName;
use serde_json::json;

use super::{
    document::Section,
    files,
    settings::{Group, choice, keys, section, settings},
    value::{self, OneOrMore, Value, boolean, duration, duration_or_off, integer},
};

const UNUSED: &str = "a setting that nothing uses";
const NEEDS_TLS: &str = r#"tls beside it, and not "off""#;

settings! {
    /// An EPP.
    pub struct Epp {
        /// `host:port` of the EPP's gRPC service, or an array of them. Each address that a host has in DNS is a replica. Requests go to
        /// the first one that serves, in the order of the array and then of the addresses, so that all agents ask the same one and its
        /// state is of use; to the next when it fails.
        pub addresses: Vec<String> = Vec::new()
            => value::host_port().one_or_more().named("address").example("127.0.0.1:9002"),
        /// How the agent speaks to the EPP.
        pub tls: EppTls = EppTls::Off => keys::<EppTlsKeys>(),
        /// With TLS only: name to ask for and, with `tls = "ca"`, that the certificate must carry; instead of the host of `address`.
        pub server_name: Option<String> = None => value::non_empty().optional("epp.example.com"),
        /// What the EPP is shown of the agent in TLS.
        pub client_certificate: Option<ClientCertificate> = None => keys::<ClientCertificateKeys>(),
        /// TCP and TLS to the EPP; also how long a request waits for the first answer of DNS.
        pub connect_timeout: Duration = Duration::from_secs(1) => duration(),
        /// From the end of the request's body to the pick, whatever goes wrong on the way and however many replicas are asked. An EPP
        /// may queue requests.
        pub decision_timeout: Option<Duration> = Some(Duration::from_secs(75)) => duration_or_off(),
        /// When `decision_timeout` is over for a request and the EPP has decided others meanwhile, it holds this one back: the answer is
        /// 503, unless this is true and `failure_mode` is `open`. An EPP that has decided nothing meanwhile has failed: `failure_mode`
        /// decides, and no further request waits for it until it decides one again.
        pub open_on_deadline: bool = false => boolean(),
        /// How long a response head waits for the EPP's mutation of it.
        pub response_timeout: Option<Duration> = Some(Duration::from_millis(100)) => duration_or_off(),
        /// What the EPP sees of response bodies.
        pub response_to_picker: ResponseToPicker = ResponseToPicker::Headers => value::choice(),
        /// With `response_to_picker = "body"`: bytes of one response that may wait for the EPP. Beyond it the EPP is told no more of
        /// that response, and the client goes on.
        pub response_queue_bytes: usize = 1 << 20 => integer(64 << 10..=1 << 30),
        /// Header that carries the pick.
        pub header: HeaderName = HeaderName::from_static("x-gateway-destination-endpoint")
            => value::header_name().named("destination_header").was("header"),
        /// How often each replica is asked for its gRPC health. One that is not serving, or does not answer within `connect_timeout`,
        /// is asked after the others. One that knows nothing of health, or of the service, counts as serving.
        pub health_interval: Option<Duration> = Some(Duration::from_secs(5)) => duration_or_off(),
        /// Where health is served, if not at the port of `address`. EPPs with default settings have it on 9003.
        pub health_port: Option<u16> = None => integer(1..=u16::MAX).optional(9003),
        /// With `health_port` only: whether it speaks TLS, as the EPP does.
        pub health_tls: bool = false => boolean(),
        /// The service whose health is asked for. The light EPP of the conformance suite says `inference-extension`.
        pub health_service: String = "envoy.service.ext_proc.v3.ExternalProcessor".to_owned() => value::non_empty(),
        /// How much the EPP may say about one request. Beyond it, it has failed; what it says about a response is then not applied.
        pub limits: EppLimits = EppLimits::default() => section(),
    }
}

choice! {
    /// What the EPP sees of response bodies.
    pub enum ResponseToPicker {
        /// Nothing but the end.
        Headers = "headers",
        /// What it takes to count tokens: the last events of an event stream (which is steered all the same, for 8 KiB of kernel memory
        /// for each endpoint connection), or the whole of a JSON document up to 256 KiB (which is relayed).
        Usage = "usage",
        /// Every byte. Such responses are relayed.
        Body = "body",
    }
}

settings! {
    /// How much an EPP may say about one request. Beyond it, it has failed; what it says about a response is then not applied.
    #[derive(Copy)]
    pub struct EppLimits {
        /// Fields that it sets or removes besides those that the head has.
        pub fields: usize = 512 => integer(16..=8192),
        /// Their bytes, names and values, besides those that the head has.
        pub bytes: usize = 128 << 10 => integer(1024..=4 << 20).named("field_bytes").was("bytes"),
        /// Messages before its decision, besides two for each message that it gets and one for each 256 bytes of a body that it
        /// replaces.
        pub messages: usize = 4096 => integer(16..=1_000_000),
        /// Dynamic metadata of one message, bytes.
        pub metadata_bytes: usize = 256 << 10 => integer(1024..=16 << 20),
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EppTls {
    /// Plain HTTP/2.
    Off,
    /// TLS, certificate not verified: the EPP's own default certificate is self-signed without names.
    Insecure,
    /// TLS, verified against this PEM file of CA certificates, which is read again when it changes.
    Ca(PathBuf),
    /// TLS, with a certificate of one of these public keys, whatever else it says. At least one.
    Pinned(Vec<Pin>),
}

settings! {
    /// TLS to the EPP.
    struct EppTlsKeys {
        /// How the agent speaks to the EPP.
        tls: EppTlsMode = EppTlsMode::Off => value::choice(),
        /// With `tls = "ca"` only: PEM, read again when it changes; a relative path starts at the folder of this file.
        ca_file: Option<PathBuf> = None => value::file().example("ca.pem"),
        /// With `tls = "pinned"` only: SHA-256 of each public key, in hexadecimal:
        /// `openssl x509 -in epp.pem -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256`
        pins: Vec<Pin> = Vec::new()
            => pins().example(json!(["0000000000000000000000000000000000000000000000000000000000000000"])),
    }
}

choice! {
    /// The values of `tls`.
    enum EppTlsMode {
        /// Plain HTTP/2.
        Off = "off",
        /// TLS, certificate not verified: the one that an EPP makes for itself carries no name.
        Insecure = "insecure",
        /// TLS, verified against `ca_file`.
        Ca = "ca",
        /// TLS, with a certificate of one of the public keys in `pins`, whatever else it says.
        Pinned = "pinned",
    }
}

/// SHA-256 of a public key (the SubjectPublicKeyInfo, DER), 64 hexadecimal digits:
/// `openssl x509 -in epp.pem -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin(pub [u8; 32]);

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn pins() -> OneOrMore<Pin> {
    let parse = |text: &str| {
        let mut pin = [0; 32];
        for (byte, digits) in pin.iter_mut().zip(Some(text).filter(|text| text.len() == 64)?.as_bytes().chunks(2)) {
            let digit = |at: usize| char::from(digits[at]).to_digit(16).map(|digit| digit as u8);
            *byte = digit(0)? << 4 | digit(1)?;
        }
        Some(Pin(pin))
    };
    let value = Value::text("the SHA-256 of a public key, 64 hexadecimal digits", parse, ToString::to_string);
    value.schema(json!({ "type": "string", "pattern": "^[0-9A-Fa-f]{64}$" })).one_or_more()
}

impl Group for EppTlsKeys {
    type Value = EppTls;

    fn resolve(self, section: &Section<'_>) -> EppTls {
        let needed = [
            ("ca_file", r#"tls = "ca" beside it"#, EppTlsMode::Ca),
            ("pins", r#"tls = "pinned" beside it"#, EppTlsMode::Pinned),
        ];
        for (key, needs, mode) in needed {
            if section.has(key) && self.tls != mode {
                section.reject(key, UNUSED, needs);
            }
        }
        match self.tls {
            EppTlsMode::Off => EppTls::Off,
            EppTlsMode::Insecure => EppTls::Insecure,
            EppTlsMode::Ca => {
                if self.ca_file.is_none() {
                    section.reject("ca_file", "nothing", "the file with the CA's certificate");
                }
                EppTls::Ca(self.ca_file.unwrap_or_default())
            }
            EppTlsMode::Pinned => {
                if !section.has("pins") {
                    section.reject("pins", "nothing", "the SHA-256 of at least one public key");
                }
                EppTls::Pinned(self.pins)
            }
        }
    }
}

/// Two PEM files, which are read again when they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The certificate, and those between it and the EPP's CA.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

settings! {
    /// For an EPP that wants to know who asks.
    struct ClientCertificateKeys {
        /// With TLS only, for an EPP that wants to know who asks: PEM, the certificate and those between it and the EPP's CA. Read again
        /// when it changes; a relative path starts at the folder of this file.
        client_cert_file: Option<PathBuf> = None => value::file().example("client.pem"),
        /// PEM, the key of `client_cert_file`. Read again when it changes; a relative path starts at the folder of this file.
        client_key_file: Option<PathBuf> = None => value::file().example("client.key"),
    }
}

impl Group for ClientCertificateKeys {
    type Value = Option<ClientCertificate>;

    fn resolve(self, _: &Section<'_>) -> Option<ClientCertificate> {
        Some(ClientCertificate { certificate: self.client_cert_file?, key: self.client_key_file? })
    }
}

impl Epp {
    /// The EPP at `host:port`, without TLS.
    pub fn new(address: impl Into<String>) -> Self {
        Self { addresses: vec![address.into()], ..Self::default() }
    }

    pub(super) fn check(&self, section: &Section<'_>) {
        if !section.has("address") {
            section.reject("address", "nothing", "host:port of the EPP");
        }
        for (index, address) in self.addresses.iter().enumerate() {
            if self.addresses[..index].contains(address) {
                section.reject(&format!("address[{index}]"), format_args!("{address:?} again"), "each address once");
            }
        }
        self.check_tls(section);
    }

    fn check_tls(&self, section: &Section<'_>) {
        let is_off = self.tls == EppTls::Off;
        if section.has("server_name") && is_off {
            section.reject("server_name", UNUSED, NEEDS_TLS);
        }
        if let Some(name) = self.server_name.as_deref().filter(|name| ServerName::try_from(*name).is_err()) {
            section.reject("server_name", format_args!("{name:?}"), "a DNS name or an IP address");
        }
        for (one, other) in [("client_cert_file", "client_key_file"), ("client_key_file", "client_cert_file")] {
            if section.has(one) && is_off {
                section.reject(one, UNUSED, NEEDS_TLS);
            } else if section.has(one) && !section.has(other) {
                section.reject(one, format_args!("no {other} beside it"), "both or none");
            }
        }
        if section.has("health_tls") && !section.has("health_port") {
            section.reject("health_tls", UNUSED, "health_port beside it");
        }
        if self.health_tls && is_off {
            section.reject("health_tls", r#"tls = "off""#, NEEDS_TLS);
        }
    }

    /// Reads the files that the section names.
    pub(super) fn check_files(&self, section: &Section<'_>) {
        if let EppTls::Ca(file) = &self.tls {
            files::check_roots(section, "ca_file", file);
        }
        if let Some(ClientCertificate { certificate, key }) = &self.client_certificate {
            files::check_key_pair(section, ("client_cert_file", certificate), ("client_key_file", key));
        }
    }
}
