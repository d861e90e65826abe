//! Limits on the cost of one HTTP/2 client connection: unread streams, cancelled requests, empty frames. Clients below the
//! limits are unaffected.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use h2::client::Builder;
use penstock_agent::config::{Config, SteeringMode};
use penstock_tests::{
    BodyEnd, Http2Client, Plan, Request,
    agent::{TestAgent, builtin_pool},
    eventually,
    http2_frames::{END_STREAM, Frame, Http2Frames, PREFACE, kind},
    model_server::{HeadWrites, ModelServer, Options},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
};

use crate::SOON;

const IDLE: Duration = Duration::from_millis(400);
/// An idle timeout for tests of other limits: an upper bound for a busy machine.
const LONG: Duration = Duration::from_secs(60);
pub(crate) const CANCEL: u32 = 8;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

pub(crate) struct Scene {
    pub(crate) server: ModelServer,
    pub(crate) agent: TestAgent,
}

impl Scene {
    async fn new(adjust: impl FnOnce(&mut Config)) -> Self {
        let server = ModelServer::start(Options::default()).await.unwrap();
        let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |config| {
            config.timeouts.idle = Some(IDLE);
            adjust(config);
        });
        Self { server, agent }
    }

    /// Like [`Self::new`], with an idle timeout that no client reaches.
    pub(crate) async fn patient(adjust: impl FnOnce(&mut Config)) -> Self {
        Self::new(|config| {
            config.timeouts.idle = Some(LONG);
            adjust(config);
        })
        .await
    }

    /// A client whose windows admit this much of each response before it opens them.
    pub(crate) async fn client(&self, window: u32) -> Http2Frames {
        Http2Frames::connect_with(self.agent.addr, &Frame::initial_window(window)).await.unwrap()
    }

    fn connections(&self) -> f64 {
        self.agent.metric("penstock_client_connections", &[])
    }
}

pub(crate) fn get(stream: u32, path: &str, plan: Option<&Plan>) -> Frame {
    let plan = plan.map(Plan::header);
    let mut fields = vec![(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "x")];
    fields.extend(plan.as_deref().map(|plan| ("x-test-plan", plan)));
    Frame::headers(stream, true, &fields)
}

/// Reads the response of this stream to its end: body bytes and the reset's error, if any.
pub(crate) async fn answer(client: &mut Http2Frames, stream: u32, give_back: bool) -> (u64, Option<u32>) {
    let mut bytes = 0;
    loop {
        let frame = client.find(|frame| frame.stream == stream).await.unwrap().expect("no frame of the stream");
        match frame.kind {
            kind::RST_STREAM => return (bytes, frame.error()),
            kind::DATA => {
                bytes += frame.payload.len() as u64;
                if give_back && !frame.payload.is_empty() {
                    client.send(&Frame::window(stream, frame.payload.len() as u32)).await.unwrap();
                    client.send(&Frame::window(0, frame.payload.len() as u32)).await.unwrap();
                }
            }
            _ => {}
        }
        if frame.flags & END_STREAM != 0 && matches!(frame.kind, kind::DATA | kind::HEADERS) {
            return (bytes, None);
        }
    }
}

/// The client answers PINGs, as [`Http2Frames`] does, and opens no window, for a response and for an agent error.
#[tokio::test]
async fn client_with_closed_window_loses_stream_then_connection() {
    let scene = Scene::new(|_| {}).await;
    let plan = Plan { size: 100_000, ..Plan::default() };
    for (window, path, plan, came) in
        [(0, "/test/echo", Some(&plan), 0), (30_000, "/test/echo", Some(&plan), 30_000), (0, "/test/echo?x=1", None, 0)]
    {
        let mut client = scene.client(window).await;
        let begin = Instant::now();
        client.send(&get(1, path, plan)).await.unwrap();
        assert_eq!(answer(&mut client, 1, false).await, (came, Some(CANCEL)), "{window} {path}");
        assert!(begin.elapsed() >= IDLE);
        let last = client.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().expect("no GOAWAY");
        assert_eq!(last.error(), Some(0));
        assert!(client.next().await.unwrap().is_none());
    }
    eventually(SOON, || scene.connections() == 0.0 && scene.server.connections_open() == 0).await;
    assert_eq!(scene.agent.count("penstock_client_stalls_total", &[]), 3);
    assert_eq!(scene.agent.count("penstock_http2_connections_ended_total", &["reason=\"stalled\""]), 3);
}

