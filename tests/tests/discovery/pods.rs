//! Pods become endpoints, and stop being endpoints, without an effect on what runs.

use penstock_agent::config::{InferencePoolVersion, Locality};
use penstock_tests::api_server::objects::{self, terminating, unready};
use penstock_tests::client::{BodyEnd, Client, Pace};
use penstock_tests::{Plan, eventually};
use serde_json::Value;

use crate::SOON;
use crate::scene::{Scene, answering, endpoints, ip, model_server, until_ready};

#[tokio::test]
async fn ready_pods_of_the_selector_are_the_endpoints() {
    let scene = Scene::new().await;
    let mut other = objects::pod("other", ip(9, 1));
    other["metadata"]["labels"]["app"] = "other".into();
    scene.api.apply(other);
    scene.api.apply(unready(objects::pod("starting", ip(10, 1))));
    let agent = scene.agent().await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
    assert_eq!((endpoints(&agent, "ready"), endpoints(&agent, "draining")), (2, 0));

    let three = model_server(ip(4, scene.port())).await;
    scene.api.apply(objects::pod("three", three.addr));
    eventually(SOON, || endpoints(&agent, "ready") == 3).await;
    scene.api.delete("pods", objects::NAMESPACE, "one");
    eventually(SOON, || endpoints(&agent, "ready") == 2).await;
    assert_eq!(answering(&agent).await, [scene.two.addr, three.addr]);
}

/// A Pod that was evicted keeps its address and its conditions, and another Pod may have got the address.
#[tokio::test]
async fn pod_that_has_ended_is_no_endpoint() {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    for phase in ["Failed", "Succeeded"] {
        let mut ended = scene.pod_one();
        ended["status"]["phase"] = phase.into();
        for pod in [ended.clone(), terminating(ended)] {
            scene.api.apply(scene.pod_one());
            eventually(SOON, || endpoints(&agent, "ready") == 2).await;
            scene.api.apply(pod);
            eventually(SOON, || endpoints(&agent, "ready") == 1).await;
            assert_eq!((answering(&agent).await, endpoints(&agent, "draining")), (vec![scene.two.addr], 0), "{phase}");
        }
    }
}

/// A response from the first model server that is running while `change` happens to its Pod.
async fn stream_continues(change: impl FnOnce(Value) -> Option<Value>, left: (u64, u64)) {
    let scene = Scene::new().await;
    scene.api.delete("pods", objects::NAMESPACE, "two");
    let agent = scene.agent().await;
    let mut running = Client::connect(agent.addr).await.unwrap();
    // Larger than the buffers in between while the client does not read.
    let plan = Plan { size: 40 << 20, ..Plan::default() };
    running.send(&plan.request()).await.unwrap();
    running.head().await.unwrap();
    scene.api.apply(objects::pod("two", scene.two.addr));
    eventually(SOON, || endpoints(&agent, "ready") == 2).await;
    match change(scene.pod_one()) {
        Some(pod) => scene.api.apply(pod),
        None => scene.api.delete("pods", objects::NAMESPACE, "one"),
    }
    eventually(SOON, || (endpoints(&agent, "ready"), endpoints(&agent, "draining")) == left).await;
    assert_eq!(answering(&agent).await, [scene.two.addr]);
    assert!(scene.one.written() < plan.size);
    let mut checker = plan.checker();
    let read = running.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((checker.offset(), read.end), (plan.size, BodyEnd::Complete));
    assert_eq!((scene.one.requests(), scene.one.aborted()), (1, 0));
}

#[tokio::test]
async fn unready_pod_gets_no_new_requests_and_its_stream_continues() {
    stream_continues(|pod| Some(unready(pod)), (1, 0)).await;
}

#[tokio::test]
async fn terminating_pod_drains_and_its_stream_continues() {
    stream_continues(|pod| Some(unready(terminating(pod))), (1, 1)).await;
}

#[tokio::test]
async fn deleted_pod_gets_no_new_requests_and_its_stream_continues() {
    stream_continues(|_| None, (1, 0)).await;
}

#[tokio::test]
async fn changes_of_pods_reload_nothing() {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    let reloads = || agent.count("penstock_config_reloads_total", &[]);
    let before = reloads();
    scene.api.apply(unready(scene.pod_one()));
    eventually(SOON, || endpoints(&agent, "ready") == 1).await;
    assert_eq!(reloads(), before);
}

#[tokio::test]
async fn pods_of_the_agents_node_are_preferred() {
    let scene = Scene::new().await;
    let mut far = objects::pod("two", scene.two.addr);
    far["spec"]["nodeName"] = "node-2".into();
    scene.api.apply(far);
    let agent = scene.agent_with(|config| {
        config.node.name = Some("node-1".to_owned());
        config.pools[0].subset.prefer = vec![Locality::Node];
    });
    until_ready(&agent).await;
    assert_eq!(answering(&agent).await, [scene.one.addr]);
    scene.api.apply(unready(scene.pod_one()));
    eventually(SOON, || endpoints(&agent, "ready") == 1).await;
    assert_eq!(answering(&agent).await, [scene.two.addr]);
}

#[tokio::test]
async fn other_selector_and_ports_take_effect_when_their_pods_are_known() {
    let scene = Scene::new().await;
    let agent = scene.agent().await;
    let new = model_server(ip(4, 0)).await;
    let mut pod = objects::pod("new", new.addr);
    pod["metadata"]["labels"]["app"] = "sglang".into();
    scene.api.apply(pod);
    let mut pool = objects::pool_without_epp(crate::scene::POOL, new.addr.port());
    pool["spec"]["selector"]["matchLabels"]["app"] = "sglang".into();
    scene.api.apply(pool);
    eventually(SOON, || endpoints(&agent, "ready") == 1).await;
    assert_eq!(answering(&agent).await, [new.addr]);
}

#[tokio::test]
async fn older_api_version_is_followed() {
    let scene = Scene::new().await;
    scene.api.delete("inferencepools", objects::NAMESPACE, crate::scene::POOL);
    scene.api.apply(objects::pool_v1alpha2(crate::scene::POOL, scene.port()));
    let agent = scene.agent_with(|config| {
        config.pools[0].inference_pool.as_mut().unwrap().version = InferencePoolVersion::V1Alpha2;
    });
    until_ready(&agent).await;
    assert_eq!(answering(&agent).await, [scene.one.addr, scene.two.addr]);
}
