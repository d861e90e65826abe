//! Which pool a request goes to, from its head and from the model its body names.
//!
//! Given the configured routes in their order, gives the index of a pool and the request's timeouts: of the first route whose
//! conditions all hold, or of the first pool where there are no routes. What the body names stands in headers by then, which only the agent can set.
//! It allocates nothing per request, and the path is taken as it was sent, neither decoded nor normalised, because the
//! endpoint gets it as it was sent.

mod split;
#[cfg(test)]
mod tests;
mod times;

use http::{HeaderMap, HeaderName, Method, header, request};

use crate::config::{self, Config, HeaderCondition, HostPattern, ModelPattern, PathPattern, TimeoutOverrides};
use split::Split;
pub use times::Times;

#[derive(Debug, Clone)]
pub struct Router {
    routes: Vec<Route>,
    /// By pool, without what routes say.
    times: Vec<Times>,
}

/// What the routes say about one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// Index in the configuration.
    pub pool: usize,
    pub times: Times,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no route matches the request")]
pub struct NoRoute;

#[derive(Debug, Clone)]
struct Route {
    hosts: Vec<HostPattern>,
    path: Option<PathPattern>,
    methods: Vec<Method>,
    headers: Vec<HeaderCondition>,
    /// What waits for the body.
    named: Vec<Named>,
    pools: Split,
    timeouts: TimeoutOverrides,
}

/// A condition on a header that carries what the body names.
#[derive(Debug, Clone)]
struct Named {
    header: HeaderName,
    any_of: Vec<ModelPattern>,
}

impl Router {
    pub fn new(config: &Config) -> Self {
        let all = Times::from(&config.timeouts);
        let times = config.pools.iter().map(|pool| all.with(&pool.timeouts)).collect();
        if config.routes.is_empty() {
            let first = config.pools.first().map(|pool| config::Route::to(pool.name.clone()));
            return Self { routes: first.iter().map(|route| Route::new(route, config)).collect(), times };
        }
        Self { routes: config.routes.iter().map(|route| Route::new(route, config)).collect(), times }
    }

    /// Whether the pool of this request depends on what its body names. The headers for that are not looked at.
    pub fn needs_model(&self, request: &request::Parts) -> bool {
        let may_win = self.routes.iter().find(|route| route.outside_holds(request));
        may_win.is_some_and(|route| !route.named.is_empty())
    }

    /// The timeouts of a request until its body has said where it goes: those of the first route that may win, with its first
    /// pool.
    pub fn times_of_body(&self, request: &request::Parts) -> Option<Times> {
        let may_win = self.routes.iter().find(|route| route.outside_holds(request))?;
        Some(self.times.get(may_win.pools.draw(|_| 0)?)?.with(&may_win.timeouts))
    }

    /// Where a route has several pools, `roll` is asked for a number below the one it is given, each equally likely.
    pub fn route(&self, request: &request::Parts, roll: impl FnOnce(u64) -> u64) -> Result<Way, NoRoute> {
        let holds = |route: &&Route| route.outside_holds(request) && route.named_holds(&request.headers);
        let route = self.routes.iter().find(holds).ok_or(NoRoute)?;
        let pool = route.pools.draw(roll).ok_or(NoRoute)?;
        Ok(Way { pool, times: self.times[pool].with(&route.timeouts) })
    }
}

impl Route {
    fn new(route: &config::Route, config: &Config) -> Self {
        let bbr = &config.bbr;
        let is_named = |condition: &&HeaderCondition| [&bbr.header, &bbr.base_model_header].contains(&&condition.name);
        let models = Named { header: bbr.header.clone(), any_of: route.models.clone() };
        let bases = route.base_models.iter().cloned().map(ModelPattern::Exact).collect();
        let bases = Named { header: bbr.base_model_header.clone(), any_of: bases };
        let given = [models, bases].into_iter().filter(|named| !named.any_of.is_empty());
        Self {
            hosts: route.hosts.clone(),
            path: route.path.clone(),
            methods: route.methods.clone(),
            headers: route.headers.iter().filter(|condition| !is_named(condition)).cloned().collect(),
            named: given.chain(route.headers.iter().filter(is_named).map(Named::from)).collect(),
            pools: Split::new(&route.pools, config),
            timeouts: route.timeouts,
        }
    }

    /// All that does not depend on the body.
    fn outside_holds(&self, request: &request::Parts) -> bool {
        self.host_holds(&request.headers)
            && self.path.as_ref().is_none_or(|path| path.matches(request.uri.path()))
            && (self.methods.is_empty() || self.methods.contains(&request.method))
            && self.headers.iter().all(|condition| condition.holds(&request.headers))
    }

    fn host_holds(&self, headers: &HeaderMap) -> bool {
        if self.hosts.is_empty() {
            return true;
        }
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        host.map(without_port).is_some_and(|host| self.hosts.iter().any(|pattern| pattern.matches(host)))
    }

    fn named_holds(&self, headers: &HeaderMap) -> bool {
        self.named.iter().all(|named| {
            let name = headers.get(&named.header).map(http::HeaderValue::as_bytes);
            name.is_some_and(|name| named.any_of.iter().any(|pattern| pattern.matches(name)))
        })
    }
}

impl From<&HeaderCondition> for Named {
    fn from(condition: &HeaderCondition) -> Self {
        let pattern = condition.value.clone().map_or(ModelPattern::Prefix(String::new()), ModelPattern::Exact);
        Self { header: condition.name.clone(), any_of: vec![pattern] }
    }
}

impl HostPattern {
    /// `host` is without port.
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

impl ModelPattern {
    fn matches(&self, name: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => name == exact.as_bytes(),
            Self::Prefix(prefix) => name.starts_with(prefix.as_bytes()),
        }
    }
}

/// The host of `host[:port]`, where an IPv6 address stands in brackets (RFC 3986 §3.2.2), and without the dot that ends a
/// fully qualified name.
fn without_port(host: &str) -> &str {
    let name = match host.rfind(':') {
        Some(colon) if !host[colon..].contains(']') => &host[..colon],
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name)
}
