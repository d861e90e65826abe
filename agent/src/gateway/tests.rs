//! Objects of a Gateway, and the routes that they mean for requests.

mod hosts;
mod matches;
mod rules;

use http::{Request, request};
use serde_json::{Value, json};

use super::*;
use crate::{
    config::{Config, Pool},
    route::{NotRouted, Router},
};

/// The Gateway `infra/g`.
pub(super) fn named() -> GatewayRef {
    GatewayRef { namespace: "infra".into(), name: "g".into(), port: None }
}

pub(super) fn object(namespace: &str, name: &str, spec: impl Into<Value>) -> ApiObject {
    let spec = spec.into();
    let metadata = json!({ "namespace": namespace, "name": name, "creationTimestamp": "2026-01-01T00:00:00Z" });
    serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).unwrap()
}

/// A Gateway with one listener for every host and every namespace.
pub(super) fn open_gateway() -> ApiObject {
    gateway(
        json!([{ "name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": { "namespaces": { "from": "All" } } }]),
    )
}

pub(super) fn gateway(listeners: impl Into<Value>) -> ApiObject {
    let listeners = listeners.into();
    object("infra", "g", json!({ "listeners": listeners }))
}

/// An HTTPRoute of the namespace `models`, with further fields of its spec.
pub(super) fn route(name: &str, spec: impl Into<Value>) -> ApiObject {
    let spec = spec.into();
    let mut whole = json!({ "parentRefs": [{ "name": "g", "namespace": "infra" }] });
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    object("models", name, whole)
}

/// A reference to an InferencePool of the route's namespace.
pub(super) fn to(pool: &str) -> Value {
    json!({ "group": "inference.networking.k8s.io", "kind": "InferencePool", "name": pool })
}

/// A rule with these matches, to the pool.
pub(super) fn rule(matches: impl Into<Value>, pool: &str) -> Value {
    let matches = matches.into();
    json!({ "matches": matches, "backendRefs": [to(pool)] })
}

pub(super) fn objects(gateway: ApiObject, routes: Vec<ApiObject>) -> GatewayObjects {
    GatewayObjects { gateway: Some(gateway), routes, ..GatewayObjects::default() }
}

pub(super) fn meaning(objects: &GatewayObjects) -> GatewayRoutes {
    translate(&named(), objects)
}

pub(super) fn get(target: &str) -> request::Parts {
    asked("GET", "h", target, &[])
}

pub(super) fn asked(method: &str, host: &str, target: &str, fields: &[(&str, &str)]) -> request::Parts {
    let mut builder = Request::builder().method(method).uri(target).header("host", host);
    for (name, value) in fields {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

/// Answers requests as an agent with these routes.
pub(super) struct Routes {
    router: Router,
    pools: Vec<String>,
}

impl Routes {
    pub(super) fn of(objects: &GatewayObjects) -> Self {
        let GatewayRoutes { routes, pools, .. } = meaning(objects);
        let pools: Vec<_> = pools.iter().map(pool_name).collect();
        let config = Config { routes, ..Config::new(pools.iter().map(|name| Pool::new(name.clone(), [])).collect()) };
        Self { router: Router::new(&config), pools }
    }

    /// The name of the pool in the namespace `models`, or what happens instead.
    pub(super) fn ask(&self, request: &request::Parts) -> String {
        self.roll(request, 0)
    }

    /// As [`ask`](Self::ask), with this number drawn for the shares.
    pub(super) fn roll(&self, request: &request::Parts, roll: u64) -> String {
        match self.router.route(request, |_| roll) {
            Ok(routed) => self.pools[routed.pool].trim_start_matches("models/").to_owned(),
            Err(NotRouted::NoRoute | NotRouted::Refused(RefusedRoute::NoRoute)) => "404".to_owned(),
            Err(NotRouted::Refused(RefusedRoute::Unread(_))) => "503".to_owned(),
            Err(NotRouted::Refused(why)) => format!("500 {why}"),
            Err(NotRouted::Redirected(to)) => {
                format!("{} {}", to.status().as_u16(), to.location(request).to_str().unwrap())
            }
        }
    }
}

#[test]
fn gateway_that_is_absent_or_empty_takes_no_request() {
    let route = route("r", json!({ "rules": [rule(json!([]), "a")] }));
    let absent = GatewayObjects { routes: vec![route.clone()], ..GatewayObjects::default() };
    for objects in [absent, objects(gateway(json!([])), vec![route])] {
        assert_eq!(Routes::of(&objects).ask(&get("/")), "404");
        assert!(meaning(&objects).pools.is_empty());
    }
}

#[test]
fn routes_beyond_the_limit_are_left_out_by_precedence() {
    let path = |number: usize| json!({ "path": { "type": "Exact", "value": format!("/{number:04}") } });
    let rules = |from: usize| -> Vec<Value> {
        (0..16)
            .map(|rule_number| {
                let first = from + rule_number * 64;
                rule((first..first + 64).map(path).collect::<Vec<Value>>(), "a")
            })
            .collect()
    };
    let mut routes: Vec<_> = (0..9).map(|n| route(&format!("r{n}"), json!({ "rules": rules(n * 1024) }))).collect();
    routes.push(route("last", json!({ "rules": [rule(json!([]), "b")] })));
    let objects = objects(open_gateway(), routes);
    assert_eq!((meaning(&objects).routes.len(), meaning(&objects).left_out), (MAX_ROUTES + 1, 5 * 1024 + 1));
    let routes = Routes::of(&objects);
    for (path, expected) in [("/0000", "a"), ("/4095", "a"), ("/4096", "404"), ("/9215", "404"), ("/none", "404")] {
        assert_eq!(routes.ask(&get(path)), expected, "{path}");
    }
}

#[test]
fn objects_survive_being_saved() {
    let kept = objects(open_gateway(), vec![route("r", json!({ "rules": [rule(json!([]), "a")] }))]);
    let text = serde_json::to_string(&kept).unwrap();
    assert_eq!(serde_json::from_str::<GatewayObjects>(&text).unwrap(), kept);
}
