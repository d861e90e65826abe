//! Endpoints whose machine vanishes: no FIN, no RST, no response. Each has a network namespace whose link goes down.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use penstock_agent::config::{AppProtocol, Config, FailureMode, Pool, PoolTls, ServerTls, SteeringMode};
use penstock_tests::agent::{TestAgent, epp_pool};
use penstock_tests::client::{Client, Pace, Request};
use penstock_tests::scripted_epp::{Answering, ScriptedEpp, StreamEnd, reply};
use penstock_tests::stage::{echo, json};
use penstock_tests::tls::{Certificate, TlsFront};
use penstock_tests::{BodyEnd, Http2Options, Http2Server, ModelServer, Namespace, eventually, model_server::Options};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use crate::SOON;

/// A kernel may acknowledge bytes that its program has read this much later (`TCP_DELACK_MAX`), and more.
const DELAYED_ACK: Duration = Duration::from_millis(300);
const PROTOCOLS: [AppProtocol; 3] = [AppProtocol::Http1, AppProtocol::Https, AppProtocol::H2c];

/// A machine of its own, reached through one link.
struct Machine {
    namespace: Namespace,
    link: String,
    listener: Option<TcpListener>,
    addr: SocketAddr,
    /// Requests for `/wait` that were read whole.
    waiting: Arc<AtomicU64>,
}

impl Machine {
    /// `number` distinguishes the machines of this process.
    fn new(number: u32) -> Self {
        // Benchmark addresses (RFC 2544); a range per process.
        let base = 0xc613_0000 + (std::process::id() % (1 << 10)) * 64 + number * 4;
        let [here, there] = [1, 2].map(|host| Ipv4Addr::from(base + host));
        let link = format!("pv{}x{number}", std::process::id());
        let namespace = Namespace::connected(&link, &format!("{here}/30"), &format!("{there}/30")).unwrap();
        let listener = namespace.run(|| std::net::TcpListener::bind((there, 0)).unwrap()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let listener = Some(TcpListener::from_std(listener).unwrap());
        Self { namespace, link, listener, addr, waiting: Arc::default() }
    }

    /// Serves `/stream` with an endless body, `/wait` never, and anything else with `ok`.
    fn serve(&mut self, protocol: AppProtocol) {
        let (listener, waiting) = (self.listener.take().unwrap(), Arc::clone(&self.waiting));
        let acceptor = tokio_rustls::TlsAcceptor::from(tls());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, waiting) = (acceptor.clone(), Arc::clone(&waiting));
                match protocol {
                    AppProtocol::Http1 => drop(tokio::spawn(http1(stream, waiting))),
                    AppProtocol::H2c => drop(tokio::spawn(http2(stream, waiting))),
                    AppProtocol::Https => {
                        drop(tokio::spawn(async move { http1(acceptor.accept(stream).await?, waiting).await }));
                    }
                }
            }
        });
    }

    fn vanish(&self) {
        self.namespace.ip(&format!("link set {} down", self.link)).unwrap();
    }
}

fn tls() -> Arc<rustls::ServerConfig> {
    Certificate::new("models.example").unwrap().server(None).unwrap()
}

/// The near endpoints, one of each protocol.
struct Near {
    http1: ModelServer,
    http2: Http2Server,
    tls: TlsFront,
}

impl Near {
    async fn start() -> Self {
        let http1 = ModelServer::start(Options::default()).await.unwrap();
        let http2 = Http2Server::start(Http2Options::default()).await.unwrap();
        let tls = TlsFront::start(http1.addr, tls()).await.unwrap();
        Self { http1, http2, tls }
    }

    fn of(&self, protocol: AppProtocol) -> SocketAddr {
        match protocol {
            AppProtocol::Http1 => self.http1.addr,
            AppProtocol::Https => self.tls.addr,
            AppProtocol::H2c => self.http2.addr,
        }
    }

    /// Whether this is the server that answers, with TLS or without.
    fn serves(&self, server: SocketAddr) -> bool {
        [self.http1.addr, self.http2.addr].contains(&server)
    }

    fn requests(&self) -> u64 {
        self.http1.requests() + self.http2.requests()
    }
}

async fn http1(mut stream: impl AsyncRead + AsyncWrite + Unpin, waiting: Arc<AtomicU64>) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
        if bytes.starts_with(b"GET /stream ") {
            let begin = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\n5\r\nbegin\r\n";
            stream.write_all(begin).await?;
            stream.flush().await?;
            return std::future::pending().await;
        }
        // The JSON ends with its only closing brace.
        if bytes.ends_with(b"}") {
            if bytes.windows(7).any(|part| part == b" /wait ") {
                waiting.fetch_add(1, Ordering::Relaxed);
                return std::future::pending().await;
            }
            bytes.clear();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
            stream.flush().await?;
        }
    }
}

async fn http2(stream: TcpStream, waiting: Arc<AtomicU64>) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (mut request, mut respond) = accepted?;
        if request.uri().path() == "/wait" {
            let waiting = Arc::clone(&waiting);
            tokio::spawn(async move {
                while let Some(Ok(_)) = request.body_mut().data().await {}
                waiting.fetch_add(1, Ordering::Relaxed);
                let _open = (respond, request);
                std::future::pending::<()>().await;
            });
            continue;
        }
        let mut out = respond.send_response(http::Response::new(()), false)?;
        if request.uri().path() == "/stream" {
            out.send_data("begin".into(), false)?;
            tokio::spawn(async move {
                let _open = (out, request);
                std::future::pending::<()>().await;
            });
        } else {
            out.send_data("ok".into(), true)?;
        }
    }
    Ok(())
}

