//! `penstock doctor` on this machine and on machines with something missing, and the agent on a kernel known to lose bytes.

use std::{
    fs::Permissions,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Output},
};

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Collector, CollectorBehaviour, Http2Options, Http2Server, ModelServer, Process, Refusing, ScriptedEpp, TestAgent,
    agent::builtin_pool,
    agent_process::AgentProcess,
    eventually,
    model_server::Options,
    scripted_epp::{Production, Setup},
    tls_only,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;
use tonic::transport::{Identity, ServerTlsConfig};

use crate::{ANY_PORT, SOON};

/// Runs it through another command, such as `setarch`.
fn doctor(through: &[&str], arguments: &[&str]) -> Output {
    let binary = Process::binary("penstock").unwrap();
    let (program, before) = match through {
        [program, before @ ..] => (program.as_ref(), before),
        [] => (binary.as_os_str(), &[][..]),
    };
    let mut command = Command::new(program);
    command.args(before);
    if !through.is_empty() {
        command.arg(&binary);
    }
    command.arg("doctor").args(arguments).output().unwrap()
}

fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// The finding `name`: whether it passed, what was found, and the advice.
fn finding<'a>(document: &'a Value, name: &str) -> (bool, &'a str, Option<&'a str>) {
    let machine = document["machine"].as_array().unwrap();
    let found = machine.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("no {name} in {document:#}"));
    (found["ok"] == true, found["found"].as_str().unwrap(), found["advice"].as_str())
}

#[tokio::test]
async fn doctor_on_capable_machine_reports_every_path_ready() {
    let output = doctor(&[], &["--json"]);
    let document = document(&output);
    assert_eq!((output.status.code(), &document["exit_code"]), (Some(0), &Value::from(0)), "{document:#}");
    for name in ["kernel", "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "btf", "cgroup v2", "program"] {
        let (ok, found, advice) = finding(&document, name);
        assert!(ok && !found.is_empty() && advice.is_none(), "{name}: {document:#}");
    }
    // What the kernel tells about waiting bytes of a socket in a map, asked here as well.
    let (ok, found, advice) = finding(&document, "sockets");
    assert!(ok, "{document:#}");
    let agent = TestAgent::start(builtin_pool(&[]), SteeringMode::Auto, |_| {});
    assert_eq!(found.starts_with("endpoint_visible: in a map, "), agent.is_endpoint_visible(), "{found}");
    assert_eq!(found == "same behaviour inside and outside of a map", !agent.is_endpoint_visible(), "{found}");
    assert_eq!(advice.is_some_and(|advice| advice.contains("path ingress")), agent.is_endpoint_visible(), "{advice:?}");
    let paths = document["paths"].as_array().unwrap();
    assert_eq!(paths.iter().map(|path| &path["path"]).collect::<Vec<_>>(), ["local", "ingress"]);
    // The text output names the same checks.
    let text = String::from_utf8(doctor(&[], &[]).stdout).unwrap();
    for path in paths {
        assert_eq!(path["ready"], true);
        let checks = path["checks"].as_array().unwrap();
        assert!(checks.len() >= 5 && checks.iter().all(|check| check["ok"] == true), "{checks:#?}");
        for check in checks {
            assert!(text.contains(&format!("ok      {}", check["case"].as_str().unwrap())), "{text}");
        }
    }
}

