//! The manifests that are rendered from the chart, as typed objects of the Kubernetes API.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use k8s_openapi::{
    Resource,
    api::{
        apps::v1::DaemonSet,
        batch::v1::Job,
        core::v1::{
            ConfigMap, Container, HTTPGetAction, Namespace, PodSpec, Probe, SecurityContext, Service, ServiceAccount,
        },
        networking::v1::NetworkPolicy,
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::util::intstr::IntOrString,
    serde::{Serialize, de::DeserializeOwned},
};
use penstock_agent::{capability, config::Config};
use serde_json::Value;

use super::{CONFIG_PATH, commented_out, config, parsed, read, run};

const EXAMPLE: &str = "deploy/kubernetes/penstock.toml";

pub(super) struct Manifests(Vec<Value>);

impl Manifests {
    pub(super) fn parse(text: &str) -> Self {
        let documents: Vec<Value> = serde_saphyr::from_multiple(text).expect("the manifests are YAML");
        Self(documents.into_iter().filter(|document| !document.is_null()).collect())
    }

    pub(super) fn pod_network() -> Self {
        Self::parse(&read("deploy/kubernetes/penstock.yaml"))
    }

    fn host_network() -> Self {
        Self::parse(&read("deploy/kubernetes/penstock-host-network.yaml"))
    }

    fn both() -> [Self; 2] {
        [Self::pod_network(), Self::host_network()]
    }

    /// The documents by kind; each kind has one.
    pub(super) fn by_kind(&self) -> BTreeMap<&str, &Value> {
        let kinds = self.0.iter().map(|document| (document["kind"].as_str().expect("a kind"), document));
        let by_kind: BTreeMap<_, _> = kinds.collect();
        assert_eq!(by_kind.len(), self.0.len(), "more than one of a kind: {:?}", by_kind.keys());
        by_kind
    }

    pub(super) fn get<T: Resource + DeserializeOwned>(&self) -> T {
        let document = self.by_kind().get(T::KIND).copied().unwrap_or_else(|| panic!("no {}", T::KIND)).clone();
        serde_json::from_value(document).unwrap_or_else(|error| panic!("{}: {error}", T::KIND))
    }

    pub(super) fn pod(&self) -> PodSpec {
        self.get::<DaemonSet>().spec.template.spec.expect("no pod spec")
    }

    pub(super) fn container(&self) -> Container {
        let [container] = <[Container; 1]>::try_from(self.pod().containers).expect("expected one container");
        container
    }

    pub(super) fn config(&self) -> Config {
        parsed(&self.get::<ConfigMap>().data.expect("data")["penstock.toml"])
    }

    /// Fails on fields that the Kubernetes API does not know: typed objects drop them.
    pub(super) fn assert_known(&self) {
        let mut found = Vec::new();
        for (kind, source) in self.by_kind() {
            let typed = match kind {
                "Namespace" => retyped::<Namespace>(source),
                "ServiceAccount" => retyped::<ServiceAccount>(source),
                "ConfigMap" => retyped::<ConfigMap>(source),
                "ClusterRole" => retyped::<ClusterRole>(source),
                "ClusterRoleBinding" => retyped::<ClusterRoleBinding>(source),
                "DaemonSet" => retyped::<DaemonSet>(source),
                "Service" => retyped::<Service>(source),
                "NetworkPolicy" => retyped::<NetworkPolicy>(source),
                "Job" => retyped::<Job>(source),
                other => panic!("no check of the kind {other}"),
            };
            lost(source, &typed, kind, &mut found);
        }
        assert!(found.is_empty(), "unknown to Kubernetes: {found:#?}");
    }
}

fn retyped<T: Resource + DeserializeOwned + Serialize>(source: &Value) -> Value {
    let typed: T = serde_json::from_value(source.clone()).unwrap_or_else(|error| panic!("{}: {error}", T::KIND));
    serde_json::to_value(typed).expect("the manifest cannot be serialised")
}

