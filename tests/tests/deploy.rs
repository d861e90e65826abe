//! Checks the files in `deploy/` against the agent: ports, paths, flags and times match what the agent does, and Kubernetes
//! knows every field of the manifests.

use std::{collections::BTreeSet, fs, path::Path, process::Command, time::Duration};

use k8s_openapi::{
    Resource,
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Container, HTTPGetAction, Namespace, PodSpec, Probe, SecurityContext, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::util::intstr::IntOrString,
    serde::{Serialize, de::DeserializeOwned},
};
use penstock_agent::{capability, config::Config};
use penstock_tests::process::Process;
use serde_json::Value;

/// The default of `penstock run`.
const CONFIG_PATH: &str = "/etc/penstock/penstock.toml";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is not in a workspace")
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn config() -> Config {
    Config::parse(&read("deploy/penstock.toml"), "deploy/penstock.toml").unwrap_or_else(|errors| panic!("{errors}"))
}

fn documents() -> Vec<Value> {
    serde_saphyr::from_multiple(&read("deploy/daemonset.yaml")).expect("daemonset.yaml is YAML")
}

/// The only document of its kind, as a typed resource.
fn manifest<T: Resource + DeserializeOwned>() -> T {
    let mut of_kind = documents().into_iter().filter(|document| document["kind"] == T::KIND);
    let document = of_kind.next().unwrap_or_else(|| panic!("no {} in daemonset.yaml", T::KIND));
    assert!(of_kind.next().is_none(), "more than one {}", T::KIND);
    serde_json::from_value(document).unwrap_or_else(|error| panic!("{}: {error}", T::KIND))
}

fn pod() -> PodSpec {
    manifest::<DaemonSet>().spec.template.spec.expect("no pod spec")
}

fn container() -> Container {
    let [container] = <[Container; 1]>::try_from(pod().containers).expect("expected one container");
    container
}

/// What `source` has and `typed` lacks or changes: typed resources drop unknown fields.
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

fn assert_known<T: Resource + DeserializeOwned + Serialize>() {
    let source = documents().into_iter().find(|document| document["kind"] == T::KIND).expect(T::KIND);
    let typed = serde_json::to_value(manifest::<T>()).expect("the manifest cannot be serialised");
    let mut found = Vec::new();
    lost(&source, &typed, T::KIND, &mut found);
    assert!(found.is_empty(), "unknown to Kubernetes: {found:#?}");
}

#[test]
fn manifest_fields_are_known_to_kubernetes() {
    let kinds: BTreeSet<String> = documents().iter().map(|document| document["kind"].to_string()).collect();
    assert_eq!(kinds.len(), 6, "the manifests have kinds without a check below: {kinds:?}");
    assert_known::<Namespace>();
    assert_known::<ServiceAccount>();
    assert_known::<ConfigMap>();
    assert_known::<ClusterRole>();
    assert_known::<ClusterRoleBinding>();
    assert_known::<DaemonSet>();
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
    let namespace = manifest::<Namespace>().metadata.name;
    let (account, map, set) = (manifest::<ServiceAccount>(), manifest::<ConfigMap>(), manifest::<DaemonSet>());
    for metadata in [&account.metadata, &map.metadata, &set.metadata] {
        assert_eq!(metadata.namespace, namespace);
    }
    assert_eq!(pod().service_account_name, account.metadata.name);

    let volumes = pod().volumes.expect("volumes");
    let config = volumes.iter().find_map(|volume| volume.config_map.as_ref()).expect("no volume uses the ConfigMap");
    assert_eq!(Some(&config.name), map.metadata.name.as_ref());
    let mounted: BTreeSet<String> =
        container().volume_mounts.expect("mounts").into_iter().map(|mount| mount.name).collect();
    assert_eq!(
        mounted,
        volumes.into_iter().map(|volume| volume.name).collect(),
        "the mounts are not exactly the volumes"
    );

    let labels = set.spec.template.metadata.and_then(|metadata| metadata.labels);
    assert_eq!(set.spec.selector.match_labels, labels, "the selector differs from the pods' labels");
}

