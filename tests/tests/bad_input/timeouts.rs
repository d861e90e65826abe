//! Clients that are slow, silent or gone.

use std::time::{Duration, Instant};

use penstock_tests::{Plan, client::Client, eventually, model_server::HeadWrites};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::setting::{Setting, closed, echo, error, post};

const SHORT: Duration = Duration::from_millis(300);
const SOON: Duration = Duration::from_secs(10);

/// The bystanders are kept longer than any of these.
async fn setting() -> Setting {
    Setting::start(|config| {
        config.timeouts.head = Some(SHORT);
        config.timeouts.body = Some(SHORT);
    })
    .await
}

/// Waits for the answer, which is 408 after the time and not before.
async fn times_out(client: &mut Client, since: Instant, code: &str) {
    let response = client.response().await.unwrap();
    assert_eq!((response.status(), error(&response).0.as_str()), (408, code));
    assert_eq!(response.header("connection"), Some("close"));
    assert!(since.elapsed() >= SHORT && since.elapsed() < SOON, "{:?}", since.elapsed());
    closed(client).await;
}

#[tokio::test]
async fn slow_heads_and_bodies() {
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
    // Bytes that trickle in gain no time: the answer comes while they do.
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
async fn idle_connections_are_closed_quietly() {
    let setting = Setting::start(|config| {
        config.timeouts.head = Some(SHORT);
        config.timeouts.keep_alive = Some(SHORT);
    });
    let setting = setting.await;
    let begin = Instant::now();
    let mut silent = setting.client().await;
    closed(&mut silent).await;
    assert!(begin.elapsed() >= SHORT);
    let mut client = setting.client().await;
    for _ in 0..2 {
        assert_eq!(client.request(&echo()).await.unwrap().status(), 200);
    }
    closed(&mut client).await;
    // An empty line behind a body is no request either.
    let (response, mut client) = setting.answer(&post("content-length: 5\r\n", "hello\r\n")).await;
    assert_eq!(response.status(), 200);
    closed(&mut client).await;
}

/// A client that has shut its sending side down cannot be told from one that has left, so its request is given up
/// (`ClientSocket::gone`); what it costs is clients that half-close and wait.
#[tokio::test]
async fn a_client_that_half_closes_is_taken_to_have_left() {
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
    // Its endpoint connection is closed and not kept.
    eventually(SOON, || setting.server.connections_open() <= open).await;
    eventually(SOON, || setting.agent.metric("penstock_client_connections", &[]) <= 2.0).await;
    setting.unharmed().await;
}