/// What `source` has and `typed` lacks or changes.
fn lost(source: &Value, typed: &Value, path: &str, found: &mut Vec<String>) {
    match (source, typed) {
        (Value::Object(source), Value::Object(typed)) => {
            for (key, value) in source {
                let path = format!("{path}.{key}");
                match typed.get(key) {
                    Some(typed) => lost(value, typed, &path, found),
                    None => found.push(path),
                }
            }
        }
        (Value::Array(source), Value::Array(typed)) if source.len() == typed.len() => {
            for (number, (source, typed)) in source.iter().zip(typed).enumerate() {
                lost(source, typed, &format!("{path}[{number}]"), found);
            }
        }
        _ if source == typed => {}
        _ => found.push(format!("{path}: {source} was read as {typed}")),
    }
}

pub(super) fn names(all: &[impl ToString]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

#[test]
fn manifest_fields_are_known_to_kubernetes() {
    for manifests in Manifests::both() {
        assert_eq!(manifests.by_kind().len(), 7);
        manifests.assert_known();
    }
}

/// The published schemas: of the release that the plain manifests are for, and of a newer one.
#[test]
fn manifests_are_valid_by_published_schemas() {
    for version in ["1.34", "1.37"] {
        for file in ["deploy/kubernetes/penstock.yaml", "deploy/kubernetes/penstock-host-network.yaml"] {
            let output = run("venv/bin/kubernetes-validate", &["--strict", "-k", version, file]);
            output.unwrap_or_else(|error| panic!("{file}, Kubernetes {version}: {error}"));
        }
    }
}

#[test]
fn unknown_manifest_field_is_detected() {
    let mut found = Vec::new();
    let source = serde_json::json!({ "metadata": { "name": "a", "lables": {} } });
    let typed: Namespace = serde_json::from_value(source.clone()).expect("unknown fields were not dropped");
    lost(&source, &serde_json::to_value(typed).expect("serialises"), "Namespace", &mut found);
    assert_eq!(found, ["Namespace.metadata.lables"]);
}

#[test]
fn manifests_share_namespace_and_references_resolve() {
    for manifests in Manifests::both() {
        let namespace = manifests.get::<Namespace>().metadata.name;
        let account = manifests.get::<ServiceAccount>().metadata;
        let map = manifests.get::<ConfigMap>().metadata;
        let service = manifests.get::<Service>();
        let set = manifests.get::<DaemonSet>();
        for metadata in [&account, &map, &service.metadata, &set.metadata] {
            assert_eq!(metadata.namespace, namespace);
        }
        let pod = manifests.pod();
        assert_eq!(pod.service_account_name, account.name);

        let volumes = pod.volumes.expect("volumes");
        let config =
            volumes.iter().find_map(|volume| volume.config_map.as_ref()).expect("no volume uses the ConfigMap");
        assert_eq!(Some(&config.name), map.name.as_ref());
        let mounts = manifests.container().volume_mounts.expect("mounts");
        let mounted: BTreeSet<String> = mounts.into_iter().map(|mount| mount.name).collect();
        let volumes = volumes.into_iter().map(|volume| volume.name).collect();
        assert_eq!(mounted, volumes, "the mounts are not exactly the volumes");

        let labels = set.spec.template.metadata.and_then(|metadata| metadata.labels);
        assert_eq!(set.spec.selector.match_labels, labels, "the selector differs from the pods' labels");
        assert_eq!(service.spec.expect("a spec").selector, labels, "the Service selects other Pods");
    }
}

/// The agent reads what describes a pool, and writes nothing.
#[test]
fn role_permits_reading_what_describes_pools() {
    let manifests = Manifests::pod_network();
    let (role, binding) = (manifests.get::<ClusterRole>(), manifests.get::<ClusterRoleBinding>());
    let mut readable = BTreeSet::new();
    for rule in role.rules.expect("rules") {
        assert_eq!(rule.verbs, ["get", "list", "watch"]);
        for group in rule.api_groups.expect("groups") {
            readable.extend(rule.resources.iter().flatten().map(|resource| format!("{resource}.{group}")));
        }
    }
    let expected = [
        "endpointslices.discovery.k8s.io",
        "gateways.gateway.networking.k8s.io",
        "httproutes.gateway.networking.k8s.io",
        "inferencepools.inference.networking.k8s.io",
        "inferencepools.inference.networking.x-k8s.io",
        "namespaces.",
        "pods.",
        "referencegrants.gateway.networking.k8s.io",
        "services.",
    ];
    assert_eq!(readable, expected.map(str::to_owned).into());
    assert_eq!(Some(&binding.role_ref.name), role.metadata.name.as_ref());
    let [subject] = &binding.subjects.expect("subjects")[..] else { panic!("expected one subject") };
    let account = manifests.get::<ServiceAccount>().metadata;
    assert_eq!((Some(&subject.name), &subject.namespace), (account.name.as_ref(), &account.namespace));
    assert_eq!(manifests.pod().automount_service_account_token, Some(true));
}

#[test]
fn config_map_holds_example_at_agents_path() {
    for manifests in Manifests::both() {
        let data = manifests.get::<ConfigMap>().data.expect("data");
        assert_eq!(data.len(), 1);
        assert_eq!(data["penstock.toml"].trim(), read(EXAMPLE).trim());
        let container = manifests.container();
        let mounts = container.volume_mounts.expect("mounts");
        let mount = mounts.iter().find(|mount| mount.name == "config").expect("the configuration is not mounted");
        assert_eq!(format!("{}/penstock.toml", mount.mount_path), CONFIG_PATH);
        assert_eq!(container.args.expect("arguments"), ["run", "--config", CONFIG_PATH]);
        let folder = manifests.config().kubernetes.state_dir.expect("a state_dir");
        assert!(mounts.iter().any(|mount| Path::new(&mount.mount_path) == folder && mount.read_only.is_none()));
    }
}

#[test]
fn examples_pool_is_an_inference_pool_and_its_alternative_is_valid() {
    assert!(config(EXAMPLE).pools[0].inference_pool.is_some());
    let alternative = parsed(&commented_out(&read(EXAMPLE)));
    assert!(alternative.pools[0].inference_pool.is_none());
}

#[test]
fn ports_match_configuration() {
    for manifests in Manifests::both() {
        let config = manifests.config();
        assert_eq!(config.listen.address.port(), 8080, "differs from the agent's default");
        assert_eq!(config.admin.address.port(), 9901, "differs from the agent's default");
        assert!(config.admin.address.ip().is_unspecified(), "the kubelet cannot probe the admin address");
        let metadata = manifests.get::<DaemonSet>().spec.template.metadata.expect("no pod metadata");
        let annotations = metadata.annotations.expect("annotations");
        assert_eq!(annotations["prometheus.io/port"], config.admin.address.port().to_string());
        assert_eq!(annotations["prometheus.io/path"], "/metrics");
        let [port] = <[_; 1]>::try_from(manifests.get::<Service>().spec.expect("a spec").ports.expect("ports"))
            .expect("one port");
        assert_eq!(port.target_port, Some(IntOrString::Int(config.listen.address.port().into())));
    }
    for manifests in Manifests::both() {
        let ports = manifests.container().ports.expect("ports");
        let declared: Vec<_> =
            ports.iter().map(|port| (port.name.as_deref(), port.container_port, port.host_port)).collect();
        assert_eq!(declared, [(Some("http"), 8080, None), (Some("admin"), 9901, None)]);
    }
}

/// Two agents on the node's network would need the same ports.
#[test]
fn new_pod_is_ready_before_the_old_one_stops_if_both_have_ports() {
    let rolling = |manifests: &Manifests| {
        let strategy = manifests.get::<DaemonSet>().spec.update_strategy.expect("an update strategy");
        let rolling = strategy.rolling_update.expect("a rolling update");
        (rolling.max_surge, rolling.max_unavailable)
    };
    let int = |number| Some(IntOrString::Int(number));
    assert_eq!(rolling(&Manifests::pod_network()), (int(1), int(0)));
    assert_eq!(rolling(&Manifests::host_network()), (None, int(1)));
}

#[test]
fn service_prefers_the_node_and_pods_have_time_to_drain() {
    for manifests in Manifests::both() {
        let service = manifests.get::<Service>().spec.expect("a spec");
        assert_eq!(service.type_.as_deref(), Some("ClusterIP"));
        assert_eq!(service.traffic_distribution.as_deref(), Some("PreferSameNode"));
        assert_eq!(
            service.internal_traffic_policy, None,
            "Local refuses connections while the node has no ready agent"
        );

        let timeouts = manifests.config().timeouts;
        let leaves = timeouts.lame_duck.unwrap_or_default() + timeouts.drain;
        let grace = manifests.pod().termination_grace_period_seconds.expect("no grace period");
        assert!(Duration::from_secs(grace.unsigned_abs()) > leaves, "{grace} s is not longer than {leaves:?}");
    }
}

#[test]
fn probes_use_admin_port() {
    let action =
        |probe: Option<Probe>| -> HTTPGetAction { probe.and_then(|probe| probe.http_get).expect("an HTTP probe") };
    for manifests in Manifests::both() {
        let container = manifests.container();
        let probes = [
            (action(container.startup_probe), "/livez"),
            (action(container.liveness_probe), "/livez"),
            (action(container.readiness_probe), "/readyz"),
        ];
        for (get, path) in probes {
            assert_eq!(get.path.as_deref(), Some(path));
            assert_eq!(get.port, IntOrString::Int(manifests.config().admin.address.port().into()));
        }
    }
}

#[test]
fn only_the_host_network_variant_needs_the_node() {
    let host_paths = |manifests: &Manifests| -> BTreeSet<String> {
        let volumes = manifests.pod().volumes.expect("volumes");
        volumes.into_iter().filter_map(|volume| Some(volume.host_path?.path)).collect()
    };
    let pods = Manifests::pod_network();
    assert_eq!((pods.pod().host_network, pods.pod().dns_policy), (None, None));
    assert_eq!(host_paths(&pods), BTreeSet::new());

    let host = Manifests::host_network();
    assert_eq!(host.pod().host_network, Some(true));
    assert_eq!(host.pod().dns_policy.as_deref(), Some("ClusterFirstWithHostNet"));
    let paths = host_paths(&host);
    assert!(paths.contains("/sys/fs/cgroup"), "path local attaches to the node's root cgroup");
    for mount in
        host.container().volume_mounts.expect("mounts").iter().filter(|mount| paths.contains(&mount.mount_path))
    {
        assert_eq!(mount.read_only, Some(true), "{}", mount.mount_path);
    }
    let mounts = host.container().volume_mounts.expect("mounts");
    let bpffs = mounts.iter().find(|mount| mount.name == "bpffs").expect("no bpffs");
    assert_eq!((&*bpffs.mount_path, bpffs.read_only), ("/run/penstock/bpf", None), "steering.bpffs finds it there");
}

#[test]
fn container_has_minimal_capabilities_and_drops_root() {
    for manifests in Manifests::both() {
        let context = manifests.container().security_context.expect("no security context");
        assert_eq!((context.privileged, context.allow_privilege_escalation), (Some(false), Some(false)));
        assert_eq!(context.read_only_root_filesystem, Some(true));
        assert_eq!(context.seccomp_profile.map(|profile| profile.type_).as_deref(), Some("RuntimeDefault"));
        let capabilities = context.capabilities.expect("capabilities");
        assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
        let added: Vec<String> =
            capabilities.add.expect("added").into_iter().map(|name| format!("CAP_{name}")).collect();
        assert_eq!(added, [names(&capability::LOADING), names(&capability::IDENTITY)].concat());
        assert!(manifests.config().process.user.is_some(), "the configuration keeps root");
    }
}

/// `kubectl patch` merges containers by name and security contexts by field; null removes a field.
#[test]
fn privileged_patch_overrides_security_context() {
    let container = Manifests::pod_network().container();
    let source: Value = serde_saphyr::from_str(&read("deploy/kubernetes/privileged.yaml")).expect("YAML");
    let patched = &source["spec"]["template"]["spec"]["containers"];
    let [patched] = &patched.as_array().expect("containers")[..] else { panic!("expected one container: {patched}") };
    assert_eq!(patched["name"], container.name.as_str());
    let mut merged = serde_json::to_value(container.security_context).expect("serialises");
    for (field, value) in patched["securityContext"].as_object().expect("fields") {
        if value.is_null() {
            let fields = merged.as_object_mut().expect("fields");
            fields.remove(field).unwrap_or_else(|| panic!("the patch removes {field}, which is not set"));
        } else {
            merged[field] = value.clone();
        }
    }
    assert_eq!((&merged["privileged"], &merged["allowPrivilegeEscalation"]), (&Value::Bool(true), &Value::Bool(true)));
    assert_eq!(merged["readOnlyRootFilesystem"], Value::Bool(true));
    let context: SecurityContext = serde_json::from_value(merged.clone()).expect("no security context");
    assert_eq!(serde_json::to_value(context).expect("serialises"), merged, "a field is unknown to Kubernetes");
}
