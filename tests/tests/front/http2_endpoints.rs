//! HTTP/2 endpoints: shared connections, their stream limits, and requests that they refuse unprocessed.

mod lasting;
mod lengths;
mod retried;
mod uploads;

use std::{
    collections::BTreeSet,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::join_all;
use http::HeaderMap;
use parking_lot::Mutex;
use penstock_agent::config::{AppProtocol, Config, FailureMode, Pool, SteeringMode};
use penstock_tests::{
    BodyEnd, Http2Client, Http2Options, Http2Server, ModelServer, Plan, Refusing, Request, ScriptedEpp,
    agent::{TestAgent, builtin_pool, epp_pool},
    client::{Client, Piece},
    content::Fnv,
    eventually,
    http2_client::Stream,
    http2_frames::{END_HEADERS, END_STREAM, Frame, Http2Frames, kind},
    model_server::{Echo, Fault, FaultKind, Framing, Lengths, Options},
    scripted_epp::{Answering, Endpoints, LlmdRouter, reply},
    stage::{echo, json},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::{
    SOON,
    scene::{Back, Endpoint, Front, Scene, first},
};

async fn server(options: Http2Options) -> Http2Server {
    Http2Server::start(options).await.unwrap()
}

/// An agent whose pool has one HTTP/2 endpoint and no EPP.
fn agent(addr: std::net::SocketAddr, adjust: impl FnOnce(&mut Config)) -> TestAgent {
    let pool = Pool { app_protocol: AppProtocol::H2c, ..builtin_pool(&[addr]) };
    TestAgent::start(pool, SteeringMode::Off, adjust)
}

/// A POST whose body is not JSON.
fn plain(body: impl Into<bytes::Bytes>) -> Request {
    Request::post("/test/echo", body)
}

/// A response that stops in its body until the server resumes it.
fn held(number: u64) -> Plan {
    let fault = Some(Fault { after: 1000, kind: FaultKind::UntilTold });
    Plan { size: 3000, stream_id: number, fault, ..Plan::default() }
}

async fn finishes(mut stream: Stream, plan: &Plan) {
    let response = stream.response().await.unwrap();
    assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{}", response.text());
    plan.checker().feed(&response.body).unwrap();
    assert_eq!(response.read.len, plan.size);
}

/// Requests `count` held responses at once: none ends before the server has read every request.
async fn all_at_once(client: &mut Http2Client, server: &Http2Server, count: u64) {
    server.hold();
    let before = server.requests();
    let mut streams = Vec::new();
    for plan in (0..count).map(held) {
        streams.push((client.send(&plan.request()).await.unwrap(), plan));
    }
    eventually(SOON, || server.requests() == before + count).await;
    server.resume();
    join_all(streams.into_iter().map(|(stream, plan)| async move { finishes(stream, &plan).await })).await;
}

#[tokio::test]
async fn many_requests_share_one_connection() {
    let server = server(Http2Options::default()).await;
    let agent = agent(server.addr, |_| {});
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    all_at_once(&mut client, &server, 100).await;
    for number in 0..20 {
        let response = client.request(&plain(number.to_string())).await.unwrap();
        assert_eq!(response.echoed().count, 101 + number);
    }
    assert_eq!((server.connections_accepted(), server.most_streams(), server.requests()), (1, 100, 120));
    assert_eq!(agent.count("penstock_endpoint_connections_total", &["result=\"new\""]), 1);
    assert_eq!(agent.count("penstock_endpoint_connections_total", &["result=\"reused\""]), 119);
}

/// If a connection allows few streams, the agent opens more connections, and no request is refused.
#[tokio::test]
async fn endpoint_stream_limit_is_respected() {
    let server = server(Http2Options { max_streams: 4, ..Http2Options::default() }).await;
    let agent = agent(server.addr, |_| {});
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    all_at_once(&mut client, &server, 20).await;
    assert_eq!(server.connections_accepted(), 5);
    assert_eq!(agent.count("penstock_endpoint_retries_total", &[]), 0);
    // The connections are reused once the agent has noticed the end of each stream.
    eventually(SOON, || agent.metric("penstock_active_requests", &[]) == 0.0).await;
    all_at_once(&mut client, &server, 20).await;
    assert_eq!((server.connections_accepted(), server.requests()), (5, 40));
}

/// A scripted endpoint: `serve` gets each of its connections, numbered from 0.
async fn scripted_endpoint<F>(serve: impl Fn(usize, Http2Frames) -> F + Send + 'static) -> std::net::SocketAddr
where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for number in 0.. {
            let Ok((tcp, _)) = listener.accept().await else { return };
            let Ok(frames) = Http2Frames::accept(tcp).await else { continue };
            tokio::spawn(serve(number, frames));
        }
    });
    addr
}

