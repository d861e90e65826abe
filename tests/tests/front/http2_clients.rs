//! HTTP/2 clients: concurrent streams, flow-control windows, and GOAWAY.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use h2::{Reason, client::Builder};
use http::HeaderMap;
use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Alphabet, BodyEnd, Checker, Client, Http2Client, Plan, Request,
    client::{ConnectionEnd, Piece},
    content::Fnv,
    eventually,
    http2_client::Stream,
    http2_frames::{END_STREAM, Frame, Http2Frames, PREFACE, kind},
    model_server::{Fault, FaultKind, Framing, Lengths, Pauses},
    scripted_epp::{LlmdRouter, StreamEnd},
    stage::{echo, json},
};

use crate::{
    SOON,
    scene::{Asker, Back, Front, Scene, first},
};

async fn scene() -> Scene {
    Scene::new(Front::Http2, Back::Http1).await
}

async fn connect(scene: &Scene) -> Http2Client {
    Http2Client::connect(scene.agent.addr).await.unwrap()
}

/// Each stream gets its own bytes in both directions, over one connection.
#[tokio::test]
async fn two_hundred_concurrent_streams_stay_separate() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |_| {}).await;
    let mut client = connect(&scene).await;
    let mut streams = Vec::new();
    for number in 0..200 {
        let chunks = Lengths::Random { seed: number, max: 3000 };
        let pauses = Some(Pauses { seed: number, every: 5, up_to_us: 2000 });
        let plan = Plan {
            framing: Framing::Chunked,
            size: 30_000 + number,
            stream_id: number,
            chunks,
            pauses,
            ..Plan::default()
        };
        let body = Alphabet::Binary.bytes(1000 + number, 0, 20_000 + number as usize);
        let upload = Request::post("/test/body", body)
            .header("x-test-plan", plan.header())
            .header("x-number", number.to_string());
        streams.push((plan, client.send(&upload).await.unwrap()));
    }
    let whole = streams.iter_mut().map(|(plan, stream)| async move {
        let response = stream.response().await.unwrap();
        let mut checker = plan.checker();
        checker.feed(&response.body).unwrap();
        assert_eq!((response.read.end, checker.offset()), (BodyEnd::Complete, plan.size));
    });
    join_all(whole).await;
    let seen = scene.endpoint.seen();
    assert_eq!(seen.len(), 200);
    for seen in seen {
        let number: u64 = seen.header("x-number").unwrap().parse().unwrap();
        let body = Alphabet::Binary.bytes(1000 + number, 0, 20_000 + number as usize);
        assert_eq!((seen.body_length, seen.body_hash), (body.len() as u64, Fnv::of(&body).value()));
    }
    assert_eq!(scene.agent.metric("penstock_client_connections", &[]), 1.0);
    assert_eq!(scene.agent.metric("penstock_flows_total", &["path=\"relay\"", "reason=\"http2\""]), 200.0);
}

/// Only the stalled stream's window is full; the agent holds at most one window for it.
#[tokio::test]
async fn stalled_stream_does_not_block_others() {
    let scene = scene().await;
    let mut client = connect(&scene).await;
    let stalled = Plan { size: 512 << 20, ..Plan::default() };
    let mut held: Vec<Stream> = Vec::new();
    for _ in 0..8 {
        let mut stream = client.send(&stalled.request()).await.unwrap();
        assert_eq!(stream.head().await.unwrap().status, 200);
        held.push(stream);
    }
    // A client that stalls one stream on purpose returns the connection window; so does this one for everything it reads.
    let mut other = Http2Client::connect_with(
        scene.agent.addr,
        Builder::new().initial_window_size(64 << 10).initial_connection_window_size(8 << 20),
    )
    .await
    .unwrap();
    let mut stuck = other.send(&stalled.request()).await.unwrap();
    assert_eq!(stuck.head().await.unwrap().status, 200);
    for number in 0..20 {
        let plan = Plan { size: 200_000, stream_id: number, ..Plan::default() };
        let response = other.request(&plan.request()).await.unwrap();
        plan.checker().feed(&response.body).unwrap();
        assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, plan.size));
    }
    let mut checker = stalled.checker();
    while checker.offset() < 16 << 20 {
        let Piece::Data(data) = stuck.piece().await.unwrap() else { panic!("ended at {}", checker.offset()) };
        checker.feed(&data).unwrap();
    }
    drop(held);
    eventually(SOON, || scene.endpoint.aborted() == 8).await;
}

