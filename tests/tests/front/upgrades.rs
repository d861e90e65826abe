//! Protocol switches (RFC 9110 §7.8): after the 101, bytes and closes pass between client and endpoint unchanged.

mod ends;
mod refused;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{SinkExt as _, StreamExt as _, future::join_all};
use penstock_agent::config::{Config, SteeringMode};
use penstock_tests::{
    Alphabet, BodyEnd, Checker, Client, Plan, Request,
    agent::{TestAgent, builtin_pool},
    client::ConnectionEnd,
    content::Fnv,
    eventually,
    model_server::{Echo, Fault, FaultKind, Framing, Lengths, ModelServer, Pauses, Received, Upgraded},
    random::Random,
    scripted_epp::{EvictAfter, Evicting, LlmdRouter, StreamEnd},
    stage::json,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Notify,
    time::timeout,
};
use tokio_tungstenite::{WebSocketStream, accept_async, client_async, tungstenite::Message};

use crate::{
    SOON,
    scene::{Asker, Back, Endpoint, Front, Scene, first},
};

/// Plain on each path, and over TLS.
const WAYS: [(Front, SteeringMode); 5] = [
    (Front::Http1, SteeringMode::Off),
    (Front::Http1, SteeringMode::Ingress),
    (Front::Http1, SteeringMode::Local),
    STEERED,
    (Front::Tls1, SteeringMode::Auto),
];
const MODES: [SteeringMode; 4] = [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto];
const STEERED: (Front, SteeringMode) = (Front::Http1, SteeringMode::Auto);

async fn scene((front, mode): (Front, SteeringMode)) -> Scene {
    Scene::with(front, Back::Http1, first, |config| config.steering.mode = mode).await
}

fn server(scene: &Scene) -> &ModelServer {
    match &scene.endpoint {
        Endpoint::Http1(server) | Endpoint::Https(server, _) => server,
        Endpoint::Http2(_) => panic!("the endpoint speaks HTTP/2"),
    }
}

/// A GET that requests a switch; the plan determines the response.
fn switch(plan: &Plan) -> Request {
    Request::get("/test/upgrade")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("x-test-plan", plan.header())
}

trait Both: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Both for S {}

/// The client's side of a switched connection.
struct Switched {
    from: ReadHalf<Box<dyn Both>>,
    to: WriteHalf<Box<dyn Both>>,
}

impl Switched {
    /// Sends `request` directly followed by bytes; returns the connection after the 101 and the bytes that followed it directly.
    async fn new(scene: &Scene, request: &Request, early: &[u8]) -> (Self, Vec<u8>) {
        let wire = [&request.wire("agent"), early].concat();
        match scene.client().await {
            Asker::Http1(client) => Self::over(client, &wire).await,
            Asker::Tls1(client) => Self::over(client, &wire).await,
            Asker::Http2(..) => panic!("HTTP/2 cannot switch protocols"),
        }
    }

    async fn over<S: Both + 'static>(mut client: Client<S>, wire: &[u8]) -> (Self, Vec<u8>) {
        client.send_raw(wire).await.unwrap();
        let head = client.head().await.unwrap();
        assert_eq!((head.status, head.header("upgrade")), (101, Some("websocket")), "{head:?}");
        assert_eq!(head.header("connection").map(str::to_ascii_lowercase).as_deref(), Some("upgrade"));
        assert_eq!((head.header("content-length"), head.header("transfer-encoding")), (None, None));
        let (stream, early) = client.into_parts();
        let stream: Box<dyn Both> = Box::new(stream);
        let (from, to) = split(stream);
        (Self { from, to }, early.to_vec())
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.to.write_all(bytes).await.unwrap();
        self.to.flush().await.unwrap();
    }

    /// Reads this many bytes.
    async fn read(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        timeout(SOON, self.from.read_exact(&mut bytes)).await.expect("timed out").unwrap();
        bytes
    }

    /// Reads to the end; returns the bytes and how the connection ended.
    async fn rest(&mut self) -> (Vec<u8>, ConnectionEnd) {
        let mut bytes = Vec::new();
        let end = timeout(SOON, self.from.read_to_end(&mut bytes)).await.expect("timed out");
        (bytes, if end.is_ok() { ConnectionEnd::Fin } else { ConnectionEnd::Reset })
    }

    /// Sends the bytes of a stream in pieces, then closes.
    async fn upload(&mut self, stream_id: u64, size: u64) {
        let (mut at, mut random) = (0, Random::new(stream_id));
        while at < size {
            let length = (1 + random.below(20_000)).min(size - at);
            self.send(&Alphabet::Binary.bytes(stream_id, at, length as usize)).await;
            at += length;
        }
        self.to.shutdown().await.unwrap();
    }
}

