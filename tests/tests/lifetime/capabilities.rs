//! Capabilities: three are enough for any user to start the agent, relaying needs none, and every thread drops what only the
//! start needs.

use std::{collections::BTreeMap, fs};

use penstock_tests::{
    ApiServer, Between, BodyEnd, Client, ModelServer, Mounted, Plan, Reader, Request,
    agent_process::AgentProcess,
    api_server::objects::NAMESPACE,
    eventually,
    model_server::{Framing, Lengths, Options, Pauses},
    process::Process,
};

use crate::{ANY_PORT, SOON};

/// An arbitrary unprivileged user.
const USER: u32 = 65_534;
const CAP_NET_BIND_SERVICE: u64 = 1 << 10;

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

/// A stream that can be steered.
fn plan() -> Plan {
    Plan {
        framing: Framing::Chunked,
        size: 200_000,
        stream_id: 3,
        writes: Lengths::Fixed(1000),
        pauses: Some(Pauses { seed: 3, every: 4, up_to_us: 500 }),
        ..Plan::default()
    }
}

/// Requests and checks a response; returns the bytes of it that this path carried.
async fn carried(agent: &AgentProcess, path: &str) -> f64 {
    let plan = plan();
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    // The response is counted before the connection's next request is answered.
    assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
    agent.metric("penstock_body_bytes_total", &[&format!("path=\"{path}\"")]).await.unwrap()
}

/// `/proc/pid/task/*/status`: each thread's name and fields.
fn threads(process: u32) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    // A thread may end between the listing and the read.
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let fields = |line: &str| line.split_once(":\t").map(|(name, value)| (name.to_owned(), value.to_owned()));
    statuses.map(|status| status.lines().filter_map(fields).collect()).collect()
}

fn set(thread: &BTreeMap<String, String>, name: &str) -> u64 {
    u64::from_str_radix(&thread[name], 16).unwrap()
}

/// Waits until no thread holds or can gain a capability, and all have this user, group and supplementary groups.
async fn assert_no_capabilities(process: u32, user: u32, groups: &str) {
    let ids = [user; 4].map(|id| id.to_string()).join("\t");
    let as_wanted = |thread: &BTreeMap<String, String>| {
        ["CapEff", "CapPrm", "CapInh", "CapAmb"].map(|name| set(thread, name)) == [0; 4]
            && thread["NoNewPrivs"] == "1"
            && [&thread["Uid"], &thread["Gid"]] == [&ids; 2]
            && thread.get("Groups").map_or("", |found| found.trim()) == groups
    };
    // A thread drops its capabilities first, but the start does not wait for it.
    eventually(SOON, || threads(process).iter().all(as_wanted)).await;
}

const THREE: &str = "-all,+bpf,+net_admin,+perfmon";

#[tokio::test]
async fn any_user_with_three_capabilities_can_steer() {
    let server = server().await;
    let [user, group] = ["--reuid", "--regid"].map(|flag| format!("{flag}={USER}"));
    let three = ["--bounding-set", "--inh-caps", "--ambient-caps"].map(|set| format!("{set}={THREE}"));
    let through = ["setpriv", &user, &group, "--clear-groups", &three[0], &three[1], &three[2]];
    for (mode, said) in [("ingress", "steering: active (ingress)"), ("local", "steering: active (local, ingress)")] {
        let agent = AgentProcess::start_through(&through, ANY_PORT, server.addr, mode, "").await.unwrap();
        let output = agent.process.output();
        assert!(output.iter().any(|line| line.contains(said)), "{output:#?}");
        assert_no_capabilities(agent.process.id(), USER, "").await;
        assert!(carried(&agent, mode).await > 0.0, "{mode}");
    }
}

