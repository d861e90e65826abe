//! Slow and stalled endpoints. Progress is what an endpoint acknowledges: an endpoint that reads, however slowly, gets the whole
//! request, and one that stops reading costs the request its timeout.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::future::join_all;
use penstock_agent::config::{AppProtocol, Config, Pool, PoolTls, ServerTls, SteeringMode};
use penstock_tests::{
    Client, Request, Response,
    agent::{TestAgent, builtin_pool},
    content::Alphabet,
    eventually,
    http2_frames::{END_STREAM, Frame, Http2Frames, kind},
    tls::Certificate,
};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::{SOON, scene::Back};

const BACKS: [Back; 3] = [Back::Http1, Back::Https, Back::Http2];
/// Shorter than the time a slow endpoint needs to free a third of the send queue, which is when a writer is woken.
const LIMIT: Duration = Duration::from_secs(1);
/// Up to 80 KB a second.
const BYTES: usize = 20_000;
const TICK: Duration = Duration::from_millis(250);
/// Six limits.
const TICKS: usize = 24;
/// The requested size; the kernel doubles it.
const RECEIVE_BUFFER: usize = 16 << 10;
/// More than the sockets take.
const LARGE: usize = 8 << 20;
/// The send queue takes it whole, and a slow endpoint does not read it within its ticks.
const SMALL: usize = 1 << 20;

/// How an endpoint reads a request: for `ticks` slowly, and then the rest, or nothing more.
#[derive(Clone, Copy, Debug)]
struct Reads {
    ticks: usize,
    rest: bool,
}

/// What the endpoint answers with, by whether the body is the expected one.
const SAME: &str = "same";
const OTHER: &str = "else";

fn answer(same: bool) -> &'static str {
    if same { SAME } else { OTHER }
}

fn listen() -> TcpListener {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
    // Accepted connections inherit it.
    socket.set_recv_buffer_size(RECEIVE_BUFFER).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    socket.listen(16).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

/// An endpoint that expects this body.
fn start(back: Back, reads: Reads, body: Bytes) -> SocketAddr {
    let listener = listen();
    let addr = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Certificate::new("models.example").unwrap().server(None).unwrap());
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await?;
        match back {
            Back::Http1 => http1(tcp, reads, &body).await,
            Back::Https => http1(acceptor.accept(tcp).await?, reads, &body).await,
            Back::Http2 => http2(tcp, reads, &body).await,
        }
    });
    addr
}

async fn http1(mut stream: impl AsyncRead + AsyncWrite + Unpin, reads: Reads, body: &[u8]) -> anyhow::Result<()> {
    let (mut bytes, mut piece) = (Vec::new(), vec![0; BYTES]);
    for _ in 0..reads.ticks {
        let read = stream.read(&mut piece).await?;
        bytes.extend_from_slice(&piece[..read]);
        sleep(TICK).await;
    }
    if !reads.rest {
        return std::future::pending().await;
    }
    let head = bytes.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    while bytes.len() < head + body.len() {
        anyhow::ensure!(stream.read_buf(&mut bytes).await? > 0, "cut");
    }
    let answer = answer(&bytes[head..] == body);
    stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n{answer}").as_bytes()).await?;
    stream.flush().await?;
    std::future::pending().await
}

/// Reads a frame of DATA in each tick.
async fn http2(tcp: TcpStream, reads: Reads, body: &[u8]) -> anyhow::Result<()> {
    let mut frames = Http2Frames::accept(tcp).await?;
    // The windows are never the limit.
    frames.send(&Frame::initial_window(i32::MAX as u32)).await?;
    frames.send(&Frame::window(0, 1 << 30)).await?;
    let (mut count, mut bytes) = (0, Vec::new());
    loop {
        if count == reads.ticks && !reads.rest {
            return std::future::pending().await;
        }
        let frame = frames.find(|frame| frame.kind == kind::DATA).await?.context("cut")?;
        bytes.extend_from_slice(&frame.payload);
        count += 1;
        if count <= reads.ticks {
            sleep(TICK).await;
        }
        if frame.flags & END_STREAM != 0 {
            frames.send(&Frame::headers(frame.stream, false, &[(":status", "200")])).await?;
            frames.send(&Frame::new(kind::DATA, END_STREAM, frame.stream, answer(bytes == body))).await?;
            return std::future::pending().await;
        }
    }
}

