//! The limit on connections, and exhausted file descriptors.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use penstock_agent::config::{ListenTls, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Plan, Request,
    agent::{TestAgent, builtin_pool},
    agent_process::AgentProcess,
    client::{ConnectionEnd, Piece},
    eventually,
    http2_frames::{END_STREAM, Frame, Http2Frames, kind},
    model_server::{Fault, FaultKind, Options},
    tls::Certificate,
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use crate::{ANY_PORT, MODELS, SOON};

const LIMIT: usize = 4;

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

fn limited(server: &ModelServer) -> TestAgent {
    TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |config| {
        config.listen.max_connections = LIMIT;
    })
}

/// Opens a connection in the middle of a response.
async fn busy(agent: &TestAgent) -> Client {
    let plan = Plan { fault: Some(Fault { after: 1000, kind: FaultKind::Stall }), size: 1 << 20, ..Plan::default() };
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    client
}

async fn verbose(agent: &TestAgent) -> (u16, String) {
    let mut admin = Client::connect(agent.agent.admin_address()).await.unwrap();
    let response = admin.request(&Request::get("/readyz?verbose")).await.unwrap();
    (response.status(), response.text())
}

#[tokio::test]
async fn connection_over_limit_gets_503_at_once() {
    let server = server().await;
    let agent = limited(&server);
    let mut held = Vec::new();
    for _ in 0..LIMIT {
        held.push(busy(&agent).await);
    }
    for turn in 1..=6 {
        let mut client = Client::connect(agent.addr).await.unwrap();
        let refused = tokio::time::timeout(SOON, client.request(&Request::get(MODELS))).await.unwrap().unwrap();
        assert_eq!((refused.status(), refused.error_code().as_str()), (503, "too_many_connections"));
        assert_eq!((refused.header("connection"), refused.header("retry-after")), (Some("close"), Some("1")));
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
        let count = |name| agent.count(name, &[]);
        assert_eq!(count("penstock_client_connections_refused_total"), turn);
        assert_eq!(agent.count("penstock_requests_total", &[r#"reason="too_many_connections""#]), turn);
    }
    let mut http2 = Http2Frames::connect(agent.addr).await.unwrap();
    let told = http2.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().unwrap();
    assert_eq!(told.error(), Some(0));
    // Retrying on the next node would only fill it sooner.
    let (status, lines) = verbose(&agent).await;
    assert!(status == 200 && lines.contains("connections: 4 of 4, full"), "{status} {lines}");
    assert_eq!(agent.count("penstock_client_connections_limit", &[]), LIMIT as u64);

    held.pop();
    eventually(SOON, || agent.count("penstock_client_connections", &[]) < LIMIT as u64).await;
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::get(MODELS)).await.unwrap().status(), 200);
}

/// Five hundred clients arrive at once at a full agent: each is answered or, beyond a rate, closed; none waits, and those that are
/// served notice nothing.
#[tokio::test]
async fn burst_over_limit_is_refused_and_harms_no_connection() {
    const BURST: usize = 500;
    let server = server().await;
    let agent = limited(&server);
    let mut held = Vec::new();
    for _ in 1..LIMIT {
        held.push(busy(&agent).await);
    }
    // More than the buffers in between hold, so that its connection does not become idle.
    let whole = Plan { size: 32 << 20, ..Plan::default() };
    let mut served = Client::connect(agent.addr).await.unwrap();
    served.send(&whole.request()).await.unwrap();
    assert_eq!(served.head().await.unwrap().status, 200);
    let clients: Vec<_> = (0..BURST)
        .map(|_| {
            let address = agent.addr;
            tokio::spawn(async move {
                let mut client = Client::connect(address).await.unwrap();
                let Ok(refused) = client.request(&Request::get(MODELS)).await else { return false };
                assert_eq!((refused.status(), refused.error_code().as_str()), (503, "too_many_connections"));
                assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
                true
            })
        })
        .collect();
    let mut answered = 0;
    for client in clients {
        answered +=
            usize::from(tokio::time::timeout(SOON, client).await.expect("neither an answer nor a close").unwrap());
    }
    println!("{answered} of {BURST} answered");
    assert!(answered > 0);
    assert_eq!(agent.count("penstock_client_connections_refused_total", &[]), BURST as u64);
    assert_eq!(agent.count("penstock_client_connections", &[]), LIMIT as u64);
    let mut bytes = 0;
    while bytes < whole.size {
        match served.piece(usize::MAX).await.unwrap() {
            Piece::Data(data) => bytes += data.len() as u64,
            end => panic!("{end:?} after {bytes} bytes"),
        }
    }
}

#[tokio::test]
async fn tls_connection_over_limit_is_closed() {
    let server = server().await;
    let (certificate, folder) = (Certificate::new("agent").unwrap(), tempfile::tempdir().unwrap());
    let (cert_file, key_file) = certificate.write(folder.path()).unwrap();
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |config| {
        config.listen.max_connections = 1;
        config.listen.tls = Some(ListenTls { address: ANY_PORT, cert_file, key_file, ..ListenTls::default() });
    });
    let held = busy(&agent).await;
    let address = agent.agent.tls_address().unwrap();
    let refused = tokio::time::timeout(SOON, certificate.connect(address, &["http/1.1"])).await.expect("timed out");
    assert!(refused.is_err(), "the connection over the limit was accepted");
    drop(held);
    eventually(SOON, || agent.count("penstock_client_connections", &[]) == 0).await;
    certificate.connect(address, &["http/1.1"]).await.unwrap();
}

