//! HTTP/2 connections of clients that send much at once or last long: what each request may do, many may do.

use penstock_tests::{
    Http2Client, Plan, Request,
    http2_frames::{END_STREAM, Frame, kind},
};

use crate::http2_limits::{CANCEL, ENHANCE_YOUR_CALM, Scene, answer, get};

fn wire(frames: impl IntoIterator<Item = Frame>) -> Vec<u8> {
    frames.into_iter().flat_map(|frame| frame.wire()).collect()
}

fn post(stream: u32) -> Frame {
    let fields = [(":method", "POST"), (":scheme", "http"), (":path", "/test/echo"), (":authority", "x")];
    Frame::headers(stream, false, &fields)
}

/// A request that h2 resets.
fn malformed(stream: u32) -> Frame {
    let fields =
        [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x"), ("connection", "close")];
    Frame::headers(stream, true, &fields)
}

fn small(stream: u32) -> Frame {
    get(stream, "/test/echo", Some(&Plan { size: 100, ..Plan::default() }))
}

/// Requests that are cancelled at once, all in one write.
#[tokio::test]
async fn burst_of_cancelled_requests_is_within_budget() {
    let cancelled = |count| wire((0..count).flat_map(|n| [small(2 * n + 1), Frame::reset(2 * n + 1, CANCEL)]));
    let scene = Scene::patient(|_| {}).await;
    let mut client = scene.client(65_535).await;
    client.send_raw(&cancelled(900)).await.unwrap();
    client.send(&small(1801)).await.unwrap();
    assert_eq!(answer(&mut client, 1801, false).await, (100, None));

    let scene = Scene::patient(|config| config.listen.http2_resets = 20).await;
    let mut client = scene.client(65_535).await;
    client.send_raw(&cancelled(60)).await.unwrap();
    let going = client.find(|frame| frame.kind == kind::GOAWAY).await.unwrap();
    assert_eq!(going.and_then(|frame| frame.error()), Some(ENHANCE_YOUR_CALM));
    assert_eq!(scene.agent.count("penstock_http2_connections_ended_total", &["reason=\"resets\""]), 1);
}

/// They end their streams alone, however many there are; only their rate is limited.
#[tokio::test]
async fn malformed_requests_are_limited_by_refilling_budget() {
    let scene = Scene::patient(|config| config.listen.http2_resets = 1_000_000).await;
    let mut client = scene.client(65_535).await;
    client.send_raw(&wire((0..1500).map(|n| malformed(2 * n + 1)))).await.unwrap();
    client.send(&small(3001)).await.unwrap();
    assert_eq!(answer(&mut client, 3001, false).await, (100, None));

    let scene = Scene::patient(|config| config.listen.http2_resets = 20).await;
    for (count, is_over) in [(20, false), (60, true)] {
        let mut client = scene.client(65_535).await;
        client.send_raw(&wire((0..count).map(|n| malformed(2 * n + 1)))).await.unwrap();
        client.send(&small(2 * count + 1)).await.unwrap();
        let end = client.find(|frame| frame.kind == kind::GOAWAY || frame.stream == 2 * count + 1).await.unwrap();
        assert_eq!(end.and_then(|frame| frame.error()), is_over.then_some(ENHANCE_YOUR_CALM), "{count}");
    }
    assert_eq!(scene.agent.count("penstock_http2_connections_ended_total", &["reason=\"resets\""]), 1);
}

/// The agent answers each frame on a stream that is over, so a client that reads nothing must not go on for ever.
#[tokio::test]
async fn frames_on_streams_that_are_over_are_limited() {
    let scene = Scene::patient(|_| {}).await;
    let mut client = scene.client(65_535).await;
    let last = 300_001;
    client.send(&small(last)).await.unwrap();
    let late = (0..70_000).map(|n| Frame::new(kind::DATA, END_STREAM, 2 * n + 1, *b""));
    // The agent closes before it has read all.
    let _ = client.send_raw(&wire(late)).await;
    let end = client.find(|frame| frame.kind == kind::GOAWAY).await;
    assert!(
        end.as_ref().is_ok_and(|going| going.as_ref().is_some_and(|going| going.error() == Some(ENHANCE_YOUR_CALM))),
        "{end:?}"
    );
}

/// Within windows, the size of frames is the client's choice.
#[tokio::test]
async fn uploads_in_small_frames_arrive() {
    let scene = Scene::patient(|_| {}).await;
    let mut client = Http2Client::connect(scene.agent.addr).await.unwrap();
    let body = vec![b'x'; 400_000];
    for size in [20, 1, 200] {
        let body = body[..20_000 * size.min(20)].to_vec();
        let response = client.request(&Request::new("POST", "/test/echo").chunked(body.clone(), size)).await.unwrap();
        assert_eq!((response.status(), response.echoed().body_length), (200, body.len() as u64), "{size}");
    }
    // At once, and on several streams.
    let mut client = scene.client(65_535).await;
    for stream in [1, 3, 5, 7] {
        let mut frames = post(stream).wire();
        frames.extend(Frame::new(kind::DATA, 0, stream, *b"x").wire().repeat(15_000));
        frames.extend(Frame::new(kind::DATA, END_STREAM, stream, *b"y").wire());
        client.send_raw(&frames).await.unwrap();
    }
    for _ in 0..4 {
        let ended = client.find(|frame| frame.kind == kind::DATA && frame.flags & END_STREAM != 0).await.unwrap();
        assert!(ended.is_some(), "the connection ended");
    }
}

/// More than h2 allows in the life of a connection. [`Scene`]'s budget allows a thousand at once.
#[tokio::test]
async fn empty_frames_within_uploads_are_ignored() {
    let scene = Scene::patient(|_| {}).await;
    let mut client = scene.client(65_535).await;
    for stream in [1, 3] {
        let empty = |count| Frame::new(kind::DATA, 0, stream, []).wire().repeat(count);
        let mut frames = post(stream).wire();
        frames.extend(empty(300));
        for _ in 0..100 {
            frames.extend(Frame::new(kind::DATA, 0, stream, *b"xyz").wire());
            frames.extend(empty(3));
        }
        frames.extend(Frame::new(kind::DATA, END_STREAM, stream, []).wire());
        client.send_raw(&frames).await.unwrap();
        let head = client.find(|frame| frame.stream == stream || frame.kind == kind::GOAWAY).await.unwrap();
        assert_eq!(head.and_then(|frame| frame.status()), Some(200));
        assert_eq!(scene.server.seen().last().map(|echo| echo.body_length), Some(300));
    }
}
