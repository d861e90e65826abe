//! `[pools.picker]` with `kind = "epp"`: an EPP, its replicas, and TLS to them.

use std::time::Duration;

use http::HeaderName;
use rustls::pki_types::ServerName;

use super::{
    FailureMode,
    document::Section,
    metadata::EppMetadata,
    server_tls::{self, ClientCertificate, ClientCertificateKeys, EppTlsKeys, ServerTls, UNUSED},
    settings::{Elsewhere, choice, keys, section, settings},
    value::{self, boolean, duration, duration_or_off, integer},
};

const NEEDS_TLS: &str = r#"a tls other than "off""#;

settings! {
    /// Settings of a pool whose picker is an EPP.
    pub struct Epp {
        /// `host:port` of the EPP's gRPC service, `unix:/path` of its socket on this machine, or an array of them. Each address of a host in DNS is a replica. Requests go to
        /// the first replica that serves, in the order of the array and then of the addresses, and to the next one if it fails; all
        /// agents therefore ask the same replica, whose state covers all requests.
        pub addresses: Vec<String> = Vec::new()
            => epp_address().one_or_more().named("address").example("127.0.0.1:9002"),
        /// Whether the replicas are those of a Kubernetes Service instead of the addresses in DNS.
        pub is_service: bool = false => Elsewhere(|_| None),
        /// How the agent connects to the EPP.
        pub tls: ServerTls = ServerTls::Off => keys::<EppTlsKeys>(),
        /// With TLS only: server name to send (SNI), instead of the host of `address`. With `tls = "ca"`, the certificate must be
        /// for this name.
        pub server_name: Option<String> = None => value::non_empty().optional("epp.example.com"),
        /// The certificate that the agent presents to the EPP.
        pub client_certificate: Option<ClientCertificate> = None => keys::<ClientCertificateKeys>(),
        /// How long connecting to the EPP (TCP, TLS and the server's HTTP/2 SETTINGS) may take, and how long a request waits for the
        /// first DNS answer.
        pub connect_timeout: Duration = Duration::from_secs(1) => duration(),
        /// With `failure_mode = "closed"` only: how long `/readyz` waits after the start until each worker has connected to the EPP
        /// once. After that the agent counts as ready without it. `"off"` does not wait.
        pub start_wait: Option<Duration> = Some(Duration::from_secs(10)) => duration_or_off(),
        /// How long a request waits for a replica if none can be connected, as while an EPP with one replica restarts, or if the last
        /// one that was asked answers with the gRPC status UNAVAILABLE, as one that drains does. After that,
        /// `failure_mode` applies. Unset: `"2s"` with `failure_mode = "closed"` and `"off"` with `"open"`. The wait counts against
        /// `decision_timeout`.
        pub unreachable_wait: Option<Option<Duration>> = None => duration_or_off().optional("2s"),
        /// Maximum number of requests of the pool that wait for a replica. `failure_mode` applies to further ones at once.
        pub unreachable_wait_requests: usize = 4096 => integer(1..=1_000_000),
        /// Maximum size of the bodies of these requests together, in bytes. `failure_mode` applies at once to a request that exceeds
        /// it. The bodies also count against the limits of all bodies.
        pub unreachable_wait_bytes: u64 = 128 << 20 => integer(0..=1 << 50),
        /// How long a request waits for the pick after the end of its body, over all replicas and retries. An EPP may queue
        /// requests.
        pub decision_timeout: Option<Duration> = Some(Duration::from_secs(75)) => duration_or_off(),
        /// Whether a request that the EPP holds back fails open. An EPP that decided other requests during `decision_timeout` holds
        /// this one back on purpose: it is answered with 503, unless this is true and `failure_mode` is `"open"`. An EPP that
        /// decided none has failed: `failure_mode` applies, and no further request waits for it until it decides one again.
        pub open_on_deadline: bool = false => boolean(),
        /// How long a response head waits for the mutation that the EPP may make of it. With `response_to_picker = "body"`, the head
        /// of a response that has a body waits until the EPP has replied to it or answered for the body. An EPP that does neither
        /// counts as failed `timeouts.idle` after the body's end, or after it has stopped reading.
        pub response_timeout: Option<Duration> = Some(Duration::from_millis(100)) => duration_or_off(),
        /// What the EPP sees of request bodies.
        pub body_to_picker: BodyToPicker = BodyToPicker::Whole => value::choice(),
        /// With `body_to_picker = "abridged"`: bytes of strings that the EPP gets of a body. Shorter bodies are sent whole.
        pub body_to_picker_bytes: usize = 64 << 10 => integer(1024..=64 << 20),
        /// What the EPP sees of response bodies, and whether it answers for them.
        pub response_to_picker: ResponseToPicker = ResponseToPicker::Usage => value::choice(),
        /// With `response_to_picker = "body"`: bytes of one response that are kept until the EPP has answered for them, so that they
        /// can be sent as they are if it fails. Beyond it, what is kept is dropped, and the response continues. Also the size up to
        /// which a response with a length is held back until it is complete. Counts against `limits.total_body_memory_bytes`.
        pub response_queue_bytes: usize = 1 << 20 => integer(64 << 10..=1 << 30),
        /// Header in which the EPP names the picked endpoints.
        pub header: HeaderName = HeaderName::from_static("x-gateway-destination-endpoint")
            => value::header_name().named("destination_header").was("header"),
        /// Interval between the gRPC health checks of each replica. A replica that is not serving, or that does not answer within
        /// `connect_timeout`, is asked after the others. A replica that does not implement health checks, or does not know the
        /// service, counts as serving.
        pub health_interval: Option<Duration> = Some(Duration::from_secs(5)) => duration_or_off(),
        /// Port of the health service, if it is not that of `address`. EPPs with default settings use 9003.
        pub health_port: Option<u16> = None => integer(1..=u16::MAX).optional(9003),
        /// With `health_port` only: whether the health service uses TLS, as the EPP does.
        pub health_tls: bool = false => boolean(),
        /// Name of the service whose health is checked. The light EPP of the conformance suite uses `inference-extension`.
        pub health_service: String = "envoy.service.ext_proc.v3.ExternalProcessor".to_owned() => value::non_empty(),
        /// Limits of what the EPP may send for one request. If it exceeds them before its decision, it has failed; if it exceeds
        /// them for a response, its mutation of the response is not applied.
        pub limits: EppLimits = EppLimits::default() => section(),
        /// What becomes of the dynamic metadata of the EPP's replies.
        pub metadata: EppMetadata = EppMetadata::default() => section(),
    }
}

