//! The EPP that an InferencePool refers to.

use penstock_agent::config::Epp;
use penstock_agent::config::Picker;
use penstock_tests::TestAgent;
use penstock_tests::api_server::objects::{self, unready};
use penstock_tests::eventually;

use crate::SOON;
use crate::scene::{POOL, Scene, answering, ask, ask_for, endpoints, ip, obedient_epp, until_asked, until_ready};

#[tokio::test]
async fn requests_reach_the_endpoint_that_the_epp_picks() {
    let epp = obedient_epp(ip(5, 0)).await;
    let scene = Scene::with_epp("FailClose", &[epp.addr]).await;
    let agent = scene.agent().await;
    for server in [&scene.two, &scene.one, &scene.two] {
        assert_eq!(ask_for(&agent, server.addr).await, (200, String::new(), Some(server.addr)));
    }
    let stranger = ask_for(&agent, ip(9, 9)).await;
    assert_eq!((stranger.0, stranger.1.as_str()), (502, "endpoint_not_in_pool"));
    // A Pod that is not ready gets nothing even if the EPP still picks it.
    scene.api.apply(unready(scene.pod_one()));
    eventually(SOON, || endpoints(&agent, "ready") == 1).await;
    assert_eq!(ask_for(&agent, scene.one.addr).await.1, "endpoint_not_in_pool");
}

/// Waits until the agent knows so many replicas.
async fn until_replicas(agent: &TestAgent, count: u64) {
    eventually(SOON, || agent.count("penstock_epp_replicas", &[]) == count).await;
}

#[tokio::test]
async fn replica_that_stays_keeps_its_connections() {
    let first = obedient_epp(ip(5, 0)).await;
    let second = obedient_epp(ip(6, first.addr.port())).await;
    let scene = Scene::with_epp("FailClose", &[first.addr]).await;
    let agent = scene.agent().await;
    assert_eq!(ask_for(&agent, scene.one.addr).await.0, 200);
    let connections = first.connections_accepted();
    scene.api.apply(objects::epp_slice(&[first.addr, second.addr]));
    until_replicas(&agent, 2).await;
    scene.api.apply(unready(scene.pod_one()));
    eventually(SOON, || endpoints(&agent, "ready") == 1).await;
    scene.api.apply(objects::epp_slice(&[first.addr]));
    until_replicas(&agent, 1).await;
    assert_eq!(ask_for(&agent, scene.two.addr).await.0, 200);
    assert_eq!(first.connections_accepted(), connections);
}

#[tokio::test]
async fn epp_that_moves_is_followed() {
    let (mut old, new) = (obedient_epp(ip(5, 0)).await, obedient_epp(ip(6, 0)).await);
    let scene = Scene::with_epp("FailClose", &[old.addr]).await;
    let agent = scene.agent().await;
    assert_eq!(ask_for(&agent, scene.one.addr).await.0, 200);
    scene.api.apply(objects::epp_slice(&[new.addr]));
    old.stop();
    eventually(SOON, || new.connections_accepted() > 0).await;
    assert_eq!(ask_for(&agent, scene.two.addr).await, (200, String::new(), Some(scene.two.addr)));
}

#[tokio::test]
async fn failure_mode_of_the_inference_pool_applies() {
    let scene = Scene::with_epp("FailClose", &[]).await;
    let short = |config: &mut penstock_agent::config::Config| {
        let epp = Epp { unreachable_wait: Some(None), start_wait: None, ..Epp::default() };
        config.pools[0].picker = Picker::Epp(epp);
    };
    let agent = scene.agent_with(short);
    until_ready(&agent).await;
    let (status, error, _) = ask(&agent).await;
    assert_eq!((status, error.as_str()), (503, "picker_failed"));
    assert_eq!(agent.count("penstock_epp_failures_total", &[r#"reason="no_replica""#]), 1);
    scene.api.apply(objects::pool(POOL, scene.port(), "FailOpen"));
    until_asked(&agent, "").await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
}

#[tokio::test]
async fn request_waits_for_a_replica_that_becomes_ready() {
    let epp = obedient_epp(ip(5, 0)).await;
    let scene = Scene::with_epp("FailClose", &[]).await;
    let agent = scene.agent().await;
    let waiting = async {
        eventually(SOON, || agent.count("penstock_epp_waiting", &[]) == 1).await;
        scene.api.apply(objects::epp_slice(&[epp.addr]));
    };
    let (answer, ()) = tokio::join!(ask_for(&agent, scene.one.addr), waiting);
    assert_eq!(answer, (200, String::new(), Some(scene.one.addr)));
}
