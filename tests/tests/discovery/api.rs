//! How the API server's lists and watches end, and that no change is missed.

use std::time::Duration;

use penstock_tests::TestAgent;
use penstock_tests::api_server::{Faults, WatchFault, objects};
use penstock_tests::eventually;

use crate::SOON;
use crate::scene::{Scene, answering, ask, endpoints, failures, watch};

const PODS: &str = "pods";

async fn until_endpoints(agent: &TestAgent, count: u64) {
    eventually(SOON, || endpoints(agent, "ready") == count).await;
}

/// Waits until the watch of the Pods runs again, after `before` watches.
async fn until_watched(scene: &Scene, agent: &TestAgent, before: usize) {
    eventually(SOON, || scene.api.watches(PODS) > before && watch(agent, "watch_up", PODS) == 1).await;
}

#[tokio::test]
async fn list_in_pages_is_whole() {
    let scene = Scene::new().await;
    scene.api.fail(Faults { page: Some(1), ..Faults::default() });
    let agent = scene.agent().await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
    assert_eq!((scene.api.lists(PODS), watch(&agent, "objects", PODS)), (2, 2));
}

#[tokio::test]
async fn slow_answers_are_read() {
    let scene = Scene::new().await;
    scene.api.fail(Faults { pace: Some(Duration::from_micros(300)), ..Faults::default() });
    let agent = scene.agent().await;
    scene.api.delete(PODS, objects::NAMESPACE, "one");
    until_endpoints(&agent, 1).await;
    assert_eq!(answering(&agent).await, [scene.two.addr]);
}

/// The watch ends and cannot continue; a Pod was deleted meanwhile.
async fn gone(as_event: bool) {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    scene.api.fail(Faults { gone_as_event: as_event, ..Faults::default() });
    scene.api.compact();
    scene.api.cut();
    eventually(SOON, || watch(&agent, "relists_total", PODS) >= 1 && watch(&agent, "watch_up", PODS) == 1).await;
    assert_eq!(endpoints(&agent, "ready"), 2, "the list is not applied in pieces");
    assert!(failures(&agent, PODS, "gone") >= 1);
    scene.api.delete(PODS, objects::NAMESPACE, "one");
    until_endpoints(&agent, 1).await;
    assert_eq!(answering(&agent).await, [scene.two.addr]);
}

#[tokio::test]
async fn version_that_is_gone_leads_to_another_list() {
    gone(false).await;
}

#[tokio::test]
async fn event_that_a_version_is_gone_leads_to_another_list() {
    gone(true).await;
}

#[tokio::test]
async fn pod_that_was_deleted_during_an_outage_is_removed_by_the_next_list() {
    let mut scene = Scene::new().await;
    let agent = scene.agent().await;
    scene.api.stop();
    scene.api.delete(PODS, objects::NAMESPACE, "one");
    scene.api.compact();
    scene.api.restart().await.unwrap();
    until_endpoints(&agent, 1).await;
    assert_eq!(answering(&agent).await, [scene.two.addr]);
}

#[tokio::test]
async fn bookmark_saves_a_list() {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    let pools = "inferencepools";
    eventually(SOON, || scene.api.watches(PODS) == 1 && scene.api.watches(pools) == 1).await;
    scene.api.compact();
    scene.api.bookmark();
    // The bookmark carries a version; the Pod that follows proves that it was read.
    scene.api.delete(PODS, objects::NAMESPACE, "one");
    until_endpoints(&agent, 1).await;
    let watches = scene.api.watches(PODS);
    scene.api.cut();
    until_watched(&scene, &agent, watches).await;
    eventually(SOON, || scene.api.watches(pools) == 2).await;
    assert_eq!((watch(&agent, "relists_total", PODS), watch(&agent, "relists_total", pools)), (0, 0));
}

/// Watches are cut many times; each change arrives, without a list.
async fn cut(in_line: bool) {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    scene.api.fail(Faults { cut_in_line: in_line, ..Faults::default() });
    for turn in 0..3 {
        let watches = scene.api.watches(PODS);
        scene.api.cut();
        if turn % 2 == 0 {
            scene.api.delete(PODS, objects::NAMESPACE, "one");
        } else {
            scene.api.apply(scene.pod_one());
        }
        until_endpoints(&agent, 1 + turn % 2).await;
        until_watched(&scene, &agent, watches).await;
    }
    assert_eq!((watch(&agent, "relists_total", PODS), scene.api.lists(PODS)), (0, 1));
}