#[tokio::test]
async fn agent_without_capabilities_relays_and_logs_reason() {
    let server = server().await;
    let [user, group] = ["--reuid", "--regid"].map(|flag| format!("{flag}={USER}"));
    let through = ["setpriv", &user, &group, "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"];
    let mut agent = AgentProcess::start_through(&through, ANY_PORT, server.addr, "auto", "").await.unwrap();
    let why = "this process lacks CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON: ";
    agent.process.line(&format!("steering: unavailable: {why}"), SOON).await.unwrap();
    let (_, ready) = agent.ask_admin("/readyz?verbose").await.unwrap();
    assert!(ready.contains(&format!("path ingress: off: {why}")), "{ready}");
    assert!(ready.contains("capabilities: none kept\n"), "{ready}");
    assert_eq!(agent.metric("penstock_steering_path_active", &[]).await.unwrap(), 0.0);
    assert_eq!(agent.metric("penstock_steering_path_info", &[r#"path="ingress""#, why]).await.unwrap(), 1.0);
    assert!(carried(&agent, "relay").await >= plan().size as f64);
    assert_eq!(carried(&agent, "ingress").await, 0.0);
}

/// The capabilities that the manifests in `deploy/kubernetes` request.
const FIVE: &str = "-all,+bpf,+net_admin,+perfmon,+setuid,+setgid";

/// Root limited to a container runtime's capabilities, without ambient ones.
#[tokio::test]
async fn root_with_five_capabilities_loads_programs_and_drops_root() {
    let server = server().await;
    let bounded = format!("--bounding-set={FIVE}");
    let through = ["setpriv", "--no-new-privs", &bounded, "--inh-caps=-all"];
    let mut agent = AgentProcess::start_through(&through, ANY_PORT, server.addr, "auto", "").await.unwrap();
    assert_no_capabilities(agent.process.id(), USER, "").await;
    let line = agent.process.line("capabilities: none kept", SOON).await.unwrap();
    assert!(line.contains("INFO") && line.contains("user: uid 65534, gid 65534, groups: none"), "{line}");
    assert!(carried(&agent, "local").await > 0.0);
}

#[tokio::test]
async fn configured_user_and_groups_apply_to_reads() {
    let server = server().await;
    let settings = "[process]\nuser = \"61001:61001\"\ngroups = [61002]";
    let mut agent = AgentProcess::start(ANY_PORT, server.addr, "off", settings).await.unwrap();
    assert_no_capabilities(agent.process.id(), 61_001, "61002").await;
    // A request body can still spill to a file.
    let body = vec![b'x'; 3 << 20];
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::post("/test/echo", body)).await.unwrap().status(), 200);
    // From here on, only the supplementary group may read the file.
    agent.write_config(server.addr, settings).unwrap();
    let path = agent.config_path().to_owned();
    std::os::unix::fs::chown(&path, Some(0), Some(61_002)).unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    agent.process.signal(nix::sys::signal::Signal::SIGHUP).unwrap();
    agent.process.line("configuration reloaded", SOON).await.unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    agent.process.signal(nix::sys::signal::Signal::SIGHUP).unwrap();
    let refused = agent.process.line("configuration reload failed, keeping the current one", SOON).await.unwrap();
    assert!(refused.contains("ermission denied"), "{refused}");
}

#[tokio::test]
async fn retained_root_is_reported() {
    let server = server().await;
    let keep = "[process]\nuser = \"keep\"";
    let mut agent = AgentProcess::start(ANY_PORT, server.addr, "off", keep).await.unwrap();
    agent.process.line("user: uid 0, gid 0", SOON).await.unwrap();
    let (_, ready) = agent.ask_admin("/readyz?verbose").await.unwrap();
    assert!(ready.contains("user: uid 0, gid 0") && ready.contains("set process.user"), "{ready}");

    let through = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
    let mut agent = AgentProcess::start_through(&through, ANY_PORT, server.addr, "off", "").await.unwrap();
    let line = agent.process.line("could not change the user, staying root", SOON).await.unwrap();
    assert!(line.contains("lacks CAP_SETUID, CAP_SETGID"), "{line}");
}

/// Send buffers above any machine's limit for unprivileged processes, and every kind of thread (spans, EPP, endpoint checks).
const EVERYTHING: &str = "client_send_buffer = 67108864\n\
    [tracing]\notlp_endpoint = \"http://127.0.0.1:9\"\n\
    [[routes]]\npool = \"default\"\n\
    [[pools]]\nname = \"other\"\nendpoints = [\"127.0.0.1:9\"]\n\
    [pools.health]\npath = \"/health\"\n\
    [pools.picker]\nkind = \"epp\"\naddress = \"127.0.0.1:9\"\ntls = \"off\"\n";

#[tokio::test]
async fn startup_capabilities_are_dropped_by_every_thread() {
    let server = server().await;
    let mut agent = AgentProcess::start(ANY_PORT, server.addr, "ingress", EVERYTHING).await.unwrap();
    // Threads set their own names; the kernel keeps 15 bytes.
    let all =
        ["penstock-0", "penstock-1", "penstock-events", "penstock-contro", "penstock-spans", "endpoints", "admin"];
    let named = |name: &&str| threads(agent.process.id()).iter().any(|thread| thread["Name"] == **name);
    eventually(SOON, || all.iter().all(named)).await;
    assert_no_capabilities(agent.process.id(), USER, "").await;
    // These tests run as root, which may limit the bounding set.
    assert!(threads(agent.process.id()).iter().all(|thread| set(thread, "CapBnd") == 0));
    let line = agent.process.line("capabilities: ", SOON).await.unwrap();
    assert!(line.contains("INFO") && line.contains("none kept"), "{line}");
    assert!(carried(&agent, "ingress").await > 0.0);
    // Client connections inherit their send buffer from the listener.
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
    let sockets = std::process::Command::new("ss").args(["-tmnH", "state", "established"]).output().unwrap();
    let sockets = String::from_utf8(sockets.stdout).unwrap();
    let (ours, theirs) = (agent.addr.to_string(), client.local_addr().unwrap().to_string());
    let mut lines = sockets.lines();
    lines
        .find(|line| line.split_whitespace().collect::<Vec<_>>().ends_with(&[ours.as_str(), theirs.as_str()]))
        .unwrap();
    assert!(lines.next().unwrap().contains("tb67108864,"), "{sockets}");

    // Threads started by a reload hold none either.
    agent.write_config(server.addr, EVERYTHING).unwrap();
    agent.process.signal(nix::sys::signal::Signal::SIGHUP).unwrap();
    agent.process.line("configuration reloaded", SOON).await.unwrap();
    assert_no_capabilities(agent.process.id(), USER, "").await;
}

#[tokio::test]
async fn threads_of_wire_and_kubernetes_hold_no_capabilities() {
    let (between, api) = (Between::new().unwrap(), ApiServer::start().await.unwrap());
    let (bpffs, kubeconfig) = (Mounted::bpffs().unwrap(), api.kubeconfig());
    fs::set_permissions(kubeconfig.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let settings = format!(
        "interfaces = \"{}\"\nbpffs = \"{}\"\n[kubernetes]\nkubeconfig = \"{}\"\n[[routes]]\npool = \"default\"\n\
         [[pools]]\nname = \"found\"\n[pools.inference_pool]\nnamespace = \"{NAMESPACE}\"\nname = \"llama\"\n",
        between.interfaces.join(","),
        bpffs.path().display(),
        kubeconfig.path().display(),
    );
    let listen = (between.front, 8080).into();
    let agent = AgentProcess::start(listen, between.server.addr, "wire", &settings).await.unwrap();
    let all = ["penstock-wire", "penstock-adopt", "kubernetes"];
    let named = |name: &&str| threads(agent.process.id()).iter().any(|thread| thread["Name"] == **name);
    eventually(SOON, || all.iter().all(named)).await;
    eventually(SOON, || api.requests(&["inferencepools"]) > 0).await;
    assert_no_capabilities(agent.process.id(), USER, "").await;
    assert!(threads(agent.process.id()).iter().all(|thread| set(thread, "CapBnd") == 0));
}

#[tokio::test]
async fn capabilities_without_need_are_all_dropped() {
    let server = server().await;
    for (steering, settings, path) in [("ingress", "client_send_buffer = 131072", "ingress"), ("off", "", "relay")] {
        let agent = AgentProcess::start(ANY_PORT, server.addr, steering, settings).await.unwrap();
        assert_no_capabilities(agent.process.id(), USER, "").await;
        let (_, ready) = agent.ask_admin("/readyz?verbose").await.unwrap();
        assert!(ready.contains("capabilities: none kept\n"), "{ready}");
        assert!(carried(&agent, path).await > 0.0);
    }
}

/// Ports below 1024 are bound before the agent drops the capability for them.
#[tokio::test]
async fn privileged_port_is_bound_before_capability_drop() {
    let server = server().await;
    let [user, group] = ["--reuid", "--regid"].map(|flag| format!("{flag}={USER}"));
    // 127.0.0.2 is also this machine, and no other test uses it.
    let listen = "127.0.0.2:81".parse().unwrap();
    let with = ["--bounding-set", "--inh-caps", "--ambient-caps"].map(|set| format!("{set}=-all,+net_bind_service"));
    let through = ["setpriv", &user, &group, "--clear-groups", &with[0], &with[1], &with[2]];
    let agent = AgentProcess::start_through(&through, listen, server.addr, "off", "").await.unwrap();
    assert_eq!(agent.addr, listen);
    assert_no_capabilities(agent.process.id(), USER, "").await;
    assert!(threads(agent.process.id()).iter().all(|thread| set(thread, "CapBnd") == CAP_NET_BIND_SERVICE));

    let none = ["setpriv", &user, &group, "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"];
    let listen = "127.0.0.2:82".parse().unwrap();
    let refused = AgentProcess::start_through(&none, listen, server.addr, "off", "").await;
    let Err(error) = refused else { panic!("bound without the capability") };
    assert!(format!("{error:#}").contains("Permission denied"), "{error:#}");
}

#[tokio::test]
async fn picker_that_is_started_as_root_is_root_no_longer() {
    for (flags, user) in [(&[][..], USER), (&["--user", "1000:1000"], 1000), (&["--user", "keep"], 0)] {
        let args = [&["epp", "--listen", "127.0.0.1:0", "--endpoint", "127.0.0.1:1"], flags].concat();
        let mut epp = Process::start("penstock", &args).unwrap();
        epp.line(&format!("user: uid {user}, gid {user}"), SOON).await.unwrap();
        assert_no_capabilities(epp.id(), user, "").await;
    }
    let mut epp = Process::start("penstock", ["epp", "--endpoint", "127.0.0.1:1", "--user", "0:0"]).unwrap();
    epp.line("expected \"keep\", or the uid and gid of a user", SOON).await.unwrap();
}
