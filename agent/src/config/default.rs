//! The defaults, as values and as a file. A test holds the two together.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use http::{HeaderName, Method, uri::PathAndQuery};

use super::{
    Admin, AppProtocol, Bbr, Config, Dns, Ejection, Endpoint, Epp, EppLimits, EppTls, ErrorFormat, Errors, FailureMode,
    Forwarding, HalfClose, Headers, HealthCheck, LeaseLimits, Limits, Listen, MissingModel, Node, Passthrough, PickPer,
    Picker, PinLimits, Pool, Process, Ratio, ResponseToPicker, Retry, Route, Steering, SteeringMode, Subset,
    TimeoutOverrides, Timeouts, Tracing, User, WeightedPool,
};

/// A complete commented file. Its settings are the defaults; what has none is commented out, as `#key = value`.
pub fn default_toml() -> String {
    include_str!("default.toml").to_owned()
}

impl Config {
    /// The defaults around these pools.
    pub fn new(pools: Vec<Pool>) -> Self {
        Self {
            listen: Listen::default(),
            admin: Admin::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            headers: Headers::default(),
            errors: Errors::default(),
            bbr: Bbr::default(),
            steering: Steering::default(),
            tracing: Tracing::default(),
            process: Process::default(),
            node: Node::default(),
            dns: Dns::default(),
            pools,
            routes: Vec::new(),
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8080)),
            workers: 0,
            max_connections: 16_384,
            http2_max_streams: 256,
            upgrades: vec!["websocket".to_owned()],
            tls: None,
            http2_resets: 1000,
            http2_control_frames: 1000,
            half_close: HalfClose::Cancel,
            tls_handshakes: 1024,
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: SocketAddr::from((Ipv4Addr::LOCALHOST, 9901)) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_bytes: 64 << 10,
            headers: 128,
            body_bytes: 32 << 20,
            body_memory_bytes: 1 << 20,
            total_body_bytes: 256 << 20,
            total_spill_bytes: 1 << 30,
            decoded_body_bytes: 128 << 20,
            body_min_rate: 100,
            metric_models: 100,
            linger_bytes: 256 << 20,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            head: Some(Duration::from_secs(10)),
            body: Some(Duration::from_secs(60)),
            keep_alive: Some(Duration::from_secs(75)),
            connect: Some(Duration::from_secs(1)),
            first_byte: Some(Duration::from_secs(600)),
            idle: Some(Duration::from_secs(300)),
            request: None,
            endpoint_keep_alive: Duration::from_secs(4),
            endpoint_unreachable: Some(Duration::from_secs(45)),
            drain: Duration::from_secs(30),
            lame_duck: Some(Duration::from_secs(5)),
            linger: Duration::from_secs(30),
            client_unreachable: Some(Duration::from_secs(45)),
        }
    }
}

impl Default for Headers {
    fn default() -> Self {
        Self {
            via: Some("penstock".to_owned()),
            x_forwarded: Forwarding::Append,
            forwarded: Forwarding::Off,
            request_id_to_client: false,
        }
    }
}

impl Default for Errors {
    fn default() -> Self {
        Self { format: ErrorFormat::OpenAi }
    }
}

impl Default for Bbr {
    fn default() -> Self {
        Self {
            enabled: true,
            header: HeaderName::from_static("x-gateway-model-name"),
            missing_model: MissingModel::Pass,
            base_model_header: HeaderName::from_static("x-gateway-base-model-name"),
            base_models: BTreeMap::new(),
        }
    }
}

impl Default for PinLimits {
    fn default() -> Self {
        Self { age: Some(Duration::from_secs(3600)) }
    }
}

impl Default for LeaseLimits {
    fn default() -> Self {
        Self { time: Duration::from_secs(10), requests: 100 }
    }
}

impl Default for Steering {
    fn default() -> Self {
        Self {
            mode: SteeringMode::Auto,
            cgroup: None,
            min_bytes: 16 << 10,
            max_remote_bytes: 64 << 10,
            client_send_buffer: 1 << 20,
            endpoint_receive_buffer: 512 << 10,
            max_flows: 16_384,
            force: false,
        }
    }
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            sampling_ratio: Ratio::ALL,
            service_name: "penstock".to_owned(),
            queue_spans: 4096,
            export_interval: Duration::from_secs(1),
        }
    }
}

impl Default for Process {
    fn default() -> Self {
        // `nobody` and its group, as most distributions number them.
        Self { user: Some(User { uid: 65_534, gid: 65_534 }), groups: Vec::new() }
    }
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            timeout: Duration::from_secs(5),
            min_ttl: Duration::from_secs(1),
            max_ttl: Duration::from_secs(300),
        }
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 2,
            methods: vec![Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE],
            budget_percent: 20,
            budget_min_per_second: 10,
        }
    }
}

impl Default for Ejection {
    fn default() -> Self {
        Self {
            failures: 3,
            base: Duration::from_secs(5),
            max: Duration::from_secs(60),
            max_percent: 50,
            server_errors: false,
        }
    }
}

impl HealthCheck {
    /// GET `path` every five seconds.
    pub fn new(path: PathAndQuery) -> Self {
        Self {
            path,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            unhealthy_after: 3,
            healthy_after: 1,
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self { address, node: None, zone: None, draining: false }
    }
}

impl Pool {
    /// A pool with the built-in picker that fails closed.
    pub fn new(name: impl Into<String>, endpoints: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            name: name.into(),
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            endpoints_dns: None,
            endpoints_file: None,
            ports: Vec::new(),
            app_protocol: AppProtocol::Http1,
            pick_per: PickPer::Request,
            pin: PinLimits::default(),
            lease: LeaseLimits::default(),
            failure_mode: FailureMode::Closed,
            default_upstream: None,
            passthrough: Passthrough::Off,
            picker: Picker::Builtin,
            session_headers: Vec::new(),
            subset: Subset::default(),
            retry: Retry::default(),
            ejection: Ejection::default(),
            health: None,
            timeouts: TimeoutOverrides::default(),
        }
    }
}

impl Default for EppLimits {
    fn default() -> Self {
        Self { fields: 512, bytes: 128 << 10, messages: 4096, metadata_bytes: 256 << 10 }
    }
}

impl Epp {
    /// The EPP at `host:port`, without TLS.
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            addresses: vec![address.into()],
            tls: EppTls::Off,
            server_name: None,
            client_certificate: None,
            connect_timeout: Duration::from_secs(1),
            decision_timeout: Some(Duration::from_secs(75)),
            open_on_deadline: false,
            response_timeout: Some(Duration::from_millis(100)),
            response_to_picker: ResponseToPicker::Headers,
            response_queue_bytes: 1 << 20,
            header: HeaderName::from_static("x-gateway-destination-endpoint"),
            health_interval: Some(Duration::from_secs(5)),
            health_port: None,
            health_tls: false,
            health_service: "envoy.service.ext_proc.v3.ExternalProcessor".to_owned(),
            limits: EppLimits::default(),
        }
    }
}

impl Route {
    /// All requests to the pool of this name.
    pub fn to(pool: impl Into<String>) -> Self {
        Self { pools: vec![WeightedPool::new(pool, 1)], ..Self::default() }
    }
}

impl WeightedPool {
    pub fn new(name: impl Into<String>, weight: u32) -> Self {
        Self { name: name.into(), weight }
    }
}