#[tokio::test]
async fn errors_with_closed_window_end_connection() {
    let scene = Scene::new(|config| config.limits.headers = 16).await;
    let mut client = scene.client(0).await;
    let names: Vec<String> = (0..20).map(|n| format!("x-{n}")).collect();
    let mut fields = vec![(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")];
    fields.extend(names.iter().map(|name| (name.as_str(), "1")));
    for stream in [1, 3] {
        client.send(&Frame::headers(stream, true, &fields)).await.unwrap();
    }
    for stream in [1, 3] {
        assert_eq!(answer(&mut client, stream, false).await, (0, Some(CANCEL)));
    }
    assert!(client.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().is_some());
    eventually(SOON, || scene.connections() == 0.0).await;
}

/// One stream is read all the time, the other never.
#[tokio::test]
async fn stalled_stream_is_reset_and_others_continue() {
    let scene = Scene::new(|_| {}).await;
    let mut client = scene.client(10_000).await;
    let stalled = Plan { size: 100_000, ..Plan::default() };
    let read = Plan { size: 1 << 40, stream_id: 3, ..Plan::default() };
    client.send(&get(1, "/test/echo", Some(&stalled))).await.unwrap();
    client.send(&get(3, "/test/echo", Some(&read))).await.unwrap();
    let mut checker = read.checker();
    let mut reset_at = None;
    // As much again as had arrived when the other stream was reset.
    while reset_at.is_none_or(|at| checker.offset() < 2 * at) {
        let frame = client.next().await.unwrap().expect("the connection ended");
        match (frame.kind, frame.stream) {
            (kind::DATA, 3) => {
                checker.feed(&frame.payload).unwrap();
                client.send(&Frame::window(3, frame.payload.len() as u32)).await.unwrap();
                client.send(&Frame::window(0, frame.payload.len() as u32)).await.unwrap();
            }
            (kind::RST_STREAM, 1) => {
                assert_eq!(frame.error(), Some(CANCEL));
                reset_at = Some(checker.offset());
            }
            (kind::RST_STREAM | kind::GOAWAY, _) => panic!("{frame:?}"),
            _ => {}
        }
    }
    client.send(&Frame::reset(3, CANCEL)).await.unwrap();
    client.send(&get(5, "/test/echo", Some(&Plan { size: 5000, ..Plan::default() }))).await.unwrap();
    assert_eq!(answer(&mut client, 5, true).await, (5000, None));
}

/// A window that opens by single bytes is progress, however long the whole takes.
#[tokio::test]
async fn client_opening_window_by_bytes_is_served_completely() {
    const IDLE: Duration = Duration::from_secs(2);
    let scene = Scene::new(|config| config.timeouts.idle = Some(IDLE)).await;
    let mut client = scene.client(1).await;
    let plan = Plan { size: 12, ..Plan::default() };
    client.send(&get(1, "/test/echo", Some(&plan))).await.unwrap();
    let (begin, mut checker) = (Instant::now(), plan.checker());
    loop {
        let frame = client.find(|frame| frame.kind == kind::DATA).await.unwrap().expect("no more of the body");
        checker.feed(&frame.payload).unwrap();
        if frame.flags & END_STREAM != 0 {
            break;
        }
        tokio::time::sleep(IDLE / 4).await;
        client.send(&Frame::window(1, 1)).await.unwrap();
    }
    assert_eq!(checker.offset(), plan.size);
    assert!(begin.elapsed() > 2 * IDLE, "the test took no longer than the idle timeout");
}

/// The client's windows are open, and it reads nothing from the connection.
#[tokio::test]
async fn client_not_reading_connection_is_closed() {
    let scene = Scene::new(|_| {}).await;
    let mut client = scene.client((1 << 31) - 1).await;
    client.send(&Frame::window(0, 1 << 30)).await.unwrap();
    client.send(&get(1, "/test/echo", Some(&Plan { size: 1 << 30, ..Plan::default() }))).await.unwrap();
    eventually(SOON, || scene.server.aborted() == 1).await;
    eventually(SOON, || scene.connections() == 0.0 && scene.server.connections_open() == 0).await;
}

#[tokio::test]
async fn client_without_request_is_closed_after_keep_alive() {
    let scene = Scene::new(|config| config.timeouts.keep_alive = Some(IDLE)).await;
    let begin = Instant::now();
    let mut client = Http2Frames::connect(scene.agent.addr).await.unwrap();
    let last = client.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().expect("no GOAWAY");
    assert_eq!(last.error(), Some(0));
    assert!(begin.elapsed() >= IDLE, "{:?}", begin.elapsed());
    assert!(client.find(|_| false).await.unwrap().is_none());
    eventually(SOON, || scene.connections() == 0.0).await;
    assert_eq!(scene.agent.count("penstock_client_idle_closes_total", &[]), 1);
}

#[tokio::test]
async fn client_with_incomplete_preface_is_closed_after_head_timeout() {
    let scene = Scene::new(|config| config.timeouts.head = Some(IDLE)).await;
    let begin = Instant::now();
    // A prefix that may be a request head gets an HTTP/1.1 error; a longer one identifies HTTP/2.
    for (length, status) in [(3, "HTTP/1.1 408 "), (10, "HTTP/1.1 408 "), (PREFACE.len() - 1, "")] {
        let mut client = TcpStream::connect(scene.agent.addr).await.unwrap();
        client.write_all(&PREFACE[..length]).await.unwrap();
        let mut answer = Vec::new();
        let end = tokio::time::timeout(SOON, client.read_to_end(&mut answer)).await;
        let end = end.unwrap_or_else(|_| panic!("still open after {length} bytes of the preface"));
        assert!(end.is_ok() || status.is_empty(), "{length}: {end:?}");
        assert!(answer.starts_with(status.as_bytes()), "{length}: {:?}", answer.escape_ascii().to_string());
    }
    assert!(begin.elapsed() >= 3 * IDLE, "{:?}", begin.elapsed());
    eventually(SOON, || scene.connections() == 0.0).await;
}

/// Whatever blocks the other frames of its connection until it is complete: the preface, heads, trailers, short frames. Each with what
/// is sent of it at first, and then again and again.
fn unfinished() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let settings = Frame::new(kind::SETTINGS, 0, 0, []).wire();
    let begin = [PREFACE, &settings].concat();
    let whole = get(1, "/test/echo", None);
    let open = Frame { flags: END_STREAM, ..whole.clone() }.wire();
    let post = [(":method", "POST"), (":scheme", "http"), (":path", "/test/echo"), (":authority", "x")];
    let post = Frame::headers(1, false, &post).wire();
    let trailers = Frame::new(kind::HEADERS, END_STREAM, 1, []).wire();
    let drop = Frame::new(kind::CONTINUATION, 0, 1, []).wire();
    let after = |bytes: &[u8]| [&begin, bytes].concat();
    vec![
        ("preface alone", vec![PREFACE.to_vec()]),
        ("part of SETTINGS", vec![[PREFACE, &Frame::initial_window(1).wire()[..12]].concat()]),
        ("HEADERS without END_HEADERS", vec![after(&open)]),
        ("HEADERS, then CONTINUATION drop by drop", vec![after(&open), drop.clone()]),
        ("head in part of a frame", vec![after(&whole.wire()[..20])]),
        ("head byte by byte", vec![after(&whole.wire()[..12]), vec![whole.payload[3]]]),
        ("part of a frame head", vec![after(&whole.wire()[..5])]),
        ("part of a PING", vec![after(&Frame::new(kind::PING, 0, 0, [0; 8]).wire()[..12])]),
        ("trailers", vec![after(&[post, trailers].concat()), drop]),
    ]
}

#[tokio::test]
async fn unfinished_head_ends_its_connection_after_head_timeout() {
    let scene = Scene::patient(|config| {
        config.timeouts.head = Some(IDLE);
        config.timeouts.keep_alive = None;
        config.timeouts.body = Some(LONG);
    })
    .await;
    // A body may take its time, also within one frame.
    let mut slow = scene.client(1 << 20).await;
    let post = [(":method", "POST"), (":scheme", "http"), (":path", "/test/echo"), (":authority", "x")];
    slow.send(&Frame::headers(1, false, &post)).await.unwrap();
    let data = Frame::new(kind::DATA, END_STREAM, 1, [b'x'; 40]).wire();
    slow.send_raw(&data[..15]).await.unwrap();
    let clients = unfinished().into_iter().map(|(name, pieces)| ends_in_time(scene.agent.addr, name, pieces));
    futures_util::future::join_all(clients).await;
    assert_eq!(scene.agent.count("penstock_http2_connections_ended_total", &["reason=\"head\""]), 9);
    slow.send_raw(&data[15..]).await.unwrap();
    let head = slow.find(|frame| frame.stream == 1).await.unwrap().expect("no response");
    assert_eq!(head.status(), Some(200));
    assert_eq!(scene.connections(), 1.0);
}

async fn ends_in_time(agent: SocketAddr, name: &str, pieces: Vec<Vec<u8>>) {
    let (mut from, mut to) = TcpStream::connect(agent).await.unwrap().into_split();
    let begin = Instant::now();
    let sending = async {
        for piece in pieces.iter().chain(pieces[1..].iter().cycle()) {
            // Fails when the agent has closed the connection.
            if to.write_all(piece).await.is_err() {
                break;
            }
            tokio::time::sleep(IDLE / 8).await;
        }
        std::future::pending::<()>().await;
    };
    let mut received = Vec::new();
    tokio::select! {
        end = tokio::time::timeout(SOON, from.read_to_end(&mut received)) => {
            assert!(end.is_ok(), "{name}: still open after {:?}", begin.elapsed());
        }
        () = sending => {}
    }
    assert!(begin.elapsed() >= IDLE, "{name}: ended after {:?}", begin.elapsed());
    // The length of a GOAWAY, its type, its flags, its stream.
    let goaway = [0, 0, 8, kind::GOAWAY, 0, 0, 0, 0, 0];
    assert!(received.windows(9).any(|bytes| bytes == goaway), "{name}: {:?}", received.escape_ascii().to_string());
}

/// Reads 50 KB a second through small buffers with all windows open: the intervals at which the connection's socket becomes
/// writable exceed the idle timeout.
#[tokio::test]
async fn slow_reader_of_connection_is_served_completely() {
    let scene = Scene::new(|config| {
        config.timeouts.idle = Some(Duration::from_secs(1));
        config.steering.client_send_buffer = 512 << 10;
    })
    .await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 << 10).unwrap();
    let stream = socket.connect(scene.agent.addr).await.unwrap();
    let mut client = Http2Frames::new(stream).unwrap();
    let settings = Frame::initial_window((1 << 31) - 1);
    client.send_raw(&[PREFACE, &settings.wire()].concat()).await.unwrap();
    client.send(&Frame::window(0, 1 << 30)).await.unwrap();
    let plan = Plan { size: 400_000, ..Plan::default() };
    client.send(&get(1, "/test/echo", Some(&plan))).await.unwrap();
    let (begin, mut checker, mut read) = (Instant::now(), plan.checker(), 0);
    loop {
        let frame = client.next().await.unwrap().expect("the connection ended");
        assert!(!matches!(frame.kind, kind::RST_STREAM | kind::GOAWAY), "{frame:?} after {} bytes", checker.offset());
        read += frame.payload.len() as u32;
        if frame.kind == kind::DATA && frame.stream == 1 {
            checker.feed(&frame.payload).unwrap();
            if frame.flags & END_STREAM != 0 {
                break;
            }
        }
        tokio::time::sleep_until((begin + Duration::from_secs(1) * read / 50_000).into()).await;
    }
    assert_eq!(checker.offset(), plan.size);
    assert!(begin.elapsed() > Duration::from_secs(6), "not slow: {:?}", begin.elapsed());
    assert_eq!(scene.agent.count("penstock_client_stalls_total", &[]), 0);
}

