//! A Gateway with HTTPRoutes: which pools answer, changes without a lost request, and what is known without the API server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use penstock_agent::config::{Config, GatewayRef, InferencePools, Pool, Route, SteeringMode};
use penstock_tests::api_server::objects::{self, INFRA, NAMESPACE};
use penstock_tests::client::Client;
use penstock_tests::stage::echo;
use penstock_tests::{TestAgent, eventually};
use serde_json::{Value, json};

use crate::SOON;
use crate::scene::{Scene, ip, model_server, until_ready};

const GATEWAY: &str = "inference";

/// Two pools, each with one of the model servers, and a Gateway for all namespaces.
async fn scene() -> Scene {
    let scene = Scene::empty().await;
    scene.api.apply(objects::gateway(GATEWAY, &json!([listener("http", "")])));
    for (name, server) in [("one", scene.one.addr), ("two", scene.two.addr)] {
        add_pool(&scene, name, server);
    }
    scene
}

fn listener(name: &str, hostname: &str) -> Value {
    json!({
        "name": name, "hostname": hostname, "port": 80, "protocol": "HTTP", "allowedRoutes": { "namespaces": { "from": "All" } },
    })
}

/// An InferencePool with one Pod of its own.
fn add_pool(scene: &Scene, name: &str, server: std::net::SocketAddr) {
    let mut pool = objects::pool_without_epp(name, server.port());
    pool["spec"]["selector"]["matchLabels"] = json!({ "app": name });
    let mut pod = objects::pod(&format!("pod-of-{name}"), server);
    pod["metadata"]["labels"] = json!({ "app": name });
    scene.api.apply(pod);
    scene.api.apply(pool);
}

fn rule(path: &str, pool: &str) -> Value {
    json!({ "matches": [{ "path": { "value": path } }], "backendRefs": [objects::to_pool(pool)] })
}

/// An HTTPRoute of the pools' namespace.
fn route(scene: &Scene, name: &str, rules: &Value) {
    scene.api.apply(objects::http_route(NAMESPACE, name, GATEWAY, rules));
}

fn settings(config: &mut Config) {
    let gateway = GatewayRef { namespace: INFRA.to_owned(), name: GATEWAY.to_owned(), port: None };
    config.kubernetes.gateway = Some(gateway);
}

/// An agent whose only pools are those of the routes. It may not be ready yet.
fn agent_with(scene: &Scene, adjust: impl FnOnce(&mut Config)) -> TestAgent {
    let section = Pool { inference_pools: Some(InferencePools::default()), ..Pool::new("of-gateway", []) };
    TestAgent::start(section, SteeringMode::Off, |config| {
        scene.settings(config);
        settings(config);
        adjust(config);
    })
}

async fn agent(scene: &Scene) -> TestAgent {
    let agent = agent_with(scene, |_| {});
    until_ready(&agent).await;
    agent
}

/// The model server that answers, or the reason of the error, with the message.
async fn ask(scene: &Scene, agent: &TestAgent, path: &str) -> (String, String) {
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&penstock_tests::Request::get(path)).await.unwrap();
    let name = match response.served_by() {
        Some(server) if server == scene.one.addr => "one".to_owned(),
        Some(server) if server == scene.two.addr => "two".to_owned(),
        Some(other) => other.to_string(),
        None => format!("{} {}", response.status(), response.error_code()),
    };
    (name, response.text())
}

/// Waits until requests for the path end like this.
async fn until(scene: &Scene, agent: &TestAgent, path: &str, expected: &str) -> String {
    let begin = std::time::Instant::now();
    loop {
        let (found, text) = ask(scene, agent, path).await;
        if found == expected {
            return text;
        }
        assert!(begin.elapsed() < SOON, "{path}: {found}, expected {expected}: {text}");
    }
}

