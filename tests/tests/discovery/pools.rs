//! InferencePools that come, go, change and cannot be used; reloads of the file.

use penstock_agent::config::Config;
use penstock_tests::TestAgent;
use penstock_tests::api_server::objects;
use penstock_tests::client::Client;
use penstock_tests::eventually;
use penstock_tests::stage::echo;

use crate::SOON;
use crate::scene::{POOL, Scene, answering, ask, discovered, endpoints, until_asked, until_ready};

fn discoveries(agent: &TestAgent) -> u64 {
    agent.count("penstock_config_reloads_total", &[r#"reason="discovered""#])
}

#[tokio::test]
async fn absent_pool_answers_503_until_it_exists() {
    let scene = Scene::empty().await;
    scene.api.apply(objects::pod("one", scene.one.addr));
    let agent = scene.agent().await;
    let (status, error, _) = ask(&agent).await;
    assert_eq!((status, error.as_str()), (503, "pool_absent"));
    scene.api.apply(objects::pool_without_epp(POOL, scene.port()));
    until_asked(&agent, "").await;
    assert_eq!((answering(&agent).await, endpoints(&agent, "ready")), (vec![scene.one.addr], 1));
    scene.api.delete("inferencepools", objects::NAMESPACE, POOL);
    until_asked(&agent, "pool_absent").await;
    assert_eq!(endpoints(&agent, "ready"), 0);
    assert!(agent.agent.readiness().is_ready(), "a deleted pool does not take the others down");
}

#[tokio::test]
async fn invalid_pool_answers_503_and_says_why() {
    let scene = Scene::new().await;
    scene.api.apply(objects::pool(POOL, scene.port(), "FailOpen"));
    let agent = scene.agent().await;
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&echo("{}")).await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (503, "pool_invalid"));
    let text = response.text();
    assert!(
        text.contains("InferencePool models/llama")
            && text.contains("the Service models/epp of the EPP does not exist"),
        "{text}"
    );
    scene.api.apply(objects::epp_service());
    until_asked(&agent, "").await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr], "it fails open");
}

#[tokio::test]
async fn reload_keeps_what_was_discovered() {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    let (lists, discovered) = (scene.api.requests(&[]), discoveries(&agent));
    let mut config = agent.agent.config();
    config.limits.body_bytes = 1 << 20;
    agent.agent.reload(config).unwrap();
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
    assert_eq!((scene.api.requests(&[]), discoveries(&agent)), (lists, discovered));
    assert_eq!(agent.agent.config().pools[0].picker, agent.config().pools[0].picker, "the file's settings are kept");
}

#[tokio::test]
async fn pool_that_a_reload_adds_is_followed_and_one_that_it_removes_is_not() {
    let scene = Scene::new().await;
    scene.api.apply(objects::pool_without_epp("second", scene.port()));
    let agent = scene.agent().await;
    let reload = |adjust: &dyn Fn(&mut Config)| {
        let mut config = agent.agent.config();
        adjust(&mut config);
        agent.agent.reload(config).unwrap();
    };
    let of_second = |name: &str| agent.count(name, &[r#"inference_pool="models/second""#]);
    let ready = |pool: &str| agent.count("penstock_endpoints", &[&format!("pool=\"{pool}\""), r#"state="ready""#]);
    reload(&|config| config.pools.push(discovered("second", "second")));
    eventually(SOON, || ready("second") == 2).await;
    assert_eq!(ready("default"), 2);
    eventually(SOON, || of_second("penstock_kubernetes_watch_up") == 2).await;
    reload(&|config| drop(config.pools.pop()));
    eventually(SOON, || of_second("penstock_kubernetes_watch_up") == 0).await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
}

#[tokio::test]
async fn reload_can_bring_the_first_inference_pool() {
    let scene = Scene::new().await;
    let agent = scene.agent_with(|config| {
        config.pools[0].inference_pool = None;
        config.pools[0].endpoints = vec![scene.one.addr.into()];
    });
    until_ready(&agent).await;
    let mut config = agent.agent.config();
    config.pools = vec![discovered("default", POOL)];
    agent.agent.reload(config).unwrap();
    until_asked(&agent, "").await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
}

#[tokio::test]
async fn pool_that_two_reloads_drop_and_bring_back_is_served() {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    let config = agent.agent.config();
    let mut without = config.clone();
    without.pools[0].inference_pool = None;
    without.pools[0].endpoints = vec![scene.one.addr.into()];
    for _ in 0..3 {
        agent.agent.reload(without.clone()).unwrap();
        agent.agent.reload(config.clone()).unwrap();
        until_asked(&agent, "").await;
        eventually(SOON, || endpoints(&agent, "ready") == 2).await;
    }
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
}
