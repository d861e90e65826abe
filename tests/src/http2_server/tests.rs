//! The HTTP/2 client against the HTTP/2 endpoint.

use std::time::Duration;

use h2::Reason;
use http::HeaderMap;

use super::*;
use crate::client::{Piece, Request};
use crate::model_server::{Fault, FaultKind, Framing, Lengths};
use crate::stage::echo;
use crate::{BodyEnd, Http2Client, Plan, eventually};

const SOON: Duration = Duration::from_secs(30);

async fn pair() -> (Http2Server, Http2Client) {
    let server = Http2Server::start(Http2Options::default()).await.unwrap();
    let client = Http2Client::connect(server.addr).await.unwrap();
    (server, client)
}

#[tokio::test]
async fn plan_is_answered_frame_by_frame() {
    let (server, mut client) = pair().await;
    let trailers = vec![("x-a".to_owned(), "1".to_owned()), ("x-a".to_owned(), "2".to_owned())];
    let plan = Plan { size: 10_000, chunks: Lengths::Fixed(999), trailers: trailers.clone(), ..Plan::default() };
    let response = client.request(&plan.request()).await.unwrap();
    plan.checker().feed(&response.body).unwrap();
    assert_eq!((response.status(), response.read.len, response.read.chunks), (200, 10_000, 11));
    assert_eq!((response.read.end, &response.read.trailers), (BodyEnd::Complete, &trailers));
    assert_eq!(response.header("content-length"), Some("10000"));
    assert_eq!(response.served_by(), Some(server.addr));
}

#[tokio::test]
async fn request_is_recorded_unchanged() {
    let (server, mut client) = pair().await;
    let seen = client.request(&echo(vec![b'x'; 300_000])).await.unwrap().echoed();
    assert_eq!((seen.body_framing.as_str(), seen.body_length, seen.count), ("content-length", 300_000, 1));
    let chunked = Request::new("POST", "/test/echo").chunked(vec![b'y'; 10], 3);
    let head = client.head(&chunked).unwrap();
    let mut stream = client.open(head, false).await.unwrap();
    stream.data("yyyyy").await.unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-last", "1".parse().unwrap());
    stream.finish(trailers).unwrap();
    let seen = stream.response().await.unwrap().echoed();
    assert_eq!((seen.body_framing.as_str(), seen.body_length, seen.count), ("frames", 5, 2));
    assert_eq!(seen.trailers, [("x-last".to_owned(), "1".to_owned())]);
    assert_eq!((server.requests(), server.seen().len(), server.connections_accepted()), (2, 2, 1));
}

#[tokio::test]
async fn stream_ends_are_distinguished() {
    let (server, mut client) = pair().await;
    for (kind, end) in [(FaultKind::Reset, BodyEnd::Reset), (FaultKind::Close, BodyEnd::Truncated)] {
        let fault = Some(Fault { after: 500, kind });
        let plan = Plan { framing: Framing::Chunked, size: 1000, fault, ..Plan::default() };
        let mut stream = client.send(&plan.request()).await.unwrap();
        assert_eq!(stream.head().await.unwrap().status, 200);
        let read = stream.read_body(|_| Ok(())).await.unwrap();
        assert_eq!(read.end, end);
        assert_eq!(stream.reason(), (end == BodyEnd::Reset).then_some(Reason::INTERNAL_ERROR));
    }
    eventually(SOON, || server.connections_open() == 0).await;
}

#[tokio::test]
async fn client_cancel_at_any_stage_is_noticed() {
    let (server, mut client) = pair().await;
    let stall = Some(Fault { after: 500, kind: FaultKind::Stall });
    let stalled = Plan { size: 1000, fault: stall, ..Plan::default() };
    let large = Plan { size: 64 << 20, ..Plan::default() };
    let mut late = Plan::default();
    (late.head.split_at, late.head.pause_us) = (Some(0), 3_600_000_000);
    for (number, plan) in (1..).zip([stalled, large, late]) {
        let mut stream = client.send(&plan.request()).await.unwrap();
        if plan.size > 0 {
            stream.head().await.unwrap();
            assert!(matches!(stream.piece().await.unwrap(), Piece::Data(_)));
        }
        eventually(SOON, || server.requests() == number).await;
        assert_eq!(server.aborted(), number - 1);
        stream.cancel();
        eventually(SOON, || server.aborted() == number).await;
    }
    assert_eq!(server.connections_open(), 1);
}

#[tokio::test]
async fn refused_streams_and_goaway_reach_client() {
    let options = Http2Options { refuses: 1, ..Http2Options::default() };
    let server = Http2Server::start(options).await.unwrap();
    let mut client = Http2Client::connect(server.addr).await.unwrap();
    let mut stream = client.send(&echo("x")).await.unwrap();
    stream.head().await.unwrap_err();
    assert_eq!((stream.reason(), server.refused()), (Some(Reason::REFUSED_STREAM), 1));
    assert_eq!(client.request(&echo("x")).await.unwrap().status(), 200);
    server.leave();
    client.end().await.unwrap();
    eventually(SOON, || server.connections_open() == 0).await;
}