#[tokio::test]
async fn watch_that_is_cut_between_events_continues() {
    cut(false).await;
}

#[tokio::test]
async fn watch_that_is_cut_in_a_line_continues() {
    cut(true).await;
}

#[tokio::test]
async fn watch_that_has_lasted_its_time_is_renewed_without_a_list() {
    let scene = Scene::new().await;
    let agent = scene.agent_with(|config| config.kubernetes.watch_timeout = Duration::from_secs(1));
    eventually(SOON, || scene.api.watches(PODS) >= 3).await;
    assert_eq!(watch(&agent, "relists_total", PODS), 0);
    assert_eq!((failures(&agent, PODS, "timeout"), watch(&agent, "watch_up", PODS)), (0, 1));
}

#[tokio::test]
async fn watch_whose_connection_died_without_a_sign_is_replaced() {
    let scene = Scene::new().await;
    let agent = scene.agent_with(|config| config.kubernetes.watch_timeout = Duration::from_secs(1));
    eventually(SOON, || scene.api.watches(PODS) >= 1).await;
    scene.api.fail(Faults { silent: true, ..Faults::default() });
    scene.api.delete(PODS, objects::NAMESPACE, "one");
    eventually(SOON, || failures(&agent, PODS, "timeout") >= 1).await;
    assert_eq!(endpoints(&agent, "ready"), 2);
    scene.api.fail(Faults::default());
    until_endpoints(&agent, 1).await;
    assert_eq!((watch(&agent, "relists_total", PODS), scene.api.lists(PODS)), (0, 1));
}

#[tokio::test]
async fn errors_of_the_server_keep_the_pool() {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    scene.api.fail(Faults { status: Some(503), ..Faults::default() });
    scene.api.cut();
    eventually(SOON, || failures(&agent, PODS, "refused") >= 2).await;
    assert_eq!(watch(&agent, "watch_up", PODS), 0);
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
    scene.api.delete(PODS, objects::NAMESPACE, "one");
    scene.api.fail(Faults::default());
    until_endpoints(&agent, 1).await;
}

/// Watches fail for ever: lists tell what has changed, and the metrics say that no watch runs.
async fn lists_replace_watches(fault: WatchFault, reason: &str) {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    eventually(SOON, || watch(&agent, "watch_up", PODS) == 1).await;
    scene.api.fail(Faults { watches: Some(fault), ..Faults::default() });
    scene.api.cut();
    // No watch runs any more.
    eventually(SOON, || failures(&agent, PODS, reason) >= 1).await;
    scene.api.delete(PODS, objects::NAMESPACE, "one");
    until_endpoints(&agent, 1).await;
    assert!(watch(&agent, "relists_total", PODS) >= 1, "only a list can tell");
    assert_eq!((answering(&agent).await, watch(&agent, "watch_up", PODS)), (vec![scene.two.addr], 0));
    scene.api.fail(Faults::default());
    eventually(SOON, || watch(&agent, "watch_up", PODS) == 1).await;
}

#[tokio::test]
async fn watches_that_are_refused_slowly_lead_to_another_list() {
    lists_replace_watches(WatchFault::Refused(504, Duration::from_millis(1200)), "refused").await;
}

#[tokio::test]
async fn watches_that_end_at_once_lead_to_another_list() {
    lists_replace_watches(WatchFault::Ended, "closed").await;
}

#[tokio::test]
async fn event_that_cannot_be_read_counts_as_malformed() {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    let mut pod = scene.pod_one();
    pod["status"]["conditions"] = "no list".into();
    scene.api.apply(pod);
    eventually(SOON, || failures(&agent, PODS, "malformed") >= 1).await;
    assert_eq!(failures(&agent, PODS, "refused"), 0);
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
    scene.api.apply(scene.pod_one());
    eventually(SOON, || watch(&agent, "watch_up", PODS) == 1).await;
}

#[tokio::test]
async fn missing_permission_keeps_the_agent_unready() {
    let scene = Scene::new().await;
    scene.api.fail(Faults { forbidden: &[PODS], ..Faults::default() });
    let agent = scene.agent_with(|_| {});
    eventually(SOON, || failures(&agent, PODS, "forbidden") >= 2).await;
    assert_eq!(agent.agent.readiness().pending(), ["InferencePool models/llama"]);
    assert_eq!(ask(&agent).await.1, "pool_unread");
    scene.api.fail(Faults::default());
    crate::scene::until_ready(&agent).await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
}
