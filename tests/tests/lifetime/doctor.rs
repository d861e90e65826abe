//! `penstock doctor` on this machine and on machines with something missing, and the agent on a kernel known to lose bytes.

use std::process::{Command, Output};

use penstock_tests::{ModelServer, Process, agent_process::AgentProcess, model_server::Options};
use serde_json::Value;

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

#[test]
fn doctor_on_capable_machine_reports_every_path_ready() {
    let output = doctor(&[], &["--json"]);
    let document = document(&output);
    assert_eq!((output.status.code(), &document["exit_code"]), (Some(0), &Value::from(0)), "{document:#}");
    for name in ["kernel", "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "btf", "cgroup v2", "program"] {
        let (ok, found, advice) = finding(&document, name);
        assert!(ok && !found.is_empty() && advice.is_none(), "{name}: {document:#}");
    }
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
    let pool = "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:1\"]\n";
    std::fs::write(config.path(), format!("[steering]\ncgroup = \"/nowhere/cgroup\"\n{pool}")).unwrap();
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
    let root = penstock_agent::kernel::cgroup::root().unwrap();
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
