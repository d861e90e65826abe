//! Which pool a request goes to, from its host, its path and the model its body names.
//!
//! Given the configured routes in their order, gives the index of a pool: of the first route whose conditions all hold, or
//! of the first pool where there are no routes. It allocates nothing per request, and the path is taken as it was sent,
//! neither decoded nor normalised, because the endpoint gets it as it was sent.

use crate::config::{self, Config};

#[derive(Debug, Clone)]
pub struct Router {
    routes: Vec<Route>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no route matches the request")]
pub struct NoRoute;

#[derive(Debug, Clone)]
struct Route {
    host: Option<String>,
    /// Without trailing slash, so `/` is empty.
    path_prefix: Option<String>,
    model: Option<String>,
    /// `None` names a pool that does not exist, which a parsed configuration has no way to do: nothing may be sent there.
    pool: Option<usize>,
}

impl Router {
    pub fn new(config: &Config) -> Self {
        if config.routes.is_empty() {
            let pool = (!config.pools.is_empty()).then_some(0);
            return Self { routes: vec![Route { host: None, path_prefix: None, model: None, pool }] };
        }
        Self { routes: config.routes.iter().map(|route| Route::new(route, config)).collect() }
    }

    /// Index of the pool in the configuration. `host` may carry a port, `path` a query.
    pub fn route(&self, host: Option<&str>, path: &str, model: Option<&str>) -> Result<usize, NoRoute> {
        let host = host.map(without_port);
        let path = path.split('?').next().unwrap_or(path);
        let route = self.routes.iter().find(|route| route.matches(host, path, model));
        route.and_then(|route| route.pool).ok_or(NoRoute)
    }

    /// Whether a pool cannot be chosen before the body's model is known.
    pub fn needs_model(&self) -> bool {
        self.routes.iter().any(|route| route.model.is_some())
    }
}

impl Route {
    fn new(route: &config::Route, config: &Config) -> Self {
        Self {
            host: route.host.as_deref().map(|host| without_port(host).to_owned()),
            path_prefix: route.path_prefix.as_deref().map(|prefix| prefix.trim_end_matches('/').to_owned()),
            model: route.model.clone(),
            pool: config.pools.iter().position(|pool| pool.name == route.pool),
        }
    }

    fn matches(&self, host: Option<&str>, path: &str, model: Option<&str>) -> bool {
        let host_holds =
            self.host.as_deref().is_none_or(|wanted| host.is_some_and(|host| host.eq_ignore_ascii_case(wanted)));
        let path_holds = self.path_prefix.as_deref().is_none_or(|prefix| {
            path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        let model_holds = self.model.as_deref().is_none_or(|wanted| model == Some(wanted));
        host_holds && path_holds && model_holds
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Pool;

    /// host, path prefix, model, pool
    type Line<'a> = (Option<&'a str>, Option<&'a str>, Option<&'a str>, &'a str);

    fn router(routes: &[Line<'_>]) -> Router {
        let mut config = Config::new(["a", "b", "c"].map(|name| Pool::new(name, vec![])).to_vec());
        let own = |text: Option<&str>| text.map(str::to_owned);
        config.routes = routes
            .iter()
            .map(|&(host, path, model, pool)| config::Route {
                host: own(host),
                path_prefix: own(path),
                model: own(model),
                pool: pool.to_owned(),
            })
            .collect();
        Router::new(&config)
    }

    #[test]
    fn without_routes_everything_goes_to_the_first_pool() {
        let router = router(&[]);
        assert_eq!(router.route(None, "*", None), Ok(0));
        assert!(!router.needs_model());
    }

    #[test]
    fn hosts_ignore_case_port_and_final_dot() {
        for wanted in ["LLM.example.com", "[fd00::7]"] {
            let router = router(&[(Some(wanted), None, None, "b")]);
            for host in [wanted.to_lowercase(), wanted.to_uppercase(), format!("{wanted}:80"), format!("{wanted}.:80")]
            {
                assert_eq!(router.route(Some(&host), "/", None), Ok(1), "{host}");
            }
            for host in [Some("llm.example.org"), Some("x.llm.example.com"), Some("[fd00::8]:80"), Some(""), None] {
                assert_eq!(router.route(host, "/", None), Err(NoRoute), "{host:?}");
            }
        }
    }

    #[test]
    fn paths_match_whole_segments() {
        for prefix in ["/v1", "/v1/"] {
            let router = router(&[(None, Some(prefix), None, "c")]);
            for path in ["/v1", "/v1/", "/v1/models", "/v1?x=1", "/v1/models?x=/v2"] {
                assert_eq!(router.route(None, path, None), Ok(2), "{path}");
            }
            for path in ["/", "/v10", "/v", "/V1", "/x/v1", "*", "/x?y=/v1"] {
                assert_eq!(router.route(None, path, None), Err(NoRoute), "{path}");
            }
        }
        assert_eq!(router(&[(None, Some("/"), None, "c")]).route(None, "/anything", None), Ok(2));
    }

    #[test]
    fn models_match_exactly() {
        let router = router(&[(None, None, Some("llama"), "b")]);
        assert!(router.needs_model());
        assert_eq!(router.route(None, "/", Some("llama")), Ok(1));
        for model in [None, Some("Llama"), Some("llama-2"), Some("")] {
            assert_eq!(router.route(None, "/", model), Err(NoRoute), "{model:?}");
        }
    }

    #[test]
    fn the_first_route_whose_conditions_all_hold_wins() {
        let router = router(&[
            (Some("h"), Some("/v1"), Some("m"), "c"),
            (Some("h"), Some("/v1"), None, "b"),
            (None, None, None, "a"),
        ]);
        assert_eq!(router.route(Some("h"), "/v1/x", Some("m")), Ok(2));
        assert_eq!(router.route(Some("h"), "/v1/x", Some("other")), Ok(1));
        assert_eq!(router.route(Some("h"), "/v2", Some("m")), Ok(0));
        assert_eq!(router.route(None, "/v1", Some("m")), Ok(0));
    }

    #[test]
    fn a_pool_that_does_not_exist_gets_nothing() {
        let router = router(&[(None, None, None, "nowhere"), (None, None, None, "a")]);
        assert_eq!(router.route(None, "/", None), Err(NoRoute));
    }
}
