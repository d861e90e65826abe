//! What the admin port shows and does over loopback alone: `GET /config` and `POST /drain`.

use nix::sys::signal::Signal;
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader, Request,
    agent_process::AgentProcess,
    client::ConnectionEnd,
    eventually,
    model_server::{Framing, Lengths, Options},
    reader::at_least,
};
use serde_json::Value;

use crate::{ANY_PORT, MODELS, SOON};

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

async fn config(agent: &AgentProcess) -> Value {
    let (status, body) = agent.ask_admin("/config").await.unwrap();
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test]
async fn configuration_in_force_is_shown_without_secrets() {
    let server = server().await;
    let route = "[[routes]]\npool = \"default\"\n\
                 request_headers.set = [{ name = \"authorization\", value = \"Bearer hunter2\" }]\n";
    let settings = format!("{route}[limits]\nbody_bytes = 4096");
    let agent = AgentProcess::start(ANY_PORT, server.addr, "off", &settings).await.unwrap();
    let shown = config(&agent).await;
    assert_eq!((&shown["limits"]["body_bytes"], &shown["listen"]["workers"]), (&4096.into(), &2.into()));
    assert_eq!(shown["pools"][0]["endpoints"][0], server.addr.to_string());
    // Not in the file.
    assert_eq!(shown["timeouts"]["drain"], "30s");
    let set = &shown["routes"][0]["request_headers"]["set"][0];
    assert_eq!((&set["name"], &set["value"]), (&"authorization".into(), &"(hidden)".into()));
    assert!(!shown.to_string().contains("hunter2"), "{shown}");

    // The file's text says nothing before it is in force.
    agent.write_config(server.addr, &settings.replace("4096", "8192")).unwrap();
    assert_eq!(config(&agent).await["limits"]["body_bytes"], 4096);
    agent.process.signal(Signal::SIGHUP).unwrap();
    let begun = std::time::Instant::now();
    while config(&agent).await["limits"]["body_bytes"] != 8192 {
        assert!(begun.elapsed() < SOON, "{:#?}", agent.process.output());
    }
}

#[tokio::test]
async fn drain_by_the_admin_port_is_that_of_sigterm() {
    let server = server().await;
    let mut agent = AgentProcess::start(ANY_PORT, server.addr, "off", "[timeouts]\nlame_duck = \"3s\"\ndrain = \"5m\"")
        .await
        .unwrap();
    // Larger than all buffers.
    let plan = Plan { framing: Framing::Chunked, size: 64 << 20, writes: Lengths::Fixed(64 << 10), ..Plan::default() };
    let mut running = Client::connect(agent.addr).await.unwrap();
    running.send(&plan.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    assert_eq!(at_least(&mut running, &mut checker, 1000).await.unwrap(), None);

    for _ in 0..2 {
        let mut admin = Client::connect(agent.admin).await.unwrap();
        let answer = admin.request(&Request::post("/drain", "")).await.unwrap();
        assert_eq!((answer.status(), answer.text().as_str()), (202, "draining\n"));
    }
    agent.process.line("draining", SOON).await.unwrap();
    assert_eq!(agent.ask_admin("/readyz").await.unwrap(), (503, "draining\n".to_owned()));
    // The lame duck still serves, and asks clients to leave.
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&Request::get(MODELS)).await.unwrap();
    assert_eq!((response.status(), response.header("connection")), (200, Some("close")));
    assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    eventually(SOON, || std::net::TcpStream::connect(agent.addr).is_err()).await;
    // The running response ends whole, and then the agent.
    let read = Reader::Fast.take(&mut running, &mut checker).await.unwrap();
    assert_eq!((read.end, checker.offset()), (BodyEnd::Complete, plan.size));
    assert_eq!(agent.process.ended(SOON).await.unwrap().code(), Some(0), "{:#?}", agent.process.output());
}
