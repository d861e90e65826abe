//! Every InferencePool of a label selector: as they come and go, with routes of the file.

use penstock_agent::config::{Config, InferencePools, Pool, PoolSource, Route, SteeringMode};
use penstock_tests::api_server::objects::{self, NAMESPACE};
use penstock_tests::client::Client;
use penstock_tests::{Request, TestAgent, eventually};
use serde_json::json;

use crate::SOON;
use crate::scene::{Scene, discovered, until_ready};

fn labels() -> InferencePools {
    let labels = Some("serves=here".to_owned());
    InferencePools { from: PoolSource::Labels, labels, ..InferencePools::default() }
}

/// An InferencePool of the namespace, with one Pod of its own and this label.
fn add_pool(scene: &Scene, namespace: &str, name: &str, server: std::net::SocketAddr, serves: &str) {
    let mut pool = objects::pool_without_epp(name, server.port());
    pool["metadata"]["labels"] = json!({ "serves": serves });
    pool["spec"]["selector"]["matchLabels"] = json!({ "app": name });
    let mut pod = objects::pod(&format!("pod-of-{name}"), server);
    pod["metadata"]["labels"] = json!({ "app": name });
    for mut object in [pool, pod] {
        object["metadata"]["namespace"] = namespace.into();
        scene.api.apply(object);
    }
}

fn host(host: &str, pool: &str) -> Route {
    let hosts = vec![penstock_agent::config::HostPattern::Exact(host.to_owned())];
    Route { hosts, ..Route::to(pool) }
}

fn agent_with(scene: &Scene, adjust: impl FnOnce(&mut Config)) -> TestAgent {
    let section = Pool { inference_pools: Some(labels()), ..Pool::new("section", []) };
    TestAgent::start(section, SteeringMode::Off, |config| {
        scene.settings(config);
        config.routes = vec![host("one", "models/one"), host("two", "other/two")];
        adjust(config);
    })
}

/// The model server that answers, or the reason of the error.
async fn ask(scene: &Scene, agent: &TestAgent, host: &str) -> &'static str {
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&Request::get("/test/echo").header("host", host)).await.unwrap();
    match (response.served_by(), response.error_code().as_str()) {
        (Some(server), _) if server == scene.one.addr => "one",
        (Some(server), _) if server == scene.two.addr => "two",
        (_, "pool_absent") => "pool_absent",
        // What a request may find that began just before its pool was dropped.
        (_, "no_endpoint") => "no_endpoint",
        (_, other) => panic!("{} {other}", response.status()),
    }
}

async fn until(scene: &Scene, agent: &TestAgent, host: &str, expected: &str) {
    let begin = std::time::Instant::now();
    while ask(scene, agent, host).await != expected {
        assert!(begin.elapsed() < SOON, "{host} is not {expected}");
    }
}

#[tokio::test]
async fn pools_of_the_selector_are_served_as_they_come_and_go() {
    let scene = Scene::empty().await;
    add_pool(&scene, NAMESPACE, "one", scene.one.addr, "here");
    add_pool(&scene, "other", "two", scene.two.addr, "elsewhere");
    let agent = agent_with(&scene, |_| {});
    until_ready(&agent).await;
    // What is ready was read before.
    assert_eq!((ask(&scene, &agent, "one").await, ask(&scene, &agent, "two").await), ("one", "pool_absent"));
    add_pool(&scene, "other", "two", scene.two.addr, "here");
    until(&scene, &agent, "two", "two").await;
    add_pool(&scene, NAMESPACE, "one", scene.one.addr, "elsewhere");
    until(&scene, &agent, "one", "pool_absent").await;
    scene.api.delete("inferencepools", "other", "two");
    until(&scene, &agent, "two", "pool_absent").await;
    let watched = || agent.count("penstock_kubernetes_watch_up", &[r#"resource="pods""#]);
    eventually(SOON, || watched() == 0).await;
}

#[tokio::test]
async fn namespace_and_named_pools_limit_the_selection() {
    let scene = Scene::empty().await;
    add_pool(&scene, NAMESPACE, "one", scene.one.addr, "here");
    add_pool(&scene, "other", "two", scene.two.addr, "here");
    let agent = agent_with(&scene, |config| {
        config.pools[0].inference_pools.as_mut().unwrap().namespace = Some("other".to_owned());
        config.pools.push(discovered("mine", "one"));
        config.routes[0] = host("one", "mine");
    });
    until_ready(&agent).await;
    assert_eq!((ask(&scene, &agent, "one").await, ask(&scene, &agent, "two").await), ("one", "two"));
    // A reload without the section drops its pools.
    let mut config = agent.agent.config();
    config.pools.remove(0);
    config.routes = vec![Route::to("mine")];
    agent.agent.reload(config.clone()).unwrap();
    until(&scene, &agent, "two", "one").await;
    config.pools.insert(0, Pool { inference_pools: Some(labels()), ..Pool::new("section", []) });
    config.routes = vec![host("two", "other/two")];
    agent.agent.reload(config).unwrap();
    until(&scene, &agent, "two", "two").await;
}

#[tokio::test]
async fn last_known_selection_serves_without_the_api_server() {
    let mut scene = Scene::empty().await;
    let folder = tempfile::tempdir().unwrap();
    let keeping = |config: &mut Config| {
        config.kubernetes.state_dir = Some(folder.path().to_owned());
        config.kubernetes.start_wait = Some(std::time::Duration::from_millis(300));
    };
    add_pool(&scene, NAMESPACE, "one", scene.one.addr, "here");
    let first = agent_with(&scene, keeping);
    until_ready(&first).await;
    until(&scene, &first, "one", "one").await;
    let saved = || std::fs::read_to_string(folder.path().join("inference-pools.json")).unwrap_or_default();
    eventually(SOON, || saved().contains("serves=here")).await;
    scene.api.stop();
    drop(first);
    let second = agent_with(&scene, keeping);
    until_ready(&second).await;
    assert_eq!(ask(&scene, &second, "one").await, "one");
}
