//! Slow, silent and departed clients and endpoints: every request timeout and its result. (`broken` tests endpoints that fall
//! silent during a response, `picking::patience` tests silent pickers.)

use std::time::{Duration, Instant};

use penstock_agent::config::{Config, SteeringMode};
use penstock_tests::{
    BodyEnd, Deaf, ModelServer, Plan,
    agent::{TestAgent, builtin_pool},
    client::Client,
    eventually,
    model_server::{Fault, FaultKind, HeadWrites, Options},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::setting::{Setting, closed, echo, error, post};

const SHORT: Duration = Duration::from_millis(300);
const SOON: Duration = Duration::from_secs(10);

/// The bystanders must outlive every timeout in these tests.
async fn setting() -> Setting {
    Setting::start(|config| {
        config.timeouts.head = Some(SHORT);
        config.timeouts.body = Some(SHORT);
    })
    .await
}

/// Waits for the 408, which must not arrive before the timeout.
async fn times_out(client: &mut Client, since: Instant, code: &str) {
    let response = client.response().await.unwrap();
    assert_eq!((response.status(), error(&response).0.as_str()), (408, code));
    assert_eq!(response.header("connection"), Some("close"));
    assert!(since.elapsed() >= SHORT && since.elapsed() < SOON, "{:?}", since.elapsed());
    closed(client).await;
}

#[tokio::test]
async fn slow_heads_and_bodies_return_408() {
    let mut setting = setting().await;
    let before = setting.reached();
    let body = post("content-length: 10\r\n", "hello");
    let chunk = post("transfer-encoding: chunked\r\n", "5\r\nhel");
    let rows: [(&[u8], &str); 5] = [
        (b"G", "head_timeout"),
        (b"GET / HTTP/1.1\r\nhost: x\r\n", "head_timeout"),
        (&body, "body_timeout"),
        (&chunk, "body_timeout"),
        (b"\r\n\r\nGET /", "head_timeout"),
    ];
    for (wire, code) in rows {
        let mut client = setting.client().await;
        let begin = Instant::now();
        client.send_raw(wire).await.unwrap();
        times_out(&mut client, begin, code).await;
    }
    // Trickling bytes do not extend the timeout: the response arrives while they are sent.
    for (begun, code) in [(b"GET /".to_vec(), "head_timeout"), (post("content-length: 9999\r\n", ""), "body_timeout")] {
        let (mut reader, mut writer) = TcpStream::connect(setting.agent.addr).await.unwrap().into_split();
        writer.write_all(&begun).await.unwrap();
        let trickle = async {
            while writer.write_all(b"x").await.is_ok() {
                sleep(Duration::from_millis(20)).await;
            }
            std::future::pending::<()>().await;
        };
        let answer = async {
            let mut answer = Vec::new();
            while !String::from_utf8_lossy(&answer).contains(code) {
                assert_ne!(reader.read_buf(&mut answer).await.unwrap(), 0);
            }
            assert!(answer.starts_with(b"HTTP/1.1 408 "));
        };
        tokio::select! {
            answered = timeout(SOON, answer) => answered.expect(code),
            () = trickle => {}
        }
    }
    assert_eq!(setting.reached(), before);
    setting.unharmed().await;
}

#[tokio::test]
async fn idle_connections_are_closed_without_response() {
    let setting = Setting::start(|config| {
        config.timeouts.head = Some(SHORT);
        config.timeouts.keep_alive = Some(SHORT);
    });
    let setting = setting.await;
    let begin = Instant::now();
    let mut silent = setting.client().await;
    closed(&mut silent).await;
    assert!(begin.elapsed() >= SHORT);
    assert!(setting.agent.count("penstock_client_idle_closes_total", &[]) >= 1);
    let mut client = setting.client().await;
    for _ in 0..2 {
        assert_eq!(client.request(&echo()).await.unwrap().status(), 200);
    }
    closed(&mut client).await;
    // An empty line after a body does not start a request.
    let (response, mut client) = setting.answer(&post("content-length: 5\r\n", "hello\r\n")).await;
    assert_eq!(response.status(), 200);
    closed(&mut client).await;
}

/// D10: waits until a reference client times out to know how long the others have waited.
#[tokio::test]
async fn disabled_timeouts_never_expire() {
    let setting = Setting::start(|config| {
        (config.timeouts.head, config.timeouts.keep_alive) = (None, None);
        config.timeouts.body = Some(SHORT);
    })
    .await;
    let (mut silent, mut slow, mut clock) = (setting.client().await, setting.client().await, setting.client().await);
    slow.send_raw(b"GET /test/echo HTTP/1.1\r\n").await.unwrap();
    let begin = Instant::now();
    clock.send_raw(&post("content-length: 10\r\n", "hello")).await.unwrap();
    times_out(&mut clock, begin, "body_timeout").await;
    slow.send_raw(b"host: x\r\n\r\n").await.unwrap();
    assert_eq!(slow.response().await.unwrap().status(), 200);
    assert_eq!(silent.request(&echo()).await.unwrap().status(), 200);
    assert_eq!(setting.agent.count("penstock_client_idle_closes_total", &[]), 0);

    let setting = Setting::start(|config| {
        (config.timeouts.first_byte, config.timeouts.idle, config.timeouts.body) = (None, None, None);
        config.timeouts.head = Some(SHORT);
    })
    .await;
    let (mut slow, mut clock) = (setting.client().await, setting.client().await);
    slow.send_raw(&post("content-length: 10\r\n", "hello")).await.unwrap();
    let begin = Instant::now();
    clock.send_raw(b"GET /").await.unwrap();
    times_out(&mut clock, begin, "head_timeout").await;
    slow.send_raw(b"hello").await.unwrap();
    assert_eq!(slow.response().await.unwrap().status(), 200);
    let head = HeadWrites { split_at: Some(0), pause_us: 400_000, ..HeadWrites::default() };
    let fault = Some(Fault { after: 1000, kind: FaultKind::StallMs(400) });
    let response = slow.request(&Plan { size: 3000, head, fault, ..Plan::default() }.request()).await.unwrap();
    assert_eq!((response.status(), response.read.end, response.read.len), (200, BodyEnd::Complete, 3000));
}

async fn before(endpoint: std::net::SocketAddr, adjust: impl FnOnce(&mut Config)) -> (TestAgent, Client) {
    let agent = TestAgent::start(builtin_pool(&[endpoint]), SteeringMode::Off, adjust);
    let client = Client::connect(agent.addr).await.unwrap();
    (agent, client)
}

/// D10.
#[tokio::test]
async fn unreachable_endpoint_returns_504() {
    let deaf = Deaf::new().unwrap();
    let (agent, mut client) = before(deaf.addr, |config| config.timeouts.connect = Some(SHORT)).await;
    for _ in 0..2 {
        let begin = Instant::now();
        let response = client.request(&echo()).await.unwrap();
        assert_eq!((response.status(), error(&response).0.as_str()), (504, "connect_timeout"));
        assert!(begin.elapsed() >= SHORT && begin.elapsed() < SOON);
    }
    let reasons = ["reason=\"connect_timeout\"", "status=\"504\""];
    eventually(SOON, || agent.count("penstock_requests_total", &reasons) == 2).await;

    // With the connect timeout off, the request timeout ends it.
    let (_agent, mut client) = before(deaf.addr, |config| {
        (config.timeouts.connect, config.timeouts.request) = (None, Some(SHORT));
    })
    .await;
    let response = client.request(&echo()).await.unwrap();
    assert_eq!((response.status(), error(&response).0.as_str()), (504, "request_timeout"));
}

/// D10: the total timeout in each phase before the response.
#[tokio::test]
async fn request_over_total_timeout_is_ended() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let (agent, mut client) = before(server.addr, |config| {
        (config.timeouts.head, config.timeouts.body) = (None, None);
        config.timeouts.request = Some(SHORT);
    })
    .await;
    // The request head counts.
    let mut slow = Client::connect(agent.addr).await.unwrap();
    let begin = Instant::now();
    slow.send_raw(b"GET /test/echo HTTP/1.1\r\n").await.unwrap();
    times_out(&mut slow, begin, "head_timeout").await;

    // The request body counts: the rest of it is missing, so the connection closes.
    let mut slow = Client::connect(agent.addr).await.unwrap();
    let begin = Instant::now();
    slow.send_raw(&post("content-length: 10\r\n", "hello")).await.unwrap();
    let response = slow.response().await.unwrap();
    assert_eq!((response.status(), error(&response).0.as_str()), (504, "request_timeout"));
    assert_eq!(response.header("connection"), Some("close"));
    assert!(begin.elapsed() >= SHORT && begin.elapsed() < SOON);
    closed(&mut slow).await;
    assert_eq!(server.requests(), 0);

    // Waiting for the endpoint counts: the endpoint request is aborted and the client connection stays usable.
    let head = HeadWrites { split_at: Some(0), pause_us: 60_000_000, ..HeadWrites::default() };
    for turn in 1..=2 {
        let response = client.request(&Plan { head, ..Plan::default() }.request()).await.unwrap();
        assert_eq!((response.status(), error(&response).0.as_str()), (504, "request_timeout"));
        assert_eq!(response.header("connection"), None);
        eventually(SOON, || server.aborted() == turn && server.connections_open() == 0).await;
    }
    let reasons = ["reason=\"request_timeout\"", "status=\"504\""];
    eventually(SOON, || agent.count("penstock_requests_total", &reasons) == 3).await;

    // Each request of a connection has its own total timeout.
    let begin = Instant::now();
    while begin.elapsed() < 2 * SHORT {
        assert_eq!(client.request(&echo()).await.unwrap().status(), 200);
    }
}

/// A half-closed client cannot be told from one that has left, so its request ends (`ClientSocket::gone`). The cost: clients
/// that half-close and wait get no response.
#[tokio::test]
async fn half_closed_client_ends_its_request() {
    let mut setting = setting().await;
    let head = HeadWrites { split_at: Some(0), pause_us: 60_000_000, ..HeadWrites::default() };
    let never = Plan { head, ..Plan::default() };
    let (requests, open) = (setting.server.requests(), setting.server.connections_open());
    let mut client = setting.client().await;
    client.send(&never.request()).await.unwrap();
    eventually(SOON, || setting.server.requests() == requests + 1).await;
    client.finish().await.unwrap();
    closed(&mut client).await;
    eventually(SOON, || setting.server.aborted() == 1).await;
    // The endpoint connection is closed, not kept.
    eventually(SOON, || setting.server.connections_open() <= open).await;
    eventually(SOON, || setting.agent.metric("penstock_client_connections", &[]) <= 2.0).await;
    setting.unharmed().await;
}
