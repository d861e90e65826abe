//! `[[routes]]`: which requests go to which pools. A route that no request can reach is an error.

use http::{HeaderName, HeaderValue, Method};
use serde_json::json;
use thiserror::Error;

use super::{
    bbr::Bbr,
    changes::{self, FieldChanges, Redirect, Rewrite},
    document::Section,
    kubernetes::{InferencePools, PoolSource},
    pools::Pool,
    settings::{Elsewhere, Group, keys, optional_section, section, settings, tables},
    timeouts::TimeoutOverrides,
    value::{self, Value, integer},
};

/// The maximum weight in the Gateway API.
const MAX_WEIGHT: u32 = 1_000_000;

settings! {
    /// Where requests go that meet all of its conditions. A route without conditions matches every request.
    pub struct Route {
        /// Host of the request, without port; case-insensitive. `*.example.com` matches every name below example.com, but not
        /// example.com itself.
        pub hosts: Vec<HostPattern> = Vec::new() => host().one_or_more().named("host").example("llm.example.com"),
        /// Condition on the path.
        pub path: Option<PathPattern> = None => keys::<PathKeys>(),
        /// Method of the request.
        pub methods: Vec<Method> = Vec::new()
            => value::method(goes_through).one_or_more().named("method").example("POST"),
        /// Header fields that must all match, as the endpoint gets them: without the client's control headers, with what the agent
        /// adds. Without `value`, the header must be present.
        pub headers: Vec<HeaderCondition> = Vec::new()
            => tables(r#"an array of { name = "x-team", value = "red" }, value optional"#)
                .example(json!([{ "name": "x-team", "value": "red" }, { "name": "x-beta" }])),
        /// Parameters of the query that must all match, decoded. Of a repeated parameter the first one counts. Without `value`, the
        /// parameter must be present.
        pub query: Vec<QueryCondition> = Vec::new()
            => tables(r#"an array of { name = "beta", value = "1" }, value optional"#)
                .example(json!([{ "name": "beta", "value": "1" }])),
        /// Model that the request body names. `llama-*` matches every model that begins with `llama-`, `*` matches any model.
        pub models: Vec<ModelPattern> = Vec::new() => model().one_or_more().named("model").example("llama-3.1-8b"),
        /// Base model of the request's model. It must occur in `bbr.base_models`.
        pub base_models: Vec<String> = Vec::new()
            => value::non_empty().one_or_more().named("base_model").example("llama-3.1-8b"),
        /// At least one, each once, not all with weight 0.
        pub pools: Vec<WeightedPool> = Vec::new() => keys::<PoolKeys>(),
        /// Timeouts of requests of this route. Unset keys use those of the pool.
        pub timeouts: TimeoutOverrides = TimeoutOverrides::default() => section(),
        /// Header fields of a request that the route changes, after the client's fields were filtered and before the EPP is asked.
        pub request_headers: FieldChanges = FieldChanges::default() => section(),
        /// The target that the endpoint gets instead of the client's. The EPP gets it, too; the access log names the client's.
        pub rewrite: Option<Rewrite> = None => optional_section(),
        /// Answers requests of the route with a redirect instead of forwarding them. Excludes `pool`, `pools`, `rewrite` and
        /// `request_headers`.
        pub redirect: Option<Redirect> = None => optional_section(),
        /// Why requests of this route are refused. Not a setting: what is wrong with an HTTPRoute.
        pub refused: Option<RefusedRoute> = None => Elsewhere(|_| None),
    }
}

/// Why requests of a route, or of a share of it, are refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RefusedRoute {
    /// As if the route did not match, but no later route is tried either.
    #[error("no route matches this request")]
    NoRoute,
    /// The API server has not told the routes so far.
    #[error("the HTTPRoutes of the Gateway {0} have not been read from the Kubernetes API yet")]
    Unread(String),
    /// The file names a pool that no InferencePool is.
    #[error("no InferencePool that `inference_pools` selects has the name {0}")]
    Absent(String),
    /// Part of the route is not implemented.
    #[error("the HTTPRoute {0}")]
    Unsupported(String),
    /// A reference leads to no pool.
    #[error("the HTTPRoute {0}")]
    Backend(String),
}

/// A host without port. Case-insensitive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostPattern {
    /// This host, in lower case.
    Exact(String),
    /// `*.example.com`: names with at least one label before the suffix `.example.com`, which this holds.
    Below(String),
}