/// Only the stream ends: its endpoint connection and picker stream close at once, and other streams continue.
#[tokio::test]
async fn stream_cancelled_during_upload_aborts_request() {
    let scene = scene().await;
    let mut client = connect(&scene).await;
    let request = echo("").header("x-which", "cancelled");
    let mut head = client.head(&request).unwrap();
    head.headers_mut().remove("content-length");
    let mut stream = client.open(head, false).await.unwrap();
    // The picker is asked as soon as the model is known.
    stream.data(json("m", 100_000)[..90_000].to_vec()).await.unwrap();
    eventually(SOON, || scene.epp.streams_open() == 1).await;
    stream.cancel();
    eventually(SOON, || scene.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
    assert_eq!(client.request(&echo(json("m", 10))).await.unwrap().status(), 200);
    assert_eq!(scene.endpoint.requests(), 1);
}

/// A body that differs from its declared length.
#[tokio::test]
async fn length_mismatch_resets_stream() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |_| {}).await;
    let mut client = connect(&scene).await;
    for (declared, sent) in [("5", "abc"), ("2", "abc"), ("0", "abc")] {
        let before = scene.endpoint.requests();
        let mut head = client.head(&Request::new("POST", "/test/echo")).unwrap();
        head.headers_mut().insert("content-length", declared.parse().unwrap());
        let mut stream = client.open(head, false).await.unwrap();
        // The stream may have been reset already.
        let _ = stream.data(sent).await;
        let _ = stream.finish(HeaderMap::new());
        stream.head().await.unwrap_err();
        assert_eq!(stream.reason(), Some(Reason::PROTOCOL_ERROR), "{declared}");
        assert_eq!(scene.endpoint.requests(), before);
    }
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
}

/// Status of a request with this trailer. A request that is refused does not reach the endpoint.
async fn with_trailer(scene: &Scene, client: &mut Http2Client, value: &str) -> u16 {
    let before = scene.endpoint.requests();
    let head = client.head(&Request::new("POST", "/test/echo")).unwrap();
    let mut stream = client.open(head, false).await.unwrap();
    stream.data("abc").await.unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", value.parse().unwrap());
    stream.finish(trailers).unwrap();
    let status = stream.response().await.unwrap().status();
    assert_eq!(scene.endpoint.requests() - before, u64::from(status == 200));
    status
}

#[tokio::test]
async fn large_request_trailers_are_refused() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |_| {}).await;
    let mut client = connect(&scene).await;
    for (size, status) in [(15_000, 200), (20_000, 431), (140_000, 431), (250_000, 431)] {
        assert_eq!(with_trailer(&scene, &mut client, &"t".repeat(size)).await, status, "{size}");
    }
}

/// RFC 9113 §8.2.1: a value with blanks around it is malformed.
#[tokio::test]
async fn field_value_with_blanks_around_it_is_refused() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |_| {}).await;
    let mut client = connect(&scene).await;
    for (value, status) in [("a b", 200), (" a", 400), ("a ", 400), ("\ta", 400)] {
        let response = client.request(&Request::get("/test/echo").header("x-l", value)).await.unwrap();
        assert_eq!(response.status(), status, "{value:?}");
    }
}

/// The same of a trailer: an endpoint that speaks HTTP/2 may end its whole connection for it.
#[tokio::test]
async fn trailer_with_blanks_around_it_is_refused() {
    for back in [Back::Http1, Back::Http2] {
        let scene = Scene::with(Front::Http2, back, first, |_| {}).await;
        let mut client = connect(&scene).await;
        for (value, status) in [("a b", 200), (" a", 400), ("a\t", 400)] {
            assert_eq!(with_trailer(&scene, &mut client, value).await, status, "{value:?}");
        }
    }
}

/// Node sends the end of an empty body in a frame of its own.
#[tokio::test]
async fn empty_data_frame_with_json_type_is_no_body() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |_| {}).await;
    let mut client = connect(&scene).await;
    let request = Request::new("POST", "/test/echo").header("content-type", "application/json");
    let head = client.head(&request).unwrap();
    let mut stream = client.open(head, false).await.unwrap();
    stream.finish(HeaderMap::new()).unwrap();
    assert_eq!(stream.response().await.unwrap().status(), 200);
}

