//! The agent's end. Killed, it visibly breaks only what passes through it and leaves nothing in the kernel; terminated, it
//! finishes running requests.

use std::time::Duration;

use aya::programs::loaded_programs;
use nix::sys::signal::Signal;
use penstock_tests::{
    BodyEnd, Checker, Client, ModelServer, Plan, Reader, Request,
    agent_process::AgentProcess,
    eventually,
    model_server::{Fault, FaultKind, Framing, Lengths, Options, Pauses},
    reader::at_least,
};

use crate::{ANY_PORT, SOON};

const AT_ONCE: Duration = Duration::from_secs(1);
const FRAMINGS: [Framing; 3] = [Framing::ContentLength, Framing::Chunked, Framing::UntilClose];

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

fn plan(framing: Framing, size: u64) -> Plan {
    Plan {
        framing,
        size,
        stream_id: 5,
        writes: Lengths::Fixed(1000),
        pauses: Some(Pauses { seed: 5, every: 1, up_to_us: 500 }),
        ..Plan::default()
    }
}

/// A running response.
struct Running {
    client: Client,
    checker: Checker,
    framing: Framing,
}

impl Running {
    async fn start(agent: &AgentProcess, plan: &Plan) -> Self {
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut checker = plan.checker();
        assert_eq!(at_least(&mut client, &mut checker, 20_000).await.unwrap(), None);
        Self { client, checker, framing: plan.framing }
    }

    async fn is_broken(&mut self) {
        let read = Reader::Fast.take(&mut self.client, &mut self.checker).await.unwrap();
        match self.framing {
            Framing::UntilClose => assert_eq!(read.end, BodyEnd::Reset),
            framing => assert_ne!(read.end, BodyEnd::Complete, "{framing:?}"),
        }
    }
}

async fn is_complete(agent: &AgentProcess, plan: &Plan) {
    let mut running = Running::start(agent, plan).await;
    let read = Reader::Fast.take(&mut running.client, &mut running.checker).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    if plan.framing != Framing::UntilClose {
        // The response is counted before the connection's next request is answered.
        assert_eq!(running.client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
    }
}

/// The kernel programs end with the agent, and endpoints, including those whose own sockets were in maps, serve its successor.
#[tokio::test]
async fn killed_agent_leaves_no_kernel_state() {
    // The kernel keeps 15 bytes of a name.
    let all = ["penstock_verdic", "penstock_messag", "penstock_peers"];
    leaves_nothing("ingress", &all[..1]).await;
    leaves_nothing("local", &all).await;
    leaves_nothing("auto", &all).await;
    leaves_nothing("off", &[]).await;
}

async fn leaves_nothing(steering: &str, names: &[&str]) {
    let server = server().await;
    let mut agent = AgentProcess::start(ANY_PORT, server.addr, steering, "").await.unwrap();
    let programs = agent.programs().unwrap();
    assert_eq!(programs.is_empty(), steering == "off");
    let ours = || {
        let loaded = loaded_programs().filter_map(Result::ok);
        let is_ours = |name: &[u8]| names.iter().any(|own| own.as_bytes() == name);
        loaded.filter(|one| is_ours(one.name()) && programs.contains(&one.id())).count()
    };
    assert_eq!(ours(), names.len());

    let mut running = Vec::new();
    for framing in FRAMINGS {
        // Some streams flow, others are paused.
        running.push(Running::start(&agent, &plan(framing, 1 << 30)).await);
        let resting = Plan { fault: Some(Fault { after: 50_000, kind: FaultKind::Stall }), ..plan(framing, 1 << 30) };
        running.push(Running::start(&agent, &resting).await);
    }
    is_complete(&agent, &plan(Framing::ContentLength, 100_000)).await;
    let path = match steering {
        "auto" => "local",
        "off" => "relay",
        path => path,
    };
    let path = format!("path=\"{path}\"");
    let carried = async |agent: &AgentProcess| agent.metric("penstock_body_bytes_total", &[&path]).await;
    assert!(carried(&agent).await.unwrap() > 0.0);

    agent.process.kill().unwrap();
    eventually(AT_ONCE, || server.connections_open() == 0).await;
    assert_eq!(server.aborted(), running.len() as u64);
    for one in &mut running {
        one.is_broken().await;
    }
    eventually(AT_ONCE, || ours() == 0).await;

    let next = AgentProcess::start(agent.addr, server.addr, steering, "").await.unwrap();
    assert_eq!(next.addr, agent.addr);
    for framing in FRAMINGS {
        is_complete(&next, &plan(framing, 100_000)).await;
    }
    assert!(carried(&next).await.unwrap() > 0.0);
}

#[tokio::test]
async fn sigterm_drains_agent() {
    for steering in ["ingress", "local", "auto", "off"] {
        let server = server().await;
        let patient = "[timeouts]\ndrain = \"5m\"\n";
        let mut agent = AgentProcess::start(ANY_PORT, server.addr, steering, patient).await.unwrap();
        let mut idle = Client::connect(agent.addr).await.unwrap();
        let mut running = Vec::new();
        for framing in FRAMINGS {
            // Larger than all buffers, so that no response is complete when the signal arrives.
            let plan = Plan { writes: Lengths::Fixed(64 << 10), pauses: None, ..plan(framing, 64 << 20) };
            running.push((Running::start(&agent, &plan).await, plan.size));
        }
        assert_eq!(agent.ask_admin("/readyz").await.unwrap(), (200, "ok\n".to_owned()));
        agent.process.terminate().unwrap();
        idle.until_end().await.unwrap();
        assert_eq!(agent.ask_admin("/readyz").await.unwrap(), (503, "draining\n".to_owned()));
        // Each worker closes its own listener.
        eventually(AT_ONCE, || std::net::TcpStream::connect(agent.addr).is_err()).await;
        for (running, size) in &mut running {
            let read = Reader::Fast.take(&mut running.client, &mut running.checker).await.unwrap();
            assert_eq!((read.end, read.len), (BodyEnd::Complete, *size), "{steering} {:?}", running.framing);
        }
        assert_eq!(agent.process.ended(SOON).await.unwrap().code(), Some(0), "{:#?}", agent.process.output());
    }
}

#[tokio::test]
async fn second_signal_ends_agent_at_once() {
    for (steering, second) in
        [("ingress", Signal::SIGTERM), ("local", Signal::SIGTERM), ("auto", Signal::SIGINT), ("off", Signal::SIGINT)]
    {
        let server = server().await;
        let mut agent = AgentProcess::start(ANY_PORT, server.addr, steering, "").await.unwrap();
        let mut running = Vec::new();
        for framing in FRAMINGS {
            running.push(Running::start(&agent, &plan(framing, 1 << 30)).await);
        }
        agent.process.terminate().unwrap();
        agent.process.line("draining", SOON).await.unwrap();
        agent.process.signal(second).unwrap();
        assert_eq!(agent.process.ended(AT_ONCE).await.unwrap().code(), Some(0));
        eventually(AT_ONCE, || server.connections_open() == 0).await;
        for one in &mut running {
            one.is_broken().await;
        }
    }
}