choice! {
    /// What the EPP sees of request bodies.
    pub enum BodyToPicker {
        /// Every byte, while the client uploads.
        Whole = "whole",
        /// Of a JSON body that is longer than `body_to_picker_bytes`: the same document, in which strings end early. Each string
        /// keeps its first 64 bytes and the model's name is whole; what is longer is cut once `body_to_picker_bytes` of it were sent.
        /// The field `x-penstock-body-length` has the length of the client's body, Content-Length that of the abridged one. The
        /// endpoint gets the client's body; a model that the EPP changes is changed in it. If the EPP changes anything else, it is
        /// asked again with the whole body, and the pool's next long bodies are sent whole for one minute. The EPP is asked when the
        /// body is complete. Bodies with a content coding, those that are not JSON, and those of which more than
        /// `body_to_picker_bytes` cannot be cut are sent whole.
        Abridged = "abridged",
    }
}

choice! {
    /// What the EPP sees of response bodies, and whether it answers for them.
    pub enum ResponseToPicker {
        /// Nothing of the response, not even its head. The EPP's stream stays open until the response has ended, and then closes.
        Off = "off",
        /// The head, the first event of an event stream, and the end. An EPP learns when the first token came and when the request
        /// ended.
        Headers = "headers",
        /// The same and what is needed to count tokens: the last events of an event stream (it is still steered, for 8 KiB of kernel
        /// memory for each endpoint connection), or a JSON document of up to 256 KiB (it is relayed).
        Usage = "usage",
        /// Every byte, and the client gets what the EPP returns, as ext_proc says for bodies in full duplex: an EPP has to answer. If
        /// it fails or does not answer for `timeouts.idle`, a pool with `failure_mode = "open"` continues with the endpoint's own
        /// bytes if it is known which of them the EPP has not answered for; otherwise the response is broken off. Trailers are sent
        /// after the body, whose last message then does not end the response; the EPP's reply to them does. An EPP that has answered
        /// for the body and does not reply to the trailers within a second is sent the end of the body instead for ten minutes, and
        /// clients get the endpoint's trailers. A body in the reply to the head (`CONTINUE_AND_REPLACE`) is the whole body, and goes
        /// out with that reply's status and fields or not at all; a reply of this kind without a body leaves the endpoint's body as it
        /// is, and the EPP is sent no more of it. Header mutations in replies to the body have no effect. Such responses are relayed.
        Body = "body",
    }
}