/// A condition on the path of a request as the client sent it, without query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathPattern {
    /// The whole path, byte for byte.
    Exact(String),
    /// Whole segments: `/v1` holds for `/v1` and `/v1/models`, not for `/v10`. Without slash at the end, so `/` is empty.
    Prefix(String),
}

settings! {
    /// The path of a request as the client sent it: neither decoded nor normalised, without query.
    struct PathKeys {
        /// Prefix of the path, in whole segments: `/v1` matches `/v1` and `/v1/models`, but not `/v10`. The path is compared as the
        /// client sent it, neither decoded nor normalised, without query.
        path_prefix: Option<String> = None => path().optional("/v1"),
        /// The whole path, instead of `path_prefix`.
        path: Option<String> = None => path().optional("/v1/chat/completions"),
    }
}

settings! {
    /// A condition on a header.
    pub struct HeaderCondition {
        /// Name of the header.
        pub name: HeaderName = HeaderName::from_static("x") => any_header_name().required("the name of a header", "x-team"),
        /// Value of one of the header's lines, case-sensitive. Unset: the header must be present.
        pub value: Option<String> = None => header_value().optional("red"),
    }
}

settings! {
    /// A condition on a parameter of the query.
    pub struct QueryCondition {
        /// Name of the parameter, case-sensitive.
        pub name: String = String::new() => value::non_empty().required("the name of a parameter", "beta"),
        /// Its value, case-sensitive. Unset: the parameter must be present.
        pub value: Option<String> = None => value::string("a string", |_| true).optional("1"),
    }
}

/// A condition on the model that the request names. Case-sensitive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelPattern {
    /// This model.
    Exact(String),
    /// `llama-*`; of `*` nothing is left, and any model will do.
    Prefix(String),
}

settings! {
    /// A pool and its share of a route's requests. A pool is drawn for each request.
    pub struct WeightedPool {
        /// Name of a pool.
        pub name: String = String::new() => value::pool_name().required("the name of a pool", "default"),
        /// Share of the sum of the weights. 0: the pool gets no requests.
        pub weight: u32 = 1 => integer(0..=MAX_WEIGHT),
        /// Why requests of this share are refused. Not a setting: what is wrong with a reference of an HTTPRoute.
        pub refused: Option<RefusedRoute> = None => Elsewhere(|_| None),
    }
}