/// The reset of a stream discards what h2 has queued.
#[tokio::test]
async fn everything_before_a_break_reaches_the_client() {
    for front in [Front::Http1, Front::Http2, Front::Tls2] {
        let scene = Scene::with(front, Back::Http1, first, |_| {}).await;
        for after in [1, 50_000, 300_000] {
            for number in 0..10 {
                let fault = Some(Fault { after, kind: FaultKind::Close });
                let plan = Plan { size: 1 << 20, stream_id: number, fault, ..Plan::default() };
                let response = scene.request(&plan.request()).await;
                assert_ne!(response.read.end, BodyEnd::Complete);
                plan.checker().feed(&response.body).unwrap();
                assert_eq!((response.status(), response.read.len), (200, after), "{front:?} {number}");
            }
        }
    }
}

/// A response before the end of the body is complete, and the rest of the body is not awaited.
#[tokio::test]
async fn early_response_does_not_wait_for_upload() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |config| config.limits.body_bytes = 100_000).await;
    let mut client = connect(&scene).await;
    let mut head = client.head(&Request::new("POST", "/test/echo")).unwrap();
    head.headers_mut().insert("content-length", "300000".parse().unwrap());
    let mut stream = client.open(head, false).await.unwrap();
    let response = stream.response().await.unwrap();
    assert_eq!((response.status(), response.read.end), (413, BodyEnd::Complete));
    let unknown = client.head(&Request::new("POST", "/test/echo")).unwrap();
    let mut stream = client.open(unknown, false).await.unwrap();
    stream.data(vec![b'x'; 150_000]).await.unwrap();
    let response = stream.response().await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (413, "body_too_large"));
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
}

/// Clients lose an answer whose stream is reset in the same moment, so the agent reads the rest of the upload.
#[tokio::test]
async fn answered_upload_is_read_and_not_reset() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |config| config.limits.body_bytes = 100).await;
    let mut client = Http2Frames::connect(scene.agent.addr).await.unwrap();
    let fields = [(":method", "POST"), (":scheme", "http"), (":path", "/test/echo"), (":authority", "x")];
    client.send(&Frame::headers(1, false, &fields)).await.unwrap();
    client.send(&Frame::new(kind::DATA, 0, 1, vec![b'x'; 1000])).await.unwrap();
    assert!(client.find(|frame| frame.kind == kind::HEADERS).await.unwrap().is_some());
    assert!(client.find(|frame| frame.kind == kind::DATA && frame.flags & END_STREAM != 0).await.unwrap().is_some());
    for more in [0, END_STREAM] {
        client.send(&Frame::new(kind::DATA, more, 1, vec![b'x'; 10_000])).await.unwrap();
        client.send(&Frame::new(kind::PING, 0, 0, *b"are you?")).await.unwrap();
        let next =
            client.find(|frame| matches!(frame.kind, kind::PING | kind::RST_STREAM | kind::GOAWAY)).await.unwrap();
        assert_eq!(next.map(|frame| frame.kind), Some(kind::PING));
    }
}

#[tokio::test]
async fn oversized_head_returns_431() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |config| {
        config.limits.head_bytes = 8192;
        config.limits.headers = 32;
    })
    .await;
    let mut client = connect(&scene).await;
    let large = Request::get("/test/echo").header("x-large", "x".repeat(10_000));
    let many = (0..40).fold(Request::get("/test/echo"), |request, n| request.header(&format!("x-{n}"), "1"));
    for (request, code) in [(large, "head_too_long"), (many, "too_many_fields")] {
        let response = client.request(&request).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (431, code));
    }
    let odd = Request::post("/test/echo", "x").header("expect", "a");
    assert_eq!(client.request(&odd).await.unwrap().error_code(), "expectation");
    // RFC 9113 §8.2.3: cookies in several fields are one.
    let cookies = (0..40).fold(Request::get("/test/echo"), |request, n| request.header("cookie", format!("a{n}=b")));
    assert_eq!(client.request(&cookies).await.unwrap().status(), 200);
    for cookies in [["a=1", ""], ["", "a=1"], ["", ""]] {
        let request =
            cookies.into_iter().fold(Request::get("/test/echo"), |request, one| request.header("cookie", one));
        assert_eq!(client.request(&request).await.unwrap().status(), 200, "{cookies:?}");
    }
    let right = Request::get("/test/echo").header("x-large", "x".repeat(4000));
    assert_eq!(client.request(&right).await.unwrap().status(), 200);
    assert_eq!(scene.endpoint.requests(), 5);
}

