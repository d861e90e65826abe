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

#[tokio::test]
async fn gateway_its_routes_and_its_permissions_are_tried() {
    use penstock_agent::config::GatewayRef;
    use serde_json::json;

    let scene = Scene::new().await;
    let mut config = Config::new(Vec::new());
    config.steering.mode = SteeringMode::Off;
    scene.settings(&mut config);
    let gateway = GatewayRef { namespace: objects::INFRA.to_owned(), name: "g".to_owned(), port: None };
    config.kubernetes.gateway = Some(gateway);
    let tried = async || try_all(&config).await;
    assert_eq!(failed(&tried().await), ["Gateway infra/g: does not exist"]);
    let listener =
        json!({ "name": "l", "port": 80, "protocol": "HTTP", "allowedRoutes": { "namespaces": { "from": "All" } } });
    scene.api.apply(objects::gateway("g", &json!([listener])));
    let rules =
        json!([{ "backendRefs": [objects::to_pool(POOL)] }, { "retry": {}, "backendRefs": [objects::to_pool(POOL)] }]);
    scene.api.apply(objects::http_route(objects::NAMESPACE, "r", "g", &rules));
    let trials = tried().await;
    assert_eq!(
        (trials[0].name.as_str(), trials[0].found.as_str()),
        ("Gateway infra/g", "1 HTTPRoutes to 1 InferencePools")
    );
    let refused =
        "Gateway infra/g, the HTTPRoute models/r, rule 1: rules.retry is not implemented: its requests get 500";
    assert_eq!(failed(&trials), [refused]);
    assert!(
        trials.iter().any(|trial| trial.found == "2 ready endpoints, 0 EPP replicas"),
        "the pool of the route is tried"
    );
    scene.api.fail(Faults { forbidden: &["httproutes"], ..Faults::default() });
    let of = "httproutes.gateway.networking.k8s.io in namespace infra, expected get, list and watch";
    let access = "Gateway infra/g, access: not permitted to";
    assert_eq!(failed(&tried().await), [format!("{access} list {of}"), format!("{access} watch {of}")]);
    // Needed only for some Gateways and routes.
    scene.api.fail(Faults { forbidden: &["referencegrants"], ..Faults::default() });
    assert_eq!(failed(&tried().await), [refused]);
    let mut elsewhere = objects::http_route("team", "s", "g", &json!([{ "backendRefs": [objects::to_pool(POOL)] }]));
    elsewhere["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    scene.api.apply(elsewhere);
    let of = "referencegrants.gateway.networking.k8s.io in all namespaces, expected get, list and watch";
    assert_eq!(failed(&tried().await), [format!("{access} list {of}"), format!("{access} watch {of}")]);
}