#[tokio::test]
async fn routes_of_the_gateway_select_the_pool() {
    let scene = scene().await;
    route(&scene, "r", &json!([rule("/test", "one"), rule("/test/echo", "two")]));
    let agent = agent(&scene).await;
    for (path, expected) in [("/test/echo", "two"), ("/test/other", "one"), ("/tests", "404 no_route")] {
        assert_eq!(ask(&scene, &agent, path).await.0, expected, "{path}");
    }
    let ready = agent.count("penstock_endpoints", &[r#"pool="models/two""#, r#"state="ready""#]);
    assert_eq!(ready, 1);
    // A route of the file comes first, and the section's settings are those of the pools.
    assert_eq!(agent.agent.config().pools.len(), 1);
}

#[tokio::test]
async fn routes_come_change_and_go_while_the_agent_runs() {
    let scene = scene().await;
    let agent = agent(&scene).await;
    until(&scene, &agent, "/test/echo", "404 no_route").await;
    route(&scene, "r", &json!([rule("/", "one")]));
    until(&scene, &agent, "/test/echo", "one").await;
    route(&scene, "r", &json!([rule("/", "two")]));
    until(&scene, &agent, "/test/echo", "two").await;
    // The pool that no route refers to any more is not watched either.
    let watched =
        |pool: &str| agent.count("penstock_kubernetes_watch_up", &[&format!("inference_pool=\"models/{pool}\"")]);
    eventually(SOON, || (watched("one"), watched("two")) == (0, 2)).await;
    // Another parent takes the route away, as a deletion does.
    let mut elsewhere = objects::http_route(NAMESPACE, "r", "other", &json!([rule("/", "two")]));
    elsewhere["spec"]["parentRefs"][0]["namespace"] = "elsewhere".into();
    scene.api.apply(elsewhere);
    until(&scene, &agent, "/test/echo", "404 no_route").await;
    route(&scene, "r", &json!([rule("/", "one")]));
    until(&scene, &agent, "/test/echo", "one").await;
    scene.api.delete("httproutes", NAMESPACE, "r");
    until(&scene, &agent, "/test/echo", "404 no_route").await;
    route(&scene, "r", &json!([rule("/", "one")]));
    until(&scene, &agent, "/test/echo", "one").await;
    scene.api.delete("gateways", INFRA, GATEWAY);
    until(&scene, &agent, "/test/echo", "404 no_route").await;
    assert!(agent.agent.readiness().is_ready());
}

/// A route moves between pools, one of which is new each time.
#[tokio::test]
async fn no_request_is_lost_while_routes_change() {
    let scene = scene().await;
    route(&scene, "r", &json!([rule("/", "one")]));
    let agent = agent(&scene).await;
    let stop = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (address, stop) = (agent.addr, Arc::clone(&stop));
            tokio::spawn(async move {
                let mut answered = 0;
                while !stop.load(Ordering::Relaxed) {
                    let mut client = Client::connect(address).await.unwrap();
                    let response = client.request(&echo("{}")).await.unwrap();
                    assert_eq!(response.status(), 200, "{}", response.text());
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    for round in 0..6 {
        let (pool, server) = [("two", scene.two.addr), ("one", scene.one.addr)][round % 2];
        let name = format!("{pool}-{round}");
        add_pool(&scene, &name, server);
        route(&scene, "r", &json!([rule("/", &name)]));
        until(&scene, &agent, "/test/echo", pool).await;
    }
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        assert!(caller.await.unwrap() > 0);
    }
}

#[tokio::test]
async fn references_to_other_namespaces_follow_their_grants() {
    let scene = scene().await;
    scene.api.apply(objects::http_route("team", "r", GATEWAY, &json!([rule("/", "one")])));
    let agent = agent(&scene).await;
    let text = until(&scene, &agent, "/test/echo", "500 backend_invalid").await;
    assert!(
        text.contains("no ReferenceGrant in models permits the reference to the InferencePool models/one"),
        "{text}"
    );
    scene.api.apply(objects::grant("team"));
    until(&scene, &agent, "/test/echo", "one").await;
    scene.api.delete("referencegrants", NAMESPACE, "from-team");
    until(&scene, &agent, "/test/echo", "500 backend_invalid").await;
}

#[tokio::test]
async fn listeners_select_namespaces_by_their_labels() {
    let scene = scene().await;
    let selector = json!({ "from": "Selector", "selector": { "matchLabels": { "serves": "models" } } });
    let mut selecting = listener("http", "");
    selecting["allowedRoutes"]["namespaces"] = selector;
    scene.api.apply(objects::gateway(GATEWAY, &json!([selecting])));
    scene.api.apply(objects::namespace(NAMESPACE, &json!({})));
    route(&scene, "r", &json!([rule("/", "one")]));
    let agent = agent(&scene).await;
    until(&scene, &agent, "/test/echo", "404 no_route").await;
    scene.api.apply(objects::namespace(NAMESPACE, &json!({ "serves": "models" })));
    until(&scene, &agent, "/test/echo", "one").await;
    scene.api.apply(objects::gateway(GATEWAY, &json!([listener("http", "llm.example")])));
    until(&scene, &agent, "/test/echo", "404 no_route").await;
}

#[tokio::test]
async fn what_cannot_be_served_answers_500_and_says_why() {
    let scene = scene().await;
    let service = json!([{ "name": "web", "port": 80 }]);
    let filtered = json!([{ "type": "RequestMirror", "requestMirror": { "backendRef": { "name": "web" } } }]);
    let at = |path: &str| json!([{ "path": { "value": path } }]);
    route(
        &scene,
        "r",
        &json!([
            { "matches": at("/service"), "backendRefs": service },
            { "matches": at("/mirror"), "filters": filtered, "backendRefs": [objects::to_pool("one")] },
            { "matches": [{ "path": { "type": "RegularExpression", "value": "/re.*" } }], "backendRefs": [objects::to_pool("one")] },
            rule("/absent", "absent"),
            rule("/test", "one"),
        ]),
    );
    let agent = agent(&scene).await;
    let rows = [
        ("/service", "500 backend_invalid", "rule 0: backendRefs of kind Service"),
        ("/mirror", "500 route_unsupported", "rule 1: filters of type RequestMirror are not implemented"),
        ("/regex", "500 route_unsupported", "rule 2: matches.path of type RegularExpression is not implemented"),
        ("/absent", "500 backend_invalid", "the InferencePool models/absent, which does not exist"),
    ];
    for (path, expected, why) in rows {
        let (found, text) = ask(&scene, &agent, path).await;
        assert!(found == expected && text.contains(why), "{path}: {found} {text}");
    }
    assert_eq!(ask(&scene, &agent, "/test/echo").await.0, "one", "the other rules are served");
    add_pool(&scene, "absent", scene.two.addr);
    until(&scene, &agent, "/absent", "two").await;
}

#[tokio::test]
async fn rewrites_weights_and_redirects_of_routes_are_served() {
    let scene = scene().await;
    let weighted = |pool: &str, weight: u32| {
        let mut backend = objects::to_pool(pool);
        backend["weight"] = weight.into();
        backend
    };
    let rewrite = json!([{ "type": "URLRewrite", "urlRewrite": {
        "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/test" },
    } }]);
    let redirect =
        json!([{ "type": "RequestRedirect", "requestRedirect": { "hostname": "new.example", "statusCode": 301 } }]);
    let at = |path: &str| json!([{ "path": { "value": path } }]);
    route(
        &scene,
        "r",
        &json!([
            { "matches": at("/team"), "filters": rewrite, "backendRefs": [weighted("one", 1), weighted("two", 0)] },
            { "matches": at("/old"), "filters": redirect },
            { "matches": at("/half"), "backendRefs": [weighted("one", 1), { "name": "web", "port": 80, "weight": 1 }] },
        ]),
    );
    let agent = agent(&scene).await;
    let mut client = Client::connect(agent.addr).await.unwrap();
    for _ in 0..10 {
        let response = client.request(&penstock_tests::Request::post("/team/echo", "{}")).await.unwrap();
        assert_eq!((response.served_by(), response.echoed().target.as_str()), (Some(scene.one.addr), "/test/echo"));
    }
    let response = client.request(&penstock_tests::Request::get("/old?x")).await.unwrap();
    assert_eq!((response.status(), response.header("location")), (301, Some("http://new.example/old?x")));
    let mut outcomes = std::collections::BTreeMap::new();
    for _ in 0..60 {
        *outcomes.entry(ask(&scene, &agent, "/half").await.0).or_insert(0) += 1;
    }
    // Each share is drawn: 60 draws give one of them fewer than 10 times once in ten million runs.
    let few: Vec<_> = outcomes.values().filter(|count| **count < 10).collect();
    assert!(outcomes.len() == 2 && outcomes.contains_key("500 backend_invalid") && few.is_empty(), "{outcomes:?}");
}

#[tokio::test]
async fn pools_and_routes_of_the_file_take_precedence() {
    let scene = scene().await;
    let extra = model_server(ip(4, 0)).await;
    route(&scene, "r", &json!([rule("/", "one")]));
    let agent = agent_with(&scene, |config| {
        let own = Pool { inference_pool: Some(crate::scene::named("one")), ..Pool::new("mine", []) };
        config.pools.extend([own, Pool::new("fixed", [extra.addr])]);
        let host = penstock_agent::config::PathPattern::Prefix("/fixed".to_owned());
        config.routes = vec![Route { path: Some(host), ..Route::to("fixed") }];
    });
    until_ready(&agent).await;
    assert_eq!(ask(&scene, &agent, "/test/echo").await.0, "one");
    assert_eq!(ask(&scene, &agent, "/fixed").await.0, extra.addr.to_string());
    let requests = |pool: &str| agent.count("penstock_requests_total", &[&format!("pool=\"{pool}\"")]);
    eventually(SOON, || (requests("mine"), requests("fixed")) == (1, 1)).await;
    // A reload keeps what was discovered.
    let mut config = agent.agent.config();
    config.limits.body_bytes = 1 << 20;
    agent.agent.reload(config).unwrap();
    assert_eq!(ask(&scene, &agent, "/test/echo").await.0, "one");
}

#[tokio::test]
async fn last_known_routes_serve_without_the_api_server() {
    let mut scene = scene().await;
    let folder = tempfile::tempdir().unwrap();
    let keeping = |config: &mut Config| {
        config.kubernetes.state_dir = Some(folder.path().to_owned());
        config.kubernetes.start_wait = Some(std::time::Duration::from_millis(300));
    };
    route(&scene, "r", &json!([rule("/test", "one")]));
    let first = agent_with(&scene, keeping);
    until_ready(&first).await;
    until(&scene, &first, "/test/echo", "one").await;
    let saved = || std::fs::read_to_string(folder.path().join("inference-pools.json")).unwrap_or_default();
    eventually(SOON, || saved().contains("HTTPRoute") || saved().contains("parentRefs")).await;
    scene.api.stop();
    assert_eq!(ask(&scene, &first, "/test/echo").await.0, "one", "the running agent keeps its routes");
    drop(first);
    let second = agent_with(&scene, keeping);
    until_ready(&second).await;
    assert_eq!(ask(&scene, &second, "/test/echo").await.0, "one");
    // What changed meanwhile is applied when the API server is back.
    route(&scene, "r", &json!([rule("/test", "two")]));
    scene.api.restart().await.unwrap();
    until(&scene, &second, "/test/echo", "two").await;
}

#[tokio::test]
async fn agent_that_knows_nothing_waits_for_the_gateway() {
    let mut scene = scene().await;
    route(&scene, "r", &json!([rule("/", "one")]));
    scene.api.stop();
    let agent = agent_with(&scene, |_| {});
    assert_eq!(ask(&scene, &agent, "/test/echo").await.0, "503 routes_unread");
    assert!(agent.agent.readiness().pending().iter().any(|gate| gate == "Gateway infra/inference"));
    scene.api.restart().await.unwrap();
    until_ready(&agent).await;
    assert_eq!(ask(&scene, &agent, "/test/echo").await.0, "one", "the pools of the routes have been read, too");
}

/// Routes of other Gateways are not kept, however many there are.
#[tokio::test]
async fn routes_of_other_gateways_are_not_kept() {
    let scene = scene().await;
    for number in 0..50 {
        scene.api.apply(objects::http_route(NAMESPACE, &format!("o{number}"), "other", &json!([rule("/", "two")])));
    }
    route(&scene, "r", &json!([rule("/", "one")]));
    let agent = agent(&scene).await;
    assert_eq!(ask(&scene, &agent, "/test/echo").await.0, "one");
    let kept = || agent.count("penstock_kubernetes_objects", &[r#"resource="httproutes""#]);
    assert_eq!(kept(), 1);
    scene.api.apply(objects::http_route(NAMESPACE, "o0", "another", &json!([rule("/", "two")])));
    scene.api.apply(objects::http_route(NAMESPACE, "o1", GATEWAY, &json!([rule("/x", "two")])));
    eventually(SOON, || kept() == 2).await;
}