/// Streams over the limit wait in the client, which knows the limit.
#[tokio::test]
async fn concurrent_streams_stay_within_configured_limit() {
    let limit = |config: &mut penstock_agent::config::Config| config.listen.http2_max_streams = 3;
    let scene = Scene::with(Front::Http2, Back::Http1, first, limit).await;
    let mut client = connect(&scene).await;
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
    assert_eq!(client.allowed_streams(), 3);
}

#[tokio::test]
async fn idle_connection_gets_goaway() {
    let soon = |config: &mut penstock_agent::config::Config| config.timeouts.keep_alive = Some(Duration::from_secs(1));
    let scene = Scene::with(Front::Http2, Back::Http1, LlmdRouter::new, soon).await;
    let mut frames = Http2Frames::connect(scene.agent.addr).await.unwrap();
    let going = frames.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().unwrap();
    assert_eq!(going.error(), Some(0));
    assert!(frames.find(|_| false).await.unwrap().is_none());
    // A connection with a long request is not idle.
    let mut client = connect(&scene).await;
    let fault = Some(Fault { after: 500, kind: FaultKind::StallMs(2000) });
    let plan = Plan { size: 1000, fault, ..Plan::default() };
    let response = client.request(&plan.request()).await.unwrap();
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, 1000));
    client.end().await.unwrap();
    eventually(SOON, || scene.agent.metric("penstock_client_connections", &[]) == 0.0).await;
}