settings! {
    /// Where the requests of a route go.
    struct PoolKeys {
        /// Name of the pool that gets the requests.
        pool: Option<String> = None => value::pool_name().optional("default"),
        /// Pools that share the requests by weight, instead of `pool`; a pool is drawn for each request. The default weight is 1,
        /// and a pool with weight 0 gets no requests.
        pools: Vec<WeightedPool> = Vec::new()
            => tables(r#"an array of { name = "a", weight = 70 }"#).example(json!([{ "name": "default", "weight": 70 }])),
    }
}

fn host() -> Value<HostPattern> {
    let normal = |host: &str| host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let parse = move |text: &str| match text.strip_prefix("*.") {
        // `*.` is not allowed before an IP address.
        Some(below) => {
            let is_name =
                value::is_host(below) && !below.starts_with('[') && below.parse::<std::net::Ipv4Addr>().is_err();
            is_name.then(|| HostPattern::Below(format!(".{}", normal(below))))
        }
        None => value::is_host(text).then(|| HostPattern::Exact(normal(text))),
    };
    let show = |host: &HostPattern| match host {
        HostPattern::Exact(host) => host.clone(),
        HostPattern::Below(below) => format!("*{below}"),
    };
    Value::text(r#"a host without port, such as "llm.example.com" or "*.example.com""#, parse, show)
}

/// Returns whether the agent forwards the method; it rejects CONNECT and TRACE.
fn goes_through(method: &Method) -> bool {
    !matches!(*method, Method::CONNECT | Method::TRACE)
}

fn path() -> Value<String> {
    value::string(r#"a path that starts with "/", without query"#, |text| {
        text.starts_with('/') && !text.contains(['?', '#', ' '])
    })
}

/// The name of a header to match.
fn any_header_name() -> Value<HeaderName> {
    Value::text("the name of a header", |text| HeaderName::from_bytes(text.as_bytes()).ok(), ToString::to_string)
}

/// A header value after trimming.
fn header_value() -> Value<String> {
    let is_value = |text: &str| text.trim() == text && HeaderValue::from_str(text).is_ok();
    value::string("a header value without surrounding white space", is_value)
}

fn model() -> Value<ModelPattern> {
    // In the middle `*` would match only itself, which no one means.
    let parse = |text: &str| match text.strip_suffix('*') {
        _ if text.is_empty() || text.strip_suffix('*').unwrap_or(text).contains('*') => None,
        Some(prefix) => Some(ModelPattern::Prefix(prefix.to_owned())),
        None => Some(ModelPattern::Exact(text.to_owned())),
    };
    let show = |model: &ModelPattern| match model {
        ModelPattern::Exact(model) => model.clone(),
        ModelPattern::Prefix(prefix) => format!("{prefix}*"),
    };
    Value::text("a model's name that is not empty, in which only the last character may be `*`", parse, show)
}

impl Group for PathKeys {
    type Value = Option<PathPattern>;

    fn resolve(self, section: &Section<'_>) -> Option<PathPattern> {
        if section.has("path") && section.has("path_prefix") {
            section.reject("path_prefix", "a second condition on the path", "path or path_prefix");
        }
        let prefix = |prefix: String| PathPattern::Prefix(prefix.trim_end_matches('/').to_owned());
        self.path.map(PathPattern::Exact).or_else(|| self.path_prefix.map(prefix))
    }

    fn of(value: &Option<PathPattern>) -> Self {
        match value.clone() {
            Some(PathPattern::Exact(path)) => Self { path: Some(path), path_prefix: None },
            Some(PathPattern::Prefix(prefix)) => Self { path: None, path_prefix: Some(changes::or_root(prefix)) },
            None => Self::default(),
        }
    }
}

impl Group for PoolKeys {
    type Value = Vec<WeightedPool>;

    fn resolve(self, section: &Section<'_>) -> Vec<WeightedPool> {
        match (self.pool, section.has("pools")) {
            (None, false) if section.has("redirect") => {}
            (None, false) => section.reject("pool", "nothing", "the name of a pool, or pools"),
            (Some(_), true) => section.reject("pool", "both pool and pools", "one of them"),
            (Some(name), false) => return vec![WeightedPool::new(name, 1)],
            (None, true) if self.pools.iter().all(|share| share.weight == 0) => {
                section.reject("pools", "no weight above 0", "at least one");
            }
            (None, true) => {}
        }
        self.pools
    }

    fn of(value: &Vec<WeightedPool>) -> Self {
        Self { pool: None, pools: value.clone() }
    }
}

impl Route {
    /// A route for all requests to this pool.
    pub fn to(pool: impl Into<String>) -> Self {
        Self { pools: vec![WeightedPool::new(pool, 1)], ..Self::default() }
    }

    fn check(&self, section: &Section<'_>, pools: &[Pool], bbr: &Bbr) {
        self.check_pools(section, pools);
        self.check_models(section, bbr);
        let path = self.path.as_ref();
        if let Some(rewrite) = &self.rewrite {
            changes::check(rewrite.path.as_ref(), path, &section.at("rewrite"));
        }
        if let Some(redirect) = &self.redirect {
            changes::check(redirect.path.as_ref(), path, &section.at("redirect"));
            for key in ["pool", "pools", "rewrite", "request_headers"].into_iter().filter(|key| section.has(key)) {
                section.reject(key, "a setting of requests that are forwarded", "redirect alone");
            }
        }
    }

    fn check_pools(&self, section: &Section<'_>, pools: &[Pool]) {
        let is_pool = |pool: &&Pool| pool.inference_pools.is_none();
        let names: Vec<&str> = pools.iter().filter(is_pool).map(|pool| pool.name.as_str()).collect();
        let from_labels = |pools: &InferencePools| pools.from == PoolSource::Labels;
        let selects = pools.iter().any(|pool| pool.inference_pools.as_ref().is_some_and(from_labels));
        let one_of = format!("one of {}", names.join(", "));
        let of_pools = section.each("pools");
        for (index, share) in self.pools.iter().enumerate() {
            let (section, key) = of_pools.get(index).map_or((section, "pool"), |section| (section, "name"));
            // Kubernetes says which names these are.
            let is_selected = selects && share.name.contains('/');
            if !names.contains(&share.name.as_str()) && !is_selected {
                section.reject(key, format_args!("{:?}", share.name), &one_of);
            } else if self.pools[..index].iter().any(|other| other.name == share.name) {
                section.reject(key, format_args!("{:?} again", share.name), "each pool once");
            }
        }
    }

    /// Checks that the model conditions can match.
    fn check_models(&self, section: &Section<'_>, bbr: &Bbr) {
        if !bbr.enabled {
            for key in ["model", "base_model"].into_iter().filter(|key| section.has(key)) {
                section.reject(key, "a condition that never matches", "bbr.enabled = true");
            }
        }
        for base in &self.base_models {
            if !bbr.base_models.values().any(|known| known == base) {
                section.reject("base_model", format_args!("{base:?}"), "a base model of bbr.base_models");
            }
        }
    }

    /// Returns whether this route matches every request that `later` matches.
    fn covers(&self, later: &Self) -> bool {
        any_covers(&self.hosts, &later.hosts, HostPattern::covers)
            && self.path.as_ref().is_none_or(|path| later.path.as_ref().is_some_and(|later| path.covers(later)))
            && any_covers(&self.methods, &later.methods, PartialEq::eq)
            && self.headers.iter().all(|header| later.headers.iter().any(|later| header.covers(later)))
            && self.query.iter().all(|query| later.query.iter().any(|later| query.covers(later)))
            && any_covers(&self.models, &later.models, ModelPattern::covers)
            && any_covers(&self.base_models, &later.base_models, PartialEq::eq)
    }
}

impl WeightedPool {
    /// The pool with this name, with `weight` of the sum of a route's weights.
    pub fn new(name: impl Into<String>, weight: u32) -> Self {
        Self { name: name.into(), weight, refused: None }
    }
}

pub(super) fn check(routes: &[Route], root: &Section<'_>, pools: &[Pool], bbr: &Bbr) {
    for (index, (route, section)) in routes.iter().zip(root.each("routes")).enumerate() {
        route.check(&section, pools, bbr);
        if let Some(earlier) = routes[..index].iter().position(|earlier| earlier.covers(route)) {
            let key = ["redirect", "pools"].into_iter().find(|key| section.has(key)).unwrap_or("pool");
            let found = format_args!("an unreachable route: routes[{earlier}] matches all of its requests");
            section.reject(key, found, "the narrower route first");
        }
    }
}

/// Compares two lists of alternatives. An empty list matches everything.
fn any_covers<T>(earlier: &[T], later: &[T], covers: impl Fn(&T, &T) -> bool) -> bool {
    earlier.is_empty()
        || !later.is_empty() && later.iter().all(|later| earlier.iter().any(|earlier| covers(earlier, later)))
}

impl HostPattern {
    /// Whether this pattern matches every host that `other` matches.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(host), Self::Exact(other)) => host == other,
            (Self::Exact(_), Self::Below(_)) => false,
            (Self::Below(below), Self::Exact(other)) => other.len() > below.len() && other.ends_with(below),
            (Self::Below(below), Self::Below(other)) => other.ends_with(below),
        }
    }
}

impl PathPattern {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(path), Self::Exact(other)) => path == other,
            (Self::Exact(_), Self::Prefix(_)) => false,
            (Self::Prefix(prefix), Self::Exact(other) | Self::Prefix(other)) => {
                other.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl HeaderCondition {
    fn covers(&self, other: &Self) -> bool {
        self.name == other.name && (self.value.is_none() || self.value == other.value)
    }
}

impl QueryCondition {
    fn covers(&self, other: &Self) -> bool {
        self.name == other.name && (self.value.is_none() || self.value == other.value)
    }
}

impl ModelPattern {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(model), Self::Exact(other)) => model == other,
            (Self::Exact(_), Self::Prefix(_)) => false,
            (Self::Prefix(prefix), Self::Exact(other) | Self::Prefix(other)) => other.starts_with(prefix),
        }
    }
}