fn whole(bytes: &[u8]) -> Received {
    Received { length: bytes.len() as u64, hash: Fnv::of(bytes).value(), end: ConnectionEnd::Fin }
}

/// Asserts that the received bytes are the stream's, from its start.
fn assert_stream(stream_id: u64, size: u64, pieces: &[&[u8]]) {
    let mut checker = Checker::new(stream_id);
    for piece in pieces {
        checker.feed(piece).unwrap();
    }
    assert_eq!(checker.offset(), size);
}

/// In any interleaving; counted as one relayed request; the picker's stream lives as long as the connection.
#[tokio::test]
async fn bytes_flow_both_ways() {
    let https = [WAYS[0], STEERED, WAYS[4]].map(|way| (way, Back::Https));
    for (way, back) in WAYS.map(|way| (way, Back::Http1)).into_iter().chain(https) {
        let scene = Scene::with(way.0, back, first, |config| config.steering.mode = way.1).await;
        let plan = Plan {
            size: 1 << 20,
            stream_id: 7,
            writes: Lengths::Random { seed: 1, max: 20_000 },
            pauses: Some(Pauses { seed: 2, every: 7, up_to_us: 2000 }),
            ..Plan::switching("websocket", Upgraded::Send)
        };
        let (mut client, early) = Switched::new(&scene, &switch(&plan), b"").await;
        assert_eq!(scene.epp.streams_open(), 1);
        let Switched { from, to } = &mut client;
        let mut down = Vec::new();
        let read = async { timeout(SOON, from.read_to_end(&mut down)).await.expect("timed out").unwrap() };
        let write = async {
            for at in (0..1 << 20).step_by(10_000) {
                let length = 10_000.min((1 << 20) - at);
                to.write_all(&Alphabet::Binary.bytes(8, at, length as usize)).await.unwrap();
                to.flush().await.unwrap();
            }
            to.shutdown().await.unwrap();
        };
        tokio::join!(read, write);
        assert_stream(7, 1 << 20, &[&early, &down]);
        eventually(SOON, || server(&scene).received().len() == 1).await;
        assert_eq!(server(&scene).received()[0], whole(&Alphabet::Binary.bytes(8, 0, 1 << 20)));
        eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
        eventually(SOON, || server(&scene).connections_open() == 0).await;
        let flows = || scene.agent.count("penstock_flows_total", &["reason=\"upgrade\""]);
        eventually(SOON, || flows() == 1).await;
        assert_eq!(scene.agent.count("penstock_upstream_bytes_total", &[]), 1 << 20, "{way:?}");
        assert_eq!(scene.agent.count("penstock_requests_total", &["reason=\"ok\""]), 1);
        eventually(SOON, || scene.agent.metric("penstock_client_connections", &[]) == 0.0).await;
        // The endpoint received the agent's own upgrade fields.
        let seen = server(&scene).seen();
        assert_eq!((seen[0].header("connection"), seen[0].header("upgrade")), (Some("upgrade"), Some("websocket")));
        assert_eq!(seen[0].body_framing, "none");
    }
}

/// Both directions, with the endpoint and the client taking turns waiting.
#[tokio::test]
async fn both_directions_are_steered() {
    for way in WAYS {
        let scene = scene(way).await;
        let (mut client, _) = Switched::new(&scene, &switch(&Plan::switching("websocket", Upgraded::Echo)), b"").await;
        for number in 0..200 {
            let bytes = Alphabet::Binary.bytes(number, 0, 3000);
            client.send(&bytes).await;
            assert_eq!(client.read(3000).await, bytes);
        }
        client.to.shutdown().await.unwrap();
        assert_eq!(client.rest().await, (Vec::new(), ConnectionEnd::Fin));
        eventually(SOON, || scene.agent.metric("penstock_client_connections", &[]) == 0.0).await;
        let (down, up) = (scene.agent.steered(), scene.agent.steered_up());
        let expected = match way {
            (Front::Http1, SteeringMode::Ingress | SteeringMode::Auto) => (true, true),
            (Front::Http1, SteeringMode::Local) => (true, false),
            _ => (false, false),
        };
        assert_eq!((down > 0, up > 0), expected, "{way:?}: {down} down, {up} up");
        let local = scene.agent.count("penstock_body_bytes_total", &["path=\"local\""]);
        let is_local = way.0 == Front::Http1 && scene.agent.carries_tunnels_locally();
        assert_eq!(local > 0, is_local, "{way:?}: {local} bytes");
        assert_eq!(scene.agent.count("penstock_upstream_bytes_total", &[]), 600_000, "{way:?}");
    }
}

