//! Tests routes as they are written in a file, with tables of requests and against a second implementation of the same rules.

use std::fmt::Write as _;

use http::HeaderValue;
use proptest::prelude::*;

use super::*;

const POOLS: &str = "[[pools]]\nname = \"a\"\nendpoints = [\"10.0.0.1:1\"]\n\
                     [[pools]]\nname = \"b\"\nendpoints = [\"10.0.0.1:1\"]\n\
                     [[pools]]\nname = \"c\"\nendpoints = [\"10.0.0.1:1\"]\n\
                     [bbr.base_models]\nlora = \"llama\"\n";

/// Each of `routes` is the content of a `[[routes]]` section.
fn parsed(routes: &[&str]) -> Result<Config, String> {
    let sections: String = routes.iter().map(|route| format!("[[routes]]\n{route}\n")).collect();
    Config::parse(&format!("{POOLS}{sections}"), "p.toml").map_err(|errors| errors.to_string())
}

fn router(routes: &[&str]) -> Router {
    Router::new(&parsed(routes).unwrap())
}

fn request(method: &str, path: &str, fields: &[(&str, &str)]) -> request::Parts {
    let mut builder = http::Request::builder().method(method).uri(path);
    for (name, value) in fields {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

/// The name of the pool that the request is routed to.
fn pool(router: &Router, request: &request::Parts) -> Option<char> {
    let roll = |_| panic!("only one pool, so no roll is needed");
    router.route(request, roll).ok().map(|routed| ['a', 'b', 'c'][routed.pool])
}

fn get(path: &str) -> request::Parts {
    request("GET", path, &[])
}

fn at(host: &str) -> request::Parts {
    request("GET", "/", &[("host", host)])
}

fn model(name: &str) -> request::Parts {
    request("POST", "/", &[("x-gateway-model-name", name)])
}

#[test]
fn request_without_routes_goes_to_the_first_pool() {
    let router = router(&[]);
    assert_eq!(pool(&router, &get("*")), Some('a'));
    assert!(!router.needs_model(&get("/")));
}

#[test]
fn hosts_ignore_case_port_and_final_dot() {
    for wanted in ["LLM.example.com", "llm.example.com.", "[fd00::7]"] {
        let router = router(&[&format!("host = \"{wanted}\"\npool = \"b\"")]);
        let name = wanted.trim_end_matches('.');
        for host in [name.to_lowercase(), name.to_uppercase(), format!("{name}:80"), format!("{name}.:80")] {
            assert_eq!(pool(&router, &at(&host)), Some('b'), "{host}");
        }
        for host in ["llm.example.org", "x.llm.example.com", "[fd00::8]:80", ""] {
            assert_eq!(pool(&router, &at(host)), None, "{host}");
        }
        assert_eq!(pool(&router, &get("/")), None, "no host");
    }
}

#[test]
fn wildcard_host_matches_subdomains_only() {
    let router = router(&["host = [\"*.Example.com\", \"example.org\"]\npool = \"b\""]);
    for host in ["a.example.com", "A.B.EXAMPLE.COM:80", "a.example.com.", "example.org"] {
        assert_eq!(pool(&router, &at(host)), Some('b'), "{host}");
    }
    for host in ["example.com", ".example.com", "aexample.com", "a.example.com.evil", "a.example.org", "com", ""] {
        assert_eq!(pool(&router, &at(host)), None, "{host}");
    }
}

#[test]
fn path_prefixes_match_whole_segments() {
    for prefix in ["/v1", "/v1/"] {
        let router = router(&[&format!("path_prefix = \"{prefix}\"\npool = \"c\"")]);
        for path in ["/v1", "/v1/", "/v1/models", "/v1?x=1", "/v1/models?x=/v2"] {
            assert_eq!(pool(&router, &get(path)), Some('c'), "{path}");
        }
        for path in ["/", "/v10", "/v", "/V1", "/x/v1", "*", "/x?y=/v1", "/%761"] {
            assert_eq!(pool(&router, &get(path)), None, "{path}");
        }
    }
    assert_eq!(pool(&router(&["path_prefix = \"/\"\npool = \"c\""]), &get("/anything")), Some('c'));
}

#[test]
fn exact_paths_match_no_subpaths() {
    let router = router(&["path = \"/v1/models\"\npool = \"c\""]);
    for (path, expected) in [
        ("/v1/models", Some('c')),
        ("/v1/models?a=b", Some('c')),
        ("/v1/models/", None),
        ("/v1/models/x", None),
        ("/v1", None),
    ] {
        assert_eq!(pool(&router, &get(path)), expected, "{path}");
    }
}

#[test]
fn query_parameters_match_decoded_and_by_their_first_value() {
    let router = router(&[
        "query = [{ name = \"a b\", value = \"1&\" }, { name = \"c\" }]\npool = \"a\"",
        "query = [{ name = \"c\", value = \"\" }]\npool = \"b\"",
    ]);
    for (target, expected) in [
        ("/?a%20b=1%26&c", Some('a')),
        ("/?c=7&a+b=1%26", Some('a')),
        ("/?a+b=1%26&a+b=2&c", Some('a')),
        ("/?a+b=2&a+b=1%26&c", Some('b')),
        ("/?a+b=1%26", None),
        ("/?C=&A+b=1%26", None),
        ("/?c=", Some('b')),
        ("/?c", Some('b')),
        ("/?c=1", None),
        ("/", None),
    ] {
        assert_eq!(pool(&router, &get(target)), expected, "{target}");
    }
}

#[test]
fn refused_routes_and_shares_say_why() {
    let mut config = parsed(&["path = \"/x\"\npool = \"a\"", "pool = \"b\""]).unwrap();
    let why = config::RefusedRoute::Unsupported("m/r: rule 0".to_owned());
    config.routes[0].refused = Some(why.clone());
    let broken = config::RefusedRoute::Backend("m/r: no pool".to_owned());
    let share = config::WeightedPool { refused: Some(broken.clone()), ..config::WeightedPool::new("nowhere", 1) };
    config.routes[1].pools.push(share);
    let router = Router::new(&config);
    assert_eq!(router.route(&get("/x"), |_| 0), Err(NotRouted::Refused(&why)));
    assert_eq!(router.route(&get("/y"), |_| 0).unwrap().pool, 1);
    assert_eq!(router.route(&get("/y"), |_| 1), Err(NotRouted::Refused(&broken)));
}

#[test]
fn methods_match_exactly() {
    let router = router(&["method = \"GET\"\npool = \"a\"", "method = [\"POST\", \"PURGE\"]\npool = \"b\""]);
    for (method, expected) in [("GET", Some('a')), ("POST", Some('b')), ("PURGE", Some('b')), ("HEAD", None)] {
        assert_eq!(pool(&router, &request(method, "/", &[])), expected, "{method}");
    }
}

#[test]
fn header_conditions_match_presence_or_value() {
    let router = router(&[
        "headers = [{ name = \"X-Team\", value = \"red\" }, { name = \"x-beta\" }]\npool = \"c\"",
        "headers = [{ name = \"x-team\", value = \"red\" }]\npool = \"b\"",
    ]);
    for (fields, expected) in [
        (&[("x-team", "red"), ("x-beta", "")][..], Some('c')),
        (&[("x-team", "blue"), ("x-team", "red")], Some('b')),
        (&[("x-team", "Red")], None),
        (&[("x-team", "red, blue")], None),
        (&[("x-beta", "1")], None),
        (&[], None),
    ] {
        assert_eq!(pool(&router, &request("GET", "/", fields)), expected, "{fields:?}");
    }
}

#[test]
fn models_match_exactly_or_by_prefix() {
    let router = router(&[
        "model = [\"llama\", \"mistral-*\"]\npool = \"b\"",
        "model = \"*\"\npool = \"c\"",
        "path_prefix = \"/v1\"\npool = \"a\"",
    ]);
    for (name, expected) in [
        ("llama", 'b'),
        ("mistral-", 'b'),
        ("mistral-7b", 'b'),
        ("Llama", 'c'),
        ("llama-2", 'c'),
        ("mistral", 'c'),
        ("模型", 'c'),
    ] {
        assert_eq!(pool(&router, &model(name)), Some(expected), "{name:?}");
    }
    assert_eq!(pool(&router, &get("/v1/models")), Some('a'));
    assert_eq!(pool(&router, &get("/")), None);
}

#[test]
fn base_models_and_model_headers_match() {
    let router = router(&[
        "base_model = \"llama\"\npool = \"a\"",
        "headers = [{ name = \"X-Gateway-Model-Name\", value = \"m\" }]\npool = \"b\"",
        "headers = [{ name = \"x-gateway-base-model-name\" }]\npool = \"c\"",
    ]);
    let base = |name| request("POST", "/", &[("x-gateway-base-model-name", name)]);
    assert_eq!(pool(&router, &base("llama")), Some('a'));
    assert_eq!(pool(&router, &base("other")), Some('c'));
    assert_eq!(pool(&router, &model("m")), Some('b'));
    assert_eq!(pool(&router, &model("llama")), None);
}

#[test]
fn the_first_route_whose_conditions_all_hold_wins() {
    let router = router(&[
        "host = \"h\"\npath_prefix = \"/v1\"\nmodel = \"m\"\npool = \"c\"",
        "host = \"h\"\npath_prefix = \"/v1\"\npool = \"b\"",
        "pool = \"a\"",
    ]);
    let ask = |host, path, model| request("POST", path, &[("host", host), ("x-gateway-model-name", model)]);
    assert_eq!(pool(&router, &ask("h", "/v1/x", "m")), Some('c'));
    assert_eq!(pool(&router, &ask("h", "/v1/x", "other")), Some('b'));
    assert_eq!(pool(&router, &ask("h", "/v2", "m")), Some('a'));
    assert_eq!(pool(&router, &ask("i", "/v1", "m")), Some('a'));
}

#[test]
fn body_is_awaited_only_if_it_decides_the_route() {
    let router = router(&[
        "host = \"fixed\"\npool = \"a\"",
        "model = \"m\"\npath_prefix = \"/v1\"\npool = \"b\"",
        "headers = [{ name = \"x-gateway-base-model-name\", value = \"llama\" }]\npath_prefix = \"/v2\"\npool = \"b\"",
        "pool = \"c\"",
    ]);
    for (host, path, expected) in
        [("fixed", "/v1", false), ("h", "/v1/chat", true), ("h", "/v2", true), ("h", "/v3", false)]
    {
        assert_eq!(router.needs_model(&request("POST", path, &[("host", host)])), expected, "{host} {path}");
    }
}

#[test]
fn unknown_pool_gets_no_requests() {
    let mut config = parsed(&[]).unwrap();
    config.routes = vec![config::Route::to("nowhere"), config::Route::to("a")];
    assert_eq!(pool(&Router::new(&config), &get("/")), None);
}

#[test]
fn pool_with_weight_zero_gets_no_requests() {
    let router = router(&["pools = [{ name = \"a\", weight = 0 }, { name = \"b\", weight = 3 }]"]);
    assert_eq!(pool(&router, &get("/")), Some('b'));
    let none = config::Route { pools: Vec::new(), ..config::Route::to("a") };
    let mut config = parsed(&[]).unwrap();
    config.routes = vec![none];
    assert_eq!(pool(&Router::new(&config), &get("/")), None);
}

/// The conditions of a generated route.
#[derive(Debug, Clone)]
struct Spec {
    hosts: Vec<&'static str>,
    /// The path, and whether it has to match exactly.
    path: Option<(&'static str, bool)>,
    methods: Vec<&'static str>,
    headers: Vec<(&'static str, Option<&'static str>)>,
    models: Vec<&'static str>,
}

impl Spec {
    fn toml(&self) -> String {
        let mut text = "pool = \"a\"\n".to_owned();
        for (key, values) in [("host", &self.hosts), ("method", &self.methods), ("model", &self.models)] {
            if !values.is_empty() {
                let _ = writeln!(text, "{key} = {values:?}");
            }
        }
        if let Some((path, exact)) = self.path {
            let _ = writeln!(text, "{} = {path:?}", if exact { "path" } else { "path_prefix" });
        }
        let headers = self.headers.iter().map(|(name, value)| match value {
            Some(value) => format!("{{ name = {name:?}, value = {value:?} }}"),
            None => format!("{{ name = {name:?} }}"),
        });
        let _ = writeln!(text, "headers = [{}]", headers.collect::<Vec<_>>().join(", "));
        text
    }

    /// A second implementation of the rules, by labels and segments.
    fn matches(&self, asked: &Asked) -> bool {
        let labels = |name: &str| name.split('.').rev().map(str::to_owned).collect::<Vec<_>>();
        let host = |pattern: &&str| match pattern.strip_prefix("*.") {
            Some(name) => {
                let (host, name) = (labels(asked.host), labels(name));
                host.len() > name.len() && host[..name.len()] == name
            }
            None => *pattern == asked.host,
        };
        let segments = |path: &str| path.split('/').map(str::to_owned).collect::<Vec<_>>();
        let path = |(wanted, exact): (&str, bool)| {
            let (wanted, path) = (segments(wanted), segments(asked.path));
            let leading = if wanted.last().is_some_and(String::is_empty) { wanted.len() - 1 } else { wanted.len() };
            if exact { wanted == path } else { path.len() >= leading && path[..leading] == wanted[..leading] }
        };
        let header = |(name, value): &(&str, Option<&str>)| {
            let mut lines = asked.headers.iter().filter(|(present, _)| present == name);
            lines.any(|(_, line)| value.is_none_or(|value| value == *line))
        };
        let model = |pattern: &&str| match pattern.split_once('*') {
            Some((start, _)) => asked.model.is_some_and(|model| model.starts_with(start)),
            None => asked.model == Some(*pattern),
        };
        (self.hosts.is_empty() || self.hosts.iter().any(host))
            && self.path.is_none_or(path)
            && (self.methods.is_empty() || self.methods.contains(&asked.method))
            && self.headers.iter().all(header)
            && (self.models.is_empty() || self.models.iter().any(model))
    }
}

#[derive(Debug, Clone)]
struct Asked {
    host: &'static str,
    path: &'static str,
    method: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    model: Option<&'static str>,
}

impl Asked {
    fn parts(&self) -> request::Parts {
        let mut parts = request(self.method, self.path, &self.headers);
        parts.headers.insert(header::HOST, HeaderValue::from_static(self.host));
        if let Some(model) = self.model {
            parts.headers.insert("x-gateway-model-name", HeaderValue::from_static(model));
        }
        parts
    }
}

const HOSTS: [&str; 6] = ["a", "b.a", "c.b.a", "d.b.a", "xb.a", "b.aa"];
const PATHS: [&str; 8] = ["/", "/v", "/v/", "/v/w", "/v/w/", "/v/w/x", "/vw", "/w"];
const METHODS: [&str; 2] = ["GET", "POST"];
const NAMES: [&str; 2] = ["x-one", "x-two"];
const VALUES: [&str; 2] = ["1", "2"];
const MODELS: [&str; 5] = ["m", "mm", "m-1", "n", "mn"];

fn some<T: Clone + std::fmt::Debug + 'static>(of: &'static [T], most: usize) -> impl Strategy<Value = Vec<T>> {
    prop::sample::subsequence(of.to_vec(), 0..=most)
}

fn spec() -> impl Strategy<Value = Spec> {
    const PATTERNS: [&str; 6] = ["a", "b.a", "*.a", "*.b.a", "c.b.a", "*.aa"];
    const MODEL_PATTERNS: [&str; 6] = ["m", "m*", "m-*", "*", "n", "mn"];
    let path = prop::option::of((prop::sample::select(&PATHS[..]), any::<bool>()));
    let header = (prop::sample::select(&NAMES[..]), prop::option::of(prop::sample::select(&VALUES[..])));
    let headers = prop::collection::vec(header, 0..=2);
    (some(&PATTERNS, 2), path, some(&METHODS, 1), headers, some(&MODEL_PATTERNS, 2))
        .prop_map(|(hosts, path, methods, headers, models)| Spec { hosts, path, methods, headers, models })
}

fn asked() -> impl Strategy<Value = Asked> {
    let field = (prop::sample::select(&NAMES[..]), prop::sample::select(&VALUES[..]));
    (
        prop::sample::select(&HOSTS[..]),
        prop::sample::select(&PATHS[..]),
        prop::sample::select(&METHODS[..]),
        prop::collection::vec(field, 0..=3),
        prop::option::of(prop::sample::select(&MODELS[..])),
    )
        .prop_map(|(host, path, method, headers, model)| Asked { host, path, method, headers, model })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn routes_match_as_the_second_implementation(spec in spec(), asked in prop::collection::vec(asked(), 20)) {
        let router = router(&[&spec.toml()]);
        for asked in asked {
            let parts = asked.parts();
            prop_assert_eq!(pool(&router, &parts).is_some(), spec.matches(&asked), "{:?}", asked);
            // If the model is not needed, the result is the same without it.
            if !router.needs_model(&parts) {
                let without = Asked { model: None, ..asked.clone() };
                prop_assert_eq!(pool(&router, &parts), pool(&router, &without.parts()), "{:?}", asked);
            }
        }
    }

    /// A route is rejected as unreachable only if it is.
    #[test]
    fn unreachable_route_is_covered_by_the_earlier_one(
        earlier in spec(),
        later in spec(),
        asked in prop::collection::vec(asked(), 50),
    ) {
        match parsed(&[&earlier.toml(), &later.toml()]) {
            Ok(_) => {}
            Err(error) => {
                prop_assert!(error.contains("found an unreachable route: routes[0] matches all of its requests"), "{}", error);
                for asked in asked {
                    prop_assert!(!later.matches(&asked) || earlier.matches(&asked), "{:?}", asked);
                }
            }
        }
    }

    /// Of all possible rolls, each pool gets exactly as many as its weight.
    #[test]
    fn shares_match_the_weights_exactly(weights in [0..40u32, 0..40u32, 0..40u32]) {
        prop_assume!(weights.iter().any(|&weight| weight > 0));
        let pools = ["a", "b", "c"].iter().zip(weights).map(|(name, weight)| config::WeightedPool::new(*name, weight));
        let mut config = parsed(&[]).unwrap();
        config.routes = vec![config::Route { pools: pools.collect(), ..config::Route::default() }];
        let (router, total) = (Router::new(&config), u64::from(weights.iter().sum::<u32>()));
        let mut drawn = [0; 3];
        for roll in 0..total {
            drawn[router.route(&get("/"), |below| { assert_eq!(below, total); roll }).unwrap().pool] += 1;
        }
        prop_assert_eq!(drawn, weights);
    }
}
