//! `[[pools]]`: the endpoints of each pool, its picker, and where requests go when the picker fails.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use http::HeaderName;
use serde_json::json;

use super::{
    Endpoint, NamedEndpoints,
    document::Section,
    ejection::Ejection,
    endpoints,
    health::HealthCheck,
    node::Node,
    passthrough::{Passthrough, passthrough},
    picker::{self, Picker},
    retry::Retry,
    settings::{Elsewhere, choice, optional_section, section, settings},
    subset::Subset,
    timeouts::TimeoutOverrides,
    value::{self, duration, duration_or_off, integer},
};
use crate::listeners::Listeners;

settings! {
    /// A named set of endpoints, its picker, and where requests go when the picker fails.
    pub struct Pool {
        /// Unique among the pools.
        pub name: String = String::new() => value::pool_name().required("the name of the pool", "default"),
        /// `"ip:port"` or `{ address = "ip:port", node = "node-1", zone = "zone-a", draining = false }` each. May be left out with
        /// `endpoints_dns` or `endpoints_file`, and with an EPP and `passthrough`; where several are given, the pool is all of them.
        pub endpoints: Vec<Endpoint> = Vec::new() => endpoints::listed().shown(json!(["127.0.0.1:8000"])),
        /// A name whose addresses are endpoints, at each of `ports`; looked up again when its TTL is over. A lookup that fails, or
        /// that finds no address, changes nothing.
        pub endpoints_dns: Option<NamedEndpoints> = None => endpoints::named().example("models.default.svc.cluster.local"),
        /// A file that is watched, with `endpoints = [...]` in the form of `endpoints`, as TOML or, if its name ends in .json, as
        /// JSON; a relative path starts at the folder of this file. While it cannot be read or is wrong, what it said before holds.
        pub endpoints_file: Option<PathBuf> = None => value::file().example("endpoints.toml"),
        /// Up to 8 ports for addresses that are given without one: each address with each port is an endpoint.
        pub ports: Vec<u16> = Vec::new() => endpoints::ports().example(json!([8000])),
        /// What the endpoints speak, as `appProtocol` of InferencePool v1.
        pub app_protocol: AppProtocol = AppProtocol::Http1 => value::choice(),
        /// What a pick is for. All but `request` concern clients and endpoints of HTTP/1.1, and apply when the EPP changed nothing
        /// of the request but its destination and its trace.
        pub pick_per: PickPer = PickPer::Request => value::choice(),
        /// With `pick_per = "connection"`.
        pub pin: PinLimits = PinLimits::default() => section(),
        /// With `pick_per = "lease"`: how long an EPP's decision holds for a connection.
        pub lease: LeaseLimits = LeaseLimits::default() => section(),
        /// What happens when the EPP fails.
        pub failure_mode: FailureMode = FailureMode::Closed => value::choice(),
        /// With `failure_mode = "open"` only: where it sends requests. Without it, the built-in picker chooses among the endpoints.
        pub default_upstream: Option<SocketAddr> = None => value::endpoint().optional("127.0.0.1:8001"),
        /// Endpoints that the EPP may name and the pool does not list. `false`: none. `true`: all but loopback and link-local
        /// addresses (where clouds serve metadata). An array of networks: exactly those, as in `["10.0.0.0/8"]`. Never the agent's
        /// own listeners.
        pub passthrough: Passthrough = Passthrough::Off => passthrough(),
        /// What chooses the endpoint of a request.
        pub picker: Picker = Picker::Builtin => section(),
        /// `picker.session_header`: where the built-in picker chooses, requests with the same value of the first of these headers
        /// that they have go to the same endpoint.
        pub session_headers: Vec<HeaderName> = Vec::new() => Elsewhere(picker::session_headers),
        /// The part of the pool that requests are to stay in: the EPP gets it as a hint, the built-in picker keeps to it. A pick from
        /// outside the subset is followed.
        pub subset: Subset = Subset::default() => section(),
        /// When a request that an endpoint took and did not answer goes to the next endpoint of its list. A request of which the
        /// endpoint's kernel has acknowledged nothing (no connection, or a kept one that had been closed), or that the endpoint says
        /// it has not looked at (HTTP/2), goes on whatever is said here; one that was not answered in time (`timeouts.first_byte`)
        /// does not. No list serves two pools.
        pub retry: Retry = Retry::default() => section(),
        /// When an endpoint that fails requests is avoided for a time.
        pub ejection: Ejection = Ejection::default() => section(),
        /// Ask each endpoint whether it is well. Off unless the section is there.
        pub health: Option<HealthCheck> = None => optional_section(),
        /// For requests of this pool, instead of those of `[timeouts]`; each can be left out.
        pub timeouts: TimeoutOverrides = TimeoutOverrides::default() => section(),
    }
}

