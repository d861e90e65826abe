//! Upgrades: a new agent takes the listening sockets over from the running one, which finishes its responses and exits.

mod activated;
pub(crate) mod load;
mod peers;
mod told;

use std::{
    fs::Permissions,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::PathBuf,
};

use nix::sys::socket::{getsockopt, sockopt};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader, Request,
    agent_process::AgentProcess,
    eventually,
    model_server::{Framing, Lengths, Options, Pauses},
    reader::at_least,
    tls::Certificate,
};
use tempfile::TempDir;

use crate::{MODELS, SOON};

/// A model server, and a folder that the agents' user can write into.
struct Scene {
    server: ModelServer,
    folder: TempDir,
    certificate: Certificate,
}

impl Scene {
    async fn new() -> Self {
        let options = Options { idle_close: None, ..Options::default() };
        let (server, folder) = (ModelServer::start(options).await.unwrap(), tempfile::tempdir().unwrap());
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
        let certificate = Certificate::new("agent.example").unwrap();
        certificate.write(folder.path()).unwrap();
        Self { server, folder, certificate }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("upgrade.sock")
    }

    /// A configuration whose ports are free ones, or those of the agent before.
    fn text(&self, workers: usize, steering: &str, settings: &str) -> String {
        let (folder, endpoint) = (self.folder.path().display(), self.server.addr);
        format!(
            "[listen]\naddress = \"127.0.0.1:0\"\nworkers = {workers}\n\
             [listen.tls]\naddress = \"127.0.0.1:0\"\ncert_file = \"{folder}/cert.pem\"\nkey_file = \"{folder}/key.pem\"\n\
             [admin]\naddress = \"127.0.0.1:0\"\n[steering]\nmode = \"{steering}\"\nmax_flows = 1024\n\
             [process]\nupgrade_socket = \"{folder}/upgrade.sock\"\n[timeouts]\nlame_duck = \"2s\"\n\
             [[pools]]\nname = \"default\"\nendpoints = [\"{endpoint}\"]\n{settings}\n"
        )
    }

    async fn agent(&self, workers: usize, steering: &str) -> AgentProcess {
        let agent = AgentProcess::start_logging(&self.text(workers, steering, "")).await.unwrap();
        self.is_answered_by(&agent).await;
        agent
    }

    /// Returns when the agent answers at the upgrade socket, which is soon after it accepts.
    async fn is_answered_by(&self, agent: &AgentProcess) {
        let pid = agent.process.id().cast_signed();
        let peer = |stream: UnixStream| getsockopt(&stream, sockopt::PeerCredentials).ok();
        let listens = || UnixStream::connect(self.socket()).ok().and_then(peer).is_some_and(|peer| peer.pid() == pid);
        eventually(SOON, listens).await;
    }
}

/// Every one of many new connections is answered, whichever socket of the agent it gets.
async fn is_served(agent: &AgentProcess) {
    for _ in 0..64 {
        let mut client = Client::connect(agent.addr).await.unwrap();
        assert_eq!(client.request(&Request::get(MODELS)).await.unwrap().status(), 200);
    }
    assert_eq!(agent.ask_admin("/readyz").await.unwrap(), (200, "ok\n".to_owned()));
}

async fn ends_well(mut agent: AgentProcess) -> Vec<String> {
    let ended = agent.process.ended(SOON).await.unwrap();
    assert_eq!(ended.code(), Some(0), "{:#?}", agent.process.output());
    // The last line.
    agent.process.line("stopped", SOON).await.unwrap();
    agent.process.output()
}

/// Three upgrades, or as many as `PENSTOCK_UPGRADES` says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upgrades_under_load_lose_nothing() {
    let count = std::env::var("PENSTOCK_UPGRADES").map_or(3, |count| count.parse().expect("a number"));
    let scene = Scene::new().await;
    let mut agent = scene.agent(2, "auto").await;
    let load = load::Load::start(&scene, &agent);
    let mut before = Vec::new();
    // More workers than before, fewer, and others that do not divide evenly.
    for workers in [4, 1, 3, 2, 5, 3, 2, 2, 1].into_iter().cycle().take(count) {
        load.until_each_has_worked().await;
        let next = scene.agent(workers, "auto").await;
        assert_eq!((next.addr, next.admin, next.tls), (agent.addr, agent.admin, agent.tls));
        is_served(&next).await;
        before.push(std::mem::replace(&mut agent, next));
    }
    load.until_each_has_worked().await;
    let counts = load.stop().await;
    for old in before {
        ends_well(old).await;
    }
    println!("{counts:?}");
    assert_eq!((scene.server.aborted(), scene.server.malformed()), (0, 0));
}

