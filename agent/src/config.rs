//! The configuration: one TOML file, read and checked as a whole before the first socket is bound.
//!
//! The doc comment of a field is its documentation. Durations are strings: `250ms`, `4s`, `5m`, `1h`, or `off` where allowed.
//! A [`Config`] that came out of [`Config::load`] or [`Config::parse`] holds everything this file says; what cannot hold is
//! reported with file, line, key, what was found and what was expected, all of it at once.

mod bbr;
mod default;
mod dns;
mod document;
mod endpoints;
mod error;
mod headers;
mod health;
mod listen;
mod node;
mod overrides;
mod passthrough;
mod picker;
mod pools;
mod process;
mod retry;
mod routes;
mod sections;
mod subset;
mod timeouts;
#[cfg(test)]
mod tests;
mod tracing;
mod value;

pub use default::default_toml;
pub use endpoints::{EndpointsError, EndpointsFormat, is_own, parse_endpoints};
pub use error::{ConfigError, ConfigErrors};
pub use overrides::Overrides;
pub use passthrough::{Network, Passthrough};

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub listen: Listen,
    pub admin: Admin,
    pub limits: Limits,
    pub timeouts: Timeouts,
    pub headers: Headers,
    pub errors: Errors,
    pub bbr: Bbr,
    pub steering: Steering,
    pub tracing: Tracing,
    pub process: Process,
    pub node: Node,
    pub dns: Dns,
    /// At least one; names are unique.
    pub pools: Vec<Pool>,
    /// First match wins. Empty: everything goes to the first pool.
    pub routes: Vec<Route>,
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigErrors> {
        Self::load_with(path, &Overrides::default())
    }

    /// As [`Config::load`], with flags and environment on top, so that the result is checked as it will run.
    pub fn load_with(path: impl AsRef<Path>, overrides: &Overrides) -> Result<Self, ConfigErrors> {
        let path = path.as_ref();
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            ConfigErrors::from(ConfigError::Unreadable { file: file.clone(), reason: error.to_string() })
        })?;
        Self::parse_with(&text, &file, overrides)
    }

    /// Checks `text`; `file_name` appears in errors, and relative paths in the text start at its folder.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, ConfigErrors> {
        Self::parse_with(text, file_name, &Overrides::default())
    }

    pub fn parse_with(text: &str, file_name: &str, overrides: &Overrides) -> Result<Self, ConfigErrors> {
        document::read(text, file_name, |root| sections::config(root, overrides))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// Default `0.0.0.0:8080`.
    pub address: SocketAddr,
    /// Worker threads; 0 (default) is one per core.
    pub workers: usize,
    /// Client connections at once over all workers; default 16384.
    pub max_connections: usize,
    /// Requests at once on one HTTP/2 connection; 0: HTTP/2 is refused; default 256.
    pub http2_max_streams: u32,
    /// Protocols that a client may switch its connection to, if the endpoint agrees; default `websocket`. The connection is
    /// then relayed both ways until one side ends it. `h2c` is none: requests in it would not be seen.
    pub upgrades: Vec<String>,
    /// A second listener, for clients that speak TLS; default none.
    pub tls: Option<ListenTls>,
    /// Requests on one HTTP/2 connection that the client may reset before they are answered; default 1000. As many more are
    /// allowed in ten minutes. Then GOAWAY with ENHANCE_YOUR_CALM.
    pub http2_resets: u32,
    /// Frames on one HTTP/2 connection that carry no part of a message (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, …), beyond 8 for
    /// each that carries one either way; default 1000. As many more are allowed in ten seconds. Then GOAWAY with
    /// ENHANCE_YOUR_CALM.
    pub http2_control_frames: u32,
    /// What becomes of a request whose client closes its sending side before it has the answer; default `cancel`.
    pub half_close: HalfClose,
    /// TLS handshakes at once over all workers; default 1024. Clients that come then wait, within `timeouts.head`.
    pub tls_handshakes: usize,
}

/// What a client means that closes its sending side behind its request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HalfClose {
    /// It has left, as most clients that do this have: the request is cancelled.
    #[default]
    Cancel,
    /// It waits for its answer, which ends with a reset, a failed write, or when its machine is gone. HTTP/1.1 alone: HTTP/2 cannot
    /// go on with one side closed.
    Answer,
}