choice! {
    /// What the endpoints of a pool speak.
    pub enum AppProtocol {
        /// HTTP/1.1.
        Http1 = "http1",
        /// HTTP/2 without TLS. Bodies are relayed.
        H2c = "h2c",
    }
}

choice! {
    /// What a pick is for.
    pub enum PickPer {
        /// Each request.
        Request = "request",
        /// A client's connection, which then stays with its endpoint: what follows the first response goes both ways as it is.
        Connection = "connection",
        /// The requests of a client's connection, for a while.
        Lease = "lease",
    }
}

choice! {
    /// What happens when the EPP fails.
    pub enum FailureMode {
        /// Requests go to `default_upstream`, or to an endpoint of the pool.
        Open = "open",
        /// Requests are answered with 503, as in InferencePool v1.
        Closed = "closed",
    }
}

settings! {
    /// With `pick_per = "connection"`.
    #[derive(Copy)]
    pub struct PinLimits {
        /// A connection that has been pinned so long is reset at its next quiet second.
        pub age: Option<Duration> = Some(Duration::from_secs(3600)) => duration_or_off(),
    }
}

settings! {
    /// With `pick_per = "lease"`: how long an EPP's decision holds for a connection.
    #[derive(Copy)]
    pub struct LeaseLimits {
        /// From the pick.
        pub time: Duration = Duration::from_secs(10) => duration(),
        /// Requests, the one that was picked for among them.
        pub requests: u32 = 100 => integer(1..=1_000_000),
    }
}

impl Pool {
    /// A pool with the built-in picker that fails closed.
    pub fn new(name: impl Into<String>, endpoints: impl IntoIterator<Item = SocketAddr>) -> Self {
        let endpoints = endpoints.into_iter().map(Into::into).collect();
        Self { name: name.into(), endpoints, ..Self::default() }
    }

    /// Whether there is a source of endpoints; what a name or a file gives is not known yet.
    fn has_endpoints(&self) -> bool {
        !self.endpoints.is_empty() || self.endpoints_dns.is_some() || self.endpoints_file.is_some()
    }

    fn check(&self, section: &Section<'_>, listen: SocketAddr, own: &Listeners, node: &Node) {
        endpoints::check_listed(section, &self.ports, listen);
        self.check_endpoints(section);
        self.check_own(section, own);
        self.check_failure_mode(section);
        self.picker.check(&section.at("picker"));
        self.subset.check(&section.at("subset"), node);
        self.ejection.check(&section.at("ejection"));
    }

    fn check_endpoints(&self, section: &Section<'_>) {
        let named_by_epp = matches!(self.picker, Picker::Epp(_)) && !self.passthrough.is_off();
        if !self.has_endpoints() && !named_by_epp {
            section.reject(
                "endpoints",
                "none",
                r#"at least one, endpoints_dns, endpoints_file, or picker.kind = "epp" with passthrough = true"#,
            );
        }
    }

    /// Requests that the agent sends to itself would go round for ever.
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
                section.reject("failure_mode", r#""open" without a place to send to"#, "endpoints or default_upstream");
            }
            FailureMode::Closed | FailureMode::Open => {}
        }
    }
}

pub(super) fn check(pools: &[Pool], root: &Section<'_>, listen: SocketAddr, own: &Listeners, node: &Node) {
    for (index, (pool, section)) in pools.iter().zip(root.each("pools")).enumerate() {
        pool.check(&section, listen, own, node);
        if pools[..index].iter().any(|other| other.name == pool.name) {
            section.reject("name", format_args!("{:?} again", pool.name), "a name that no other pool has");
        }
    }
    if pools.is_empty() {
        root.reject("pools", "none", "at least one [[pools]] section");
    }
}

/// Reads the files that the pools name.
pub(super) fn check_files(pools: &[Pool], root: &Section<'_>) {
    for (pool, section) in pools.iter().zip(root.each("pools")) {
        if let Picker::Epp(epp) = &pool.picker {
            epp.check_files(&section.at("picker"));
        }
    }
}
