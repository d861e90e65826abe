//! Clients behind their own network: a slow link, a vanished machine, and a reachable client that reads nothing.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use penstock_agent::config::{
    Config, Epp, HalfClose, ListenTls, PathPattern, PickPer, Picker, Pool, Route, SteeringMode,
};
use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_tests::{
    BodyEnd, Client, Http2Client, Plan, Request, ScriptedEpp,
    agent::{TestAgent, builtin_pool},
    client::{ConnectionEnd, Response},
    eventually,
    model_server::{Fault, FaultKind, Framing, HeadWrites, Lengths, ModelServer, Options, Pauses, Upgraded},
    namespace::Namespace,
    scripted_epp::{Answer, Answering, Exchange, Script, StreamEnd, reply},
    tls::Certificate,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use crate::SOON;

/// An agent that clients reach from a network namespace.
struct FarClients {
    server: ModelServer,
    agent: TestAgent,
    there: Arc<Namespace>,
    name: String,
    certificate: Certificate,
    _folder: tempfile::TempDir,
}

impl FarClients {
    async fn new(mode: SteeringMode, pool: impl FnOnce(&mut Pool), adjust: impl FnOnce(&mut Config)) -> Self {
        // Benchmark addresses (RFC 2544), which hide no real host; several pairs per process.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed) % 16;
        let pair = std::process::id() % (1 << 10) * 16 + number;
        let [here, client] = [1, 2].map(|host| Ipv4Addr::from(0xc613_0000 + pair * 4 + host));
        let name = format!("far{pair}");
        let there = Namespace::connected(&name, &format!("{here}/30"), &format!("{client}/30")).unwrap();
        let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
        let mut settings = builtin_pool(&[server.addr]);
        pool(&mut settings);
        let certificate = Certificate::new("agent.example").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (cert_file, key_file) = certificate.write(folder.path()).unwrap();
        let agent = TestAgent::start(settings, mode, |config| {
            config.listen.address = SocketAddr::from((here, 0));
            config.listen.tls =
                Some(ListenTls { address: SocketAddr::from((here, 0)), cert_file, key_file, ..ListenTls::default() });
            adjust(config);
        });
        Self { server, agent, there: Arc::new(there), name, certificate, _folder: folder }
    }

    async fn connect(&self, addr: SocketAddr) -> TcpStream {
        let there = Arc::clone(&self.there);
        let socket = tokio::task::spawn_blocking(move || there.run(|| std::net::TcpStream::connect(addr)));
        let socket = socket.await.unwrap().unwrap().unwrap();
        socket.set_nonblocking(true).unwrap();
        TcpStream::from_std(socket).unwrap()
    }

    async fn client(&self) -> Client {
        Client::over(self.connect(self.agent.addr).await, self.agent.addr)
    }

    /// Limits what the client sends to this many bits a second.
    fn slow_down(&self, rate: &str) {
        let name = self.name.clone();
        let shape = move || {
            let args = format!("qdisc add dev {name} root tbf rate {rate} burst 16kb latency 50ms");
            Command::new("tc").args(args.split(' ')).output().unwrap()
        };
        let output = self.there.run(shape).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn vanish(&self) {
        self.there.ip(&format!("link set {} down", self.name)).unwrap();
    }
}

/// Sends everything before looking for a response, as simple clients do.
async fn upload<S: AsyncRead + AsyncWrite + Unpin>(
    mut client: Client<S>,
    request: &Request,
) -> (Response, ConnectionEnd) {
    client.patience = SOON;
    client.send(request).await.expect("the request was not sent whole");
    let response = client.response().await.expect("no response");
    (response, client.until_end().await.unwrap())
}

/// The rest of the upload takes longer than any pause, and the agent still reads it.
#[tokio::test]
async fn early_response_during_slow_upload_reaches_client() {
    const LIMIT: u64 = 100_000;
    let far = FarClients::new(
        SteeringMode::Off,
        |_| {},
        |config| {
            config.limits.body_bytes = LIMIT;
            config.routes = vec![Route { path: Some(PathPattern::Prefix("/test".into())), ..Route::to("default") }];
        },
    )
    .await;
    far.slow_down("20mbit");
    let body = vec![b'x'; 6 << 20];
    let begin = Instant::now();
    let rows = [
        (Request::post("/test/echo", body.clone()), 413),
        (Request::new("POST", "/test/echo").chunked(body.clone(), 50_000), 413),
        (Request::new("POST", "/nowhere").chunked(body.clone(), 50_000), 404),
    ];
    for (request, status) in &rows {
        let (response, end) = upload(far.client().await, request).await;
        assert_eq!((response.status(), response.header("connection")), (*status, Some("close")));
        assert_eq!(end, ConnectionEnd::Fin);
    }
    assert!(begin.elapsed() > Duration::from_secs(3), "the link was not slow: {:?}", begin.elapsed());
    let addr = far.agent.agent.tls_address().unwrap();
    let tls = far.certificate.over(far.connect(addr).await, &["http/1.1"]).await.unwrap();
    let (response, end) = upload(Client::over(tls, addr), &rows[0].0).await;
    assert_eq!((response.status(), end), (413, ConnectionEnd::Fin));
    eventually(SOON, || far.agent.metric("penstock_client_connections", &[]) == 0.0).await;
    assert_eq!(far.agent.count("penstock_client_lingers_cut_total", &[]), 0);
}

/// The picker's immediate replies and the agent's body timeout, while the client is still sending.
#[tokio::test]
async fn immediate_replies_and_408_during_slow_upload_reach_client() {
    let first = AtomicUsize::new(0);
    let why = "too much of it".repeat(1000);
    let answer = why.clone();
    let script = EarlyReply { answer, first };
    let epp = ScriptedEpp::start(script).await.unwrap();
    let picker = epp.addr;
    let far = FarClients::new(
        SteeringMode::Off,
        |pool| {
            let epp = Epp { health_interval: None, ..Epp::new(picker.to_string()) };
            pool.picker = Picker::Epp(epp);
        },
        |config| config.timeouts.body = Some(Duration::from_secs(60)),
    )
    .await;
    far.slow_down("20mbit");
    let upload_of = |length| Request::post("/test/echo", vec![b'x'; length]);
    for status in [413, 408] {
        let begin = Instant::now();
        let (response, end) = upload(far.client().await, &upload_of(4 << 20)).await;
        assert_eq!((response.status(), response.text().as_str(), end), (status, why.as_str(), ConnectionEnd::Fin));
        assert_eq!(response.header("connection"), Some("close"));
        assert!(begin.elapsed() > Duration::from_secs(1), "the link was not slow: {:?}", begin.elapsed());
    }
    assert_eq!(far.server.requests(), 0);
    assert_eq!(far.agent.count("penstock_client_lingers_cut_total", &[]), 0);

    let far =
        FarClients::new(SteeringMode::Off, |_| {}, |config| config.timeouts.body = Some(Duration::from_millis(300)))
            .await;
    far.slow_down("20mbit");
    let mut client = far.client().await;
    client.patience = SOON;
    let wire = upload_of(4 << 20).wire("agent");
    // The client pauses for longer than the timeout, and sends the rest before it looks for a response.
    client.send_raw(&wire[..100_000]).await.unwrap();
    eventually(SOON, || far.agent.count("penstock_requests_total", &[r#"reason="body_timeout""#]) == 1).await;
    client.send_raw(&wire[100_000..]).await.expect("the request was not sent whole");
    let response = client.response().await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (408, "body_timeout"));
    assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    assert_eq!(far.agent.count("penstock_client_lingers_cut_total", &[]), 0);
}

/// Replies to the request head: 413 to the first request, 408 to the others.
struct EarlyReply {
    answer: String,
    first: AtomicUsize,
}

#[tonic::async_trait]
impl Script for EarlyReply {
    async fn request_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        let status = if self.first.fetch_add(1, Ordering::Relaxed) == 0 { 413 } else { 408 };
        exchange.send(reply::immediate(status, &[], &self.answer)).await
    }

    async fn request_body(&self, _: &mut Exchange, _: &HttpBody) -> Answer {
        Ok(())
    }
}

/// Reading on is limited in time and in bytes.
#[tokio::test]
async fn client_sending_after_response_is_cut_at_limit() {
    let far = FarClients::new(
        SteeringMode::Off,
        |_| {},
        |config| {
            config.limits.body_bytes = 1000;
            config.limits.linger_bytes = 100_000;
            config.timeouts.linger = Duration::from_millis(1500);
        },
    )
    .await;
    let endless = || Request::post("/test/echo", vec![b'x'; 64 << 20]);
    let mut client = far.client().await;
    // The client notices while sending or at the end.
    let _ = client.send(&endless()).await;
    eventually(SOON, || far.agent.count("penstock_client_lingers_cut_total", &["reason=\"bytes\""]) == 1).await;
    // One client sends nothing more, the other continues slowly forever.
    let mut client = far.client().await;
    client.send_raw(b"POST /test/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n").await.unwrap();
    assert_eq!(client.response().await.unwrap().status(), 413);
    eventually(SOON, || far.agent.count("penstock_client_lingers_cut_total", &["reason=\"time\""]) == 1).await;
    eventually(SOON, || far.agent.metric("penstock_client_connections", &[]) == 0.0).await;
}

const UNREACHABLE: Duration = Duration::from_secs(3);

fn unreachable(config: &mut Config) {
    config.timeouts.client_unreachable = Some(UNREACHABLE);
    config.timeouts.idle = None;
    config.timeouts.keep_alive = None;
}

/// In each state of a request, on each path, the endpoint is notified in time.
async fn vanishes(mode: SteeringMode) {
    let far = FarClients::new(mode, |_| {}, unreachable).await;
    let head = HeadWrites { split_at: Some(0), pause_us: 600_000_000, ..HeadWrites::default() };
    let waits = Plan { head, ..Plan::default() };
    // A token now and then, in flight when the link goes down.
    let pauses = Some(Pauses { seed: 1, every: 1, up_to_us: 100_000 });
    let tokens =
        Plan { framing: Framing::Chunked, size: 1 << 30, writes: Lengths::Fixed(100), pauses, ..Plan::default() };
    let fault = Some(Fault { after: 1000, kind: FaultKind::StallMs(600_000) });
    let silent = Plan { framing: Framing::Chunked, size: 1 << 30, fault, ..Plan::default() };
    // Larger than the send queue, for a client that reads none of it.
    let full = Plan { size: 1 << 30, ..Plan::default() };
    let switched = Plan { size: 1 << 30, ..Plan::switching("websocket", Upgraded::Send) };
    let switch = switched.request().header("connection", "Upgrade").header("upgrade", "websocket");
    let mut clients = Vec::new();
    for request in [waits.request(), tokens.request(), silent.request(), full.request(), switch] {
        let mut client = far.client().await;
        client.send(&request).await.unwrap();
        clients.push(client);
    }
    let all = clients.len() as u64;
    eventually(SOON, || far.server.requests() == all).await;
    for client in &mut clients[1..] {
        client.head().await.unwrap();
    }
    let mut idle = far.client().await;
    assert_eq!(idle.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
    far.vanish();
    let begin = Instant::now();
    eventually(SOON, || far.agent.metric("penstock_client_connections", &[]) == 0.0).await;
    let took = begin.elapsed();
    assert!(took >= UNREACHABLE / 2, "{took:?}");
    assert!(took < 4 * UNREACHABLE, "{took:?}");
    eventually(SOON, || far.server.connections_open() == 0 || far.server.aborted() >= all - 1).await;
}

#[tokio::test]
async fn vanished_client_is_noticed_on_relay() {
    vanishes(SteeringMode::Off).await;
}

#[tokio::test]
async fn vanished_client_is_noticed_on_ingress() {
    vanishes(SteeringMode::Ingress).await;
}

#[tokio::test]
async fn vanished_client_is_noticed_on_local() {
    vanishes(SteeringMode::Local).await;
}

/// A client of HTTP/2, of TLS, of both, one of a pinned connection, and one that has half-closed. The EPP is told, too.
#[tokio::test]
async fn vanished_client_of_any_protocol_is_noticed() {
    let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
    let picked = server.addr.to_string();
    let epp = ScriptedEpp::start(Answering::new(move |_| vec![reply::pick(&picked, &[])])).await.unwrap();
    for protocol in [Protocol::Http2, Protocol::Tls1, Protocol::Tls2, Protocol::Pinned, Protocol::HalfClosed] {
        let far = FarClients::new(
            SteeringMode::Off,
            |pool| {
                pool.endpoints = vec![server.addr.into()];
                pool.picker = Picker::Epp(Epp { health_interval: None, ..Epp::new(epp.addr.to_string()) });
                if protocol == Protocol::Pinned {
                    pool.pick_per = PickPer::Connection;
                }
            },
            |config| {
                unreachable(config);
                if protocol == Protocol::HalfClosed {
                    config.listen.half_close = HalfClose::Answer;
                }
            },
        )
        .await;
        let (requests, aborted, cancelled) =
            (server.requests(), server.aborted(), epp.streams_ended(StreamEnd::Cancelled));
        let clients = far.clients_of(protocol).await;
        let all = clients.len() as u64;
        eventually(SOON, || server.requests() == requests + all).await;
        eventually(SOON, || epp.streams_open() == clients.len()).await;
        far.vanish();
        let begin = Instant::now();
        eventually(SOON, || far.agent.metric("penstock_client_connections", &[]) == 0.0).await;
        let took = begin.elapsed();
        assert!(took >= UNREACHABLE / 2 && took < 4 * UNREACHABLE, "{protocol:?}: {took:?}");
        eventually(SOON, || server.aborted() == aborted + all).await;
        eventually(SOON, || epp.streams_ended(StreamEnd::Cancelled) == cancelled + clients.len()).await;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http2,
    Tls1,
    Tls2,
    /// HTTP/1.1, as the following.
    Pinned,
    HalfClosed,
}

/// Keeps a client's connection open.
type Held = Box<dyn std::any::Any>;

impl FarClients {
    /// A client that waits for a head, one that waits for the next piece, and one that reads nothing; each on its own connection.
    async fn clients_of(&self, protocol: Protocol) -> Vec<Held> {
        let head = HeadWrites { split_at: Some(0), pause_us: 600_000_000, ..HeadWrites::default() };
        let fault = Some(Fault { after: 1000, kind: FaultKind::StallMs(600_000) });
        let rows = [
            (false, Plan { head, ..Plan::default() }),
            (true, Plan { framing: Framing::Chunked, size: 1 << 30, fault, ..Plan::default() }),
            (true, Plan { size: 1 << 30, ..Plan::default() }),
        ];
        let mut clients = Vec::new();
        for (answers, plan) in rows {
            clients.push(self.client_of(protocol, &plan, answers).await);
        }
        clients
    }

    /// A client after its request, and after the head of the response if it `answers`.
    async fn client_of(&self, protocol: Protocol, plan: &Plan, answers: bool) -> Held {
        let (plain, secure) = (self.agent.addr, self.agent.agent.tls_address().unwrap());
        let request = plan.request();
        match protocol {
            Protocol::Http2 => {
                let stream = self.connect(plain).await;
                let client = Http2Client::over(stream, "http", "agent", &mut h2::client::Builder::new()).await;
                ask_http2(client.unwrap(), &request, answers).await
            }
            Protocol::Tls2 => {
                let tls = self.certificate.over(self.connect(secure).await, &["h2"]).await.unwrap();
                let client = Http2Client::over(tls, "https", "agent.example", &mut h2::client::Builder::new()).await;
                ask_http2(client.unwrap(), &request, answers).await
            }
            Protocol::Tls1 => {
                let tls = self.certificate.over(self.connect(secure).await, &["http/1.1"]).await.unwrap();
                let mut client = Client::over(tls, secure);
                client.send(&request).await.unwrap();
                if answers {
                    assert_eq!(client.head().await.unwrap().status, 200);
                }
                Box::new(client)
            }
            Protocol::Pinned | Protocol::HalfClosed => {
                let mut client = self.client().await;
                client.send(&request).await.unwrap();
                if protocol == Protocol::HalfClosed {
                    client.finish().await.unwrap();
                }
                if answers {
                    assert_eq!(client.head().await.unwrap().status, 200);
                }
                Box::new(client)
            }
        }
    }
}

async fn ask_http2(mut client: Http2Client, request: &Request, answers: bool) -> Held {
    let mut stream = client.send(request).await.unwrap();
    if answers {
        assert_eq!(stream.head().await.unwrap().status, 200);
    }
    Box::new((client, stream))
}

/// Between two probes of its window the kernel would wait longer than the client may be unreachable: 0.2 s, 0.4 s, … 6.4 s. Linux
/// takes a bound on that since 6.15.
#[tokio::test]
async fn client_that_vanishes_long_after_it_shut_its_window_is_noticed() {
    let far = FarClients::new(SteeringMode::Off, |_| {}, unreachable).await;
    let mut client = far.client().await;
    client.send(&Plan { size: 1 << 30, ..Plan::default() }.request()).await.unwrap();
    client.head().await.unwrap();
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(far.agent.metric("penstock_client_connections", &[]), 1.0);
    far.vanish();
    let begin = Instant::now();
    eventually(SOON, || far.agent.metric("penstock_client_connections", &[]) == 0.0).await;
    assert!(begin.elapsed() < 2 * UNREACHABLE, "{:?}", begin.elapsed());
}

/// TCP_USER_TIMEOUT alone would end it: each window probe is acknowledged, and none opens the window.
#[tokio::test]
async fn reachable_client_that_reads_nothing_is_kept() {
    let far = FarClients::new(
        SteeringMode::Auto,
        |pool| pool.pick_per = PickPer::Request,
        |config| {
            unreachable(config);
            config.timeouts.client_unreachable = Some(Duration::from_secs(1));
        },
    )
    .await;
    let plan = Plan { size: 24 << 20, stream_id: 1, ..Plan::default() };
    let mut client = far.client().await;
    client.patience = SOON;
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mut checker = plan.checker();
    let read = client.read_body(penstock_tests::client::Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
}
