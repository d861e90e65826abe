//! Slow and stalled clients. Progress is what a client acknowledges: a client that reads, however slowly, gets every byte, and
//! one that reads nothing is closed after the idle timeout, on every path.

use std::time::{Duration, Instant};

use penstock_agent::config::{Config, ListenTls, PickPer, Pool, SteeringMode};
use penstock_tests::{
    BodyEnd, Checker, Client, Plan, Reader, Refusing, Request,
    agent::{TestAgent, builtin_pool},
    eventually,
    model_server::{Framing, ModelServer, Options, Upgraded},
    tls::Certificate,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::SOON;

/// Shorter than the time a slow reader needs to free a third of the send buffer, which is when a writer is woken.
const IDLE: Duration = Duration::from_secs(2);
const SIZE: u64 = 1 << 20;
const SEND_BUFFER: u32 = 512 << 10;
/// 60 KB a second.
const BYTES: usize = 3000;
const TICK: Duration = Duration::from_millis(50);
const MODES: [SteeringMode; 4] = [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto];
/// The requested size; the kernel doubles it.
const RECEIVE_BUFFER: usize = 16 << 10;

async fn start(
    mode: SteeringMode,
    pool: impl FnOnce(&mut Pool),
    adjust: impl FnOnce(&mut Config),
) -> (ModelServer, TestAgent) {
    let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
    let mut settings = builtin_pool(&[server.addr]);
    pool(&mut settings);
    let agent = TestAgent::start(settings, mode, |config| {
        config.timeouts.idle = Some(IDLE);
        config.steering.client_send_buffer = SEND_BUFFER;
        adjust(config);
    });
    (server, agent)
}

/// Runs the exchange on all paths concurrently. Agents start first, because a start blocks the thread.
async fn on_every_path(pool: impl Fn(&mut Pool), exchange: impl AsyncFn(SteeringMode, &TestAgent)) {
    let mut all = Vec::new();
    for mode in MODES {
        all.push((mode, start(mode, &pool, |_| {}).await));
    }
    futures_util::future::join_all(all.iter().map(|(mode, (_, agent))| exchange(*mode, agent))).await;
}

/// Reads and compares the rest slowly.
async fn read_slowly(mode: SteeringMode, client: &mut (impl AsyncRead + Unpin), checker: &mut Checker) {
    let (begin, mut piece) = (Instant::now(), vec![0; BYTES]);
    while checker.offset() < SIZE {
        let last = Instant::now();
        let read = client.read(&mut piece).await;
        let read = read.unwrap_or_else(|error| {
            panic!(
                "{mode:?}: {error} at {}, after {:?}, {:?} in all",
                checker.offset(),
                last.elapsed(),
                begin.elapsed()
            )
        });
        assert_ne!(read, 0, "{mode:?}: cut after {} bytes", checker.offset());
        checker.feed(&piece[..read]).unwrap();
        tokio::time::sleep(TICK).await;
    }
    assert!(begin.elapsed() > 3 * IDLE, "not slow: {:?}", begin.elapsed());
}

#[tokio::test]
async fn slow_reader_of_response_is_served_on_every_path() {
    on_every_path(
        |_| {},
        async |mode, agent| {
            let plan = Plan { framing: Framing::Chunked, size: SIZE, stream_id: 1, ..Plan::default() };
            let mut client = Client::connect_with(agent.addr, Some(RECEIVE_BUFFER)).await.unwrap();
            client.send(&plan.request()).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            let slow = Reader::Slow { bytes: BYTES, tick: TICK };
            let read = slow.take(&mut client, &mut plan.checker()).await.unwrap();
            assert_eq!((read.end, read.len), (BodyEnd::Complete, SIZE), "{mode:?}");
            // The connection stays usable.
            assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
        },
    )
    .await;
}

#[tokio::test]
async fn slow_reader_over_tls_is_served() {
    let tls = Tls::new();
    let listen = tls.listen.clone();
    let (_server, agent) = start(SteeringMode::Auto, |_| {}, |config| config.listen.tls = Some(listen)).await;
    let addr = agent.agent.tls_address().unwrap();
    let stream = tls.certificate.connect(addr, &["http/1.1"]).await.unwrap();
    let mut client = Client::over(stream, addr);
    let plan = Plan { size: SIZE, stream_id: 2, ..Plan::default() };
    client.send(&plan.request()).await.unwrap();
    client.head().await.unwrap();
    let (mut stream, early) = client.into_parts();
    let mut checker = plan.checker();
    checker.feed(&early).unwrap();
    read_slowly(SteeringMode::Auto, &mut stream, &mut checker).await;
}

#[tokio::test]
async fn slow_reader_of_upgraded_connection_is_served_on_every_path() {
    on_every_path(
        |_| {},
        async |mode, agent| {
            let plan = Plan { size: SIZE, stream_id: 3, ..Plan::switching("websocket", Upgraded::Send) };
            let request = plan.request().header("connection", "Upgrade").header("upgrade", "websocket");
            let mut client = Client::connect_with(agent.addr, Some(RECEIVE_BUFFER)).await.unwrap();
            client.send(&request).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 101, "{mode:?}");
            let (mut stream, early) = client.into_parts();
            let mut checker = plan.checker();
            checker.feed(&early).unwrap();
            read_slowly(mode, &mut stream, &mut checker).await;
        },
    )
    .await;
}

#[tokio::test]
async fn slow_reader_of_pinned_connection_is_served_on_every_path() {
    on_every_path(
        |pool| pool.pick_per = PickPer::Connection,
        async |mode, agent| {
            let mut client = Client::connect_with(agent.addr, Some(RECEIVE_BUFFER)).await.unwrap();
            assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
            let plan = Plan { size: SIZE, stream_id: 4, ..Plan::default() };
            client.send(&plan.request()).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            let slow = Reader::Slow { bytes: BYTES, tick: TICK };
            let read = slow.take(&mut client, &mut plan.checker()).await.unwrap();
            assert_eq!((read.end, read.len), (BodyEnd::Complete, SIZE), "{mode:?}");
        },
    )
    .await;
}

