//! `[[pools]]`: each pool's endpoints, its picker, and what happens if the picker fails.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use http::HeaderName;
use serde_json::json;
use thiserror::Error;

use super::{
    ListedEndpoint, NamedEndpoints,
    document::Section,
    ejection::Ejection,
    endpoints,
    health::HealthCheck,
    kubernetes::{InferencePoolRef, InferencePools, Kubernetes},
    node::Node,
    passthrough::{Passthrough, passthrough},
    picker::{self, Picker},
    retry::Retry,
    server_tls::{self, PoolTls, UNUSED},
    settings::{Elsewhere, choice, optional_section, section, settings},
    subset::Subset,
    timeouts::TimeoutOverrides,
    value::{self, duration, duration_or_off, integer},
};
use crate::listeners::Listeners;

settings! {
    /// A named set of endpoints, its picker, and what happens if the picker fails.
    pub struct Pool {
        /// Name of the pool, unique among the pools.
        pub name: String = String::new() => value::pool_name().required("the name of the pool", "default"),
        /// The endpoints, each `"ip:port"` or `{ address = "ip:port", node = "node-1", zone = "zone-a", draining = false }`.
        /// Optional with `endpoints_dns` or `endpoints_file`, and with an EPP and `passthrough`. Several sources are combined.
        pub endpoints: Vec<ListedEndpoint> = Vec::new() => endpoints::listed().shown(json!(["127.0.0.1:8000"])),
        /// DNS name whose addresses are endpoints, at each of `ports`. It is looked up again when its TTL expires. A lookup that
        /// fails or returns no address keeps the previous endpoints.
        pub endpoints_dns: Option<NamedEndpoints> = None => endpoints::named().example("models.default.svc.cluster.local"),
        /// File with `endpoints = [...]` in the form of `endpoints`, as TOML, or as JSON if its name ends in `.json`. It is
        /// reloaded when it changes; if that fails, the previous endpoints are kept. A relative path is resolved against the folder
        /// of this file.
        pub endpoints_file: Option<PathBuf> = None => value::file().example("endpoints.toml"),
        /// Up to 8 ports for addresses without a port: each address with each port is an endpoint.
        pub ports: Vec<u16> = Vec::new() => endpoints::ports().example(json!([8000])),
        /// The InferencePool that this pool is, if the section is present. Its Pods are the endpoints, and its `endpointPickerRef`
        /// names the EPP, to which the settings of `picker` apply; without it, the built-in picker chooses. Excludes `endpoints`,
        /// `endpoints_dns`, `endpoints_file`, `ports`, `app_protocol`, `tls`, `failure_mode` and `picker.address`, which the
        /// InferencePool determines. See docs/kubernetes.md.
        pub inference_pool: Option<InferencePoolRef> = None => optional_section(),
        /// The InferencePools that have the settings of this section, if it is present. The section is then no pool itself. Excludes
        /// the same settings as `inference_pool`.
        pub inference_pools: Option<InferencePools> = None => optional_section(),
        /// Why requests of an InferencePool cannot be served. Not a setting: what Kubernetes says.
        pub unusable: Option<UnusablePool> = None => Elsewhere(|_| None),
        /// Protocol of the endpoints, as `appProtocol` of InferencePool v1.
        pub app_protocol: AppProtocol = AppProtocol::Http1 => value::choice(),
        /// TLS to the endpoints. Required with `app_protocol = "https"`, and for nothing else.
        pub tls: Option<PoolTls> = None => optional_section(),
        /// How long a pick is used. `connection` and `lease` apply only to HTTP/1.1 clients and endpoints, and only if the EPP
        /// changes nothing in the request except its destination and its trace context; `connection` only if the route changes
        /// nothing either.
        pub pick_per: PickPer = PickPer::Request => value::choice(),
        /// With `pick_per = "connection"`: limits of a pinned connection.
        pub pin: PinLimits = PinLimits::default() => section(),
        /// With `pick_per = "lease"`: how long a pick is used for the requests of a connection.
        pub lease: LeaseLimits = LeaseLimits::default() => section(),
        /// What happens to requests if the EPP fails.
        pub failure_mode: FailureMode = FailureMode::Closed => value::choice(),
        /// With `failure_mode = "open"` only: server that gets the requests if the EPP fails. Unset: the built-in picker chooses an
        /// endpoint of the pool.
        pub default_upstream: Option<SocketAddr> = None => value::endpoint().optional("127.0.0.1:8001"),
        /// Which endpoints the EPP may name that are not in the pool. `false`: none. `true`: all except loopback and link-local
        /// addresses (clouds serve metadata there). An array of networks, such as `["10.0.0.0/8"]`: exactly those. The agent's own
        /// listeners are never allowed.
        pub passthrough: Passthrough = Passthrough::Off => passthrough(),
        /// How the endpoint of a request is chosen.
        pub picker: Picker = Picker::Builtin => section(),
        /// `picker.session_header`, for the built-in picker.
        pub session_headers: Vec<HeaderName> = Vec::new() => Elsewhere(picker::session_headers),
        /// The endpoints that are preferred for requests: an EPP gets them as a hint, the built-in picker chooses among them. If
        /// the EPP picks an endpoint outside of the subset, the request goes there.
        pub subset: Subset = Subset::default() => section(),
        /// When a request is sent to the next endpoint of its pick although the failed one may have executed it. These limits do
        /// not apply to a request of which the endpoint acknowledged no byte, or that it declared unprocessed (HTTP/2): it is
        /// always sent again. A request that exceeds `timeouts.first_byte` is never sent again. A request never moves to another
        /// pool.
        pub retry: Retry = Retry::default() => section(),
        /// When an endpoint that fails requests is avoided for a time (passive health).
        pub ejection: Ejection = Ejection::default() => section(),
        /// Active health checks of each endpoint. Off unless the section is present.
        pub health: Option<HealthCheck> = None => optional_section(),
        /// After this time without a byte of an event stream, the client gets a comment (`:`), so that proxies in between do not take
        /// the connection for idle. Only between events, and not in bodies with a length or a content coding. Event streams of the
        /// pool are then relayed. `timeouts.idle` applies to the endpoint as ever.
        pub sse_keepalive: Option<Duration> = None => duration_or_off(),
        /// Timeouts of requests to this pool. Unset keys use `[timeouts]`.
        pub timeouts: TimeoutOverrides = TimeoutOverrides::default() => section(),
    }
}

