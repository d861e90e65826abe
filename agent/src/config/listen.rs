//! `[listen]` and `[listen.tls]`: where clients connect.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use http::HeaderName;

use super::{
    document::Section,
    files,
    settings::{choice, optional_section, settings},
    value::{self, integer},
};

settings! {
    /// Where clients connect.
    pub struct Listen {
        /// `PENSTOCK_LISTEN` and `--listen` win over it.
        pub address: SocketAddr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8080)) => value::listen_address(),
        /// Worker threads; 0 is one per core.
        pub workers: usize = 0 => integer(0..=1024),
        /// Client connections at once over all workers.
        pub max_connections: usize = 16_384 => integer(1..=1_048_576),
        /// Requests at once on one HTTP/2 connection. 0: HTTP/2 is refused.
        pub http2_max_streams: u32 = 256 => integer(0..=65_536),
        /// Protocols that a client may switch its connection to, if the endpoint agrees. The connection is then relayed both ways
        /// until one side ends it. Never `h2c`: requests in it would not be seen.
        pub upgrades: Vec<String> = vec!["websocket".to_owned()] => upgrade().list("an array of protocol names"),
        /// A second listener, for clients that speak TLS (HTTP/1.1 and HTTP/2). The kernel cannot carry their bodies. Off unless
        /// the section is there.
        pub tls: Option<ListenTls> = None => optional_section(),
        /// Requests on one HTTP/2 connection that a client may reset before they are answered. As many more are allowed in ten
        /// minutes. Then GOAWAY with ENHANCE_YOUR_CALM.
        pub http2_resets: u32 = 1000 => integer(1..=1_000_000),
        /// Frames on one HTTP/2 connection that carry no part of a message (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, ...), beyond 8
        /// for each that carries one either way. As many more are allowed in ten seconds. Then GOAWAY with ENHANCE_YOUR_CALM.
        pub http2_control_frames: u32 = 1000 => integer(100..=1_000_000),
        /// What becomes of a request whose client closes its sending side before it has the answer.
        pub half_close: HalfClose = HalfClose::Cancel => value::choice(),
        /// TLS handshakes at once over all workers. Clients that come then wait, within `timeouts.head`.
        pub tls_handshakes: usize = 1024 => integer(1..=1_048_576),
    }
}

choice! {
    /// What a client means that closes its sending side after its request.
    pub enum HalfClose {
        /// It has left, as most clients that do this have: the request is cancelled.
        Cancel = "cancel",
        /// It waits for its answer, which ends with a reset, a failed write, or when its machine is gone. HTTP/1.1 alone: HTTP/2
        /// cannot go on with one side closed.
        Answer = "answer",
    }
}

settings! {
    /// Bodies of these clients are relayed: the kernel would send them plain.
    pub struct ListenTls {
        /// Where to listen; another port than `listen.address` and `admin.address`.
        pub address: SocketAddr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
            => value::listen_address().required("ip:port to listen on", "0.0.0.0:8443"),
        /// PEM, the server's certificate first. Read again when it changes; a relative path starts at the folder of this file.
        pub cert_file: PathBuf = PathBuf::new() => value::required_file("the file with the certificate", "tls.crt"),
        /// PEM, the key of `cert_file`. Read again when it changes; a relative path starts at the folder of this file.
        pub key_file: PathBuf = PathBuf::new() => value::required_file("the file with its key", "tls.key"),
    }
}

/// A token (RFC 9110 §5.6.2), and not the upgrade that hides requests.
fn upgrade() -> value::Value<String> {
    value::string(r#"the name of a protocol other than "h2c", such as "websocket""#, |text| {
        HeaderName::from_bytes(text.as_bytes()).is_ok() && !text.eq_ignore_ascii_case("h2c")
    })
}

impl Listen {
    pub(super) fn check(&self, section: &Section<'_>) {
        if let Some(tls) = self.tls.as_ref().filter(|tls| collide(tls.address, self.address)) {
            let expected = format_args!("another port than listen.address ({})", self.address);
            section.at("tls").reject("address", tls.address, expected);
        }
    }

    /// Reads the files that the section names.
    pub(super) fn check_files(&self, section: &Section<'_>) {
        if let Some(ListenTls { cert_file, key_file, .. }) = &self.tls {
            files::check_key_pair(&section.at("tls"), ("cert_file", cert_file), ("key_file", key_file));
        }
    }
}

/// Whether the two cannot both be bound.
pub(super) fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}