/// A missing path, because the configured cgroup does not exist.
#[test]
fn doctor_with_missing_path_exits_2() {
    let config = tempfile::NamedTempFile::new().unwrap();
    let endpoint = std::net::TcpListener::bind(ANY_PORT).unwrap();
    let pool = format!("[[pools]]\nname = \"a\"\nendpoints = [\"{}\"]\n", endpoint.local_addr().unwrap());
    std::fs::write(config.path(), format!("[steering]\ncgroup = \"/nowhere/cgroup\"\n{pool}")).unwrap();
    std::fs::set_permissions(config.path(), Permissions::from_mode(0o644)).unwrap();
    let output = doctor(&[], &["--json", "--config", config.path().to_str().unwrap()]);
    let document = document(&output);
    assert_eq!(output.status.code(), Some(2), "{document:#}");
    assert_eq!(document["result"], "the agent steers, except on: local");
    let (ok, found, advice) = finding(&document, "cgroup v2");
    assert!(!ok && found.contains("/nowhere/cgroup") && advice.is_some(), "{document:#}");
    let [local, ingress] = &document["paths"].as_array().unwrap()[..] else { panic!("{document:#}") };
    assert!(local["ready"] == false && local["why"].as_str().unwrap().contains("/nowhere/cgroup"), "{local:#}");
    assert_eq!(ingress["ready"], true);
}

#[test]
fn doctor_without_capabilities_exits_1() {
    let output = doctor(&["setpriv", "--bounding-set=-all", "--inh-caps=-all"], &["--json"]);
    let document = document(&output);
    assert_eq!(output.status.code(), Some(1), "{document:#}");
    for name in ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"] {
        let (ok, found, advice) = finding(&document, name);
        assert_eq!((ok, found), (false, "MISSING"), "{name}");
        assert!(advice.unwrap().contains("docs/capabilities.md"));
    }
    let (ok, found, advice) = finding(&document, "program");
    assert!(!ok && found.contains("lacks CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON"), "{found}");
    assert_eq!(advice, Some("grant the capabilities listed above"));
    let path = &document["paths"][0];
    assert!(path["ready"] == false && path["why"].as_str().unwrap().contains("Operation not permitted"), "{path:#}");
}

/// `setarch --uname-2.6` makes the kernel report version 2.6; its behaviour does not change.
const OLD_KERNEL: [&str; 2] = ["setarch", "--uname-2.6"];

#[test]
fn doctor_on_faulty_kernel_fails_unless_forced() {
    let output = doctor(&OLD_KERNEL, &["--json"]);
    let refused = document(&output);
    assert_eq!(output.status.code(), Some(1), "{refused:#}");
    let (ok, found, advice) = finding(&refused, "kernel");
    assert!(!ok && found.starts_with("2.6.") && found.contains("KNOWN"), "{found}");
    assert!(advice.unwrap().contains("--force"));
    assert!(finding(&refused, "program").1.starts_with("NOT TRIED"));

    let output = doctor(&OLD_KERNEL, &["--json", "--force"]);
    let forced = document(&output);
    assert!(!finding(&forced, "kernel").0 && finding(&forced, "program").0);
    // cgroup links need a newer kernel than the reported version.
    assert_eq!((output.status.code(), &forced["result"]), (Some(2), &"the agent steers, except on: local".into()));
}

