//! The Helm chart, by a real helm.

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Service},
    networking::v1::NetworkPolicy,
};
use serde_json::Value;
use tempfile::NamedTempFile;

use super::{manifests::Manifests, read, run, xtask};

const CHART: &str = "deploy/helm/penstock";
/// Values with whole and broken numbers, names that need quotes, lists and tables within tables.
const VALUES: &str = r#"
config:
  limits: { body_bytes: 33554432 }
  bbr:
    base_models: { "sql/lora <é>": 'a "base" \ model' }
  pools:
    - name: default
      inference_pool: { namespace: models, name: vllm-llama }
      picker: { kind: epp, tls: insecure, decision_timeout: 90s }
      retry: { attempts: 2 }
    - name: static
      endpoints: ["10.0.0.1:8000", "10.0.0.2:8000"]
  routes:
    - { pool: static, path_prefix: /static }
    - { pools: [{ name: default, weight: 3 }, { name: static, weight: 1 }] }
"#;

fn values_file() -> NamedTempFile {
    let file = NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), VALUES).expect("it can be written");
    file
}

/// `helm template` with `values` beside [`VALUES`].
fn rendered(values: &[&str]) -> Result<String, String> {
    let file = values_file();
    let file = file.path().to_str().expect("a path in UTF-8");
    let start = ["template", "penstock", CHART, "--namespace", "penstock", "-f", file, "--kube-version", "1.34.0"];
    run("kubernetes/helm", &[&start, values].concat())
}

fn manifests(values: &[&str]) -> Manifests {
    Manifests::parse(&rendered(values).unwrap_or_else(|error| panic!("{values:?}: {error}")))
}

#[test]
fn manifests_and_values_schema_are_current() {
    xtask(&["manifests", "--check"]);
}

#[test]
fn chart_passes_helms_lint() {
    let file = values_file();
    run("kubernetes/helm", &["lint", "--strict", CHART, "-f", file.path().to_str().expect("UTF-8")]).unwrap();
}

/// helm's own `toToml` writes 33554432 as 3.3554432e+07, which the settings refuse.
#[test]
fn settings_in_values_arrive_as_given() {
    let config = manifests(&[]).config();
    assert_eq!(config.limits.body_bytes, 33_554_432);
    assert_eq!(config.bbr.base_models["sql/lora <é>"], r#"a "base" \ model"#);
    assert_eq!(config.pools.len(), 2);
    assert_eq!(config.pools[0].retry.attempts, 2);
    assert!(config.pools[0].inference_pool.is_some());
    assert_eq!(config.pools[1].endpoints.len(), 2);
    assert_eq!(config.routes[1].pools.len(), 2);
    // The chart's own.
    assert_eq!(config.timeouts.drain.as_secs(), 120);
}

#[test]
fn wrong_values_are_refused_by_name() {
    let cases: [(&[&str], &str); 5] = [
        (&["--set", "config.limits.body_byte=1"], "body_byte"),
        (&["--set", "config.listen.workers=many"], "/config/listen/workers"),
        (&["--set", "hostNetwrok=true"], "hostNetwrok"),
        (&["--set", "config.admin.address=127.0.0.1:9901"], "admin.address is 127.0.0.1:9901"),
        (&["--set-json", "config.pools=[]"], "config.pools is empty"),
    ];
    for (values, named) in cases {
        let error = rendered(values).expect_err(named);
        assert!(error.contains(named), "{values:?}: {error}");
    }
}

#[test]
fn traffic_stays_on_the_node_by_the_word_that_the_api_server_knows() {
    for (version, word) in [("1.30.0", None), ("1.31.0", Some("PreferClose")), ("1.34.2", Some("PreferSameNode"))] {
        let service = manifests(&["--kube-version", version]).get::<Service>();
        assert_eq!(service.spec.expect("a spec").traffic_distribution.as_deref(), word, "{version}");
    }
}

#[test]
fn optional_parts_are_valid() {
    let values = [
        "--set",
        "networkPolicy.enabled=true,preflight.enabled=true",
        "--set-json",
        "networkPolicy.clients=[{\"podSelector\":{}}]",
    ];
    let manifests = manifests(&values);
    manifests.assert_known();
    assert_eq!(manifests.get::<NetworkPolicy>().spec.expect("a spec").ingress.expect("rules").len(), 2);
    // The name of the release is part of the Pods' selector: the Job's Pods must not serve requests.
    let job = manifests.get::<Job>().spec.expect("a spec").template.metadata.and_then(|metadata| metadata.labels);
    let serving = manifests.get::<Service>().spec.expect("a spec").selector.expect("a selector");
    assert!(
        job.expect("labels").into_iter().any(|(name, value)| serving.get(&name).is_some_and(|other| *other != value))
    );
}

#[test]
fn port_of_tls_is_reachable() {
    let values = ["--set-json", r#"config.listen.tls={"address":"0.0.0.0:8443","cert_file":"/c","key_file":"/k"}"#];
    let manifests = manifests(&[&values[..], &["--set", "networkPolicy.enabled=true"]].concat());
    manifests.assert_known();
    let ports = manifests.get::<Service>().spec.expect("a spec").ports.expect("ports");
    assert_eq!(ports.iter().map(|port| port.port).collect::<Vec<_>>(), [80, 443]);
    let rules = manifests.get::<NetworkPolicy>().spec.expect("a spec").ingress.expect("rules");
    assert_eq!(rules[0].ports.as_ref().expect("ports").len(), 2);
    assert_eq!(manifests.container().ports.expect("ports").len(), 3);
}

#[test]
fn parts_for_operators_hold_the_files() {
    let values = ["--set", "podMonitor.enabled=true,alerts.enabled=true,dashboard.enabled=true"];
    for network in ["hostNetwork=false", "hostNetwork=true"] {
        let text = rendered(&[&values[..], &["--set", network]].concat()).unwrap();
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
        let one = |kind: &str| {
            documents.iter().find(|document| document["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
        };
        let alerts: Value = serde_saphyr::from_str(&read("deploy/helm/penstock/files/alerts.yaml")).expect("YAML");
        assert_eq!(one("PrometheusRule")["spec"], alerts);
        let maps = documents.iter().filter(|document| document["kind"] == "ConfigMap");
        let dashboard = maps.filter_map(|map| map["data"].get("penstock.json")).next().expect("a dashboard");
        let dashboard: Value = serde_json::from_str(dashboard.as_str().expect("text")).expect("JSON");
        assert_eq!(
            dashboard,
            serde_json::from_str::<Value>(&read("deploy/helm/penstock/files/dashboard.json")).expect("JSON")
        );
        assert!(one("PodMonitor")["spec"]["podMetricsEndpoints"][0]["path"] == "/metrics");
    }
}

#[test]
fn changed_configuration_replaces_the_pods() {
    let hash = |values: &[&str]| {
        let set = manifests(values).get::<k8s_openapi::api::apps::v1::DaemonSet>();
        set.spec.template.metadata.and_then(|metadata| metadata.annotations).expect("annotations")["penstock.dev/config"].clone()
    };
    assert_eq!(hash(&[]), hash(&["--set", "log.filter=debug"]));
    assert_ne!(hash(&[]), hash(&["--set", "config.timeouts.drain=60s"]));
}

#[test]
fn kustomize_base_is_the_manifest() {
    let built = run("kubernetes/kubectl", &["kustomize", "deploy/kubernetes"]).unwrap();
    let built = Manifests::parse(&built);
    let plain = Manifests::pod_network();
    assert_eq!(built.by_kind(), plain.by_kind());
    assert_eq!(built.get::<ConfigMap>().data, plain.get::<ConfigMap>().data);
}