fn pool(back: Back, addr: SocketAddr) -> Pool {
    let (app_protocol, tls) = match back {
        Back::Http1 => (AppProtocol::Http1, None),
        Back::Https => (AppProtocol::Https, Some(PoolTls { verify: ServerTls::Insecure, ..PoolTls::default() })),
        Back::Http2 => (AppProtocol::H2c, None),
    };
    Pool { app_protocol, tls, ..builtin_pool(&[addr]) }
}

fn body() -> Bytes {
    Alphabet::Binary.bytes(5, 0, LARGE).into()
}

/// The timeout that is [`LIMIT`]; the other is far longer.
#[derive(Clone, Copy, Debug)]
enum Limited {
    Idle,
    FirstByte,
}

impl Limited {
    fn set(self, config: &mut Config) {
        match self {
            Self::Idle => config.timeouts.idle = Some(LIMIT),
            Self::FirstByte => config.timeouts.first_byte = Some(LIMIT),
        }
    }
}

/// Sends requests to endpoints of every protocol, all at once. `check` gets a description, what is limited, the response, and how long
/// it took.
async fn with_every_endpoint(reads: Reads, check: impl Fn(&str, Limited, &Response, Duration)) {
    let (whole, check) = (body(), &check);
    let rows = [(Limited::Idle, LARGE), (Limited::FirstByte, LARGE), (Limited::FirstByte, SMALL)];
    let mut all = Vec::new();
    // Agents start first, because a start blocks the thread.
    for back in BACKS {
        for (limited, size) in rows {
            let body = whole.slice(..size);
            let pool = pool(back, start(back, reads, body.clone()));
            let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
                config.listen.workers = 1;
                limited.set(config);
            });
            let row = format!("{back:?}, {limited:?}, {size} bytes, {reads:?}");
            all.push((row, limited, agent, Request::post("/", body)));
        }
    }
    join_all(all.iter().map(|(row, limited, agent, request)| async move {
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.patience = SOON;
        let begin = Instant::now();
        let response = client.request(request).await.unwrap();
        check(row, *limited, &response, begin.elapsed());
    }))
    .await;
}

#[tokio::test]
async fn slow_reader_of_request_gets_all_of_it() {
    with_every_endpoint(Reads { ticks: TICKS, rest: true }, |row, _, response, took| {
        assert_eq!((response.status(), response.text().as_str()), (200, SAME), "{row}: after {took:?}");
        assert!(took > 4 * LIMIT, "{row}: not slow: {took:?}");
    })
    .await;
}

/// At once, or after two limits in which the endpoint reads slowly.
#[tokio::test]
async fn endpoint_that_stops_reading_returns_504() {
    for ticks in [0, 8] {
        with_every_endpoint(Reads { ticks, rest: false }, |row, limited, response, took| {
            let code = match limited {
                Limited::Idle => "request_stalled",
                Limited::FirstByte => "first_byte_timeout",
            };
            assert_eq!((response.status(), response.error_code().as_str()), (504, code), "{row}: after {took:?}");
            assert!(took >= LIMIT.max(TICK * ticks as u32), "{row}: {took:?}");
        })
        .await;
    }
}

