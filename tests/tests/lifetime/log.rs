//! The log of an agent whose clients control what is written.

use std::time::{Duration, Instant};

use penstock_tests::{
    Client, Http2Client, ModelServer, Plan, Process, Refusing, Request,
    agent_process::AgentProcess,
    model_server::{Fault, FaultKind, Options},
};
use tokio::io::AsyncWriteExt as _;

use crate::{ANY_PORT, SOON};

async fn logging_agent(endpoint: std::net::SocketAddr, format: &str) -> AgentProcess {
    let format = format!("PENSTOCK_LOG_FORMAT={format}");
    let through = ["env", "PENSTOCK_LOG=info", &format];
    AgentProcess::start_through(&through, ANY_PORT, endpoint, "off", "").await.unwrap()
}

#[tokio::test]
async fn access_line_of_long_request_is_truncated_and_marked() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let mut agent = logging_agent(server.addr, "json").await;
    let mut client = Client::connect(agent.addr).await.unwrap();
    let path = format!("/v1/{}", "p".repeat(20_000));
    let address = client.local_addr().unwrap().to_string();
    let id = "i".repeat(9_000);
    client.request(&Request::get(&path).header("x-request-id", &id)).await.unwrap();
    let line = agent.process.line("\"path\":\"/v1/ppp", SOON).await.unwrap();
    assert!(line.len() < 4096, "{} bytes", line.len());
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["path"], format!("{}…(+{} bytes)", &path[..1024], path.len() - 1024));
    assert_eq!(line["client"], address);
    assert_eq!(line["request_id"], format!("{}…(+{} bytes)", &id[..256], id.len() - 256));

    // A method may be any token.
    let mut raw = tokio::net::TcpStream::connect(agent.addr).await.unwrap();
    let method = "M".repeat(9_000);
    raw.write_all(format!("{method} /v1/models HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
    let line = agent.process.line("\"MMMM", SOON).await.unwrap();
    assert!(line.len() < 4096 && line.contains("bytes)"), "{} bytes", line.len());
}

#[tokio::test]
async fn admin_port_changes_what_is_logged() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let mut agent = logging_agent(server.addr, "json").await;
    let ask = async |method: &str, target: &str| {
        let mut client = Client::connect(agent.admin).await.unwrap();
        let answer = client.request(&Request::new(method, target)).await.unwrap();
        (answer.status(), answer.text())
    };
    let access_lines = async |agent: &AgentProcess| {
        let mut client = Client::connect(agent.addr).await.unwrap();
        assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
        let counted = async || agent.metric("penstock_requests_total", &[]).await.unwrap();
        let begin = Instant::now();
        while counted().await < 1.0 {
            assert!(begin.elapsed() < SOON);
        }
        agent.process.output().iter().filter(|line| line.contains("/v1/models")).count()
    };
    assert_eq!(ask("GET", "/log").await, (200, "info\n".to_owned()));
    assert_eq!(ask("PUT", "/log?filter=warn%2Cpenstock_agent%3Derror").await.0, 200);
    assert_eq!(access_lines(&agent).await, 0);
    let (status, said) = ask("PUT", "/log?filter=info,penstock_agent=loud").await;
    assert!(status == 400 && said.contains("found \"info,penstock_agent=loud\""), "{status} {said}");
    assert_eq!(ask("GET", "/log").await, (200, "warn,penstock_agent=error\n".to_owned()));
    assert_eq!(ask("PUT", "/log?filter=info").await.0, 200);
    agent.process.line("the admin port has changed what is logged", SOON).await.unwrap();
    access_lines(&agent).await;
    agent.process.line("\"path\":\"/v1/models\"", SOON).await.unwrap();
}

/// Otherwise the first large body would show it.
#[tokio::test]
async fn missing_folder_for_large_bodies_is_reported_at_start() {
    let endpoint = "127.0.0.1:1".parse().unwrap();
    let through = ["env", "TMPDIR=/nonexistent"];
    let mut agent = AgentProcess::start_through(&through, ANY_PORT, endpoint, "off", "").await.unwrap();
    let line = agent.process.line("no file can be made for request bodies", SOON).await.unwrap();
    assert!(line.contains("/nonexistent"), "{line}");
    let begin = Instant::now();
    let lines = loop {
        match agent.ask_admin("/readyz?verbose").await.unwrap() {
            (200, lines) => break lines,
            (_, lines) => assert!(begin.elapsed() < SOON, "{lines}"),
        }
    };
    assert!(lines.contains("bodies of more than 1048576 bytes: failing, /nonexistent"), "{lines}");
}