/// A whole response of one byte: the indexed field `:status: 200`.
fn ok_head(stream: u32) -> Frame {
    Frame::new(kind::HEADERS, 5, stream, [0x88])
}

/// Fields that need several frames.
fn in_frames(stream: u32, ends: bool, fields: &[(&str, &str)]) -> Vec<Frame> {
    let whole = Frame::headers(stream, ends, fields);
    let pieces: Vec<&[u8]> = whole.payload.chunks(16 << 10).collect();
    let frame = |(number, piece): (usize, &&[u8])| {
        let (kind, mut flags) = if number == 0 { (kind::HEADERS, u8::from(ends)) } else { (kind::CONTINUATION, 0) };
        if number + 1 == pieces.len() {
            flags |= END_HEADERS;
        }
        Frame::new(kind, flags, stream, *piece)
    };
    pieces.iter().enumerate().map(frame).collect()
}

/// Malformed heads and frames return an error, and the next request is served.
#[tokio::test]
async fn malformed_responses_return_502() {
    let wrong: [&[u8]; 4] = [
        // Without a status; with an uppercase field name; with a wrong length; without a header block.
        &[],
        &[0x88, 0, 1, b'X', 1, b'1'],
        &[0x88, 0x5c, 1, b'5'],
        &[0xff; 40],
    ];
    let addr = scripted_endpoint(move |number, mut frames| async move {
        let head = frames.find(|frame| frame.kind == kind::HEADERS).await?.unwrap();
        match wrong.get(number) {
            Some(block) => frames.send(&Frame::new(kind::HEADERS, 5, head.stream, *block)).await?,
            None => frames.send(&ok_head(head.stream)).await?,
        }
        if number < wrong.len() {
            // GOAWAY, so that each request gets its own connection.
            frames.send(&Frame::new(kind::GOAWAY, 0, 0, [0, 0, 0, 1, 0, 0, 0, 0])).await?;
        }
        frames.find(|_| false).await?;
        Ok(())
    })
    .await;
    let agent = agent(addr, |config| config.pools[0].ejection.failures = 0);
    for block in wrong {
        let mut client = Client::connect(agent.addr).await.unwrap();
        let response = client.request(&Request::get("/")).await.unwrap();
        let found = (response.status(), response.error_code());
        assert_eq!(found, (502, "bad_response".to_owned()), "{block:?}: {}", response.text());
    }
    // What an endpoint has begun to answer is not sent again.
    assert_eq!(agent.count("penstock_endpoint_retries_total", &[]), 0);
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::get("/")).await.unwrap().status(), 200);
}

/// An endpoint that speaks HTTP/1.1, and a silent one.
#[tokio::test]
async fn endpoint_without_http2_returns_error_in_time() {
    let http1 = ModelServer::start(Options::default()).await.unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let rows = [(http1.addr, 502, "connect"), (silent.local_addr().unwrap(), 504, "connect_timeout")];
    for (addr, status, code) in rows {
        let agent = agent(addr, |config| config.timeouts.connect = Some(Duration::from_millis(500)));
        let mut client = Client::connect(agent.addr).await.unwrap();
        let response = client.request(&plain("x")).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (status, code), "{}", response.text());
    }
}