async fn agent(
    endpoints: &[SocketAddr],
    protocol: AppProtocol,
    mode: SteeringMode,
    adjust: impl FnOnce(&mut Config),
) -> (TestAgent, ScriptedEpp) {
    let named = endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let epp = ScriptedEpp::start(Answering::new(move |_| vec![reply::pick(&named, &[])])).await.unwrap();
    let insecure = PoolTls { verify: ServerTls::Insecure, ..PoolTls::default() };
    let tls = Some(insecure).filter(|_| protocol == AppProtocol::Https);
    let pool = Pool { app_protocol: protocol, tls, ..epp_pool(endpoints, epp.addr, FailureMode::Closed) };
    let agent = TestAgent::start(pool, mode, |config| {
        config.listen.workers = 1;
        config.timeouts.endpoint_unreachable = Some(Duration::from_secs(1));
        config.timeouts.connect = Some(Duration::from_millis(300));
        config.timeouts.endpoint_keep_alive = Duration::from_secs(60);
        adjust(config);
    });
    (agent, epp)
}

/// No byte of the request was acknowledged, so it is retried whatever its method, and is executed once.
#[tokio::test]
async fn vanished_machine_on_kept_connection_is_followed_by_next() {
    for (number, protocol) in (0..).zip(PROTOCOLS) {
        let mut far = Machine::new(number);
        far.serve(protocol);
        let near = Near::start().await;
        let (_agent, _epp) = agent(&[far.addr, near.of(protocol)], protocol, SteeringMode::Off, |config| {
            config.pools[0].retry.attempts = 0;
        })
        .await;
        let mut client = Client::connect(_agent.addr).await.unwrap();
        let request = echo(json("m", 100));
        assert_eq!(client.request(&request).await.unwrap().text(), "ok");
        far.vanish();
        let begin = Instant::now();
        let response = client.request(&request).await.unwrap();
        assert!(response.served_by().is_some_and(|server| near.serves(server)), "{protocol:?}: {}", response.text());
        assert_eq!(near.requests(), 1, "{protocol:?}");
        assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    }
}

/// The request was acknowledged, so it may have been executed.
#[tokio::test]
async fn vanished_machine_before_response_is_followed_by_next_only_if_idempotent() {
    let rows = PROTOCOLS.into_iter().flat_map(|protocol| ["POST", "PUT"].map(|method| (protocol, method)));
    for (number, (protocol, method)) in (10..).zip(rows) {
        let mut far = Machine::new(number);
        far.serve(protocol);
        let near = Near::start().await;
        let (agent, epp) = agent(&[far.addr, near.of(protocol)], protocol, SteeringMode::Off, |_| {}).await;
        let mut client = Client::connect(agent.addr).await.unwrap();
        let request = Request::new(method, "/wait").header("content-type", "application/json").body(json("m", 1000));
        client.send(&request).await.unwrap();
        eventually(SOON, || far.waiting.load(Ordering::Relaxed) == 1).await;
        sleep(DELAYED_ACK).await;
        far.vanish();
        let begin = Instant::now();
        let response = client.response().await.unwrap();
        assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
        let (near_requests, text) = (near.requests(), response.text());
        if method == "PUT" {
            let is_near = response.served_by().is_some_and(|server| near.serves(server));
            assert_eq!((is_near, near_requests), (true, 1), "{protocol:?}: {text}");
        } else {
            let found = (response.status(), response.error_code(), near_requests);
            assert_eq!(found, (502, "endpoint_closed".to_owned(), 0), "{protocol:?}: {text}");
        }
        eventually(SOON, || epp.streams_open() == 0).await;
    }
}

/// The client sees a broken response and the EPP learns of it, long before the idle timeout, even when steering is on and nothing
/// reads the connection.
#[tokio::test]
async fn vanished_machine_during_response_breaks_it_off() {
    let rows = [
        (20, AppProtocol::Http1, SteeringMode::Off),
        (21, AppProtocol::Http1, SteeringMode::Ingress),
        (22, AppProtocol::Https, SteeringMode::Off),
        (23, AppProtocol::H2c, SteeringMode::Off),
    ];
    for (number, protocol, mode) in rows {
        let mut far = Machine::new(number);
        far.serve(protocol);
        let (agent, epp) = agent(&[far.addr], protocol, mode, |_| {}).await;
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.send(&Request::get("/stream")).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        assert!(matches!(client.piece(usize::MAX).await.unwrap(), penstock_tests::client::Piece::Data(_)));
        far.vanish();
        let begin = Instant::now();
        let read = client.read_body(Pace::Fast, |_| Ok(())).await.unwrap();
        assert_ne!(read.end, BodyEnd::Complete, "{protocol:?} {mode:?}");
        assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
        eventually(SOON, || epp.streams_open() == 0).await;
        assert_eq!(epp.streams_ended(StreamEnd::HalfClosed), 0);
        eventually(SOON, || agent.count("penstock_requests_total", &[r#"reason="endpoint_broke""#]) == 1).await;
    }
}