/// Each of the two workers misses its connection to each of the two EPPs.
#[tokio::test]
async fn missing_connection_to_an_epp_is_logged_once_per_pool() {
    const LINE: &str = "no connection to the EPP in the start time";
    let refusing = Refusing::new().unwrap();
    let pool = |name: &str| {
        format!(
            "[[pools]]\nname = \"{name}\"\nfailure_mode = \"closed\"\nendpoints = [\"127.0.0.1:1\"]\n\
             [pools.picker]\nkind = \"epp\"\naddress = \"{}\"\nstart_wait = \"300ms\"\n",
            refusing.addr
        )
    };
    let (pools, endpoint) = (pool("one") + &pool("two"), "127.0.0.1:1".parse().unwrap());
    let mut agent = AgentProcess::start_through(&[], ANY_PORT, endpoint, "off", &pools).await.unwrap();
    // The agent is ready after each worker has waited.
    let begin = Instant::now();
    while agent.ask_admin("/readyz").await.unwrap().0 != 200 {
        assert!(begin.elapsed() < SOON, "{:#?}", agent.process.output());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    agent.process.terminate().unwrap();
    agent.process.line("stopped", SOON).await.unwrap();
    let output = agent.process.output();
    let lines: Vec<_> = output.iter().filter(|line| line.contains(LINE)).collect();
    for pool in ["one", "two"] {
        let count = lines.iter().filter(|line| line.contains(&format!("\"pool\":\"{pool}\""))).count();
        assert_eq!((count, lines.len()), (1, 2), "{lines:#?}");
    }
}

/// The time of a request counts from its first byte, also if its head is refused.
#[tokio::test]
async fn refused_head_is_timed_from_its_first_byte() {
    let settings = "[timeouts]\nhead = \"500ms\"\n";
    let through = ["env", "PENSTOCK_LOG=info", "PENSTOCK_LOG_FORMAT=json"];
    let endpoint = "127.0.0.1:1".parse().unwrap();
    let mut agent = AgentProcess::start_through(&through, ANY_PORT, endpoint, "off", settings).await.unwrap();
    let mut raw = tokio::net::TcpStream::connect(agent.addr).await.unwrap();
    let address = raw.local_addr().unwrap().to_string();
    raw.write_all(b"GET /late HTTP/1.1\r\nHo").await.unwrap();
    let line = agent.process.line("head_timeout", SOON).await.unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert!(line["took_us"].as_u64().unwrap() >= 500_000, "{line}");
    assert_eq!(line["client"], address);
}

/// Requests that a second signal ends have their lines.
#[tokio::test]
async fn requests_of_a_stopped_agent_are_logged() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let held = |after| {
        let fault = Some(Fault { after, kind: FaultKind::Stall });
        Plan { size: 100_000, fault, ..Plan::default() }.request()
    };
    for steering in ["off", "ingress", "auto"] {
        let through = ["env", "PENSTOCK_LOG=info", "PENSTOCK_LOG_FORMAT=json"];
        let mut agent = AgentProcess::start_through(&through, ANY_PORT, server.addr, steering, "").await.unwrap();
        let mut stream = Client::connect(agent.addr).await.unwrap();
        stream.send(&held(50_000)).await.unwrap();
        assert_eq!(stream.head().await.unwrap().status, 200);
        let mut http2 = Http2Client::connect(agent.addr).await.unwrap();
        let mut over_http2 = http2.send(&held(50_000)).await.unwrap();
        assert_eq!(over_http2.head().await.unwrap().status, 200);
        let mut waiting = Client::connect(agent.addr).await.unwrap();
        waiting.send(&Request::new("POST", "/waiting").header("content-length", "10")).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        agent.process.terminate().unwrap();
        agent.process.line("draining", SOON).await.unwrap();
        agent.process.terminate().unwrap();
        assert_eq!(agent.process.ended(SOON).await.unwrap().code(), Some(0));
        let output = agent.process.output();
        let lines = output.iter().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut ended: Vec<_> =
            lines.filter(|line| line["reason"] == "agent_stopped").map(|line| line["status"].as_u64()).collect();
        ended.sort_unstable();
        assert_eq!(ended, [Some(200), Some(200), Some(503)], "{steering}: {output:#?}");
    }
}

/// An unread log queues lines up to its limit and drops the rest; requests continue, and a metric counts the lost lines.
#[tokio::test]
async fn unread_log_stays_within_limit_and_blocks_no_request() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let config = format!(
        "[listen]\naddress = \"127.0.0.1:0\"\nworkers = 1\n[admin]\naddress = \"127.0.0.1:0\"\n[steering]\nmode = \"off\"\n\
         [[pools]]\nname = \"default\"\nendpoints = [\"{}\"]\n",
        server.addr
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("penstock.toml");
    std::fs::write(&file, config).unwrap();
    let mut command = std::process::Command::new(Process::binary("penstock").unwrap());
    command.args(["run", "--log-format", "json", "--log-queue-bytes", "100000", "--config"]).arg(&file);
    let (reader, writer) = std::io::pipe().unwrap();
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(writer);
    let mut child = Killed(command.spawn().unwrap());
    drop(command);
    let mut reader = std::io::BufReader::new(reader);
    let started = loop {
        let mut line = String::new();
        assert!(std::io::BufRead::read_line(&mut reader, &mut line).unwrap() > 0, "the agent ended");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        if line["admin"].is_string() {
            break line;
        }
    };
    let address = |name: &str| started[name].as_str().unwrap().parse::<std::net::SocketAddr>().unwrap();
    let mut client = Client::connect(address("address")).await.unwrap();
    let dropped = async || {
        let text =
            Client::connect(address("admin")).await.unwrap().request(&Request::get("/metrics")).await.unwrap().text();
        let line =
            text.lines().find(|line| line.starts_with("penstock_log_lines_dropped_total{reason=\"queue_full\"}"));
        line.unwrap().rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    // A pipe holds 64 KiB, and the writer's buffer as much.
    let path = format!("/v1/{}", "q".repeat(1000));
    let begin = std::time::Instant::now();
    while dropped().await == 0 {
        for _ in 0..50 {
            let answer = tokio::time::timeout(SOON, client.request(&Request::get(&path))).await.unwrap().unwrap();
            assert_eq!(answer.status(), 404);
        }
        assert!(begin.elapsed() < 3 * SOON, "no line was dropped");
    }
    assert_eq!(child.0.try_wait().unwrap(), None);
}

struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
