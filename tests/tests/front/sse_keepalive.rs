//! Comments in event streams while nothing comes.

use std::time::Duration;

use penstock_agent::config::{Config, SteeringMode};
use penstock_tests::{
    BodyEnd, Plan, Request,
    agent::{TestAgent, builtin_pool},
    client::Pace,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::sleep,
};

use crate::scene::{Asker, Back, Front, Scene, first};

const EVERY: Duration = Duration::from_millis(100);
/// Long enough for some comments.
const SILENCE: Duration = Duration::from_millis(650);

/// An endpoint that answers each request with this head, and with the pieces, and is silent before each of them and before the end.
async fn silent(head: &'static str, pieces: &'static [&'static str]) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = client.read(&mut [0; 65536]).await;
                let _ = client.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n").as_bytes()).await;
                for piece in pieces {
                    sleep(SILENCE).await;
                    let _ = client.write_all(piece.as_bytes()).await;
                }
                sleep(SILENCE).await;
            });
        }
    });
    address
}

fn agent(address: std::net::SocketAddr, mode: SteeringMode, adjust: impl FnOnce(&mut Config)) -> TestAgent {
    TestAgent::start(builtin_pool(&[address]), mode, |config| {
        config.pools[0].sse_keepalive = Some(EVERY);
        adjust(config);
    })
}

async fn asker(agent: &TestAgent, front: Front) -> Asker {
    match front {
        Front::Http2 => Asker::Http2(penstock_tests::Http2Client::connect(agent.addr).await.unwrap(), None),
        _ => Asker::Http1(penstock_tests::Client::connect(agent.addr).await.unwrap()),
    }
}

async fn body(agent: &TestAgent, front: Front) -> (String, BodyEnd) {
    let mut client = asker(agent, front).await;
    client.send(&Request::get("/")).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let mut body = Vec::new();
    let read = client
        .read_body(|bytes| {
            body.extend_from_slice(bytes);
            Ok(())
        })
        .await
        .unwrap();
    (String::from_utf8(body).unwrap(), read.end)
}

const EVENTS: &str = "content-type: text/event-stream\r\n";

/// At the beginning it has no meaning to the client; after a comment it would be a part of the first field's name.
#[tokio::test]
async fn byte_order_mark_does_not_follow_a_comment() {
    let address = silent(EVENTS, &["\u{feff}data: a\n\n", "data: \u{feff}b\n\n"]).await;
    for front in [Front::Http1, Front::Http2] {
        let agent = agent(address, SteeringMode::Auto, |_| {});
        let (body, _) = body(&agent, front).await;
        assert!(body.starts_with(":\n\n"), "{body:?}");
        assert_eq!(body.replace(":\n\n", ""), "data: a\n\ndata: \u{feff}b\n\n", "{front:?}");
    }
}

#[tokio::test]
async fn comments_come_only_between_events() {
    // Nothing is said in the middle of the second event, which comes in two pieces.
    let address = silent(EVENTS, &["data: a\n\n", "data: ", "b\n\n"]).await;
    for front in [Front::Http1, Front::Http2] {
        let agent = agent(address, SteeringMode::Auto, |_| {});
        let (body, end) = body(&agent, front).await;
        assert_eq!(
            (body.replace(":\n\n", ""), end),
            ("data: a\n\ndata: b\n\n".to_owned(), BodyEnd::Complete),
            "{front:?}"
        );
        let (before, rest) = body.split_once("data: a\n\n").unwrap();
        let (between, after) = rest.split_once("data: b\n\n").unwrap();
        for comments in [before, between, after] {
            assert!(comments.len() >= 2 * ":\n\n".len(), "{front:?}: {body:?}");
        }
        // Not counted as parts of the response.
        assert_eq!(agent.count("penstock_body_bytes_total", &[]), 18);
        let reason = if front == Front::Http1 { "sse_keepalive" } else { "http2" };
        assert_eq!(agent.count("penstock_flows_total", &[&format!("reason=\"{reason}\"")]), 1);
    }
}

#[tokio::test]
async fn other_bodies_get_no_comments() {
    let rows = [
        "content-type: text/event-stream\r\ncontent-length: 9\r\n",
        "content-type: text/event-stream\r\ncontent-encoding: gzip\r\n",
        "content-type: application/json\r\n",
    ];
    for head in rows {
        let agent = agent(silent(head, &["data: a\n\n"]).await, SteeringMode::Off, |_| {});
        assert_eq!(body(&agent, Front::Http1).await, ("data: a\n\n".to_owned(), BodyEnd::Complete), "{head}");
    }
    let off =
        agent(silent(EVENTS, &["data: a\n\n"]).await, SteeringMode::Off, |config| config.pools[0].sse_keepalive = None);
    assert_eq!(body(&off, Front::Http1).await.0, "data: a\n\n");
}

/// A comment is not a sign of life of the endpoint.
#[tokio::test]
async fn comments_do_not_extend_the_idle_timeout() {
    let address = silent(EVENTS, &["data: a\n\n", "data: b\n\n"]).await;
    let agent = agent(address, SteeringMode::Off, |config| config.timeouts.idle = Some(Duration::from_millis(400)));
    let (body, end) = body(&agent, Front::Http1).await;
    assert!(!body.contains("data") && body.contains(':'), "{body:?}");
    assert_ne!(end, BodyEnd::Complete);
}

/// Chunks and trailers stay what they are for the endpoint's bytes.
#[tokio::test]
async fn long_streams_arrive_whole() {
    let scene =
        Scene::with(Front::Http1, Back::Http1, first, |config| config.pools[0].sse_keepalive = Some(EVERY)).await;
    let headers = vec![("content-type".to_owned(), "text/event-stream".to_owned())];
    let framing = penstock_tests::model_server::Framing::Chunked;
    let trailers = vec![("x-checksum".to_owned(), "abc".to_owned())];
    let plan = Plan { size: 3 << 20, framing, headers, trailers: trailers.clone(), ..Plan::default() };
    let Asker::Http1(mut client) = scene.client().await else { unreachable!("HTTP/1.1") };
    for _ in 0..2 {
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut checker = plan.checker();
        let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
        assert_eq!((read.end, read.len, &read.trailers), (BodyEnd::Complete, plan.size, &trailers));
    }
}