/// The agent reads what describes a pool, and writes nothing.
#[test]
fn role_permits_reading_what_describes_pools() {
    let (role, binding) = (manifest::<ClusterRole>(), manifest::<ClusterRoleBinding>());
    let mut readable = BTreeSet::new();
    for rule in role.rules.expect("rules") {
        assert_eq!(rule.verbs, ["get", "list", "watch"]);
        for group in rule.api_groups.expect("groups") {
            readable.extend(rule.resources.iter().flatten().map(|resource| format!("{resource}.{group}")));
        }
    }
    let expected = [
        "endpointslices.discovery.k8s.io",
        "inferencepools.inference.networking.k8s.io",
        "inferencepools.inference.networking.x-k8s.io",
        "pods.",
        "services.",
    ];
    assert_eq!(readable, expected.map(str::to_owned).into());
    assert_eq!(Some(&binding.role_ref.name), role.metadata.name.as_ref());
    let [subject] = &binding.subjects.expect("subjects")[..] else { panic!("expected one subject") };
    let account = manifest::<ServiceAccount>().metadata;
    assert_eq!((Some(&subject.name), &subject.namespace), (account.name.as_ref(), &account.namespace));
    assert_eq!(pod().automount_service_account_token, Some(true));
}

/// The alternative at the end of the example, uncommented.
#[test]
fn commented_inference_pool_is_valid_and_its_state_is_mounted() {
    let text = read("deploy/penstock.toml");
    let settings = text.lines().filter_map(|line| line.strip_prefix('#')).filter(|line| !line.starts_with(' '));
    let text: String = settings.map(|line| format!("{line}\n")).collect();
    let config = Config::parse(&text, "deploy/penstock.toml").unwrap_or_else(|errors| panic!("{errors}\n{text}"));
    assert!(config.pools[0].inference_pool.is_some());
    let folder = config.kubernetes.state_dir.expect("a state_dir");
    let mounts = container().volume_mounts.expect("mounts");
    assert!(mounts.iter().any(|mount| Path::new(&mount.mount_path) == folder && mount.read_only.is_none()));
}

#[test]
fn config_map_holds_example_at_agents_path() {
    let data = manifest::<ConfigMap>().data.expect("data");
    assert_eq!(data.len(), 1);
    assert_eq!(data["penstock.toml"], read("deploy/penstock.toml"));

    let mounts = container().volume_mounts.expect("mounts");
    let mount = mounts.iter().find(|mount| mount.name == "config").expect("the configuration is not mounted");
    assert_eq!(format!("{}/penstock.toml", mount.mount_path), CONFIG_PATH);
    assert_eq!(container().args.expect("arguments"), ["run", "--config", CONFIG_PATH]);
}

#[test]
fn ports_match_configuration() {
    let config = config();
    assert_eq!(config.listen.address.port(), 8080, "differs from the agent's default");
    assert_eq!(config.admin.address.port(), 9901, "differs from the agent's default");
    assert!(config.admin.address.ip().is_unspecified(), "the kubelet cannot probe the admin address");

    let ports = container().ports.expect("ports");
    let port = |name: &str| {
        let port =
            ports.iter().find(|port| port.name.as_deref() == Some(name)).unwrap_or_else(|| panic!("port {name}"));
        assert_eq!(port.host_port, Some(port.container_port), "host and container port differ on the host network");
        port.container_port
    };
    assert_eq!(port("http"), i32::from(config.listen.address.port()));
    assert_eq!(port("admin"), i32::from(config.admin.address.port()));

    let metadata = manifest::<DaemonSet>().spec.template.metadata.expect("no pod metadata");
    let annotations = metadata.annotations.expect("annotations");
    assert_eq!(annotations["prometheus.io/port"], config.admin.address.port().to_string());
    assert_eq!(annotations["prometheus.io/path"], "/metrics");

    let exposed = format!("EXPOSE {} {}", config.listen.address.port(), config.admin.address.port());
    assert!(read("deploy/Dockerfile").lines().any(|line| line == exposed), "{exposed}");
}

#[test]
fn probes_use_admin_port() {
    let action =
        |probe: Option<Probe>| -> HTTPGetAction { probe.and_then(|probe| probe.http_get).expect("an HTTP probe") };
    let probes = [(action(container().liveness_probe), "/livez"), (action(container().readiness_probe), "/readyz")];
    for (get, path) in probes {
        assert_eq!(get.path.as_deref(), Some(path));
        assert_eq!(get.port, IntOrString::String("admin".to_owned()));
    }
}