/// Bytes directly after the request head and the response head, in any split.
#[tokio::test]
async fn early_bytes_are_delivered() {
    for way in WAYS {
        let scene = scene(way).await;
        for (with_body, split_at) in [(true, None), (false, None), (true, Some(20)), (false, Some(40))] {
            let mut plan = Plan { size: 5000, stream_id: 1, ..Plan::switching("websocket", Upgraded::Send) };
            (plan.head.with_body, plan.head.split_at) = (with_body, split_at);
            let up = Alphabet::Binary.bytes(2, 0, 3000);
            let before = server(&scene).received().len();
            let (mut client, early) = Switched::new(&scene, &switch(&plan), &up[..2000]).await;
            client.send(&up[2000..]).await;
            client.to.shutdown().await.unwrap();
            let (rest, end) = client.rest().await;
            assert_eq!(end, ConnectionEnd::Fin);
            assert_stream(1, 5000, &[&early, &rest]);
            eventually(SOON, || server(&scene).received().len() == before + 1).await;
            assert_eq!(server(&scene).received()[before], whole(&up));
        }
    }
}

/// The end of one direction is forwarded, and the other direction continues.
#[tokio::test]
async fn half_close_by_either_side_is_forwarded() {
    for way in WAYS {
        let scene = scene(way).await;
        // The client ends first; the endpoint waits for that.
        let plan = Plan { size: 300_000, stream_id: 1, ..Plan::switching("websocket", Upgraded::SendLast) };
        let (mut client, early) = Switched::new(&scene, &switch(&plan), b"").await;
        client.upload(2, 100_000).await;
        let (rest, end) = client.rest().await;
        assert_eq!(end, ConnectionEnd::Fin);
        assert_stream(1, 300_000, &[&early, &rest]);
        assert_eq!(server(&scene).received()[0], whole(&Alphabet::Binary.bytes(2, 0, 100_000)));
        // The endpoint ends first; the client continues when it has seen that.
        let plan = Plan { size: 1000, stream_id: 3, ..Plan::switching("websocket", Upgraded::Send) };
        let (mut client, early) = Switched::new(&scene, &switch(&plan), b"").await;
        let (rest, end) = client.rest().await;
        assert_eq!(end, ConnectionEnd::Fin);
        assert_stream(3, 1000, &[&early, &rest]);
        assert_eq!(server(&scene).received().len(), 1);
        client.upload(4, 300_000).await;
        eventually(SOON, || server(&scene).received().len() == 2).await;
        assert_eq!(server(&scene).received()[1], whole(&Alphabet::Binary.bytes(4, 0, 300_000)));
        eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 2).await;
    }
}

/// Unread bytes of one direction do not block the other, although the kernel may hold them in one queue with what that peer
/// sends.
#[tokio::test]
async fn peer_sending_before_reading_is_not_blocked() {
    join_all(MODES.map(async |mode| {
        let (agent, mut client, mut endpoint) = ends(mode).await;
        let filled = fill(&mut endpoint, 1).await;
        exact(&mut client, &mut endpoint, 2, 4 << 20).await;
        exact_from(&mut client, 1, filled).await;
        let filled = fill(&mut client, 3).await;
        exact(&mut endpoint, &mut client, 4, 4 << 20).await;
        exact_from(&mut endpoint, 3, filled).await;
        drop((client, endpoint));
        eventually(SOON, || agent.metric("penstock_client_connections", &[]) == 0.0).await;
        assert!(agent.steered() > 0 || mode == SteeringMode::Off, "{mode:?}");
    }))
    .await;
}

/// An agent and both ends of a switched connection, each with a small receive buffer.
async fn ends(mode: SteeringMode) -> (TestAgent, TcpStream, TcpStream) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(2048).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let agent = TestAgent::start(builtin_pool(&[listener.local_addr().unwrap()]), mode, |_| {});
    let mut client = Client::connect_with(agent.addr, Some(2048)).await.unwrap();
    client.send(&switch(&Plan::default())).await.unwrap();
    let mut endpoint = listener.accept().await.unwrap().0;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(endpoint.read_u8().await.unwrap());
    }
    endpoint.write_all(b"HTTP/1.1 101 ok\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 101);
    let (client, early) = client.into_parts();
    assert!(early.is_empty());
    (agent, client, endpoint)
}

