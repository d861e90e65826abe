//! How an agent shuts down: it asks clients to leave while still serving them, then closes its ports, and resets no connection.

use std::io::{Read as _, Write as _};

use nix::sys::signal::Signal;
use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Client, Http2Client, ModelServer, Request,
    agent::{TestAgent, builtin_pool},
    agent_process::AgentProcess,
    client::ConnectionEnd,
    eventually,
    http2_frames::{Frame, Http2Frames, kind},
    model_server::Options,
};

use crate::{ANY_PORT, MODELS, SOON};

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

#[tokio::test]
async fn lame_duck_after_sigterm_serves_and_closes_connections() {
    let server = server().await;
    let mut agent = AgentProcess::start(ANY_PORT, server.addr, "off", "[timeouts]\nlame_duck = \"1h\"").await.unwrap();
    let mut kept = Client::connect(agent.addr).await.unwrap();
    let before = kept.request(&Request::get(MODELS)).await.unwrap();
    assert_eq!((before.status(), before.header("connection")), (200, None));
    let mut old = Http2Frames::connect(agent.addr).await.unwrap();
    old.send(&get(1)).await.unwrap();
    assert!(old.find(|frame| frame.status() == Some(200)).await.unwrap().is_some());

    agent.process.terminate().unwrap();
    agent.process.line("draining", SOON).await.unwrap();
    assert!(old.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().is_some());
    let (status, body) = agent.ask_admin("/readyz").await.unwrap();
    assert_eq!((status, body.as_str()), (503, "draining\n"));
    assert_eq!(agent.ask_admin("/livez").await.unwrap().0, 200);
    for mut client in [kept, Client::connect(agent.addr).await.unwrap()] {
        let response = client.request(&Request::get(MODELS)).await.unwrap();
        assert_eq!((response.status(), response.header("connection")), (200, Some("close")));
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    }
    // The agent's own errors close the connection too.
    let mut client = Client::connect(agent.addr).await.unwrap();
    let refused = client.request(&Request::new("GET", "/v1/models").header("content-length", "x")).await.unwrap();
    assert_eq!((refused.status(), refused.header("connection")), (400, Some("close")));
    // A new client gets a response before its connection closes.
    let mut http2 = Http2Client::connect(agent.addr).await.unwrap();
    assert_eq!(http2.request(&Request::get(MODELS)).await.unwrap().status(), 200);
    http2.end().await.unwrap();

    // The old client has not read the PING after its GOAWAY, so it does not acknowledge that the agent is leaving.
    let begun = std::time::Instant::now();
    while agent.metric("penstock_http2_connections_ended_total", &[r#"reason="silent""#]).await.unwrap() == 0.0 {
        assert!(begun.elapsed() < SOON, "the connection does not end");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(old.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().is_some());

    agent.process.signal(Signal::SIGINT).unwrap();
    assert_eq!(agent.process.ended(SOON).await.unwrap().code(), Some(0));
}

/// A second agent with the same configuration fails at its admin port, and must not have taken a connection by then.
#[tokio::test]
async fn failed_second_start_takes_no_connection() {
    let server = server().await;
    let agent = AgentProcess::start(ANY_PORT, server.addr, "off", "").await.unwrap();
    let text = format!(
        "[listen]\naddress = \"{}\"\n[admin]\naddress = \"{}\"\n[steering]\nmode = \"off\"\n\
         [[pools]]\nname = \"default\"\nendpoints = [\"{}\"]\n",
        agent.addr, agent.admin, server.addr
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, text).unwrap();
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (seen, addr) = (std::sync::Arc::clone(&done), agent.addr);
    let asking = tokio::spawn(async move {
        let mut asked = 0;
        while !seen.load(std::sync::atomic::Ordering::Relaxed) {
            let mut client = Client::connect(addr).await.unwrap();
            assert_eq!(client.request(&Request::get(MODELS)).await.unwrap().status(), 200);
            asked += 1;
        }
        asked
    });
    for _ in 0..10 {
        let mut command = std::process::Command::new(penstock_tests::Process::binary("penstock").unwrap());
        command.args(["run", "--config"]).arg(file.path());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("cannot start the admin server"));
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(asking.await.unwrap() > 0);
}

fn get(stream: u32) -> Frame {
    let fields = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", MODELS)];
    Frame::headers(stream, true, &fields)
}

#[tokio::test]
async fn end_of_lame_duck_closes_port_and_exits() {
    let server = server().await;
    let settings = "[timeouts]\nlame_duck = \"300ms\"";
    let mut agent = AgentProcess::start(ANY_PORT, server.addr, "off", settings).await.unwrap();
    let mut idle = Client::connect(agent.addr).await.unwrap();
    assert_eq!(idle.request(&Request::get(MODELS)).await.unwrap().status(), 200);
    agent.process.terminate().unwrap();
    assert_eq!(idle.until_end().await.unwrap(), ConnectionEnd::Fin);
    assert_eq!(agent.process.ended(SOON).await.unwrap().code(), Some(0));
    assert!(std::net::TcpStream::connect(agent.addr).is_err());
}

/// Connections not yet accepted when the drain begins.
#[tokio::test]
async fn drain_answers_connections_in_accept_queue() {
    let server = server().await;
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |_| {});
    let addr = agent.addr;
    let queued = tokio::task::spawn_blocking(move || {
        let mut queued: Vec<std::net::TcpStream> = Vec::new();
        for _ in 0..200 {
            let mut stream = std::net::TcpStream::connect(addr).unwrap();
            stream.write_all(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            queued.push(stream);
        }
        agent.agent.drain();
        (agent, queued)
    });
    let (agent, queued) = queued.await.unwrap();
    let answers = tokio::task::spawn_blocking(move || {
        for mut stream in queued {
            stream.set_read_timeout(Some(SOON)).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("the connection was reset");
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
        }
    });
    answers.await.unwrap();
    eventually(SOON, || std::net::TcpStream::connect(addr).is_err()).await;
    eventually(SOON, || agent.agent.is_done()).await;
}