settings! {
    /// Limits of what an EPP may send for one request. If it exceeds them before its decision, it has failed; if it exceeds them
    /// for a response, its mutation of the response is not applied.
    #[derive(Copy)]
    pub struct EppLimits {
        /// Maximum number of fields that the EPP sets or removes, in addition to the number of fields in the head.
        pub fields: usize = 512 => integer(16..=8192),
        /// Maximum size of the names and values of these fields in bytes, in addition to their size in the head.
        pub bytes: usize = 128 << 10 => integer(1024..=4 << 20).named("field_bytes").was("bytes"),
        /// Maximum number of messages before the decision, in addition to two for each message sent to the EPP and one for each 256
        /// bytes of a replaced body.
        pub messages: usize = 4096 => integer(16..=1_000_000),
        /// Maximum size of the dynamic metadata in one message, in bytes.
        pub metadata_bytes: usize = 256 << 10 => integer(1024..=16 << 20),
    }
}

/// A host with a port, or the absolute path of a Unix socket, which `sockaddr_un` bounds.
fn epp_address() -> value::Value<String> {
    const LONGEST: usize = 107;
    value::string(r#"host:port, such as "epp.default.svc:9002", or unix:/path"#, |text| {
        match text.strip_prefix("unix:") {
            Some(path) => path.starts_with('/') && path.len() <= LONGEST && !path.contains('\0'),
            None => value::is_host_port(text),
        }
    })
}

/// `unreachable_wait` of a pool that fails closed.
const UNREACHABLE_WAIT: Duration = Duration::from_secs(2);

impl Epp {
    /// Whether the replicas, the connections to them and the checks of their health are those of `other`. The settings that may
    /// differ are looked up for each request.
    pub fn has_same_replicas(&self, other: &Self) -> bool {
        let per_request = other.clone();
        let with_those_of_other = Self {
            start_wait: per_request.start_wait,
            unreachable_wait: per_request.unreachable_wait,
            unreachable_wait_requests: per_request.unreachable_wait_requests,
            unreachable_wait_bytes: per_request.unreachable_wait_bytes,
            decision_timeout: per_request.decision_timeout,
            open_on_deadline: per_request.open_on_deadline,
            response_timeout: per_request.response_timeout,
            body_to_picker: per_request.body_to_picker,
            body_to_picker_bytes: per_request.body_to_picker_bytes,
            response_to_picker: per_request.response_to_picker,
            response_queue_bytes: per_request.response_queue_bytes,
            limits: per_request.limits,
            ..self.clone()
        };
        with_those_of_other == *other
    }

    /// How long a request of a pool with this failure mode waits for a replica.
    pub fn unreachable_wait(&self, mode: FailureMode) -> Option<Duration> {
        self.unreachable_wait.unwrap_or((mode == FailureMode::Closed).then_some(UNREACHABLE_WAIT))
    }

    /// The EPP at `host:port`, without TLS.
    pub fn new(address: impl Into<String>) -> Self {
        Self { addresses: vec![address.into()], ..Self::default() }
    }

    pub(super) fn check(&self, section: &Section<'_>, is_discovered: bool) {
        match (section.has("address"), is_discovered) {
            (false, false) => section.reject("address", "nothing", "host:port of the EPP"),
            (true, true) => {
                let expected = "no address: the endpointPickerRef of the InferencePool names the EPP";
                section.reject("address", "an address in a pool with inference_pool", expected);
            }
            (true, false) | (false, true) => {}
        }
        for (index, address) in self.addresses.iter().enumerate() {
            if self.addresses[..index].contains(address) {
                section.reject(&format!("address[{index}]"), format_args!("{address:?} again"), "each address once");
            }
        }
        let is_unix = |address: &String| address.starts_with("unix:");
        if section.has("health_port") && self.addresses.iter().any(is_unix) {
            section.reject("health_port", "a port of an EPP at a Unix socket", "health on the same socket");
        }
        self.check_tls(section);
        self.metadata.check(&section.at("metadata"));
    }

    fn check_tls(&self, section: &Section<'_>) {
        let is_off = self.tls == ServerTls::Off;
        if section.has("server_name") && is_off {
            section.reject("server_name", UNUSED, NEEDS_TLS);
        }
        if let Some(name) = self.server_name.as_deref().filter(|name| ServerName::try_from(*name).is_err()) {
            section.reject("server_name", format_args!("{name:?}"), "a DNS name or an IP address");
        }
        for key in ["client_cert_file", "client_key_file"] {
            if section.has(key) && is_off {
                section.reject(key, UNUSED, NEEDS_TLS);
            }
        }
        if !is_off {
            server_tls::check_client_certificate(section);
        }
        if section.has("health_tls") && !section.has("health_port") {
            section.reject("health_tls", UNUSED, "health_port in the same section");
        }
        if self.health_tls && is_off {
            section.reject("health_tls", r#"tls = "off""#, NEEDS_TLS);
        }
    }

    /// Reads the files that the section names.
    pub(super) fn check_files(&self, section: &Section<'_>) {
        server_tls::check_files(section, &self.tls, self.client_certificate.as_ref());
    }
}
