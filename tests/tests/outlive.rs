//! Streams on path `wire` that outlive the agent: it is killed or told to stop, the streams run on, and the next agent adopts them.

use std::{
    net::SocketAddr,
    process::{Command, Output},
    time::Duration,
};

use penstock_tests::{
    Between, BodyEnd, Client, Mounted, Plan, Process, Request,
    agent_process::AgentProcess,
    client::{Pace, Piece},
    content::Checker,
    eventually,
    model_server::{After, Fault, FaultKind, Framing, Lengths},
};
use tokio::net::TcpStream;

const SOON: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;
const STREAMS: usize = 4;

/// Names of the agents' folders.
fn agents(bpffs: &Mounted) -> Vec<String> {
    let namespaces = std::fs::read_dir(bpffs.path().join("penstock")).into_iter().flatten();
    let agents = namespaces.flat_map(|namespace| std::fs::read_dir(namespace.unwrap().path()).unwrap());
    agents.map(|agent| agent.unwrap().file_name().into_string().unwrap()).collect()
}

struct Stage {
    bpffs: Mounted,
    between: Between,
    settings: String,
}

impl Stage {
    fn new(settings: &str) -> Self {
        let (bpffs, between) = (Mounted::bpffs().unwrap(), Between::new().unwrap());
        let (place, interfaces) = (bpffs.path().display(), between.interfaces.join(","));
        let settings = format!("interfaces = \"{interfaces}\"\nbpffs = \"{place}\"\n{settings}");
        Self { bpffs, between, settings }
    }

    fn front(&self) -> SocketAddr {
        SocketAddr::from((self.between.front, 8080))
    }

    async fn agent(&self) -> AgentProcess {
        let through = ["env", "PENSTOCK_LOG=info", "PENSTOCK_LOG_FORMAT=json"];
        let agent =
            AgentProcess::start_through(&through, self.front(), self.between.server.addr, "wire", &self.settings);
        let agent = agent.await.unwrap();
        let (_, said) = agent.ask_admin("/readyz?verbose").await.unwrap();
        assert!(said.contains("path wire: ready") && !said.contains("end with the agent"), "{said}");
        agent
    }

    /// A stream whose client has read its beginning, and then reads nothing: the endpoint waits in the middle.
    async fn begin(&self) -> Stream {
        let mut client = self.between.connect(self.front()).await.unwrap();
        client.patience = SOON;
        let plan = plan();
        client.send(&plan.request().header("accept", "text/event-stream")).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut checker = plan.checker();
        while checker.offset() < MIB {
            let Piece::Data(data) = client.piece(64 << 10).await.unwrap() else { panic!("an end") };
            checker.feed(&data).unwrap();
        }
        Stream { client, checker }
    }

    async fn begin_all(&self) -> Vec<Stream> {
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            streams.push(self.begin().await);
        }
        streams
    }

    fn penstock(&self, verb: &str, agent: &AgentProcess) -> Output {
        let mut command = Command::new(Process::binary("penstock").unwrap());
        command.arg(verb).arg("--config").arg(agent.config_path()).output().unwrap()
    }
}

struct Stream {
    client: Client<TcpStream>,
    checker: Checker,
}

impl Stream {
    async fn finish(mut self) {
        let read = self.client.read_body(Pace::Fast, |bytes| Ok(self.checker.feed(bytes)?)).await.unwrap();
        assert_eq!((read.end, self.checker.offset()), (BodyEnd::Complete, plan().size));
    }

    async fn expect_reset(mut self) {
        let read = self.client.read_body(Pace::Fast, |bytes| Ok(self.checker.feed(bytes)?)).await.unwrap();
        assert_eq!(read.end, BodyEnd::Reset);
    }
}

/// Waits until `agent` has counted so many adopted flows that ended for a reason.
async fn ended(agent: &AgentProcess, reason: &str, count: usize) {
    counted(agent, "penstock_adopted_flows_ended_total", &[&format!("reason=\"{reason}\"")], count).await;
}

