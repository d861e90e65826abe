//! The API server is away: while the agent runs, and when it starts.

use std::time::{Duration, Instant};

use penstock_agent::config::Config;
use penstock_tests::api_server::objects;
use penstock_tests::{TestAgent, eventually};
use tempfile::TempDir;

use crate::SOON;
use crate::scene::{Scene, answering, ask, ask_for, endpoints, failures, ip, obedient_epp, until_ready, watch};

#[tokio::test]
async fn pool_is_kept_while_the_api_server_is_away() {
    let mut scene = Scene::new().await;
    let agent = scene.agent().await;
    scene.api.stop();
    eventually(SOON, || failures(&agent, "pods", "unreachable") >= 1).await;
    assert_eq!(watch(&agent, "watch_up", "pods"), 0);
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
    assert!(agent.agent.readiness().is_ready());
    scene.api.delete("pods", objects::NAMESPACE, "one");
    scene.api.restart().await.unwrap();
    eventually(SOON, || endpoints(&agent, "ready") == 1).await;
    assert_eq!(answering(&agent).await, [scene.two.addr]);
}

#[tokio::test]
async fn agent_without_a_known_state_waits_for_the_api_server() {
    let mut scene = Scene::new().await;
    scene.api.stop();
    let agent = scene.agent_with(|config| config.kubernetes.start_wait = None);
    eventually(SOON, || failures(&agent, "inferencepools", "unreachable") >= 1).await;
    assert_eq!(agent.agent.readiness().pending(), ["InferencePool models/llama"]);
    let (status, error, _) = ask(&agent).await;
    assert_eq!((status, error.as_str()), (503, "pool_unread"));
    scene.api.restart().await.unwrap();
    until_ready(&agent).await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
}

/// An agent that keeps its state in `folder`.
fn keeping(scene: &Scene, folder: &TempDir, adjust: impl FnOnce(&mut Config)) -> TestAgent {
    scene.agent_with(|config| {
        config.kubernetes.state_dir = Some(folder.path().to_owned());
        config.kubernetes.start_wait = Some(Duration::from_millis(300));
        adjust(config);
    })
}

async fn until_kept(folder: &TempDir) {
    eventually(SOON, || folder.path().join("inference-pools.json").exists()).await;
}

#[tokio::test]
async fn last_known_state_serves_without_the_api_server() {
    let epp = obedient_epp(ip(5, 0)).await;
    let mut scene = Scene::with_epp("FailClose", &[epp.addr]).await;
    let folder = tempfile::tempdir().unwrap();
    let first = keeping(&scene, &folder, |_| {});
    until_ready(&first).await;
    until_kept(&folder).await;
    drop(first);
    scene.api.stop();

    let begun = Instant::now();
    let second = keeping(&scene, &folder, |_| {});
    // From the first request on, by the EPP that was known.
    assert_eq!(ask_for(&second, scene.two.addr).await, (200, String::new(), Some(scene.two.addr)));
    until_ready(&second).await;
    assert!(begun.elapsed() >= Duration::from_millis(300), "ready only after start_wait");
    scene.api.delete("pods", objects::NAMESPACE, "one");
    scene.api.restart().await.unwrap();
    eventually(SOON, || endpoints(&second, "ready") == 1).await;
}

#[tokio::test]
async fn state_that_cannot_be_used_is_ignored() {
    let scene = Scene::new().await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("inference-pools.json"), r#"{"version":9}"#).unwrap();
    let agent = keeping(&scene, &folder, |_| {});
    until_ready(&agent).await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
    eventually(SOON, || {
        std::fs::read_to_string(folder.path().join("inference-pools.json"))
            .is_ok_and(|text| text.contains("\"version\":1"))
    })
    .await;
}

#[tokio::test]
async fn state_that_cannot_be_kept_does_not_stop_discovery() {
    let scene = Scene::new().await;
    let folder = tempfile::tempdir().unwrap();
    let agent = keeping(&scene, &folder, |config| {
        config.kubernetes.state_dir = Some(folder.path().join("missing"));
    });
    until_ready(&agent).await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
}