/// Why requests of a pool that is an InferencePool cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UnusablePool {
    /// The API server has not answered so far.
    #[error("the InferencePool {0} has not been read from the Kubernetes API yet")]
    Unread(InferencePoolRef),
    /// It was deleted, or never created.
    #[error("the InferencePool {0} does not exist")]
    Absent(InferencePoolRef),
    /// It cannot be followed, for the reason in the second part.
    #[error("the InferencePool {0} is invalid: {1}")]
    Invalid(InferencePoolRef, String),
}

choice! {
    /// Protocol of the endpoints of a pool.
    pub enum AppProtocol {
        /// HTTP/1.1.
        Http1 = "http1",
        /// HTTP/2 without TLS. Bodies are relayed.
        H2c = "h2c",
        /// HTTP/1.1 over TLS, as `[pools.tls]` says. Bodies are relayed.
        Https = "https",
    }
}

choice! {
    /// How long a pick is used.
    pub enum PickPer {
        /// For one request.
        Request = "request",
        /// For a client connection, which stays with one endpoint connection: after the first response, bytes are relayed in both
        /// directions unchanged.
        Connection = "connection",
        /// For the requests of a client connection, within the limits of `[pools.lease]`.
        Lease = "lease",
    }
}

choice! {
    /// What happens to requests if the EPP fails.
    pub enum FailureMode {
        /// Requests go to `default_upstream`, or to an endpoint of the pool.
        Open = "open",
        /// Requests are answered with 503, as in InferencePool v1.
        Closed = "closed",
    }
}