/// Opens and resets streams repeatedly: endpoints see no more requests than the budget.
#[tokio::test]
async fn cancelled_requests_are_limited_by_budget() {
    const RESETS: u32 = 20;
    let scene = Scene::patient(|config| config.listen.http2_resets = RESETS).await;
    let mut client = scene.client(65_535).await;
    let head = HeadWrites { split_at: Some(0), pause_us: 60_000_000, ..HeadWrites::default() };
    let never = Plan { head, ..Plan::default() };
    let mut taken_back = 0;
    let going = loop {
        let stream = 2 * taken_back + 1;
        client.send(&get(stream, "/test/echo", Some(&never))).await.unwrap();
        // The request reached the endpoint, or the connection is over.
        let ended = || scene.agent.count("penstock_http2_connections_ended_total", &["reason=\"resets\""]) == 1;
        eventually(SOON, || scene.server.requests() > u64::from(taken_back) || ended()).await;
        if ended() {
            break client.find(|frame| frame.kind == kind::GOAWAY).await.unwrap();
        }
        client.send(&Frame::reset(stream, CANCEL)).await.unwrap();
        taken_back += 1;
        eventually(SOON, || scene.server.aborted() == u64::from(taken_back)).await;
    };
    assert_eq!(going.and_then(|frame| frame.error()), Some(ENHANCE_YOUR_CALM));
    assert!((RESETS..=RESETS + 2).contains(&taken_back), "{taken_back}");
    eventually(SOON, || scene.connections() == 0.0 && scene.server.connections_open() == 0).await;
    // The next connection has its own budget.
    let mut client = scene.client(65_535).await;
    client.send(&get(1, "/test/echo", Some(&Plan { size: 100, ..Plan::default() }))).await.unwrap();
    assert_eq!(answer(&mut client, 1, false).await, (100, None));
}

