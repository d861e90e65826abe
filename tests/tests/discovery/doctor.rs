//! `penstock doctor` names what keeps a pool from being read.

use penstock_agent::config::{Config, SteeringMode};
use penstock_agent::trial::{Trial, try_all};
use penstock_tests::api_server::{Faults, objects};

use crate::scene::{POOL, Scene, discovered, ip, obedient_epp};

async fn trials(scene: &Scene) -> Vec<Trial> {
    let mut config = Config::new(vec![discovered("default", POOL)]);
    config.steering.mode = SteeringMode::Off;
    scene.settings(&mut config);
    try_all(&config).await
}

fn failed(trials: &[Trial]) -> Vec<String> {
    trials.iter().filter(|trial| !trial.ok).map(|trial| format!("{}: {}", trial.name, trial.found)).collect()
}

#[tokio::test]
async fn working_pool_is_tried_with_its_epp_and_its_endpoints() {
    let epp = obedient_epp(ip(5, 0)).await;
    let scene = Scene::with_epp("FailClose", &[epp.addr]).await;
    scene.api.delete("pods", objects::NAMESPACE, "two");
    let trials = trials(&scene).await;
    let names: Vec<_> = trials.iter().map(|trial| (trial.name.as_str(), trial.found.as_str())).collect();
    assert_eq!(names[0], ("InferencePool models/llama", "1 ready endpoints, 1 EPP replicas"));
    assert!(names[1].0.starts_with(&format!("pool default, EPP {}", epp.addr)), "{names:?}");
    assert_eq!(names[2].0, format!("pool default, endpoint {}", scene.one.addr));
}

#[tokio::test]
async fn missing_permission_is_named_with_verb_and_resource() {
    let scene = Scene::new().await;
    scene.api.fail(Faults { forbidden: &["endpointslices"], ..Faults::default() });
    let access = "InferencePool models/llama, access: not permitted to";
    let of = "endpointslices.discovery.k8s.io in namespace models, expected get, list and watch";
    assert_eq!(failed(&trials(&scene).await), [format!("{access} list {of}"), format!("{access} watch {of}")]);
    // The same is found where the agent may not ask what it may do.
    scene.api.fail(Faults { forbidden: &["pods", "selfsubjectaccessreviews"], ..Faults::default() });
    let failed = failed(&trials(&scene).await);
    let expected = ["list", "watch"].map(|verb| format!("{access} {verb} pods in namespace models"));
    assert!(failed.len() == 2 && failed.iter().zip(&expected).all(|(found, part)| found.contains(part)), "{failed:?}");
}

#[tokio::test]
async fn missing_pool_and_missing_server_are_named() {
    let mut scene = Scene::empty().await;
    assert_eq!(failed(&trials(&scene).await), ["InferencePool models/llama: does not exist"]);
    scene.api.stop();
    let failed = failed(&trials(&scene).await);
    assert!(failed.len() == 1 && failed[0].contains("cannot list inferencepools"), "{failed:?}");
}