/// A response that is running when another agent takes over ends under the agent that began it, in the kernel.
#[tokio::test]
async fn steered_response_ends_under_the_agent_that_began_it() {
    for path in ["local", "ingress"] {
        let scene = Scene::new().await;
        let old = scene.agent(2, path).await;
        let plan = Plan {
            framing: Framing::Chunked,
            size: 600_000,
            stream_id: 3,
            writes: Lengths::Fixed(1000),
            pauses: Some(Pauses { seed: 3, every: 1, up_to_us: 8000 }),
            ..Plan::default()
        };
        let mut client = Client::connect(old.addr).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut checker = plan.checker();
        assert_eq!(at_least(&mut client, &mut checker, 20_000).await.unwrap(), None);

        let new = scene.agent(2, path).await;
        is_served(&new).await;
        // Both agents carry by the kernel at once.
        let mut other = Client::connect(new.addr).await.unwrap();
        let second = Plan { stream_id: 4, size: 100_000, ..plan.clone() };
        other.send(&second.request()).await.unwrap();
        assert_eq!(other.head().await.unwrap().status, 200);
        let read = Reader::Fast.take(&mut other, &mut second.checker()).await.unwrap();
        assert_eq!((read.end, read.len), (BodyEnd::Complete, second.size));
        assert!(checker.offset() < plan.size / 2, "the first response was not running");
        let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
        assert_eq!((read.end, checker.offset()), (BodyEnd::Complete, plan.size));

        let carried = |lines: &[String]| {
            let bytes = lines.iter().filter(|line| line.contains(&format!("\"carried_by\":\"{path}\""))).map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                line["bytes_kernel"].as_u64().unwrap()
            });
            bytes.max().unwrap_or_default()
        };
        assert!(carried(&ends_well(old).await) > plan.size / 2, "{path}");
        eventually(SOON, || carried(&new.process.output()) > second.size / 2).await;
    }
}

/// Ports that the new configuration does not have are closed by the old agent as usual, others are bound.
#[tokio::test]
async fn changed_address_is_bound_and_the_old_one_drained() {
    let scene = Scene::new().await;
    let old = scene.agent(2, "off").await;
    let (addr, admin) = (old.addr, old.admin);
    let text = scene.text(2, "off", "").replacen("127.0.0.1:0", "127.0.0.2:0", 1);
    let new = AgentProcess::start_logging(&text).await.unwrap();
    assert_eq!((new.admin, new.tls), (admin, old.tls));
    assert!(new.addr.ip().to_string() == "127.0.0.2");
    is_served(&new).await;
    let output = ends_well(old).await;
    assert!(output.iter().any(|line| line.contains("\"sockets\":\"admin,tls\"")), "{output:#?}");
    assert!(std::net::TcpStream::connect(addr).is_err());
}

#[tokio::test]
async fn new_agent_that_fails_leaves_the_old_one_serving() {
    let scene = Scene::new().await;
    let old = scene.agent(2, "off").await;
    // Its EPP cannot be reached, and it would wait for it.
    let waits = scene.text(
        2,
        "off",
        "failure_mode = \"closed\"\n[pools.picker]\nkind = \"epp\"\naddress = \"127.0.0.1:1\"\nstart_wait = \"1h\"",
    );
    let invalid = scene.text(2, "off", "nonsense = 1");
    let unusable =
        scene.text(2, "off", "").replacen("[admin]\naddress = \"127.0.0.1:0", "[admin]\naddress = \"192.0.2.1:1", 1);
    for text in [invalid, unusable] {
        assert!(AgentProcess::start_logging(&text).await.is_err());
        is_served(&old).await;
    }
    for ends in [nix::sys::signal::Signal::SIGKILL, nix::sys::signal::Signal::SIGTERM] {
        let mut new = begin(&waits);
        new.line("taking over", SOON).await.unwrap();
        new.line("EPP", SOON).await.unwrap();
        is_served(&old).await;
        // A third has to wait for its turn.
        let mut third = begin(&scene.text(2, "off", ""));
        third.line("another agent is already taking over", SOON).await.unwrap();
        assert_eq!(third.ended(SOON).await.unwrap().code(), Some(1));
        new.signal(ends).unwrap();
        let _ = new.ended(SOON).await.unwrap();
        is_served(&old).await;
    }
    // And one that works takes over.
    let new = scene.agent(2, "off").await;
    is_served(&new).await;
    ends_well(old).await;
    is_served(&new).await;
}

/// `penstock run` with this configuration.
fn begin(text: &str) -> penstock_tests::Process {
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(config.path(), text).unwrap();
    let (_, path) = config.keep().unwrap();
    let mut command = std::process::Command::new(penstock_tests::Process::binary("penstock").unwrap());
    command.env("PENSTOCK_LOG_FORMAT", "json").args(["run", "--config"]).arg(path);
    penstock_tests::Process::spawn(command).unwrap()
}

/// An agent that was killed leaves its socket file.
#[tokio::test]
async fn agent_after_a_killed_one_starts_as_usual() {
    let scene = Scene::new().await;
    let mut old = scene.agent(2, "off").await;
    old.process.kill().unwrap();
    assert!(scene.socket().exists());
    let new = scene.agent(2, "off").await;
    is_served(&new).await;
    assert_eq!(std::fs::metadata(scene.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    new.process.terminate().unwrap();
    ends_well(new).await;
    assert!(!scene.socket().exists());
}
