//! Selects a pool, the timeouts and the changes for a request, from its head and the model that its body names.
//!
//! The first configured route of which all conditions hold wins; without routes, the first pool. The model is read from headers
//! that only the agent sets. Routing allocates nothing, and matches the path as it was sent (neither decoded nor normalised),
//! because the endpoint gets it as it was sent, unless the route rewrites it.

mod change;
mod split;
#[cfg(test)]
mod tests;
mod timeouts;

use http::{HeaderMap, HeaderName, Method, header, request};

use crate::config::{
    self, Config, HeaderCondition, HostPattern, ModelPattern, PathPattern, QueryCondition, RefusedRoute,
    TimeoutOverrides,
};
pub use change::{RedirectTo, RouteChanges, TargetTooLong};
use split::Split;
pub use timeouts::RequestTimeouts;

/// The configured routes.
#[derive(Debug, Clone)]
pub struct Router {
    routes: Vec<CompiledRoute>,
    /// By pool, without the overrides of routes.
    timeouts: Vec<RequestTimeouts>,
}

/// What a route gives to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routed<'r> {
    /// The pool's index in the configuration.
    pub pool: usize,
    pub timeouts: RequestTimeouts,
    /// `None` if the route changes nothing.
    pub changes: Option<&'r RouteChanges>,
}