/// Bodies of these clients are relayed: the kernel would send them plain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenTls {
    pub address: SocketAddr,
    /// PEM, the server's certificate first; read again when it changes. A relative path starts at the folder of the
    /// configuration file.
    pub cert_file: PathBuf,
    /// PEM.
    pub key_file: PathBuf,
}

/// What the endpoints of a pool speak.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AppProtocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 without TLS. Bodies are relayed.
    H2c,
}

/// What a pick is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PickPer {
    /// Each request.
    #[default]
    Request,
    /// A client's HTTP/1.1 connection: what follows the first response goes both ways as it is.
    Connection,
    /// The requests of a client's HTTP/1.1 connection, for a while.
    Lease,
}

/// With `pick_per = "connection"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinLimits {
    /// A connection that has been pinned so long is reset at its next quiet second; default 1 h, can be `off`.
    pub age: Option<Duration>,
}

/// With `pick_per = "lease"`: how long an EPP's decision holds for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseLimits {
    /// Default 10 s.
    pub time: Duration,
    /// Requests, the one that was picked for among them; default 100.
    pub requests: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// `/livez`, `/readyz`, `/metrics`; default `127.0.0.1:9901`.
    pub address: SocketAddr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Request or response head, bytes; default 65536. More is 431 (request) or 502 (response).
    pub head_bytes: usize,
    /// Header fields in a head; default 128.
    pub headers: usize,
    /// Request body, bytes; default 33554432 (32 MiB). More is 413.
    pub body_bytes: u64,
    /// Part of a request body held in memory, the rest goes to an unlinked file; default 1048576.
    pub body_memory_bytes: usize,
    /// Memory that all request bodies together may take; default 268435456 (256 MiB). Beyond it they go to files.
    pub total_body_bytes: u64,
    /// Bytes that they may take in files; default 1073741824 (1 GiB). Beyond it requests are answered with 503. With 0 there are no
    /// files, and `body_memory_bytes` is no limit.
    pub total_spill_bytes: u64,
    /// Bytes that a request body with a `Content-Encoding` may be when it is decoded, which is done to find its model; default
    /// 134217728 (128 MiB). One that is larger is 413 where a route needs the model, and goes on without elsewhere.
    pub decoded_body_bytes: u64,
    /// Least rate of a request body, bytes a second: what it may take in all is `timeouts.body` and the time that it needs at
    /// this rate; default 100. With 0 there is none.
    pub body_min_rate: u64,
    /// Models that metrics tell apart, those named by requests and by responses together; default 100. What comes then counts
    /// as `other`, as does a name longer than 128 bytes. With 0 every model does.
    pub metric_models: usize,
    /// Bytes that are read and discarded of a client that sends on after its answer; default 268435456 (256 MiB). Then its
    /// connection is reset.
    pub linger_bytes: u64,
}

/// `None` is off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// A request head, from its first byte; default 10s. Then 408.
    pub head: Option<Duration>,
    /// No byte of a request body for this long, while the agent waits for one; default 60s. Then 408. See
    /// `limits.body_min_rate`, too.
    pub body: Option<Duration>,
    /// An idle client connection between requests; default 75s. Then it is closed.
    pub keep_alive: Option<Duration>,
    /// TCP connect to an endpoint; default 1s. Then the next of the list, and 504 after the last.
    pub connect: Option<Duration>,
    /// From the request sent to the response head; default 10m. Then 504.
    pub first_byte: Option<Duration>,
    /// No byte of a response for this long, from the endpoint or acknowledged by the client; default 5m. Then the connection is
    /// broken off; over HTTP/2 the stream is reset, and the connection ends with the last of its streams.
    pub idle: Option<Duration>,
    /// The whole of a request, from the first byte of its head to the last byte of the response; default off. Then 504, or
    /// the connection is broken off where the response has begun.
    pub request: Option<Duration>,
    /// An idle endpoint connection in its pool; default 4s, below uvicorn's 5s.
    pub endpoint_keep_alive: Duration,
    /// An endpoint's machine that acknowledges nothing, answers no keepalive probe, or takes no byte, at least 1s; default 45s.
    /// Then the connection is broken: the next of the list if nothing of the request was acknowledged, and otherwise a visible
    /// break.
    pub endpoint_unreachable: Option<Duration>,
    /// From the end of `lame_duck`, how long running responses may take; default 30s.
    pub drain: Duration,
    /// After SIGTERM, how long connections are still accepted while `/readyz` answers 503 and each answer asks for the end of its
    /// connection; default 5s.
    pub lame_duck: Option<Duration>,
    /// A client's machine that acknowledges nothing of what it was sent, or answers no keepalive probe of an idle connection, for so
    /// long, at least 1s; default 45s. Then the client has left. One that is there and takes nothing has `idle`.
    pub client_unreachable: Option<Duration>,
    /// How long a client is read and not listened to after its last answer, so that the answer is not lost to a reset; default 30s.
    pub linger: Duration,
}

