//! `[listen]` and `[listen.tls]`: where clients connect.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use http::HeaderName;

use super::{
    cors::Cors,
    document::Section,
    files,
    server_tls::UNUSED,
    settings::{choice, optional_section, settings},
    value::{self, boolean, duration_or_off, integer},
};

settings! {
    /// Where clients connect.
    pub struct Listen {
        /// Address to listen on. `--listen` and `PENSTOCK_LISTEN` override it.
        pub address: SocketAddr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8080)) => value::listen_address(),
        /// Number of worker threads. 0 starts one per core.
        pub workers: usize = 0 => integer(0..=1024),
        /// Maximum number of concurrent client connections of all workers together.
        pub max_connections: usize = 16_384 => integer(1..=1_048_576),
        /// Maximum number of concurrent requests on one HTTP/2 connection. 0 refuses HTTP/2.
        pub http2_max_streams: u32 = 256 => integer(0..=65_536),
        /// Protocols that a client may upgrade its connection to, if the endpoint agrees. The connection is then relayed in both
        /// directions until one side closes it. `h2c` is not allowed, because the agent would not see the requests in it.
        pub upgrades: Vec<String> = vec!["websocket".to_owned()] => upgrade().list("an array of protocol names"),
        /// A second listener for clients that use TLS (HTTP/1.1 and HTTP/2). Their response bodies are relayed, because the kernel
        /// would send them unencrypted. Off unless the section is present.
        pub tls: Option<ListenTls> = None => optional_section(),
        /// Requests that browsers send for web pages of other origins (CORS). Preflights pass to endpoints unless the section is
        /// present.
        pub cors: Option<Cors> = None => optional_section(),
        /// Number of requests on one HTTP/2 connection that a client may reset before they are answered, or that the agent may reset
        /// because they are malformed; the same number again is allowed in every ten minutes. Beyond it, the agent sends GOAWAY with
        /// ENHANCE_YOUR_CALM.
        pub http2_resets: u32 = 1000 => integer(1..=1_000_000),
        /// Number of frames on one HTTP/2 connection that carry no part of a message (PING, SETTINGS, PRIORITY, WINDOW_UPDATE,
        /// ...), beyond 8 for each frame of a message in either direction; the same number again is allowed in every ten seconds.
        /// Beyond it, the agent sends GOAWAY with ENHANCE_YOUR_CALM.
        pub http2_control_frames: u32 = 1000 => integer(100..=1_000_000),
        /// What happens to a request whose client closes its sending side before the response.
        pub half_close: HalfClose = HalfClose::Cancel => value::choice(),
        /// Whether each connection to `address` begins with a header of the PROXY protocol (version 1 or 2), in which a load balancer
        /// says where it comes from. That is then the client's address: in the access log, in `X-Forwarded-For` and everywhere else. A
        /// connection without the header is closed. The header is believed, so only load balancers may reach such a listener.
        pub proxy_protocol: bool = false => boolean(),
        /// How long a connection of a client may serve new requests, less or more up to a tenth, which differs by connection. After
        /// that, an HTTP/1.1 connection is closed after its current or next response, which says so, and an HTTP/2 connection gets
        /// GOAWAY and is closed after its last response, so that clients connect anew and reach other agents, too. No response is
        /// cut.
        pub max_connection_age: Option<Duration> = None => duration_or_off(),
        /// Maximum number of concurrent TLS handshakes of all workers together. Further clients wait, within `timeouts.head`.
        pub tls_handshakes: usize = 1024 => integer(1..=1_048_576),
    }
}

choice! {
    /// What it means that a client closes its sending side after its request.
    pub enum HalfClose {
        /// The client has left, which is true of most clients that do this: the request is cancelled.
        Cancel = "cancel",
        /// The client waits for its response. The request is cancelled only by a reset, a failed write, or
        /// `timeouts.client_unreachable`. HTTP/1.1 only: an HTTP/2 connection cannot continue with one side closed.
        Answer = "answer",
    }
}

settings! {
    /// A listener for clients that use TLS. Their response bodies are relayed: the kernel would send them unencrypted.
    pub struct ListenTls {
        /// Address to listen on. Its port must differ from those of `listen.address` and `admin.address`.
        pub address: SocketAddr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
            => value::listen_address().required("ip:port to listen on", "0.0.0.0:8443"),
        /// PEM file of the certificate chain, the server's certificate first. It is reloaded when it changes. A relative path is
        /// resolved against the folder of this file.
        pub cert_file: PathBuf = PathBuf::new() => value::required_file("the file with the certificate", "tls.crt"),
        /// PEM file of the private key of `cert_file`. It is reloaded when it changes. A relative path is resolved against the
        /// folder of this file.
        pub key_file: PathBuf = PathBuf::new() => value::required_file("the file with its key", "tls.key"),
        /// PEM file of the CAs whose certificates clients present (mutual TLS). It is reloaded when it changes. A relative path is
        /// resolved against the folder of this file. Unset: clients are not asked for certificates.
        pub client_ca_file: Option<PathBuf> = None => value::file().example("clients.pem"),
        /// With `client_ca_file` only: which clients are accepted.
        pub client_certificates: ClientCertificates = ClientCertificates::Required => value::choice(),
        /// Whether each connection begins with a header of the PROXY protocol, before TLS, as `listen.proxy_protocol`.
        pub proxy_protocol: bool = false => boolean(),
    }
}

choice! {
    /// Which clients are accepted if a CA of their certificates is known.
    pub enum ClientCertificates {
        /// Those with a certificate of one of the CAs.
        Required = "required",
        /// Those, and clients that present no certificate. One with a certificate of another CA is refused.
        Optional = "optional",
    }
}

/// A token (RFC 9110 §5.6.2) other than `h2c`, which would hide requests.
fn upgrade() -> value::Value<String> {
    value::string(r#"the name of a protocol other than "h2c", such as "websocket""#, |text| {
        HeaderName::from_bytes(text.as_bytes()).is_ok() && !text.eq_ignore_ascii_case("h2c")
    })
}

impl Listen {
    pub(super) fn check(&self, section: &Section<'_>) {
        if let Some(cors) = &self.cors {
            cors.check(&section.at("cors"));
        }
        if let Some(tls) = self.tls.as_ref().filter(|tls| collide(tls.address, self.address)) {
            let expected = format_args!("another port than listen.address ({})", self.address);
            section.at("tls").reject("address", tls.address, expected);
        }
        if let Some(tls) = &self.tls
            && tls.client_ca_file.is_none()
            && section.at("tls").has("client_certificates")
        {
            section.at("tls").reject("client_certificates", UNUSED, "client_ca_file in the same section");
        }
    }

    /// Reads the files that the section names.
    pub(super) fn check_files(&self, section: &Section<'_>) {
        if let Some(ListenTls { cert_file, key_file, client_ca_file, .. }) = &self.tls {
            if let Some(file) = client_ca_file {
                files::check_roots(&section.at("tls"), "client_ca_file", file);
            }
            files::check_key_pair(&section.at("tls"), ("cert_file", cert_file), ("key_file", key_file));
        }
    }
}

/// Returns whether the two addresses cannot both be bound.
pub(super) fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}