/// Sends more of a stream than all buffers hold, token by token; returns the number of bytes.
async fn fill(to: &mut TcpStream, stream_id: u64) -> u64 {
    let mut filled = 0;
    loop {
        let bytes = Alphabet::Binary.bytes(stream_id, filled, 60_000);
        let Ok(written) = timeout(Duration::from_millis(300), to.write(&bytes)).await else { return filled };
        filled += written.unwrap() as u64;
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
}

/// Asserts that the first bytes of a stream arrive.
async fn exact(to: &mut TcpStream, from: &mut TcpStream, stream_id: u64, size: u64) {
    let bytes = Alphabet::Binary.bytes(stream_id, 0, size as usize);
    let write = async { timeout(SOON, to.write_all(&bytes)).await.expect("timed out").unwrap() };
    tokio::join!(write, exact_from(from, stream_id, size));
}

async fn exact_from(from: &mut TcpStream, stream_id: u64, size: u64) {
    let mut bytes = vec![0; size as usize];
    timeout(SOON, from.read_exact(&mut bytes)).await.expect("timed out").unwrap();
    assert_stream(stream_id, size, &[&bytes]);
}

/// The endpoint's earlier responses were steered: neither side is still a target or source.
#[tokio::test]
async fn upgrade_after_steered_responses_works() {
    let ingress = |config: &mut Config| {
        config.steering.mode = SteeringMode::Ingress;
        config.listen.workers = 1;
    };
    let scene = Scene::with(Front::Http1, Back::Http1, first, ingress).await;
    let mut client = Client::connect(scene.agent.addr).await.unwrap();
    let pauses = Some(Pauses { seed: 1, every: 5, up_to_us: 2000 });
    let steered = Plan { size: 500_000, writes: Lengths::Fixed(10_000), pauses, ..Plan::default() };
    // On a busy machine a whole response may arrive before the agent looks at it.
    let begin = Instant::now();
    for number in 1.. {
        let response = client.request(&steered.request()).await.unwrap();
        steered.checker().feed(&response.body).unwrap();
        eventually(SOON, || scene.agent.count("penstock_flows_total", &[]) == number).await;
        if scene.agent.steered() > 0 {
            break;
        }
        assert!(begin.elapsed() < SOON, "no response was steered");
    }
    // The same two connections.
    let plan = Plan { size: 1 << 20, stream_id: 7, pauses, ..Plan::switching("websocket", Upgraded::Send) };
    let (mut client, early) = Switched::over(client, &switch(&plan).wire("agent")).await;
    assert_eq!(server(&scene).connections_accepted(), 1);
    client.upload(8, 200_000).await;
    let (rest, end) = client.rest().await;
    assert_eq!(end, ConnectionEnd::Fin);
    assert_stream(7, 1 << 20, &[&early, &rest]);
    eventually(SOON, || server(&scene).received().len() == 1).await;
    assert_eq!(server(&scene).received()[0], whole(&Alphabet::Binary.bytes(8, 0, 200_000)));
}

/// A WebSocket library on both sides.
#[tokio::test]
async fn websocket_messages_pass() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pool = builtin_pool(&[listener.local_addr().unwrap()]);
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    let served = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut socket: WebSocketStream<TcpStream> = accept_async(tcp).await.unwrap();
        let mut messages = 0;
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() || message.is_binary() {
                messages += 1;
                socket.send(message).await.unwrap();
            }
        }
        messages
    });
    let tcp = TcpStream::connect(agent.addr).await.unwrap();
    let (mut socket, response) = client_async(format!("ws://{}/v1/realtime?model=m", agent.addr), tcp).await.unwrap();
    assert_eq!(response.status(), 101);
    for number in 0..50 {
        let bytes = Alphabet::Binary.bytes(number, 0, number as usize * 3000);
        socket.send(Message::binary(bytes.clone())).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::binary(bytes));
        socket.send(Message::text(number.to_string())).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(number.to_string()));
    }
    socket.close(None).await.unwrap();
    assert!(matches!(socket.next().await, Some(Ok(Message::Close(_)))));
    assert!(socket.next().await.is_none());
    drop(socket);
    assert_eq!(served.await.unwrap(), 100);
    eventually(SOON, || agent.count("penstock_flows_total", &["reason=\"upgrade\""]) == 1).await;
}