/// Timeouts of a pool's or a route's requests. A route's go before its pool's, and those before `[timeouts]`: the outer `None`
/// leaves it to them, the inner one is off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TimeoutOverrides {
    pub body: Option<Option<Duration>>,
    pub first_byte: Option<Option<Duration>>,
    pub idle: Option<Option<Duration>>,
    pub request: Option<Option<Duration>>,
}

/// What requests and responses are told about this hop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers {
    /// Name of this hop in `Via`, of requests and responses; `None` is off; default `penstock`.
    pub via: Option<String>,
    /// `X-Forwarded-For`, `-Proto`, `-Host` and `-Port` of requests; default `append`.
    pub x_forwarded: Forwarding,
    /// `Forwarded` (RFC 7239) of requests; default `off`.
    pub forwarded: Forwarding,
    /// Whether responses carry the `x-request-id` of their request; default false.
    pub request_id_to_client: bool,
}

/// Who is believed about where a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forwarding {
    /// What the client says is kept, and this hop's word is put behind it or where it says nothing: for an agent that only
    /// proxies can reach. Whoever reads it may trust the last element of a list and no other.
    Append,
    /// What the client says is dropped: for an agent that clients reach themselves.
    Replace,
    /// What the client says goes on as it is, and nothing is added.
    Off,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors {
    /// Of the agent's own answers, where `Accept` prefers neither; default `openai`.
    pub format: ErrorFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorFormat {
    /// `{"error": {"message", "type", "param", "code"}}`.
    OpenAi,
    /// The message, and the reason on a line of its own.
    Plain,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bbr {
    /// Read the model from bodies whose Content-Type is JSON; other bodies, and those without a Content-Type, pass unread.
    /// Default true.
    pub enabled: bool,
    /// Request header that carries the model to picker and endpoint; default `X-Gateway-Model-Name`.
    pub header: http::HeaderName,
    /// What it means when a JSON body names no model: has none, an empty one, null, an array or an object. (A number, `true`
    /// and `false` name a model by their text.) Default `pass`.
    pub missing_model: MissingModel,
    /// Request header that carries the base model of the model; default `X-Gateway-Base-Model-Name`.
    pub base_model_header: http::HeaderName,
    /// Adapters, each with its base model; default none. A base model that is named here is its own.
    pub base_models: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum MissingModel {
    /// The request goes on without a model.
    #[default]
    Pass,
    /// It is for this model: `default_model`.
    Default(String),
    /// 400.
    Reject,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SteeringMode {
    /// The best path that passed its self-test, where it pays.
    Auto,
    /// The local path for everything that an endpoint on this machine sends, whatever its size, and user space for the rest.
    Local,
    /// The ingress path for everything that can be steered, whatever its size.
    Ingress,
    /// User space carries every byte.
    Off,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Steering {
    pub mode: SteeringMode,
    /// Where the cgroup v2 hierarchy is mounted that the endpoints on this machine live in; default: as /proc/mounts says.
    pub cgroup: Option<PathBuf>,
    /// In `auto`, bodies with a Content-Length below this are relayed; default 16384.
    pub min_bytes: u64,
    /// In `auto`, bodies above this from an endpoint that is not on this machine are relayed (they arrive in small fragments,
    /// which redirect one by one); 0 or at least `min_bytes`; default 65536.
    pub max_remote_bytes: u64,
    /// SO_SNDBUF of a client connection whose response is steered, bytes; default 1048576.
    pub client_send_buffer: u32,
    /// SO_RCVBUF of an endpoint connection, bytes; default 524288.
    pub endpoint_receive_buffer: u32,
    /// Endpoint connections that can be steered at once; default 16384. Sizes the kernel maps.
    pub max_flows: u32,
    /// Steer also on a kernel whose version is known to lose or repeat bytes in sockmap; default false.
    pub force: bool,
}

/// Spans to an OpenTelemetry collector. Trace context is passed on whether this is on or off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracing {
    /// Where the collector takes OTLP over gRPC, such as `http://127.0.0.1:4317`; `None` is off; default off.
    pub otlp_endpoint: Option<String>,
    /// Part of the traces that begin here which are exported; default 1. Of the others the caller's flag decides.
    pub sampling_ratio: Ratio,
    /// `service.name` of the spans; default `penstock`.
    pub service_name: String,
    /// Spans that may wait for the collector; default 4096. What comes then is dropped, and counted.
    pub queue_spans: usize,
    /// How long spans are gathered before they are sent; default 1s.
    pub export_interval: Duration,
}

/// From 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio(f64);

// Never NaN.
impl Eq for Ratio {}

impl Ratio {
    pub const ALL: Self = Self(1.0);

    /// `None` outside of 0 to 1.
    pub fn new(ratio: f64) -> Option<Self> {
        (0.0..=1.0).contains(&ratio).then_some(Self(ratio))
    }

    pub fn get(self) -> f64 {
        self.0
    }
}

/// Who an agent is that was started as root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// User and group that it becomes before it has a second thread; `None` keeps root; default 65534:65534.
    pub user: Option<User>,
    /// Supplementary groups that it has then; default none.
    pub groups: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// Where this agent runs, in the words that endpoints use; `prefer` compares the two.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Default: not known.
    pub name: Option<String>,
    /// Default: not known.
    pub zone: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// Servers to ask instead of the system's (`/etc/resolv.conf`); names are then taken as they are, without search domains.
    pub servers: Vec<SocketAddr>,
    /// One lookup with its repetitions; default 5s.
    pub timeout: Duration,
    /// An answer holds at least this long, whatever its TTL; default 1s.
    pub min_ttl: Duration,
    /// An answer holds at most this long; default 5m.
    pub max_ttl: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureMode {
    /// The EPP fails: an endpoint of the pool, or `default_upstream`.
    Open,
    /// The EPP fails: 503.
    Closed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    pub name: String,
    /// Always in the pool. May be empty with a name or a file beside it, or with an EPP and `passthrough`.
    pub endpoints: Vec<Endpoint>,
    /// A DNS name whose addresses are in the pool, looked up again when their TTL is over.
    pub endpoints_dns: Option<NamedEndpoints>,
    /// A TOML or JSON file of endpoints that is watched; a relative path starts at the folder of the configuration file.
    pub endpoints_file: Option<PathBuf>,
    /// Ports of endpoints that are given as an address without one: each address with each port is an endpoint.
    pub ports: Vec<u16>,
    /// As `appProtocol` of InferencePool v1; default `http1`.
    pub app_protocol: AppProtocol,
    /// Default `request`.
    pub pick_per: PickPer,
    pub pin: PinLimits,
    pub lease: LeaseLimits,
    /// Default `closed`, as in InferencePool v1.
    pub failure_mode: FailureMode,
    /// With `open` only: where it sends requests; default: the built-in picker chooses among `endpoints`.
    pub default_upstream: Option<SocketAddr>,
    /// Endpoints that the EPP may name and the pool does not list; default off. The agent's own listeners are never among them.
    pub passthrough: Passthrough,
    pub picker: Picker,
    /// `picker.session_header`: where the built-in picker chooses, requests with the same value of the first of these headers
    /// that they have go to the same endpoint; default none.
    pub session_headers: Vec<http::HeaderName>,
    pub subset: Subset,
    pub retry: Retry,
    pub ejection: Ejection,
    /// Active checks; default: none.
    pub health: Option<HealthCheck>,
    /// Of its requests; default: none, `[timeouts]` holds.
    pub timeouts: TimeoutOverrides,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// Name of the node it runs on.
    pub node: Option<String>,
    pub zone: Option<String>,
    /// Gets no new requests; those it has may finish. Default false.
    pub draining: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedEndpoints {
    pub name: String,
    /// At least one.
    pub ports: Vec<u16>,
}

/// The part of the pool that requests are to stay in: the hint that the EPP gets, and what the built-in picker chooses from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subset {
    /// The first of these that has an endpoint ready is the subset; default: none, the whole pool.
    pub prefer: Vec<Locality>,
    /// These endpoints and no others are the subset; not together with `prefer`.
    pub endpoints: Vec<SocketAddr>,
    /// What an empty subset means; default `all`.
    pub empty: EmptySubset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locality {
    /// Endpoints with the agent's `node.name`.
    Node,
    /// Endpoints with the agent's `node.zone`.
    Zone,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EmptySubset {
    /// The whole pool: the EPP gets no hint.
    #[default]
    All,
    /// Nothing: the EPP gets the empty list, and answers 503.
    Fail,
}

/// A request that an endpoint may have executed and of whose answer nothing was seen goes to the next endpoint of its list. One of
/// which the endpoint's kernel has acknowledged nothing (no connection, or a kept one that had been closed), or that the endpoint
/// says it has not looked at (HTTP/2), does so whatever is said here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// How often one request may be executed again; 0: each is executed once at most; default 2.
    pub attempts: u32,
    /// Methods of requests that may be executed again; default the idempotent ones (RFC 9110 §9.2.2): GET, HEAD, OPTIONS, TRACE,
    /// PUT and DELETE.
    pub methods: Vec<http::Method>,
    /// How many of the pool's requests of the last ten seconds may be sent again; default 20.
    pub budget_percent: u32,
    /// And besides this many a second; default 10.
    pub budget_min_per_second: u32,
}

/// Passive health: an endpoint that fails requests is avoided for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ejection {
    /// Failures in a row; 0 is off; default 3.
    pub failures: u32,
    /// How long the first ejection lasts; default 5s. Then one request is let through as a probe.
    pub base: Duration,
    /// Each ejection in a row lasts twice as long as the one before, up to this; default 1m.
    pub max: Duration,
    /// Part of the pool that may be ejected at once, and never the last endpoint; default 50.
    pub max_percent: u32,
    /// Whether a response with a 5xx status is a failure; default false.
    pub server_errors: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is asked for with GET; 2xx is healthy.
    pub path: http::uri::PathAndQuery,
    /// Default 5s.
    pub interval: Duration,
    /// From the connect to the response head; default 2s.
    pub timeout: Duration,
    /// Failures in a row until the endpoint is avoided; default 3.
    pub unhealthy_after: u32,
    /// Successes in a row until it is used again; default 1.
    pub healthy_after: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "there is one for each pool")]
pub enum Picker {
    /// Least in-flight with session and prefix affinity, in this process.
    Builtin,
    Epp(Epp),
}

/// How much an EPP may say about one request. Beyond it, it has failed; what it says about a response is then not applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EppLimits {
    /// Fields that it sets or removes besides those that the head has; default 512.
    pub fields: usize,
    /// Their bytes, names and values, besides those that the head has; default 131072.
    pub bytes: usize,
    /// Messages before its decision, besides two for each message that it gets and one for each 256 bytes of a body that it
    /// replaces; default 4096.
    pub messages: usize,
    /// Dynamic metadata of one message, bytes; default 262144.
    pub metadata_bytes: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Epp {
    /// `host:port` of the EPP's gRPC service, one or several. Each address that a host has is a replica. Requests go to the
    /// first replica that serves, in the order of this list and of the addresses of each name, so that all agents ask the same
    /// one and its state is of use; the others are asked when it fails.
    pub addresses: Vec<String>,
    /// Default `off`.
    pub tls: EppTls,
    /// Name to ask for in TLS and, with `ca`, that the certificate must carry; default: the host of the address.
    pub server_name: Option<String>,
    /// What the EPP is shown of us in TLS; default: nothing.
    pub client_certificate: Option<ClientCertificate>,
    /// TCP and TLS; also how long a request waits for the first answer of DNS. Default 1s.
    pub connect_timeout: Duration,
    /// From the end of the request's body to the pick, whatever goes wrong on the way and however many replicas are asked;
    /// default 75s (an EPP may queue requests for a minute). `None` is off.
    pub decision_timeout: Option<Duration>,
    /// Whether a pool with `failure_mode = "open"` opens for a request that the EPP has not decided in time although it has
    /// decided others meanwhile; default false: 503.
    pub open_on_deadline: bool,
    /// How long a response head waits for the EPP's mutation of it; default 100ms, `off` does not wait.
    pub response_timeout: Option<Duration>,
    /// What the EPP sees of response bodies; default `headers`.
    pub response_to_picker: ResponseToPicker,
    /// With `body`: bytes of one response that may wait for the EPP, from 65536 to 1073741824; default 1048576. Beyond it the
    /// EPP is told no more of that response, and the client goes on.
    pub response_queue_bytes: usize,
    /// Header that carries the pick; default `x-gateway-destination-endpoint`.
    pub header: http::HeaderName,
    /// How often each replica's gRPC health is checked; default 5s, `None` is off. A replica that is not serving, or does not
    /// answer within `connect_timeout`, is asked after the others; one that knows nothing of health counts as serving.
    pub health_interval: Option<Duration>,
    /// Where health is served; default: the port of `address`.
    pub health_port: Option<u16>,
    /// Whether `health_port` speaks TLS, as the EPP's port does; default false, as kubelets want it.
    pub health_tls: bool,
    /// The service to ask after; default `envoy.service.ext_proc.v3.ExternalProcessor`.
    pub health_service: String,
    pub limits: EppLimits,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseToPicker {
    /// Nothing but the end.
    Headers,
    /// What it takes to count tokens: the last events of an event stream (which is steered all the same, for 8 KiB of kernel
    /// memory for each endpoint connection), or the whole of a JSON document up to 256 KiB (which is relayed).
    Usage,
    /// Every byte. Such responses are relayed.
    Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EppTls {
    /// Plain HTTP/2.
    Off,
    /// TLS, certificate not verified: the EPP's own default certificate is self-signed without names.
    Insecure,
    /// TLS, verified against this PEM file of CA certificates, which is read again when it changes. A relative path starts at
    /// the folder of the configuration file.
    Ca(PathBuf),
    /// TLS, with a certificate of one of these public keys, whatever else it says. At least one.
    Pinned(Vec<Pin>),
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

/// Two PEM files, which are read again when they change; relative paths start at the folder of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The certificate, and those between it and the EPP's CA.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Every kind of condition that is given must hold; one without any holds always.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    /// One of these.
    pub hosts: Vec<HostPattern>,
    /// As it was sent: neither decoded nor normalised, without query.
    pub path: Option<PathPattern>,
    /// One of these.
    pub methods: Vec<http::Method>,
    /// All of these, of the header as the endpoint gets it: without a client's control headers, with what the agent adds.
    pub headers: Vec<HeaderCondition>,
    /// One of these is the request's model.
    pub models: Vec<ModelPattern>,
    /// One of these is its base model; of those that `bbr.base_models` knows.
    pub base_models: Vec<String>,
    /// At least one, each once, not all of weight 0.
    pub pools: Vec<WeightedPool>,
    /// Of its requests; default: none, the pool's hold.
    pub timeouts: TimeoutOverrides,
}

/// Without port; letter case does not matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostPattern {
    Exact(String),
    /// `*.example.com`: names with one label or more before `.example.com`, which is what is here.
    Below(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathPattern {
    Exact(String),
    /// Whole segments: `/v1` holds for `/v1` and `/v1/models`, not for `/v10`. Without slash at the end, so `/` is empty.
    Prefix(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderCondition {
    pub name: http::HeaderName,
    /// One of the header's lines is this, letter by letter; `None`: the header is there.
    pub value: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelPattern {
    Exact(String),
    /// `llama-*`; of `*` nothing is left, and any model will do.
    Prefix(String),
}

/// A share of a route's requests, each drawn for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedPool {
    /// Name of a pool.
    pub name: String,
    /// Its part of the sum of weights, up to 1000000; default 1. 0 gets nothing.
    pub weight: u32,
}