/// With TLS beside the plain listener.
struct Tls {
    certificate: Certificate,
    listen: ListenTls,
    _folder: tempfile::TempDir,
}

impl Tls {
    fn new() -> Self {
        let certificate = Certificate::new("agent.example").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (cert_file, key_file) = certificate.write(folder.path()).unwrap();
        let listen = ListenTls { address: "127.0.0.1:0".parse().unwrap(), cert_file, key_file, ..ListenTls::default() };
        Self { certificate, listen, _folder: folder }
    }
}

/// Sends requests until the agent accepts no more, and reads nothing.
async fn flood(agent: &TestAgent, tls: Option<&Certificate>, wire: &[u8]) {
    let addr = if tls.is_some() { agent.agent.tls_address().unwrap() } else { agent.addr };
    let (stream, _) = Client::connect_with(addr, Some(RECEIVE_BUFFER)).await.unwrap().into_parts();
    let mut stream: Box<dyn AsyncWrite + Unpin> = match tls {
        Some(certificate) => Box::new(certificate.over(stream, &["http/1.1"]).await.unwrap()),
        None => Box::new(stream),
    };
    let wire = wire.repeat(100);
    let sent = async {
        loop {
            if let Err(error) = stream.write_all(&wire).await {
                return error;
            }
        }
    };
    // The connection ends with a reset: unread responses are discarded.
    let error = tokio::time::timeout(SOON, sent).await.expect("timed out");
    assert!(matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe), "{error}");
    eventually(SOON, || agent.metric("penstock_client_connections", &[]) == 0.0).await;
}

/// Shorter than for slow readers, whose progress these clients do not make.
const SHORT_IDLE: Duration = Duration::from_millis(500);

#[tokio::test]
async fn pipelining_client_that_never_reads_is_closed() {
    let tls = Tls::new();
    let ways = MODES.map(|mode| (mode, None)).into_iter().chain([(SteeringMode::Auto, Some(&tls.certificate))]);
    for (mode, certificate) in ways {
        let soon = |config: &mut Config| {
            config.timeouts.idle = Some(SHORT_IDLE);
            config.headers.request_id_to_client = true;
            config.listen.tls = Some(tls.listen.clone());
        };
        let (server, agent) = start(mode, |_| {}, soon).await;
        let plan = Plan { size: 100_000, ..Plan::default() };
        flood(&agent, certificate, &plan.request().wire("agent")).await;
        eventually(SOON, || server.connections_open() <= 1).await;
        assert_eq!(agent.count("penstock_client_stalls_total", &[]), 1, "{mode:?}");
        // The endpoint is unreachable, so the agent's own errors, which keep the connection open, fill the queue.
        drop(server);
        let refusing = Refusing::new().unwrap();
        let agent = TestAgent::start(builtin_pool(&[refusing.addr]), mode, soon);
        let id = "x".repeat(8000);
        flood(&agent, certificate, &Request::get("/nowhere").header("x-request-id", id).wire("agent")).await;
        assert_eq!(agent.count("penstock_client_stalls_total", &[]), 1, "{mode:?}");
    }
}

/// Reads the head and nothing more; returns once both ends are closed.
async fn take_nothing(
    mode: SteeringMode,
    server: &ModelServer,
    agent: &TestAgent,
    mut client: Client,
    request: &Request,
    status: u16,
) {
    client.send(request).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, status, "{mode:?}");
    eventually(SOON, || agent.metric("penstock_client_connections", &[]) == 0.0).await;
    eventually(SOON, || server.connections_open() == 0).await;
    // Not the end of the bytes: most of them are missing.
    let (mut stream, _) = client.into_parts();
    let mut rest = Vec::new();
    let error = stream.read_to_end(&mut rest).await.expect_err("the end looks orderly");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{mode:?}");
}

#[tokio::test]
async fn client_of_tunnel_that_reads_nothing_is_reset() {
    for mode in MODES {
        let (server, agent) = start(mode, |_| {}, |config| config.timeouts.idle = Some(SHORT_IDLE)).await;
        let plan = Plan { size: 1 << 30, stream_id: 5, ..Plan::switching("websocket", Upgraded::Send) };
        let request = plan.request().header("connection", "Upgrade").header("upgrade", "websocket");
        let client = Client::connect_with(agent.addr, Some(RECEIVE_BUFFER)).await.unwrap();
        take_nothing(mode, &server, &agent, client, &request, 101).await;
        assert_eq!(agent.count("penstock_requests_total", &[r#"reason="idle_timeout""#]), 1, "{mode:?}");
    }
}

#[tokio::test]
async fn pinned_client_that_reads_nothing_is_reset() {
    for mode in MODES {
        let pinned = |pool: &mut Pool| pool.pick_per = PickPer::Connection;
        let (server, agent) = start(mode, pinned, |config| config.timeouts.idle = Some(SHORT_IDLE)).await;
        let mut client = Client::connect_with(agent.addr, Some(RECEIVE_BUFFER)).await.unwrap();
        assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
        eventually(SOON, || agent.metric("penstock_pinned_connections", &[]) == 1.0).await;
        let plan = Plan { size: 1 << 30, stream_id: 6, ..Plan::default() };
        take_nothing(mode, &server, &agent, client, &plan.request(), 200).await;
        assert_eq!(agent.count("penstock_pins_ended_total", &[r#"reason="idle_timeout""#]), 1, "{mode:?}");
    }
}