settings! {
    /// With `pick_per = "connection"`: limits of a pinned connection.
    #[derive(Copy)]
    pub struct PinLimits {
        /// Maximum age of a pinned connection. After it, the connection is reset when it has been idle for a second.
        pub age: Option<Duration> = Some(Duration::from_secs(3600)) => duration_or_off(),
    }
}

settings! {
    /// With `pick_per = "lease"`: how long a pick is used for the requests of a connection.
    #[derive(Copy)]
    pub struct LeaseLimits {
        /// How long a lease lasts, from the pick.
        pub time: Duration = Duration::from_secs(10) => duration(),
        /// Maximum number of requests of a lease, including the one that was picked for.
        pub requests: u32 = 100 => integer(1..=1_000_000),
    }
}

impl Pool {
    /// A pool with the built-in picker that fails closed.
    pub fn new(name: impl Into<String>, endpoints: impl IntoIterator<Item = SocketAddr>) -> Self {
        let endpoints = endpoints.into_iter().map(Into::into).collect();
        Self { name: name.into(), endpoints, ..Self::default() }
    }

    /// Returns whether the pool has a source of endpoints. What a name or a file will return is not known yet.
    fn has_endpoints(&self) -> bool {
        !self.endpoints.is_empty() || self.endpoints_dns.is_some() || self.endpoints_file.is_some()
    }