async fn counted(agent: &AgentProcess, metric: &str, labels: &[&str], count: usize) {
    let deadline = std::time::Instant::now() + SOON;
    while agent.metric(metric, labels).await.unwrap() != count as f64 {
        assert!(std::time::Instant::now() < deadline, "{:#?}", agent.process.output());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Longer than what the buffers on the way hold, with a pause after its beginning in which the flow begins.
fn plan() -> Plan {
    Plan {
        framing: Framing::Chunked,
        size: 16 * MIB,
        stream_id: 7,
        chunks: Lengths::Fixed(4000),
        writes: Lengths::Fixed(16_000),
        fault: Some(Fault { after: 20_000, kind: FaultKind::StallMs(1200) }),
        after: After::Close,
        ..Plan::default()
    }
}

#[tokio::test]
async fn killed_agent_leaves_its_streams_to_the_next() {
    let stage = Stage::new("at_stop = \"finish\"\n");
    let mut first = stage.agent().await;
    let streams = stage.begin_all().await;
    first.process.kill().unwrap();
    let said = stage.penstock("doctor", &first);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains(&format!("its agent is gone, flows: {STREAMS}")), "{said}");

    let mut second = stage.agent().await;
    second.process.line(&format!("adopted {STREAMS} flows of"), SOON).await.unwrap();
    counted(&second, "penstock_adopted_flows", &[], STREAMS).await;
    for stream in streams {
        stream.finish().await;
    }
    ended(&second, "ok", STREAMS).await;
    // Lines are written after they are counted.
    let lines = || {
        let lines = second.process.output().into_iter().filter(|line| line.contains("\"adopted\":true"));
        lines.map(|line| serde_json::from_str(&line).unwrap()).collect::<Vec<serde_json::Value>>()
    };
    eventually(SOON, || lines().len() == STREAMS).await;
    for line in &lines() {
        let bytes = line["bytes_kernel"].as_u64().unwrap() + line["bytes_user"].as_u64().unwrap();
        assert!(line["status"] == 200 && line["reason"] == "ok" && line["carried_by"] == "wire", "{line}");
        assert!(bytes > 16 * MIB && bytes < 17 * MIB, "{line}");
    }
    let carried = second.metric("penstock_body_bytes_total", &["path=\"wire\""]).await.unwrap();
    assert!(carried > (STREAMS as u64 * 15 * MIB) as f64, "{carried}");
    assert_eq!(stage.between.server.aborted(), 0);

    // In a namespace that ends with it, an agent waits for its flows.
    let last = stage.begin().await;
    second.process.terminate().unwrap();
    second.process.line("\"draining\"", SOON).await.unwrap();
    last.finish().await;
    assert!(second.process.ended(SOON).await.unwrap().success());
    assert_eq!(agents(&stage.bpffs), [""; 0]);
}

#[tokio::test]
async fn adopted_flow_is_ended_by_the_admin_port() {
    let stage = Stage::new("at_stop = \"finish\"\n");
    let mut first = stage.agent().await;
    let (kept, cut) = (stage.begin().await, stage.begin().await);
    first.process.kill().unwrap();
    let second = stage.agent().await;
    let mut admin = Client::connect(second.admin).await.unwrap();
    let list: Vec<serde_json::Value> = admin.request(&Request::get("/flows")).await.unwrap().json().unwrap();
    assert!(list.len() == 2 && list.iter().all(|flow| flow["adopted"] == true), "{list:?}");
    let path = format!("/flows/{}", cut.client.local_addr().unwrap());
    let mut admin = Client::connect(second.admin).await.unwrap();
    assert_eq!(admin.request(&Request::new("DELETE", &path)).await.unwrap().text(), "{\"ended\":1}\n");
    ended(&second, "deleted", 1).await;
    cut.expect_reset().await;
    eventually(SOON, || stage.between.server.aborted() == 1).await;
    kept.finish().await;
    ended(&second, "ok", 1).await;
}

#[tokio::test]
async fn adopted_flow_without_a_route_is_reset() {
    let stage = Stage::new("at_stop = \"finish\"\n");
    let mut first = stage.agent().await;
    let stream = stage.begin().await;
    first.process.kill().unwrap();
    let second = stage.agent().await;
    counted(&second, "penstock_adopted_flows", &[], 1).await;
    stage.between.cut_off_the_server().unwrap();
    ended(&second, "unrouted", 1).await;
    stream.expect_reset().await;
}

#[tokio::test]
async fn stopped_agent_leaves_its_streams_until_they_are_detached() {
    let stage = Stage::new("at_stop = \"leave\"\n[timeouts]\ndrain = \"60s\"\n");
    let mut agent = stage.agent().await;
    let kept = stage.begin().await;
    let mut cut = stage.begin().await;
    agent.process.terminate().unwrap();
    assert!(agent.process.ended(Duration::from_secs(20)).await.unwrap().success(), "it waits for its flows");
    let left = agent.process.output().iter().filter(|line| line.contains("\"reason\":\"left\"")).count();
    assert_eq!((left, agents(&stage.bpffs).len()), (2, 1));
    kept.finish().await;

    let done = stage.penstock("detach", &agent);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success() && said.contains("flows ended: 1, agents' folders removed: 1"), "{said}");
    let read = cut.client.read_body(Pace::Fast, |bytes| Ok(cut.checker.feed(bytes)?)).await;
    assert!(read.is_err() || read.is_ok_and(|read| read.end == BodyEnd::Reset), "the body looks complete");
    eventually(SOON, || stage.between.server.connections_open() == 0).await;
    assert!(!stage.bpffs.path().join("penstock").exists());
}