/// The frames with which the agent answers the endpoint's PINGs are acknowledged, too.
#[tokio::test]
async fn other_frames_of_the_connection_do_not_extend_first_byte() {
    /// Shorter than the limit. (END_STREAM is the flag ACK of a PING.)
    const PAUSE: Duration = Duration::from_millis(400);
    let listener = listen();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut frames = Http2Frames::accept(tcp).await?;
                frames.send(&Frame::initial_window(i32::MAX as u32)).await?;
                frames.send(&Frame::window(0, 1 << 30)).await?;
                // The request's end, then each answer to a PING.
                while let Some(frame) = frames.next().await? {
                    if frame.flags & END_STREAM != 0 && matches!(frame.kind, kind::HEADERS | kind::DATA | kind::PING) {
                        sleep(PAUSE).await;
                        frames.send(&Frame::new(kind::PING, 0, 0, [7; 8])).await?;
                    }
                }
                anyhow::Ok(())
            });
        }
    });
    let agent = TestAgent::start(pool(Back::Http2, addr), SteeringMode::Off, |config| {
        config.listen.workers = 1;
        config.timeouts.first_byte = Some(LIMIT);
    });
    let large_head = Request::new("GET", "/").header("x-large", "x".repeat(4000));
    let whole = body();
    let bodies = [1, 200, 1000, 100_000].map(|length| Request::post("/", whole.slice(..length)));
    for request in [Request::new("GET", "/"), large_head].iter().chain(&bodies) {
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.patience = SOON;
        let begin = Instant::now();
        let response = client.request(request).await.unwrap();
        let took = begin.elapsed();
        assert_eq!((response.status(), response.error_code().as_str()), (504, "first_byte_timeout"));
        assert!(took >= LIMIT && took < 3 * LIMIT, "{took:?}");
    }
}

/// The acknowledged bytes of another request on the same HTTP/2 connection are no progress of one that waits for its window.
#[tokio::test]
async fn progress_of_one_stream_does_not_extend_the_wait_of_another() {
    /// What a stream gets without a larger window (RFC 9113 §6.9.2).
    const WINDOW: usize = 65_535;
    let listener = listen();
    let addr = listener.local_addr().unwrap();
    let seen = <[Arc<AtomicUsize>; 2]>::default();
    let [stuck, ticks] = seen.clone();
    tokio::spawn(async move {
        let mut frames = Http2Frames::accept(listener.accept().await?.0).await?;
        frames.send(&Frame::window(0, 1 << 30)).await?;
        while let Some(frame) = frames.next().await? {
            match (frame.kind, frame.stream) {
                (kind::DATA, 1) => {
                    stuck.fetch_add(frame.payload.len(), Relaxed);
                }
                (kind::HEADERS, 3) => frames.send(&Frame::window(3, 1 << 30)).await?,
                (kind::DATA, 3) if frame.flags & END_STREAM != 0 => {
                    frames.send(&Frame::headers(3, true, &[(":status", "200")])).await?;
                }
                (kind::DATA, 3) if ticks.fetch_add(1, Relaxed) < TICKS => sleep(TICK).await,
                _ => {}
            }
        }
        anyhow::Ok(())
    });
    let agent = TestAgent::start(pool(Back::Http2, addr), SteeringMode::Off, |config| {
        config.listen.workers = 1;
        config.timeouts.idle = Some(LIMIT);
    });
    let [stuck, ticks] = seen;
    let (mut one, mut two) = (Client::connect(agent.addr).await.unwrap(), Client::connect(agent.addr).await.unwrap());
    let whole = body();
    one.send(&Request::post("/", whole.slice(..200_000))).await.unwrap();
    eventually(SOON, || stuck.load(Relaxed) == WINDOW).await;
    two.patience = SOON;
    let large = Request::post("/", whole);
    let cut = async {
        let stalled = || agent.count("penstock_requests_total", &[r#"reason="request_stalled""#]) == 1;
        eventually(SOON, stalled).await;
        ticks.load(Relaxed)
    };
    let (one, two, read) = tokio::join!(one.response(), two.request(&large), cut);
    let one = one.unwrap();
    assert_eq!((one.status(), one.error_code().as_str()), (504, "request_stalled"));
    // The other request had been read slowly until then, and was for long.
    assert!(read < TICKS / 2, "{read}");
    assert_eq!(two.unwrap().status(), 200);
    assert!(ticks.load(Relaxed) > TICKS);
}