#[tokio::test]
async fn longest_idle_connection_makes_room() {
    let server = server().await;
    let agent = limited(&server);
    let mut running = busy(&agent).await;
    let mut idle = Vec::new();
    for _ in 1..LIMIT {
        let mut client = Client::connect(agent.addr).await.unwrap();
        assert_eq!(client.request(&Request::get(MODELS)).await.unwrap().status(), 200);
        idle.push(client);
    }
    // Each new connection stays open, so that every idle one is closed, on whichever worker it is.
    let mut later = Vec::new();
    for _ in 1..LIMIT {
        later.push(busy(&agent).await);
    }
    for client in &mut idle {
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    }
    assert_eq!(agent.count("penstock_client_connections_shed_total", &[]), LIMIT as u64 - 1);
    assert_eq!(agent.count("penstock_client_connections_refused_total", &[]), 0);
    assert!(matches!(running.piece(1).await.unwrap(), Piece::Data(_)), "a connection with a request was closed");
}

/// An HTTP/2 connection with a response to its first request, complete if `whole`.
async fn http2(agent: &TestAgent, whole: bool) -> Http2Frames {
    let fault = (!whole).then_some(Fault { after: 1000, kind: FaultKind::Stall });
    let plan = Plan { fault, size: 2000, ..Plan::default() };
    let header = plan.header();
    let mut client = Http2Frames::connect(agent.addr).await.unwrap();
    let fields =
        [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x"), ("x-test-plan", &header)];
    client.send(&Frame::headers(1, true, &fields)).await.unwrap();
    let wanted = |frame: &Frame| frame.kind == kind::DATA && (!whole || frame.flags & END_STREAM != 0);
    assert!(client.find(wanted).await.unwrap().is_some());
    client
}

#[tokio::test]
async fn idle_http2_connection_makes_room_but_active_one_does_not() {
    let server = server().await;
    let agent = limited(&server);
    let mut held = Vec::new();
    for _ in 2..LIMIT {
        held.push(busy(&agent).await);
    }
    let mut running = http2(&agent, false).await;
    let mut idle = http2(&agent, true).await;
    eventually(SOON, || agent.metric("penstock_active_requests", &[]) == LIMIT as f64 - 1.0).await;
    let going = async {
        let last = idle.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().expect("no GOAWAY");
        assert_eq!(last.error(), Some(0));
        assert!(idle.find(|_| false).await.unwrap().is_none());
    };
    let (newcomer, ()) = tokio::join!(busy(&agent), going);
    held.push(newcomer);
    assert_eq!(agent.count("penstock_client_connections_shed_total", &[]), 1);
    assert_eq!(agent.count("penstock_client_connections_refused_total", &[]), 0);

    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::get(MODELS)).await.unwrap().error_code(), "too_many_connections");
    running.send(&Frame::new(kind::PING, 0, 0, *b"are you?")).await.unwrap();
    let next = running.find(|frame| frame.kind == kind::PING || frame.kind == kind::GOAWAY).await.unwrap();
    assert_eq!(next.map(|frame| frame.kind), Some(kind::PING));
    assert_eq!(agent.count("penstock_client_connections_shed_total", &[]), 1);
}