#[test]
fn pod_can_load_and_attach_programs() {
    let pod = pod();
    assert_eq!(pod.host_network, Some(true));
    assert_eq!(pod.dns_policy.as_deref(), Some("ClusterFirstWithHostNet"));
    let paths: BTreeSet<String> =
        pod.volumes.expect("volumes").into_iter().filter_map(|volume| Some(volume.host_path?.path)).collect();
    let mounts = container().volume_mounts.expect("mounts");
    for path in ["/sys/fs/cgroup", "/sys/kernel/btf"] {
        assert!(paths.contains(path), "{path} is not mounted from the host");
        let mount =
            mounts.iter().find(|mount| mount.mount_path == path).unwrap_or_else(|| panic!("{path} is not mounted"));
        assert_eq!(mount.read_only, Some(true), "{path}");
    }
}

fn names(all: &[impl ToString]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

#[test]
fn container_has_minimal_capabilities_and_drops_root() {
    let context = container().security_context.expect("no security context");
    assert_eq!((context.privileged, context.allow_privilege_escalation), (Some(false), Some(false)));
    assert_eq!(context.read_only_root_filesystem, Some(true));
    assert_eq!(context.seccomp_profile.map(|profile| profile.type_).as_deref(), Some("RuntimeDefault"));
    let capabilities = context.capabilities.expect("capabilities");
    assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
    let added: Vec<String> = capabilities.add.expect("added").into_iter().map(|name| format!("CAP_{name}")).collect();
    assert_eq!(added, [names(&capability::LOADING), names(&capability::IDENTITY)].concat());
    assert!(config().process.user.is_some(), "the configuration keeps root");
    // systemd has ambient capabilities and starts the agent as another user.
    assert_eq!(unit("AmbientCapabilities"), [names(&capability::LOADING).join(" ")]);
}

/// `kubectl patch` merges containers by name and security contexts by field; null removes a field.
#[test]
fn privileged_patch_overrides_security_context() {
    let source: Value = serde_saphyr::from_str(&read("deploy/privileged.yaml")).expect("YAML");
    let patched = &source["spec"]["template"]["spec"]["containers"];
    let [patched] = &patched.as_array().expect("containers")[..] else { panic!("expected one container: {patched}") };
    assert_eq!(patched["name"], container().name.as_str());
    let mut merged = serde_json::to_value(container().security_context).expect("serialises");
    for (field, value) in patched["securityContext"].as_object().expect("fields") {
        if value.is_null() {
            merged
                .as_object_mut()
                .expect("fields")
                .remove(field)
                .unwrap_or_else(|| panic!("the patch removes {field}, which is not set"));
        } else {
            merged[field] = value.clone();
        }
    }
    assert_eq!((&merged["privileged"], &merged["allowPrivilegeEscalation"]), (&Value::Bool(true), &Value::Bool(true)));
    assert_eq!(merged["readOnlyRootFilesystem"], Value::Bool(true));
    let context: SecurityContext = serde_json::from_value(merged.clone()).expect("no security context");
    assert_eq!(serde_json::to_value(context).expect("serialises"), merged, "a field is unknown to Kubernetes");
}

#[test]
fn stop_timeouts_exceed_drain_timeout() {
    let timeouts = config().timeouts;
    let leaves = timeouts.lame_duck.unwrap_or_default() + timeouts.drain;
    let grace = pod().termination_grace_period_seconds.expect("no grace period");
    assert!(Duration::from_secs(grace.unsigned_abs()) > leaves, "{grace} s is not longer than {leaves:?}");

    let [stop] = unit("TimeoutStopSec")[..].try_into().expect("one TimeoutStopSec");
    let stop: u64 = stop.strip_suffix('s').and_then(|number| number.parse().ok()).expect("seconds");
    assert!(Duration::from_secs(stop) > leaves, "{stop} s is not longer than {leaves:?}");
    assert_eq!(unit("KillSignal"), ["SIGTERM"]);
}

/// The values of a key in the systemd unit. The file is read once and cached.
fn unit(key: &str) -> Vec<&'static str> {
    static UNIT: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| read("deploy/penstock.service"));
    let values = UNIT.lines().filter_map(|line| line.split_once('='));
    values.filter(|(name, _)| *name == key).map(|(_, value)| value).collect()
}