/// A gateway connection with users who cancel: resets before the head are rare, after it they are frequent.
#[tokio::test]
async fn cancelled_responses_use_no_budget() {
    let scene = Scene::patient(|config| config.listen.http2_resets = 5).await;
    let mut client = Http2Client::connect(scene.agent.addr).await.unwrap();
    for _ in 0..50 {
        let mut stream = client.send(&Plan { size: 1 << 30, ..Plan::default() }.request()).await.unwrap();
        assert_eq!(stream.head().await.unwrap().status, 200);
        stream.cancel();
    }
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
}

#[tokio::test]
async fn empty_frames_are_limited_by_budget() {
    let scene = Scene::patient(|_| {}).await;
    let empty = Frame::new(kind::DATA, 0, 1, []);
    let rows = [
        ("PING", Frame::new(kind::PING, 0, 0, *b"whatever")),
        ("an answer to PING", Frame::new(kind::PING, 1, 0, *b"whatever")),
        ("SETTINGS", Frame::new(kind::SETTINGS, 0, 0, [])),
        ("PRIORITY", Frame::new(kind::PRIORITY, 0, 1, [0, 0, 0, 0, 1])),
        ("WINDOW_UPDATE", Frame::window(0, 1)),
        ("WINDOW_UPDATE of a stream", Frame::window(1, 1)),
        ("empty DATA", empty),
        ("RST_STREAM of a stream that has ended", Frame::reset(1, CANCEL)),
        ("an unknown type", Frame::new(0xbe, 0, 0, *b"whatever")),
    ];
    for (what, frame) in rows {
        let mut client = scene.client(65_535).await;
        let fields = [(":method", "POST"), (":scheme", "http"), (":path", "/test/echo"), (":authority", "x")];
        client.send(&Frame::headers(1, false, &fields)).await.unwrap();
        let flood = frame.wire().repeat(100);
        // The agent keeps reading while it closes, so everything can be sent.
        for _ in 0..40 {
            if client.send_raw(&flood).await.is_err() {
                break;
            }
        }
        let going = client.find(|frame| frame.kind == kind::GOAWAY).await.unwrap();
        assert_eq!(going.and_then(|frame| frame.error()), Some(ENHANCE_YOUR_CALM), "{what}");
        drop(client);
        eventually(SOON, || scene.connections() == 0.0).await;
    }
    // A header block with endless continuation frames.
    let mut client = scene.client(65_535).await;
    client.send(&Frame::new(kind::HEADERS, 0, 1, [])).await.unwrap();
    let _ = client.send_raw(&Frame::new(kind::CONTINUATION, 0, 1, []).wire().repeat(5000)).await;
    let going = client.find(|frame| frame.kind == kind::GOAWAY).await.unwrap();
    assert_eq!(going.and_then(|frame| frame.error()), Some(ENHANCE_YOUR_CALM));
}

/// Returns window space frame by frame, as some clients do.
#[tokio::test]
async fn window_updates_of_active_reader_use_no_budget() {
    let scene = Scene::patient(|config| config.listen.http2_control_frames = 100).await;
    let mut client = scene.client(65_535).await;
    let plan = Plan { size: 16 << 20, ..Plan::default() };
    client.send(&get(1, "/test/echo", Some(&plan))).await.unwrap();
    assert_eq!(answer(&mut client, 1, true).await, (plan.size, None));
    let mut client =
        Http2Client::connect_with(scene.agent.addr, Builder::new().initial_window_size(8 << 20)).await.unwrap();
    let response = client.request(&plan.request()).await.unwrap();
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, plan.size));
}