/// Idle connections take every descriptor; each new client gets that of an idle one.
#[tokio::test]
async fn idle_connections_make_room_when_descriptors_run_out() {
    let server = server().await;
    let through = ["prlimit", "--nofile=110:110"];
    let agent = AgentProcess::start_through(&through, ANY_PORT, server.addr, "off", "").await.unwrap();
    let mut held = Vec::new();
    for number in 0..120 {
        let mut client = Client::connect(agent.addr).await.unwrap();
        let begin = Instant::now();
        // The agent's own answer needs no connection to the endpoint.
        let wrong = Request::get("/").header("content-length", "x");
        let response = tokio::time::timeout(SOON, client.request(&wrong)).await.expect("no answer");
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(3), "client {number} waited {took:?}: {response:?}");
        held.push(TcpStream::connect(agent.addr).await.unwrap());
    }
}

/// Returns once a new client is served.
async fn recovered(agent: SocketAddr) {
    let begin = Instant::now();
    loop {
        let mut client = Client::connect(agent).await.unwrap();
        let response = tokio::time::timeout(Duration::from_secs(5), client.request(&Request::get(MODELS))).await;
        if matches!(response, Ok(Ok(response)) if response.status() == 200) {
            return;
        }
        assert!(begin.elapsed() < SOON, "the agent did not recover");
    }
}

/// Two hundred connections with started requests, to an agent limited to 128 descriptors.
#[tokio::test]
async fn exhausted_descriptors_refuse_clients_but_not_probes() {
    let server = server().await;
    let through = ["prlimit", "--nofile=128:128"];
    // No request times out before the test is over.
    let settings = "[timeouts]\nhead = \"10m\"\n";
    let agent = AgentProcess::start_through(&through, ANY_PORT, server.addr, "off", settings).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(agent.addr).await.unwrap();
        let _ = stream.write_all(b"GET ").await;
        held.push(stream);
    }
    let begin = Instant::now();
    while agent.metric("penstock_accept_failures_total", &["listener=\"listen\""]).await.unwrap() == 0.0 {
        assert!(begin.elapsed() < SOON, "the descriptors never ran out");
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        for _ in 0..10 {
            assert_eq!(agent.ask_admin(path).await.unwrap().0, 200);
        }
    }
    // A new client is refused, by a failed connect or by a close.
    let mut client = Client::connect(agent.addr).await.unwrap();
    match tokio::time::timeout(SOON, client.request(&Request::get(MODELS)))
        .await
        .expect("neither a response nor a close")
    {
        Ok(response) => assert_eq!(response.status(), 503),
        Err(error) => drop(error),
    }
    drop(held);
    recovered(agent.addr).await;
}

/// An agent whose clients hold every descriptor cannot connect to the endpoint: its own fault, not the endpoint's.
#[tokio::test]
async fn exhausted_descriptors_do_not_count_against_endpoints() {
    let server = server().await;
    let through = ["prlimit", "--nofile=128:128"];
    let settings = "[timeouts]\nhead = \"10m\"\n";
    let agent = AgentProcess::start_through(&through, ANY_PORT, server.addr, "off", settings).await.unwrap();
    // Connections with a started request are not idle, so none makes room for another.
    let mut waiting = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(agent.addr).await.unwrap();
        let _ = stream.write_all(b"GET /v1/models HTTP/1.1\r\n").await;
        waiting.push(stream);
    }
    let begin = Instant::now();
    while agent.metric("penstock_accept_failures_total", &["listener=\"listen\""]).await.unwrap() == 0.0 {
        assert!(begin.elapsed() < SOON, "the descriptors never ran out");
    }
    let first = waiting.remove(0);
    let mut client = Client::over(first, agent.addr);
    client.send_raw(b"host: x\r\n\r\n").await.unwrap();
    let response = tokio::time::timeout(SOON, client.response()).await.expect("no answer").unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (503, "local_fault"));
    assert_eq!(response.header("retry-after"), Some("1"));
    // An idle connection may have been closed for one that waited.
    drop((waiting, client));
    recovered(agent.addr).await;
    let count = async |name: &str, labels: &[&str]| agent.metric(name, labels).await.unwrap();
    assert!(count("penstock_local_faults_total", &["reason=\"open_files\""]).await >= 1.0);
    assert_eq!(count("penstock_ejections_total", &[]).await, 0.0);
}
