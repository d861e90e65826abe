//! Changes of what an InferencePool refers to while the API server answers slowly: neither the old objects are used with the new
//! references nor the other way round.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use penstock_agent::config::{Config, Epp, Picker};
use penstock_tests::TestAgent;
use penstock_tests::api_server::Faults;
use penstock_tests::api_server::objects;
use penstock_tests::eventually;
use penstock_tests::scripted_epp::ScriptedEpp;
use serde_json::json;

use crate::SOON;
use crate::scene::{POOL, Scene, ask_for, endpoints, ip, model_server, obedient_epp, until_ready};

const SLOW: Duration = Duration::from_millis(1500);

/// Sends requests until `is_done`. Each of them has to be answered by the endpoint that it names, or by any if it names none.
async fn all_answered(agent: &TestAgent, to: SocketAddr, mut is_done: impl FnMut(SocketAddr) -> bool) {
    let begin = Instant::now();
    loop {
        let (status, error, server) = ask_for(agent, to).await;
        let server = server.unwrap_or_else(|| panic!("{status} {error} after {:?}", begin.elapsed()));
        if is_done(server) {
            return;
        }
        assert!(begin.elapsed() < SOON, "nothing changed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Requests fail at once while no replica of the EPP is known.
fn impatient(config: &mut Config) {
    let epp = Epp { unreachable_wait: Some(None), start_wait: None, ..Epp::default() };
    config.pools[0].picker = Picker::Epp(epp);
}

/// A second EPP with a Service of its own, whose port has another name.
fn add_second_epp(scene: &Scene, epp: &ScriptedEpp) {
    let mut service = objects::epp_service();
    service["metadata"]["name"] = "epp2".into();
    service["spec"]["ports"][0]["name"] = "picks".into();
    let mut slice = objects::epp_slice(&[epp.addr]);
    slice["metadata"]["name"] = "epp2-abcde".into();
    slice["metadata"]["labels"] = json!({ "kubernetes.io/service-name": "epp2" });
    slice["ports"][0]["name"] = "picks".into();
    scene.api.apply(service);
    scene.api.apply(slice);
}

/// The pool refers to another EPP, of which the API server lists this resource slowly.
async fn epp_changes_while_a_list_is_slow(resource: &'static str) {
    let (first, second) = (obedient_epp(ip(5, 0)).await, obedient_epp(ip(6, 0)).await);
    let scene = Scene::with_epp("FailClose", &[first.addr]).await;
    add_second_epp(&scene, &second);
    let agent = scene.agent_with(impatient);
    until_ready(&agent).await;
    all_answered(&agent, scene.one.addr, |_| true).await;
    scene.api.fail(Faults { slow_lists: Some((resource, SLOW)), ..Faults::default() });
    let mut pool = objects::pool(POOL, scene.port(), "FailClose");
    pool["spec"]["endpointPickerRef"]["name"] = "epp2".into();
    let begin = Instant::now();
    scene.api.apply(pool);
    all_answered(&agent, scene.one.addr, |_| second.connections_accepted() > 0 && begin.elapsed() > SLOW).await;
    all_answered(&agent, scene.two.addr, |_| true).await;
}

#[tokio::test]
async fn epp_changes_while_the_list_of_its_service_is_slow() {
    epp_changes_while_a_list_is_slow("services").await;
}

#[tokio::test]
async fn epp_changes_while_the_list_of_its_slices_is_slow() {
    epp_changes_while_a_list_is_slow("endpointslices").await;
}

#[tokio::test]
async fn selector_and_port_change_together_while_the_list_of_pods_is_slow() {
    let scene = Scene::new().await;
    let three = model_server(ip(4, 0)).await;
    let mut pod = objects::pod("three", three.addr);
    pod["metadata"]["labels"] = json!({ "app": "other" });
    scene.api.apply(pod);
    let agent = scene.agent().await;
    scene.api.fail(Faults { slow_lists: Some(("pods", SLOW)), ..Faults::default() });
    let mut pool = objects::pool_without_epp(POOL, three.addr.port());
    pool["spec"]["selector"]["matchLabels"] = json!({ "app": "other" });
    let begin = Instant::now();
    scene.api.apply(pool);
    // Changes of the old Pods still apply.
    scene.api.delete("pods", objects::NAMESPACE, "one");
    eventually(SLOW, || endpoints(&agent, "ready") == 1).await;
    assert!(begin.elapsed() < SLOW);
    let mut first = None;
    all_answered(&agent, ip(1, 1), |server| *first.get_or_insert(server) != server).await;
    assert_eq!(first, Some(scene.two.addr));
    all_answered(&agent, ip(1, 1), |server| server == three.addr).await;
    assert!(begin.elapsed() >= SLOW, "the list is slow");
}