/// Runs the agent binary built for these tests.
fn penstock(arguments: &[&str]) -> String {
    let binary = Process::binary("penstock").unwrap_or_else(|error| panic!("{error:#}"));
    let output = Command::new(binary).args(arguments).current_dir(root()).output().expect("could not start penstock");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "penstock {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn deployed_flags_and_configuration_are_valid() {
    penstock(&["config", "check", "--config", "deploy/penstock.toml"]);
    // With --help, the command line is parsed and nothing runs; the help also names the default.
    assert!(penstock(&["run", "--config", CONFIG_PATH, "--help"]).contains(CONFIG_PATH));
    assert!(penstock(&["run", "--help"]).contains("PENSTOCK_LOG_FORMAT"));
    let env = container().env.expect("environment");
    let [log_format, node] = &env[..] else { panic!("expected two variables, found {env:?}") };
    assert_eq!((log_format.name.as_str(), log_format.value.as_deref()), ("PENSTOCK_LOG_FORMAT", Some("json")));
    let field =
        node.value_from.as_ref().and_then(|source| source.field_ref.as_ref()).map(|field| field.field_path.as_str());
    assert_eq!((node.name.as_str(), field), ("PENSTOCK_NODE", Some("spec.nodeName")));
    assert!(penstock(&["run", "--help"]).contains("PENSTOCK_NODE"));
}

#[test]
fn systemd_unit_starts_agent_with_required_settings() {
    assert_eq!(unit("ExecStart"), [format!("/usr/local/bin/penstock run --config {CONFIG_PATH}")]);
    assert_eq!(unit("ExecStartPre"), [format!("/usr/local/bin/penstock config check --config {CONFIG_PATH}")]);
    // EX_USAGE, the agent's exit code for an invalid configuration.
    assert_eq!(unit("RestartPreventExitStatus"), ["64"]);
    for key in ["AmbientCapabilities", "CapabilityBoundingSet"] {
        assert_eq!(unit(key), ["CAP_BPF CAP_NET_ADMIN CAP_PERFMON"], "{key}");
    }
    let files: usize = unit("LimitNOFILE")[0].parse().expect("a number");
    assert!(files > 2 * config().listen.max_connections, "each connection needs a client's and an endpoint's socket");
}

/// The instructions of the Dockerfile with their arguments.
fn dockerfile() -> Vec<(String, String)> {
    let text = read("deploy/Dockerfile");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| line.split_once(' ').expect("an instruction has no arguments"))
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect()
}

#[test]
fn dockerfile_copies_whole_workspace() {
    let mut copied = BTreeSet::new();
    for (_, arguments) in
        dockerfile().iter().filter(|(name, arguments)| name == "COPY" && !arguments.starts_with("--from="))
    {
        let mut words: Vec<&str> = arguments.split(' ').collect();
        words.pop().expect("a destination");
        for source in words {
            assert!(root().join(source).exists(), "COPY {source}: file not found");
            copied.insert(source.to_owned());
        }
    }
    let manifest: toml::Table = read("Cargo.toml").parse().expect("Cargo.toml is TOML");
    for member in manifest["workspace"]["members"].as_array().expect("members") {
        let member = member.as_str().expect("a folder");
        assert!(copied.contains(member), "the workspace member {member} is not copied");
    }
}

#[test]
fn dockerfile_entrypoint_matches_pod() {
    let last = |wanted: &str| {
        let found = dockerfile().into_iter().rfind(|(name, _)| name == wanted);
        found.unwrap_or_else(|| panic!("no {wanted}")).1
    };
    assert_eq!(last("ENTRYPOINT"), r#"["/usr/local/bin/penstock"]"#);
    let arguments: Vec<String> = serde_json::from_str(&last("CMD")).expect("CMD is not in exec form");
    assert_eq!(Some(arguments), container().args);
    assert_eq!(last("STOPSIGNAL"), "SIGTERM");
}

#[test]
fn dockerfile_xtask_commands_exist() {
    let runs: Vec<String> = dockerfile().into_iter().filter(|(name, _)| name == "RUN").map(|(_, line)| line).collect();
    assert!(runs.len() >= 3, "{runs:?}");
    for line in runs {
        let mut words = line.split(' ');
        assert_eq!(words.next(), Some("cargo"), "{line}");
        if words.next() != Some("xtask") {
            continue;
        }
        // With --help, the whole line is checked and nothing runs.
        let arguments: Vec<&str> = words.collect();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["run", "--quiet", "--package", "penstock-xtask", "--"]).args(&arguments).arg("--help");
        let output = cargo.current_dir(root()).output().expect("could not start cargo");
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