/// A response flows only as fast as its client reads.
#[tokio::test]
async fn drain_lets_streams_finish() {
    let scene = scene().await;
    let mut client = connect(&scene).await;
    let plan = Plan { size: 16 << 20, ..Plan::default() };
    let mut running = client.send(&plan.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    let mut idle = Http2Frames::connect(scene.agent.addr).await.unwrap();
    idle.find(|frame| frame.kind == kind::SETTINGS).await.unwrap().unwrap();
    scene.agent.agent.drain();
    assert_eq!(idle.find(|frame| frame.kind == kind::GOAWAY).await.unwrap().unwrap().error(), Some(0));
    assert!(idle.find(|_| false).await.unwrap().is_none());
    assert!(!scene.agent.agent.is_done());
    let mut checker = plan.checker();
    let read = running.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    client.end().await.unwrap();
    eventually(SOON, || scene.agent.agent.is_done()).await;
    eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
}

#[tokio::test]
async fn forced_shutdown_resets_streams() {
    let scene = scene().await;
    let mut client = connect(&scene).await;
    let plan = Plan { size: 256 << 20, ..Plan::default() };
    let mut running = client.send(&plan.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    scene.agent.agent.force();
    assert_ne!(running.read_body(|_| Ok(())).await.unwrap().end, BodyEnd::Complete);
    eventually(SOON, || scene.agent.agent.is_done()).await;
    eventually(SOON, || scene.endpoint.aborted() == 1).await;
}

/// The preface in any split, with whatever follows it; HTTP/1.1 works on the same port meanwhile.
#[tokio::test]
async fn split_preface_is_recognized() {
    let scene = scene().await;
    let settings = Frame::new(kind::SETTINGS, 0, 0, []).wire();
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", "/test/echo"), (":authority", "x")];
    let opening = [PREFACE, &settings, &Frame::headers(1, true, &fields).wire()].concat();
    for cut in 1..=opening.len() {
        let tcp = tokio::net::TcpStream::connect(scene.agent.addr).await.unwrap();
        let mut frames = Http2Frames::new(tcp).unwrap();
        frames.send_raw(&opening[..cut]).await.unwrap();
        tokio::task::yield_now().await;
        frames.send_raw(&opening[cut..]).await.unwrap();
        let head = frames.find(|frame| frame.kind == kind::HEADERS).await.unwrap().unwrap();
        assert_eq!((head.stream, head.status()), (1, Some(200)), "cut at {cut}");
    }
    let mut http1 = Client::connect(scene.agent.addr).await.unwrap();
    assert_eq!(http1.request(&echo(json("m", 10))).await.unwrap().status(), 200);
}

/// Bytes that start like a preface and differ later get an HTTP/1.1 error and a close.
#[tokio::test]
async fn partial_preface_is_answered_as_http1() {
    let scene = Scene::with(Front::Http1, Back::Http1, first, |config| {
        config.timeouts.head = Some(Duration::from_secs(1));
    })
    .await;
    let rows: [(&[u8], u16); 2] = [(b"PRI * HTTP/2.0\r\n", 408), (b"PRI * HTTP/1.1\r\nhost: x\r\n\r\n", 400)];
    for (wire, status) in rows {
        let mut client = Client::connect(scene.agent.addr).await.unwrap();
        client.send_raw(wire).await.unwrap();
        let response = client.response().await.unwrap();
        assert_eq!(response.status(), status, "{}", wire.escape_ascii());
        client.until_end().await.unwrap();
    }
    // After its first line it is HTTP/2, and a malformed preface there.
    let tcp = tokio::net::TcpStream::connect(scene.agent.addr).await.unwrap();
    let mut frames = Http2Frames::new(tcp).unwrap();
    frames.send_raw(b"PRI * HTTP/2.0\r\nhost: x\r\n\r\n").await.unwrap();
    let gone = frames.find(|frame| frame.kind == kind::GOAWAY).await.unwrap();
    assert_ne!(gone.and_then(|frame| frame.error()), Some(0));
    assert_eq!(scene.endpoint.requests(), 0);
}

/// After an HTTP/1.1 request a preface cannot start HTTP/2.
#[tokio::test]
async fn preface_after_http1_request_is_rejected() {
    let scene = Scene::with(Front::Http1, Back::Http1, first, |_| {}).await;
    let mut client = Client::connect(scene.agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
    client.send_raw(PREFACE).await.unwrap();
    let response = client.response().await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (505, "http2_preface"));
    assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
}

#[tokio::test]
async fn preface_with_http2_disabled_is_rejected() {
    let off = |config: &mut penstock_agent::config::Config| config.listen.http2_max_streams = 0;
    let scene = Scene::with(Front::Http1, Back::Http1, first, off).await;
    let mut client = Client::connect(scene.agent.addr).await.unwrap();
    client.send_raw(PREFACE).await.unwrap();
    let response = client.response().await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (505, "http2_preface"));
    assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
}

/// Malformed frames end their connection and no other.
#[tokio::test]
async fn malformed_frames_end_only_their_connection() {
    let scene = scene().await;
    let mut other = connect(&scene).await;
    let plan = Plan { size: 8 << 20, ..Plan::default() };
    let mut running = other.send(&plan.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    let wrong = [
        Frame::new(kind::DATA, 0, 0, *b"x").wire(),
        Frame::new(kind::HEADERS, 4, 2, []).wire(),
        Frame::new(kind::SETTINGS, 0, 0, *b"odd").wire(),
        vec![0xff; 64],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ];
    for wire in wrong {
        let mut frames = Http2Frames::connect(scene.agent.addr).await.unwrap();
        frames.send_raw(&wire).await.unwrap();
        let gone = frames.find(|frame| frame.kind == kind::GOAWAY).await.unwrap();
        assert_ne!(gone.and_then(|frame| frame.error()), Some(0), "{}", wire.escape_ascii());
    }
    let mut checker = plan.checker();
    let read = running.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    assert_eq!(scene.endpoint.requests(), 1);
}

/// Responses over both protocols through one steering agent: HTTP/2 is relayed, and no bytes mix.
#[tokio::test]
async fn http2_streams_and_steered_http1_responses_stay_separate() {
    let ingress = |config: &mut penstock_agent::config::Config| config.steering.mode = SteeringMode::Ingress;
    let scene = Arc::new(Scene::with(Front::Http2, Back::Http1, first, ingress).await);
    let exchanges = (0..16).map(|number| {
        let scene = Arc::clone(&scene);
        tokio::spawn(async move {
            let mut client = match number % 2 {
                0 => scene.client().await,
                _ => Asker::Http1(Client::connect(scene.agent.addr).await.unwrap()),
            };
            for round in 0..10 {
                let pauses = Some(Pauses { seed: round, every: 3, up_to_us: 500 });
                let plan = Plan {
                    size: 100_000,
                    stream_id: number * 100 + round,
                    pauses,
                    writes: Lengths::Fixed(3000),
                    ..Plan::default()
                };
                client.send(&plan.request()).await.unwrap();
                assert_eq!(client.head().await.unwrap().status, 200);
                let mut checker = Checker::new(plan.stream_id);
                let read = client.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
                assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
            }
        })
    });
    for exchange in join_all(exchanges).await {
        exchange.unwrap();
    }
    assert_eq!(scene.agent.metric("penstock_flows_total", &["reason=\"http2\""]), 80.0);
    assert!(scene.agent.steered() > 0);
}