#[test]
fn doctor_with_invalid_configuration_exits_64() {
    let output = doctor(&[], &["--config", "/nowhere/penstock.toml"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nowhere/penstock.toml"));
    assert!(output.stdout.is_empty());
}

/// 2 would mean that a path is off.
#[test]
fn wrong_command_line_exits_64() {
    for line in
        [&["doctor", "--bogus"][..], &["run", "--listen", "foo"], &["nope"], &["--log-queue-bytes", "0", "version"]]
    {
        let output = Command::new(Process::binary("penstock").unwrap()).args(line).output().unwrap();
        assert_eq!(output.status.code(), Some(64), "{line:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{line:?}");
    }
    let output = Command::new(Process::binary("penstock").unwrap()).arg("--help").output().unwrap();
    assert_eq!((output.status.code(), output.stdout.is_empty()), (Some(0), false));
}

#[tokio::test]
async fn agent_on_faulty_kernel_relays_unless_forced() {
    let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
    let mut refused = AgentProcess::start_through(&OLD_KERNEL, ANY_PORT, server.addr, "auto", "").await.unwrap();
    let said = refused.process.line("steering: unavailable: kernel 2.6.", SOON).await.unwrap();
    assert!(said.contains("WARN") && said.contains("--force"), "{said}");
    let (_, ready) = refused.ask_admin("/readyz?verbose").await.unwrap();
    assert!(ready.contains("path ingress: off: kernel 2.6."), "{ready}");
    let active =
        async |agent: &AgentProcess| agent.metric("penstock_steering_path_active", &[r#"path="ingress""#]).await;
    assert_eq!(active(&refused).await.unwrap(), 0.0);

    let through = ["setarch", "--uname-2.6", "env", "PENSTOCK_FORCE=true"];
    let mut forced = AgentProcess::start_through(&through, ANY_PORT, server.addr, "auto", "").await.unwrap();
    let said = forced.process.line("steering: active (ingress), forced on kernel 2.6.", SOON).await.unwrap();
    assert!(said.contains("WARN"), "{said}");
    let (_, ready) = forced.ask_admin("/readyz?verbose").await.unwrap();
    assert!(ready.contains("forced on kernel 2.6.") && ready.contains("path ingress: ready"), "{ready}");
    assert_eq!(active(&forced).await.unwrap(), 1.0);
    let info = [r#"path="ingress""#, "forced on kernel 2.6."];
    assert_eq!(forced.metric("penstock_steering_path_info", &info).await.unwrap(), 1.0);
}

/// A cgroup that is removed on drop once it is empty.
struct Group(std::path::PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// As in an unprivileged container: this process's cgroup looks like the root, and it contains no endpoint.
#[test]
fn private_cgroup_namespace_disables_local_path() {
    let root = penstock_agent::command::cgroup::root().unwrap();
    let group = Group(root.join(format!("penstock-doctor-{}", std::process::id())));
    std::fs::create_dir(&group.0).unwrap();
    let (enter, root) = (group.0.join("cgroup.procs"), root.display());
    let inside = format!("umount -l {root} && mount -t cgroup2 none {root} && exec \"$0\" \"$@\"");
    let outside =
        format!("echo $$ > {} && exec unshare --cgroup --mount sh -c '{inside}' \"$0\" \"$@\"", enter.display());
    let output = doctor(&["sh", "-c", &outside], &["--json"]);
    let document = document(&output);
    let (ok, found, advice) = finding(&document, "cgroup v2");
    assert!(!ok && found.contains("private cgroup namespace") && advice.is_some(), "{document:#}");
    let local = &document["paths"][0];
    assert!(
        local["ready"] == false && local["why"].as_str().unwrap().contains("private cgroup namespace"),
        "{local:#}"
    );
    assert_eq!((output.status.code(), &document["result"]), (Some(2), &"the agent steers, except on: local".into()));
}

/// A certificate for these names by a new authority: the authority's certificate, and the server's with its key.
fn signed(names: &[&str]) -> (String, ServerTlsConfig) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let names: Vec<_> = names.iter().map(ToString::to_string).collect();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &*ca).unwrap().pem();
    (ca.pem(), ServerTlsConfig::new().identity(Identity::from_pem(certificate, key.serialize_pem())))
}

async fn epp(endpoints: &[SocketAddr], tls: Option<ServerTlsConfig>) -> ScriptedEpp {
    let setup = Setup { tls, ..Setup::default() };
    ScriptedEpp::start_with(setup, Production::new(endpoints)).await.unwrap()
}

/// Asserts what doctor says about one EPP, endpoint or certificate of the configuration.
fn assert_trial(document: &Value, name: &str, ok: bool, found: &str, advice: &str) {
    let trials = document["configuration"].as_array().unwrap();
    let trial = trials.iter().find(|trial| trial["name"] == name);
    let trial = trial.unwrap_or_else(|| panic!("no {name} in {document:#}"));
    assert_eq!(trial["ok"], ok, "{trial:#}");
    assert!(trial["found"].as_str().unwrap().contains(found), "{trial:#}");
    assert!(trial["advice"].as_str().unwrap_or_default().contains(advice), "{trial:#}");
    assert_eq!(trial["advice"].is_null(), ok, "{trial:#}");
}

/// Every EPP and endpoint of the configuration is tried, and the advice names the setting that mends it.
#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
async fn doctor_names_the_setting_that_mends_each_epp_and_endpoint() {
    let endpoint = ModelServer::start(Options::default()).await.unwrap();
    let all = [endpoint.addr];
    let (ca, server) = signed(&["127.0.0.1"]);
    let (other_ca, named) = signed(&["epp.example"]);
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [("ca.pem", &ca), ("other.pem", &other_ca)] {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let (plain, empty, elsewhere) =
        (epp(&all, None).await, epp(&[], None).await, epp(&["127.0.0.9:9".parse().unwrap()], None).await);
    let (secured, named) = (epp(&all, Some(server)).await, epp(&all, Some(named)).await);
    let (silent, refusing) = (tls_only().unwrap(), Refusing::new().unwrap());
    let no_epp = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    let h2c = Http2Server::start(Http2Options::default()).await.unwrap();
    let insecure = "tls = \"insecure\"";
    // Name, EPP, its further settings, whether it works, what is found, and what the advice names. Models of an EPP's other ports: of
    // health checks another gRPC service, without TLS also if ext_proc has it; of metrics an HTTP/1.1 server.
    let pools: [(&str, SocketAddr, &str, bool, &str, &str); 17] = [
        ("health-port-of-tls", no_epp.addr, insecure, false, "answered without TLS", "to its ext_proc port"),
        ("metrics-port", endpoint.addr, "", false, "answered with HTTP/1.1", "like an EPP's port for metrics"),
        ("good", plain.addr, "", true, "picks 127.0.0.1:", ""),
        ("good-tls", secured.addr, "tls = \"ca\"\nca_file = \"ca.pem\"", true, "picks 127.0.0.1:", ""),
        ("needs-tls", secured.addr, "", false, "answered with TLS", "set `tls`"),
        ("needs-tls-silent", silent, "", false, "answered with TLS", "set `tls`"),
        ("has-no-tls", plain.addr, insecure, false, "answered without TLS", "`tls = \"off\"`"),
        ("http1", endpoint.addr, "", false, "answered with HTTP/1.1", "set `address`"),
        ("http1-tls", endpoint.addr, insecure, false, "answered with HTTP/1.1", "set `address`"),
        ("other-service", no_epp.addr, "", false, "unimplemented", "ext_proc port"),
        ("no-endpoint", empty.addr, "", false, "answers a request with 5", "InferencePool"),
        ("wrong-pool", elsewhere.addr, "", false, "picks 127.0.0.9:9, which the pool does not admit", "passthrough"),
        (
            "unknown-ca",
            secured.addr,
            "tls = \"ca\"\nca_file = \"other.pem\"",
            false,
            "invalid peer certificate",
            "`ca_file`",
        ),
        ("wrong-name", named.addr, "tls = \"ca\"\nca_file = \"other.pem\"", false, "not valid for", "`server_name`"),
        (
            "right-name",
            named.addr,
            "tls = \"ca\"\nca_file = \"other.pem\"\nserver_name = \"epp.example\"",
            true,
            "picks 127.0.0.1:",
            "",
        ),
        (
            "not-pinned",
            secured.addr,
            "tls = \"pinned\"\npins = [\"0000000000000000000000000000000000000000000000000000000000000000\"]",
            false,
            "is not pinned",
            "`pins`",
        ),
        ("refused", refusing.addr, "", false, "Connection refused", "start the EPP"),
    ];
    let mut text = String::new();
    for (name, address, more, ..) in &pools {
        text += &format!(
            "[[pools]]\nname = \"{name}\"\nendpoints = [\"{}\"]\n[pools.picker]\nkind = \"epp\"\naddress = \"{address}\"\n{more}\n",
            endpoint.addr
        );
    }
    let gone = refusing.addr;
    text += &format!("[[pools]]\nname = \"builtin\"\nendpoints = [\"{}\", \"{gone}\"]\n", endpoint.addr);
    text += &format!(
        "[[pools]]\nname = \"h2c\"\napp_protocol = \"h2c\"\nendpoints = [\"{}\", \"{}\"]\n",
        h2c.addr, endpoint.addr
    );
    text += "[[routes]]\npool = \"good\"\n";
    let config = folder.path().join("penstock.toml");
    std::fs::write(&config, text).unwrap();
    let arguments = ["--json", "--config", config.to_str().unwrap()];
    let output = doctor(&[], &arguments);
    let document = document(&output);
    assert_eq!((output.status.code(), &document["exit_code"]), (Some(3), &Value::from(3)), "{document:#}");
    let check = |name: &str, ok, found, advice| assert_trial(&document, name, ok, found, advice);
    for (name, address, _, ok, found, advice) in pools {
        check(&format!("pool {name}, EPP {address}"), ok, found, advice);
    }
    check(&format!("pool builtin, endpoint {}", endpoint.addr), true, "accepts connections", "");
    check(&format!("pool builtin, endpoint {gone}"), false, "Connection refused", "start the model server");
    check(&format!("pool h2c, endpoint {}", h2c.addr), true, "accepts connections", "");
    check(&format!("pool h2c, endpoint {}", endpoint.addr), false, "HTTP/1.1", "app_protocol");
    // The EPPs do not count the trial as load.
    eventually(SOON, || plain.streams_open() == 0).await;
    let text = String::from_utf8(doctor(&[], &arguments[1..]).stdout).unwrap();
    assert!(text.contains("ok      pool good, EPP") && text.contains("FAILED  pool needs-tls, EPP"), "{text}");
    assert!(text.contains("-> set `tls` in the pool's `picker` section"), "{text}");
}

/// The certificate for clients is tried; one whose key does not fit is an error of the configuration.
#[tokio::test]
async fn doctor_tries_the_certificate_for_clients() {
    let endpoint = ModelServer::start(Options::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let write = |name: &str, text: &str| std::fs::write(path(name), text).unwrap();
    let mut params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
    let key = KeyPair::generate().unwrap();
    write("tls.key", &key.serialize_pem());
    write("other.key", &KeyPair::generate().unwrap().serialize_pem());
    write("good.crt", &params.self_signed(&key).unwrap().pem());
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    write("expired.crt", &params.self_signed(&key).unwrap().pem());
    let doctored = |certificate: &str, key: &str| {
        let text = format!(
            "[process]\nuser = \"keep\"\n[listen.tls]\naddress = \"127.0.0.1:8443\"\ncert_file = \"{certificate}\"\nkey_file = \"{key}\"\n\
             [[pools]]\nname = \"a\"\nendpoints = [\"{}\"]\n",
            endpoint.addr
        );
        write("penstock.toml", &text);
        doctor(&[], &["--json", "--config", path("penstock.toml").to_str().unwrap()])
    };
    for (certificate, code, found) in [("good.crt", 0, "certificate for a.example"), ("expired.crt", 3, "expired at")] {
        let output = doctored(certificate, "tls.key");
        let document = document(&output);
        assert_eq!(output.status.code(), Some(code), "{document:#}");
        let trial = &document["configuration"][0];
        assert_eq!((&trial["name"], &trial["ok"]), (&"listen.tls 127.0.0.1:8443".into(), &(code == 0).into()));
        assert!(trial["found"].as_str().unwrap().contains(found), "{trial:#}");
    }
    let output = doctored("good.crt", "other.key");
    assert_eq!(output.status.code(), Some(64));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("key_file") && text.contains("does not match the certificate"), "{text}");
}

/// With a configuration that works, the exit code is that of the machine.
#[tokio::test]
async fn doctor_with_working_configuration_exits_0() {
    let endpoint = ModelServer::start(Options::default()).await.unwrap();
    let epp = epp(&[endpoint.addr], None).await;
    let config = tempfile::NamedTempFile::new().unwrap();
    let text = format!(
        "[[pools]]\nname = \"a\"\nendpoints = [\"{}\"]\n[pools.picker]\nkind = \"epp\"\naddress = \"{}\"\n",
        endpoint.addr, epp.addr
    );
    std::fs::write(config.path(), text).unwrap();
    std::fs::set_permissions(config.path(), Permissions::from_mode(0o644)).unwrap();
    let output = doctor(&[], &["--json", "--config", config.path().to_str().unwrap()]);
    let document = document(&output);
    assert_eq!(output.status.code(), Some(0), "{document:#}");
    assert_eq!(document["configuration"].as_array().unwrap().len(), 2);
}

/// The agent reads its configuration, certificates, keys and files of endpoints again after it has left root.
#[tokio::test]
async fn doctor_and_config_check_name_files_that_the_user_cannot_read() {
    let endpoint = ModelServer::start(Options::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let allow = |name: &str, mode| std::fs::set_permissions(path(name), Permissions::from_mode(mode)).unwrap();
    allow("", 0o755);
    let certificate = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    for (name, text, mode) in [
        ("tls.crt", certificate.cert.pem(), 0o644),
        ("tls.key", certificate.signing_key.serialize_pem(), 0o600),
        ("closed.toml", format!("endpoints = [\"{}\"]", endpoint.addr), 0o600),
        ("open.toml", format!("endpoints = [\"{}\"]", endpoint.addr), 0o644),
        ("kubeconfig", "{}".to_owned(), 0o600),
        ("penstock.toml", String::new(), 0o600),
    ] {
        std::fs::write(path(name), text).unwrap();
        allow(name, mode);
    }
    let write = |user: &str| {
        let pools = ["closed", "open", "gone"]
            .map(|name| format!("[[pools]]\nname = \"{name}\"\nendpoints_file = \"{name}.toml\"\n"))
            .concat();
        let tls = "[kubernetes]\nkubeconfig = \"kubeconfig\"\n[listen.tls]\naddress = \"127.0.0.1:8443\"\ncert_file = \"tls.crt\"\nkey_file = \"tls.key\"\n";
        let text =
            format!("[process]\nuser = \"{user}\"\n{tls}{pools}[[routes]]\nhost = \"a.example\"\npool = \"open\"\n");
        std::fs::write(path("penstock.toml"), text).unwrap();
    };
    let config = path("penstock.toml");
    let config = config.to_str().unwrap();
    let check = || {
        let mut command = Command::new(Process::binary("penstock").unwrap());
        let output = command.args(["config", "check", "--config", config]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let found =
        |setting: &str, file: &str, user: &str| format!("{setting}: {} cannot be read by {user}", path(file).display());
    let (key, closed) = (("listen.tls.key_file", "tls.key"), ("pool closed, endpoints_file", "closed.toml"));
    let gone = "pool gone, endpoints_file";

    write("65534:65533");
    let (text, user) = (check(), "uid 65534, gid 65533, the user of `process.user`: ");
    let (own, kubeconfig) = (("configuration", "penstock.toml"), ("kubernetes.kubeconfig", "kubeconfig"));
    assert_eq!(text.lines().count(), 5, "{text}");
    for (setting, file) in [own, kubeconfig, key, closed, (gone, "gone.toml")] {
        assert!(text.contains(&found(setting, file, user)), "{text}");
    }
    let output = doctor(&[], &["--json", "--config", config]);
    let document = document(&output);
    assert_eq!(output.status.code(), Some(3), "{document:#}");
    let failed = document["configuration"].as_array().unwrap().iter().filter(|trial| trial["ok"] == false);
    let failed: Vec<_> = failed.map(|trial| trial["name"].as_str().unwrap()).collect();
    assert_eq!(failed, [gone, own.0, kubeconfig.0, key.0, closed.0], "{document:#}");

    write("keep");
    let text = check();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains(&found(gone, "gone.toml", "uid 0, gid 0: ")), "{text}");
}
