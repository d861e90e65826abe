//! Endpoints that respond before they have the whole request, and endpoints that read none of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream};
use parking_lot::Mutex;
use penstock_agent::config::{AppProtocol, Pool, SteeringMode};
use penstock_tests::agent::{TestAgent, builtin_pool};
use penstock_tests::client::{Client, Pace, Piece, Request};
use penstock_tests::content::{Alphabet, Fnv};
use penstock_tests::{BodyEnd, Http2Client, eventually};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::SOON;

const SIZE: usize = 16 << 20;

/// When the endpoint ends its response, which starts at the request's head.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ends {
    AfterTheRequest,
    /// It reads the rest of the request only when told to.
    AtOnce,
    /// It never responds and never reads a body.
    Never,
}

/// What the test has told the endpoint.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    Nothing,
    /// The client has the start of the response.
    Begun,
    /// The client has the whole response.
    Answered,
}

#[derive(Clone)]
struct State {
    ends: Ends,
    told: watch::Sender<Told>,
    connections: Arc<AtomicUsize>,
    /// For each request read to its end: bytes of its body, and the code of a reset.
    uploads: Arc<Mutex<Uploads>>,
}

type Uploads = Vec<(usize, Option<Reason>)>;

struct Endpoint {
    addr: SocketAddr,
    state: State,
}

impl Endpoint {
    async fn start(protocol: AppProtocol, ends: Ends) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (told, connections, uploads) = (watch::Sender::new(Told::Nothing), Arc::default(), Arc::default());
        let state = State { ends, told, connections, uploads };
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::Relaxed);
                match protocol {
                    AppProtocol::Http1 => drop(tokio::spawn(http1(stream, shared.clone()))),
                    AppProtocol::H2c => drop(tokio::spawn(http2(stream, shared.clone()))),
                    AppProtocol::Https => unreachable!("no test of this file uses TLS"),
                }
            }
        });
        Self { addr, state }
    }

    fn tell(&self, told: Told) {
        self.state.told.send_replace(told);
    }

    fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    fn uploads(&self) -> Uploads {
        self.state.uploads.lock().clone()
    }
}

impl State {
    async fn wait(&self, told: Told) {
        let _ = self.told.subscribe().wait_for(|now| *now >= told).await;
    }
}

/// The start of the response is sent at once; the rest is the hash of the request body.
const BEGIN: &str = "begin ";

fn rest(hash: Fnv) -> String {
    format!("{:016x}", hash.value())
}

async fn http1(mut stream: TcpStream, state: State) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        let at = loop {
            if let Some(at) = bytes.windows(4).position(|end| end == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&bytes[..at]).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |length| length.trim().parse().unwrap());
        bytes.drain(..at);
        if state.ends == Ends::Never {
            return std::future::pending().await;
        }
        stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n{BEGIN}").as_bytes()).await?;
        state.wait(Told::Begun).await;
        if state.ends == Ends::AtOnce {
            stream.write_all(rest(Fnv::default()).as_bytes()).await?;
            state.wait(Told::Answered).await;
        }
        let (mut taken, mut hash) = (0, Fnv::default());
        loop {
            hash.update(&bytes);
            taken += bytes.len();
            bytes.clear();
            if taken == length || stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                break;
            }
        }
        state.uploads.lock().push((taken, None));
        if taken < length {
            return Ok(());
        }
        if state.ends == Ends::AfterTheRequest {
            stream.write_all(rest(hash).as_bytes()).await?;
        }
    }
}

async fn http2(stream: TcpStream, state: State) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        let state = state.clone();
        tokio::spawn(async move {
            if state.ends == Ends::Never {
                let _unread = (request, respond);
                return std::future::pending().await;
            }
            let mut out = respond.send_response(http::Response::new(()), false)?;
            out.send_data(BEGIN.into(), false)?;
            state.wait(Told::Begun).await;
            if state.ends == Ends::AtOnce {
                out.send_data(rest(Fnv::default()).into(), true)?;
                state.wait(Told::Answered).await;
            }
            let (taken, hash, reason) = upload(request.into_body()).await;
            state.uploads.lock().push((taken, reason));
            if state.ends == Ends::AfterTheRequest {
                out.send_data(rest(hash).into(), true)?;
            }
            Ok::<_, h2::Error>(())
        });
    }
    Ok(())
}

async fn upload(mut body: RecvStream) -> (usize, Fnv, Option<Reason>) {
    let (mut taken, mut hash) = (0, Fnv::default());
    while let Some(data) = body.data().await {
        let Ok(data) = data.inspect_err(|error| assert!(error.is_reset(), "{error}")) else {
            return (taken, hash, Some(Reason::CANCEL));
        };
        hash.update(&data);
        taken += data.len();
        let _ = body.flow_control().release_capacity(data.len());
    }
    (taken, hash, None)
}

fn pool(endpoint: &Endpoint, protocol: AppProtocol) -> Pool {
    Pool { app_protocol: protocol, ..builtin_pool(&[endpoint.addr]) }
}

fn large() -> (Request, Fnv) {
    let body = Alphabet::Binary.bytes(3, 0, SIZE);
    let hash = Fnv::of(&body);
    (Request::post("/", body), hash)
}