/// Clients that read nothing block neither each other nor other streams of the endpoint connection, for small and large
/// frames.
#[tokio::test]
async fn stalled_clients_do_not_block_others() {
    let server = server(Http2Options::default()).await;
    let agent = agent(server.addr, |config| config.listen.workers = 1);
    let mut stalled = Vec::new();
    // Tokens in one frame each, and bulk data.
    for number in 0..24 {
        let chunks = if number % 6 == 0 { Lengths::Fixed(40) } else { Lengths::Fixed(16 << 10) };
        let plan = Plan { framing: Framing::Chunked, size: 64 << 20, stream_id: number, chunks, ..Plan::default() };
        let mut client = Http2Client::connect(agent.addr).await.unwrap();
        let mut stream = client.send(&plan.request()).await.unwrap();
        assert_eq!(stream.head().await.unwrap().status, 200);
        stalled.push((client, stream, plan));
    }
    // By then, everything that waits for these clients is as far as it gets.
    let mut last = (0, std::time::Instant::now());
    eventually(SOON, || {
        let now = server.written();
        if now != last.0 {
            last = (now, std::time::Instant::now());
        }
        last.1.elapsed() > Duration::from_millis(300)
    })
    .await;
    assert!(last.0 < 24 << 20, "{} bytes are in flight", last.0);
    let mut other = Http2Client::connect(agent.addr).await.unwrap();
    for number in 0..20 {
        let plan = Plan { size: 200_000, stream_id: 100 + number, ..Plan::default() };
        finishes(other.send(&plan.request()).await.unwrap(), &plan).await;
    }
    assert_eq!(server.connections_accepted(), 1);
    // Each continues where it stopped.
    for (_, stream, plan) in &mut stalled {
        let mut checker = plan.checker();
        while checker.offset() < 400_000 {
            let Piece::Data(data) = stream.piece().await.unwrap() else { panic!("ended at {}", checker.offset()) };
            checker.feed(&data).unwrap();
        }
    }
    assert_eq!(server.aborted(), 0);
    drop(stalled);
    eventually(SOON, || server.aborted() == 24).await;
    assert_eq!(other.request(&plain("x")).await.unwrap().status(), 200);
    assert_eq!(server.connections_accepted(), 1);
}

/// h2 leaves out fields beyond its limit without an error; a response that lacks them must not look complete.
#[tokio::test]
async fn trailers_are_whole_or_the_response_is_broken() {
    for size in [15_000, 20_000, 100_000, 250_000] {
        let addr = scripted_endpoint(move |_, mut frames| async move {
            while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
                frames.send(&Frame::headers(head.stream, false, &[(":status", "200")])).await?;
                frames.send(&Frame::new(kind::DATA, 0, head.stream, *b"abc")).await?;
                for frame in in_frames(head.stream, true, &[("grpc-status", "5"), ("x-t", &"t".repeat(size))]) {
                    frames.send(&frame).await?;
                }
            }
            Ok(())
        })
        .await;
        let agent = agent(addr, |_| {});
        let mut http1 = Client::connect(agent.addr).await.unwrap();
        let mut http2 = Http2Client::connect(agent.addr).await.unwrap();
        let request = Request::get("/");
        let passed = usize::from(size == 15_000);
        for response in [http1.request(&request).await.unwrap(), http2.request(&request).await.unwrap()] {
            assert_eq!((response.status(), response.read.trailers.len()), (200, 2 * passed), "{size}");
            assert_eq!(response.read.end == BodyEnd::Complete, passed == 1, "{size}");
        }
    }
}

/// A client must not get what it would have to refuse (RFC 9113 §8.2.1).
#[tokio::test]
async fn trailer_with_blanks_around_it_breaks_the_response() {
    let addr = scripted_endpoint(|_, mut frames| async move {
        while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
            frames.send(&Frame::headers(head.stream, false, &[(":status", "200")])).await?;
            frames.send(&Frame::new(kind::DATA, 0, head.stream, *b"abc")).await?;
            frames.send(&Frame::headers(head.stream, true, &[("x-t", " v ")])).await?;
        }
        Ok(())
    })
    .await;
    let agent = agent(addr, |_| {});
    let http1 = Client::connect(agent.addr).await.unwrap().request(&Request::get("/")).await.unwrap();
    let http2 = Http2Client::connect(agent.addr).await.unwrap().request(&Request::get("/")).await.unwrap();
    for response in [http1, http2] {
        assert_eq!((response.status(), response.read.trailers.len()), (200, 0));
        assert_ne!(response.read.end, BodyEnd::Complete);
    }
}