/// Why a request goes to no pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotRouted<'r> {
    NoRoute,
    Refused(&'r RefusedRoute),
    Redirected(&'r RedirectTo),
}

#[derive(Debug, Clone)]
struct CompiledRoute {
    hosts: Vec<HostPattern>,
    path: Option<PathPattern>,
    methods: Vec<Method>,
    headers: Vec<HeaderCondition>,
    query: Vec<QueryCondition>,
    /// Conditions that need the body.
    body_conditions: Vec<BodyCondition>,
    target: RouteTarget,
    timeouts: TimeoutOverrides,
}

/// What happens to requests of a route.
#[derive(Debug, Clone)]
enum RouteTarget {
    Pools(Split, Option<RouteChanges>),
    Refused(RefusedRoute),
    Redirect(RedirectTo),
}

/// A condition on a header that is set from the body: the model's or the base model's name.
#[derive(Debug, Clone)]
struct BodyCondition {
    header: HeaderName,
    any_of: Vec<ModelPattern>,
}

impl Router {
    /// Compiles the routes of a configuration.
    pub fn new(config: &Config) -> Self {
        let all = RequestTimeouts::from(&config.timeouts);
        let timeouts = config.pools.iter().map(|pool| all.with(&pool.timeouts)).collect();
        if config.routes.is_empty() {
            let first = config.pools.first().map(|pool| config::Route::to(pool.name.clone()));
            return Self { routes: first.iter().map(|route| CompiledRoute::new(route, config)).collect(), timeouts };
        }
        Self { routes: config.routes.iter().map(|route| CompiledRoute::new(route, config)).collect(), timeouts }
    }

    /// Whether the pool of this request depends on its body. Ignores the headers that are set from the body.
    pub fn needs_model(&self, request: &request::Parts) -> bool {
        let may_win = self.routes.iter().find(|route| route.head_matches(request));
        may_win.is_some_and(|route| !route.body_conditions.is_empty())
    }

    /// The timeouts that apply while the body is read for routing: those of the first route that may match, with its first pool.
    pub fn body_timeouts(&self, request: &request::Parts) -> Option<RequestTimeouts> {
        let may_win = self.routes.iter().find(|route| route.head_matches(request))?;
        let RouteTarget::Pools(split, _) = &may_win.target else { return None };
        Some(self.timeouts.get(split.draw(|_| 0).ok()?)?.with(&may_win.timeouts))
    }

    /// Routes the request. If the route has several pools, `roll` returns a uniformly distributed number below its argument.
    pub fn route(&self, request: &request::Parts, roll: impl FnOnce(u64) -> u64) -> Result<Routed<'_>, NotRouted<'_>> {
        let holds = |route: &&CompiledRoute| route.head_matches(request) && route.body_matches(&request.headers);
        let route = self.routes.iter().find(holds).ok_or(NotRouted::NoRoute)?;
        match &route.target {
            RouteTarget::Pools(split, changes) => {
                let pool = split.draw(roll)?;
                let timeouts = self.timeouts[pool].with(&route.timeouts);
                Ok(Routed { pool, timeouts, changes: changes.as_ref() })
            }
            RouteTarget::Refused(why) => Err(NotRouted::Refused(why)),
            RouteTarget::Redirect(to) => Err(NotRouted::Redirected(to)),
        }
    }
}

impl CompiledRoute {
    fn new(route: &config::Route, config: &Config) -> Self {
        let bbr = &config.bbr;
        let is_named = |condition: &&HeaderCondition| [&bbr.header, &bbr.base_model_header].contains(&&condition.name);
        let models = BodyCondition { header: bbr.header.clone(), any_of: route.models.clone() };
        let bases = route.base_models.iter().cloned().map(ModelPattern::Exact).collect();
        let bases = BodyCondition { header: bbr.base_model_header.clone(), any_of: bases };
        let given = [models, bases].into_iter().filter(|condition| !condition.any_of.is_empty());
        Self {
            hosts: route.hosts.clone(),
            path: route.path.clone(),
            methods: route.methods.clone(),
            headers: route.headers.iter().filter(|condition| !is_named(condition)).cloned().collect(),
            body_conditions: given.chain(route.headers.iter().filter(is_named).map(BodyCondition::from)).collect(),
            query: route.query.clone(),
            target: RouteTarget::new(route, config),
            timeouts: route.timeouts,
        }
    }

    /// Whether all conditions hold that do not need the body.
    fn head_matches(&self, request: &request::Parts) -> bool {
        self.host_matches(&request.headers)
            && self.path.as_ref().is_none_or(|path| path.matches(request.uri.path()))
            && (self.methods.is_empty() || self.methods.contains(&request.method))
            && self.headers.iter().all(|condition| condition.holds(&request.headers))
            && self.query.iter().all(|condition| condition.holds(request.uri.query().unwrap_or_default()))
    }

    fn host_matches(&self, headers: &HeaderMap) -> bool {
        if self.hosts.is_empty() {
            return true;
        }
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        host.map(without_port).is_some_and(|host| self.hosts.iter().any(|pattern| pattern.matches(host)))
    }

    fn body_matches(&self, headers: &HeaderMap) -> bool {
        self.body_conditions.iter().all(|condition| {
            let name = headers.get(&condition.header).map(http::HeaderValue::as_bytes);
            name.is_some_and(|name| condition.any_of.iter().any(|pattern| pattern.matches(name)))
        })
    }
}

impl RouteTarget {
    fn new(route: &config::Route, config: &Config) -> Self {
        match (&route.refused, RedirectTo::of(route)) {
            (Some(why), _) => Self::Refused(why.clone()),
            (None, Some(to)) => Self::Redirect(to),
            (None, None) => Self::Pools(Split::new(&route.pools, config), RouteChanges::of(route)),
        }
    }
}

impl From<&HeaderCondition> for BodyCondition {
    fn from(condition: &HeaderCondition) -> Self {
        let pattern = condition.value.clone().map_or(ModelPattern::Prefix(String::new()), ModelPattern::Exact);
        Self { header: condition.name.clone(), any_of: vec![pattern] }
    }
}

impl HostPattern {
    /// `host` has no port.
    fn matches(&self, host: &str) -> bool {
        match self {
            Self::Exact(name) => host.eq_ignore_ascii_case(name),
            Self::Below(name) => {
                let (host, name) = (host.as_bytes(), name.as_bytes());
                host.len() > name.len() && host[host.len() - name.len()..].eq_ignore_ascii_case(name)
            }
        }
    }
}

impl PathPattern {
    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => path == exact,
            Self::Prefix(prefix) => {
                path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl HeaderCondition {
    fn holds(&self, headers: &HeaderMap) -> bool {
        match &self.value {
            Some(value) => headers.get_all(&self.name).iter().any(|line| line == value.as_str()),
            None => headers.contains_key(&self.name),
        }
    }
}

impl QueryCondition {
    fn holds(&self, query: &str) -> bool {
        let mut parameters = form_urlencoded::parse(query.as_bytes());
        let found = parameters.find(|(name, _)| *name == self.name);
        found.is_some_and(|(_, found)| self.value.as_ref().is_none_or(|value| found == *value))
    }
}

impl ModelPattern {
    fn matches(&self, name: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => name == exact.as_bytes(),
            Self::Prefix(prefix) => name.starts_with(prefix.as_bytes()),
        }
    }
}

/// The host of `host[:port]`, without the dot that ends a fully qualified name. IPv6 addresses are in brackets (RFC 3986 §3.2.2).
fn without_port(host: &str) -> &str {
    let name = match host.rfind(':') {
        Some(colon) if !host[colon..].contains(']') => &host[..colon],
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name)
}