    fn check(&self, section: &Section<'_>, listen: SocketAddr, own: &Listeners, node: &Node) {
        endpoints::check_listed(section, &self.ports, listen);
        self.check_own(section, own);
        if let Some(key) = self.discovered_by() {
            check_discovered(section, key);
        } else {
            self.check_endpoints(section);
            self.check_failure_mode(section);
        }
        match &self.tls {
            Some(_) if self.app_protocol != AppProtocol::Https => {
                section.reject("tls", UNUSED, r#"app_protocol = "https""#);
            }
            Some(tls) => tls.check(&section.at("tls")),
            None if self.app_protocol == AppProtocol::Https => {
                section.reject("app_protocol", r#""https" without TLS settings"#, "a section [pools.tls]");
            }
            None => {}
        }
        self.picker.check(&section.at("picker"), self.discovered_by().is_some());
        self.subset.check(&section.at("subset"), node);
        self.check_subset(&section.at("subset"));
        self.ejection.check(&section.at("ejection"));
    }

    /// The setting by which Kubernetes determines the pool, if one does.
    fn discovered_by(&self) -> Option<&'static str> {
        let one = self.inference_pool.is_some().then_some("inference_pool");
        one.or(self.inference_pools.is_some().then_some("inference_pools"))
    }

    fn check_endpoints(&self, section: &Section<'_>) {
        let named_by_epp = matches!(self.picker, Picker::Epp(_)) && !self.passthrough.is_off();
        let has_wrong = section.has("endpoints") && !section.is_empty_array("endpoints");
        if !self.has_endpoints() && !named_by_epp && !has_wrong {
            section.reject(
                "endpoints",
                "none",
                r#"at least one, endpoints_dns, endpoints_file, or picker.kind = "epp" with passthrough = true"#,
            );
        }
    }

    /// If all endpoints are known: rejects others.
    fn check_subset(&self, subset: &Section<'_>) {
        let is_listed = self.endpoints_dns.is_none() && self.endpoints_file.is_none() && self.inference_pool.is_none();
        let has_no_use = self.endpoints.is_empty() || !self.subset.prefer.is_empty();
        if !is_listed || !self.passthrough.is_off() || has_no_use {
            return;
        }
        for (index, address) in self.subset.endpoints.iter().enumerate() {
            if !self.endpoints.iter().any(|endpoint| endpoint.address == *address) {
                subset.reject(
                    &format!("endpoints[{index}]"),
                    format_args!("\"{address}\""),
                    "one of the pool's endpoints",
                );
            }
        }
    }

    /// Rejects the agent's own listeners: requests to them would loop.
    fn check_own(&self, section: &Section<'_>, own: &Listeners) {
        let expected = "an address where this agent does not listen";
        if let Some(upstream) = self.default_upstream.filter(|upstream| own.accept(*upstream)) {
            section.reject("default_upstream", format_args!("\"{upstream}\""), expected);
        }
        if let Picker::Epp(epp) = &self.picker {
            let addresses = epp.addresses.iter().filter_map(|address| address.parse().ok());
            for address in addresses.filter(|address| own.accept(*address)) {
                section.at("picker").reject("address", format_args!("\"{address}\""), expected);
            }
        }
    }

    fn check_failure_mode(&self, section: &Section<'_>) {
        let unused = r#"failure_mode "closed", which never uses it"#;
        match self.failure_mode {
            FailureMode::Closed if matches!(&self.picker, Picker::Epp(epp) if epp.open_on_deadline) => {
                section.at("picker").reject("open_on_deadline", unused, r#"failure_mode = "open""#);
            }
            FailureMode::Closed if self.default_upstream.is_some() => {
                section.reject("default_upstream", unused, r#"failure_mode = "open""#);
            }
            FailureMode::Open if self.default_upstream.is_none() && !self.has_endpoints() => {
                section.reject("failure_mode", r#""open" without a destination"#, "endpoints or default_upstream");
            }
            FailureMode::Closed | FailureMode::Open => {}
        }
    }
}

/// Rejects settings that the InferencePool determines.
fn check_discovered(section: &Section<'_>, by: &str) {
    if cfg!(not(feature = "kubernetes")) {
        let found = "a setting of the feature `kubernetes`, which this build lacks";
        section.reject(by, found, "a build with that feature");
    }
    if section.has("inference_pool") && section.has("inference_pools") {
        section.reject("inference_pools", "both inference_pool and inference_pools", "one of them");
    }
    for key in ["endpoints", "endpoints_dns", "endpoints_file", "ports", "app_protocol", "tls", "failure_mode"] {
        if section.has(key) {
            section.reject(key, "a setting that the InferencePool determines", format_args!("{by} alone"));
        }
    }
}

pub(super) fn check(
    pools: &[Pool],
    root: &Section<'_>,
    listen: SocketAddr,
    own: &Listeners,
    node: &Node,
    kubernetes: &Kubernetes,
) {
    for (index, (pool, section)) in pools.iter().zip(root.each("pools")).enumerate() {
        pool.check(&section, listen, own, node);
        if pools[..index].iter().any(|other| other.name == pool.name) {
            section.reject("name", format_args!("{:?} again", pool.name), "a name that no other pool has");
        }
        if let Some(selected) = &pool.inference_pools {
            selected.check(&section.at("inference_pools"), kubernetes.gateway.as_ref());
            if pools[..index].iter().any(|other| other.inference_pools.as_ref() == Some(selected)) {
                section.reject("inference_pools", "a second section for the same InferencePools", "one section");
            }
        }
    }
    if pools.is_empty() && kubernetes.gateway.is_none() {
        root.reject("pools", "none", "at least one [[pools]] section");
    }
}

/// Reads the files that the pools name.
pub(super) fn check_files(pools: &[Pool], root: &Section<'_>) {
    for (pool, section) in pools.iter().zip(root.each("pools")) {
        if let Picker::Epp(epp) = &pool.picker {
            epp.check_files(&section.at("picker"));
        }
        if let Some(tls) = &pool.tls {
            server_tls::check_files(&section.at("tls"), &tls.verify, tls.client_certificate.as_ref());
        }
    }
}