#[tokio::test]
async fn head_up_to_the_limit_passes_and_a_larger_one_harms_no_other_stream() {
    const SIZES: [(usize, u16); 4] = [(40_000, 200), (60_000, 200), (70_000, 502), (200_000, 502)];
    let connections = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&connections);
    let addr = scripted_endpoint(move |_, mut frames| {
        seen.fetch_add(1, Relaxed);
        async move {
            let first = frames.find(|frame| frame.kind == kind::HEADERS).await?.unwrap().stream;
            frames.send(&Frame::headers(first, false, &[(":status", "200")])).await?;
            for (size, _) in SIZES {
                let head = frames.find(|frame| frame.kind == kind::HEADERS).await?.unwrap();
                for frame in in_frames(head.stream, true, &[(":status", "200"), ("x-h", &"h".repeat(size))]) {
                    frames.send(&frame).await?;
                }
            }
            frames.find(|frame| frame.kind == kind::HEADERS).await?;
            frames.send(&Frame::new(kind::DATA, END_STREAM, first, *b"abc")).await?;
            frames.find(|_| false).await?;
            Ok(())
        }
    })
    .await;
    let agent = agent(addr, |_| {});
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    let mut running = client.send(&Request::get("/")).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    for (size, status) in SIZES {
        let response = client.request(&Request::get("/")).await.unwrap();
        assert_eq!(response.status(), status, "{size}: {}", response.text());
    }
    let _last = client.send(&Request::get("/")).await.unwrap();
    let read = running.read_body(|_| Ok(())).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, 3));
    assert_eq!(connections.load(Relaxed), 1);
}

/// Responses with HTTP/2 on either side are relayed in every steering mode.
#[tokio::test]
async fn http2_responses_are_relayed() {
    let ingress = |config: &mut Config| config.steering.mode = SteeringMode::Ingress;
    let scene = Scene::with(Front::Http1, Back::Http2, first, ingress).await;
    for framing in [Framing::ContentLength, Framing::Chunked] {
        let plan = Plan { size: 3 << 20, framing, ..Plan::default() };
        let response = scene.request(&plan.request()).await;
        plan.checker().feed(&response.body).unwrap();
        assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, plan.size));
    }
    let flows = || scene.agent.count("penstock_flows_total", &["path=\"relay\"", "reason=\"http2\""]);
    eventually(SOON, || flows() == 2).await;
    assert_eq!(scene.agent.steered(), 0);
}

/// Only connections without streams are closed.
#[tokio::test]
async fn idle_connections_are_closed() {
    let server = server(Http2Options::default()).await;
    let agent = agent(server.addr, |config| config.timeouts.endpoint_keep_alive = Duration::from_millis(10));
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    let fault = Some(Fault { after: 500, kind: FaultKind::StallMs(1500) });
    let plan = Plan { size: 1000, fault, ..Plan::default() };
    finishes(client.send(&plan.request()).await.unwrap(), &plan).await;
    eventually(SOON, || server.connections_open() == 0).await;
    assert_eq!(client.request(&plain("x")).await.unwrap().status(), 200);
    assert_eq!(server.connections_accepted(), 2);
}

/// An HTTP/1.0 client gets no chunks; the close ends the body.
#[tokio::test]
async fn http10_client_is_served() {
    let scene = Scene::with(Front::Http1, Back::Http2, first, |_| {}).await;
    let Endpoint::Http2(server) = &scene.endpoint else { panic!("the endpoint speaks HTTP/1.1") };
    for framing in [Framing::ContentLength, Framing::Chunked] {
        let plan = Plan { size: 100_000, framing, ..Plan::default() };
        let mut client = Client::connect(scene.agent.addr).await.unwrap();
        let wire = format!("GET /test/body HTTP/1.0\r\nx-test-plan: {}\r\n\r\n", plan.header());
        client.send_raw(wire.as_bytes()).await.unwrap();
        let response = client.response().await.unwrap();
        assert_eq!(response.header("transfer-encoding"), None);
        plan.checker().feed(&response.body).unwrap();
        assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, plan.size));
        // A broken response must not look complete.
        let fault = Some(Fault { after: 50_000, kind: FaultKind::Reset });
        let wire = format!("GET / HTTP/1.0\r\nx-test-plan: {}\r\n\r\n", Plan { fault, ..plan }.header());
        let mut client = Client::connect(scene.agent.addr).await.unwrap();
        client.send_raw(wire.as_bytes()).await.unwrap();
        if let Ok(response) = client.response().await {
            assert_ne!(response.read.end, BodyEnd::Complete);
        }
    }
    assert_eq!(server.seen()[0].header(":authority"), Some(server.addr.to_string().as_str()));
}