/// The client side for both protocols: it reads the start of the response while the endpoint has only the request head, and
/// then the rest.
macro_rules! exchange {
    ($stream:expr, $endpoint:expr) => {{
        assert_eq!($stream.head().await.unwrap().status, 200);
        let Piece::Data(begun) = $stream.piece().await.unwrap() else { panic!("ended") };
        assert_eq!(begun, BEGIN.as_bytes());
        $endpoint.tell(Told::Begun);
        let mut answer = Vec::new();
        let sink = |bytes: &[u8]| {
            answer.extend_from_slice(bytes);
            Ok(())
        };
        let read = $stream.read_body(sink).await.unwrap();
        assert_eq!(read.end, BodyEnd::Complete);
        String::from_utf8(answer).unwrap()
    }};
}

struct Http1(Client);

impl Http1 {
    async fn head(&mut self) -> anyhow::Result<penstock_tests::client::Head> {
        self.0.head().await
    }

    async fn piece(&mut self) -> anyhow::Result<Piece> {
        self.0.piece(usize::MAX).await
    }

    async fn read_body(
        &mut self,
        sink: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<penstock_tests::client::BodyRead> {
        self.0.read_body(Pace::Fast, sink).await
    }
}

/// On every path: the response flows during the upload, the upload completes, and the connection takes another request.
#[tokio::test]
async fn early_response_does_not_cut_request() {
    for (protocol, mode) in [
        (AppProtocol::Http1, SteeringMode::Off),
        (AppProtocol::Http1, SteeringMode::Ingress),
        (AppProtocol::Http1, SteeringMode::Local),
        (AppProtocol::H2c, SteeringMode::Off),
    ] {
        for http2_client in [false, true] {
            let endpoint = Endpoint::start(protocol, Ends::AfterTheRequest).await;
            let agent = TestAgent::start(pool(&endpoint, protocol), mode, |config| config.listen.workers = 1);
            let (request, hash) = large();
            let small = Request::post("/", Bytes::from_static(b"small"));
            let (answer, next) = if http2_client {
                let mut client = Http2Client::connect(agent.addr).await.unwrap();
                let mut stream = client.send(&request).await.unwrap();
                let answer = exchange!(stream, endpoint);
                (answer, client.request(&small).await.unwrap().text())
            } else {
                let mut client = Http1(Client::connect(agent.addr).await.unwrap());
                client.0.send(&request).await.unwrap();
                let answer = exchange!(client, endpoint);
                (answer, client.0.request(&small).await.unwrap().text())
            };
            let what = format!("{protocol:?} {mode:?} {http2_client}");
            assert_eq!(answer, rest(hash), "{what}");
            assert_eq!(next, format!("{BEGIN}{}", rest(Fnv::of(b"small"))), "{what}");
            assert_eq!(endpoint.uploads(), [(SIZE, None), (5, None)], "{what}");
            assert_eq!(endpoint.connections(), 1, "{what}");
        }
    }
}

/// RFC 9112 §9.3, RFC 9113 §8.1: the rest of the request is not sent, the client need not wait, and none of it is taken for the
/// next request.
#[tokio::test]
async fn response_ending_first_ends_request() {
    for protocol in [AppProtocol::Http1, AppProtocol::H2c] {
        let endpoint = Endpoint::start(protocol, Ends::AtOnce).await;
        let agent = TestAgent::start(pool(&endpoint, protocol), SteeringMode::Off, |config| config.listen.workers = 1);
        let mut client = Http1(Client::connect(agent.addr).await.unwrap());
        client.0.send(&large().0).await.unwrap();
        assert_eq!(exchange!(client, endpoint), rest(Fnv::default()));
        let response = client.0.request(&Request::post("/", Bytes::from_static(b"small"))).await.unwrap();
        assert_eq!(response.status(), 200);
        endpoint.tell(Told::Answered);
        eventually(SOON, || endpoint.uploads().len() == 2).await;
        let uploads = endpoint.uploads();
        let cut = uploads.iter().filter(|upload| **upload != (5, None));
        assert!(cut.clone().all(|(taken, _)| *taken < SIZE), "{uploads:?}");
        // The first request may have left the second no window of the HTTP/2 connection; then that is cut, too.
        let most = if protocol == AppProtocol::Http1 { 1 } else { 2 };
        assert!((1..=most).contains(&cut.count()), "{uploads:?}");
        let connections = if protocol == AppProtocol::Http1 { 2 } else { 1 };
        assert_eq!(endpoint.connections(), connections);
        assert_eq!(agent.count("penstock_requests_total", &[r#"reason="ok""#]), 2);
    }
}

/// With one of the two timeouts off, the other limits the wait.
#[tokio::test]
async fn endpoint_that_reads_no_body_times_out() {
    let limit = Some(Duration::from_millis(300));
    for protocol in [AppProtocol::Http1, AppProtocol::H2c] {
        for (first_byte, idle, code) in [
            (None, limit, "request_stalled"),
            (limit, None, "first_byte_timeout"),
            (SOME_LONG, limit, "request_stalled"),
        ] {
            let endpoint = Endpoint::start(protocol, Ends::Never).await;
            let agent = TestAgent::start(pool(&endpoint, protocol), SteeringMode::Off, |config| {
                (config.timeouts.first_byte, config.timeouts.idle) = (first_byte, idle);
            });
            let mut client = Client::connect(agent.addr).await.unwrap();
            let response = client.request(&large().0).await.unwrap();
            assert_eq!((response.status(), response.error_code().as_str()), (504, code));
        }
    }
}

const SOME_LONG: Option<Duration> = Some(Duration::from_secs(600));