/// However slowly the client takes them: a client that reads nothing does not make the agent hold what an endpoint sends.
#[tokio::test]
async fn endless_interim_responses_reset_the_stream() {
    let reset = Arc::<AtomicU64>::default();
    let seen = Arc::clone(&reset);
    let addr = scripted_endpoint(move |_, mut frames| {
        let seen = Arc::clone(&seen);
        async move {
            let head = frames.find(|frame| frame.kind == kind::HEADERS).await?.unwrap();
            let link = "x".repeat(5000);
            let interim = Frame::headers(head.stream, false, &[(":status", "103"), ("link", &link)]);
            for _ in 0..2000 {
                frames.send(&interim).await?;
            }
            if frames.find(|frame| frame.kind == kind::RST_STREAM).await?.is_some() {
                seen.fetch_add(1, Relaxed);
            }
            Ok(())
        }
    })
    .await;
    let agent = agent(addr, |config| config.limits.head_bytes = 1 << 20);
    let mut client = Client::connect_with(agent.addr, Some(2048)).await.unwrap();
    client.send(&Request::get("/test/echo")).await.unwrap();
    eventually(SOON, || reset.load(Relaxed) == 1).await;
}

/// As those of HTTP/1.1 endpoints, to clients of either version.
#[tokio::test]
async fn interim_responses_of_http2_endpoints_are_passed_on() {
    let interim = |stream, status| Frame::headers(stream, false, &[(":status", status), ("link", "</a>")]);
    let addr = scripted_endpoint(move |_, mut frames| async move {
        while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
            for status in ["103", "100", "102"] {
                frames.send(&interim(head.stream, status)).await?;
            }
            frames.send(&ok_head(head.stream)).await?;
        }
        Ok(())
    })
    .await;
    let agent = agent(addr, |_| {});
    let of_http1 = Client::connect(agent.addr).await.unwrap().request(&Request::get("/test/echo")).await.unwrap();
    let of_http2 = Http2Client::connect(agent.addr).await.unwrap().request(&Request::get("/test/echo")).await.unwrap();
    for response in [of_http1, of_http2] {
        assert_eq!(response.status(), 200);
        let heads = response.interim.iter().map(|head| (head.status, head.header("link"), head.header("via")));
        let expected = [103, 102].map(|status| (status, Some("</a>"), Some("2 penstock")));
        assert_eq!(heads.collect::<Vec<_>>(), expected);
    }
}

/// As with HTTP/1.1 endpoints, the time runs to the head of the final response.
#[tokio::test]
async fn interim_responses_of_http2_endpoints_do_not_extend_first_byte_timeout() {
    let reset = Arc::<AtomicU64>::default();
    let seen = Arc::clone(&reset);
    let addr = scripted_endpoint(move |_, mut frames| {
        let seen = Arc::clone(&seen);
        async move {
            let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? else { return Ok(()) };
            let interim = Frame::headers(head.stream, false, &[(":status", "103"), ("link", "</a>")]);
            // Beyond the timeout, then forgotten.
            for _ in 0..100 {
                frames.send(&interim).await?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            if frames.find(|frame| frame.kind == kind::RST_STREAM).await?.is_some() {
                seen.fetch_add(1, Relaxed);
            }
            Ok(())
        }
    })
    .await;
    let start = || {
        agent(addr, |config| {
            config.timeouts.first_byte = Some(Duration::from_millis(500));
            config.pools[0].ejection.failures = 0;
        })
    };
    let (one, two) = (start(), start());
    let of_http1 = Client::connect(one.addr).await.unwrap().request(&Request::get("/test/echo")).await.unwrap();
    let of_http2 = Http2Client::connect(two.addr).await.unwrap().request(&Request::get("/test/echo")).await.unwrap();
    for response in [of_http1, of_http2] {
        assert_eq!((response.status(), response.error_code().as_str()), (504, "first_byte_timeout"));
        assert!(!response.interim.is_empty());
        assert!(response.interim.iter().all(|head| head.status == 103 && head.header("link") == Some("</a>")));
    }
    // The endpoint is told.
    eventually(SOON, || reset.load(Relaxed) == 2).await;
}
