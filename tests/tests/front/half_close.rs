//! Clients that close their sending side after the request (`listen.half_close`).

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use penstock_agent::config::{Config, HalfClose, PickPer, Pool, SteeringMode};
use penstock_tests::{
    Alphabet, BodyEnd, Checker, Client, Deaf, Plan, Request,
    agent::{TestAgent, builtin_pool},
    client::{ConnectionEnd, Piece},
    eventually,
    model_server::{Fault as BodyFault, FaultKind, Framing, HeadWrites, Lengths, Pauses},
    scripted_epp::{Answering, Fault, Faulty, Harm, Moment, StreamEnd, reply},
    stage::json,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::{
    SOON,
    scene::{Asker, Back, Endpoint, Front, Scene, first},
};

const MODES: [SteeringMode; 4] = [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto];

async fn scene(front: Front, back: Back, mode: SteeringMode, half_close: HalfClose) -> Scene {
    Scene::with(front, back, first, |config: &mut Config| {
        config.listen.half_close = half_close;
        config.steering.mode = mode;
    })
    .await
}

/// A delayed head and a body that arrives piece by piece.
fn slow(stream_id: u64) -> Plan {
    Plan {
        framing: Framing::Chunked,
        size: 300_000,
        stream_id,
        head: HeadWrites { split_at: Some(0), pause_us: 200_000, ..HeadWrites::default() },
        writes: Lengths::Fixed(5000),
        pauses: Some(Pauses { seed: stream_id, every: 1, up_to_us: 10_000 }),
        ..Plan::default()
    }
}

async fn finish(client: &mut Asker) {
    match client {
        Asker::Http1(client) => client.finish().await.unwrap(),
        Asker::Tls1(client) => client.finish().await.unwrap(),
        Asker::Http2(..) => panic!("HTTP/2 connections cannot be half-closed"),
    }
}

async fn answered(scene: &Scene, request: Request, plan: &Plan) {
    let mut client = scene.client().await;
    client.send(&request).await.unwrap();
    finish(&mut client).await;
    assert_eq!(client.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    let read = client.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, checker.offset()), (BodyEnd::Complete, plan.size));
    let end = match client {
        Asker::Http1(mut client) => client.until_end().await.unwrap(),
        Asker::Tls1(mut client) => client.until_end().await.unwrap(),
        Asker::Http2(..) => unreachable!(),
    };
    assert_eq!(end, ConnectionEnd::Fin);
}

/// With and without a body, in every state of the request, on each path.
#[tokio::test]
async fn half_closed_client_with_half_close_enabled_is_answered() {
    let ways = MODES.map(|mode| (Front::Http1, Back::Http1, mode));
    let others = [(Front::Http1, Back::Http2, SteeringMode::Off), (Front::Tls1, Back::Http1, SteeringMode::Auto)];
    for (front, back, mode) in ways.into_iter().chain(others) {
        let scene = scene(front, back, mode, HalfClose::Answer).await;
        let plan = slow(1);
        answered(&scene, plan.request(), &plan).await;
        let post = Request::post("/test/body", json("m", 50_000)).header("x-test-plan", plan.header());
        answered(&scene, post, &plan).await;
        if front == Front::Http1 && matches!(mode, SteeringMode::Ingress | SteeringMode::Auto) {
            let flows = scene.agent.count("penstock_flows_total", &["reason=\"half_close\""]);
            assert_eq!(flows, 2, "{mode:?}");
        }
    }
}

/// The client half-closes while its response is steered.
#[tokio::test]
async fn half_close_during_response_keeps_rest() {
    for mode in MODES {
        let scene = scene(Front::Http1, Back::Http1, mode, HalfClose::Answer).await;
        let fault = Some(BodyFault { after: 100_000, kind: FaultKind::UntilTold });
        let plan = Plan { fault, ..slow(2) };
        let mut client = Client::connect(scene.agent.addr).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut checker = plan.checker();
        while checker.offset() < 50_000 {
            let Piece::Data(data) = client.piece(usize::MAX).await.unwrap() else { panic!("{mode:?}: ended") };
            checker.feed(&data).unwrap();
        }
        client.finish().await.unwrap();
        let Endpoint::Http1(server) = &scene.endpoint else { unreachable!() };
        server.resume();
        let read =
            client.read_body(penstock_tests::client::Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
        assert_eq!((read.end, checker.offset()), (BodyEnd::Complete, plan.size), "{mode:?}");
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    }
}

/// A reset counts as leaving, whatever came before.
#[tokio::test]
async fn reset_after_half_close_ends_request() {
    for mode in MODES {
        let scene = scene(Front::Http1, Back::Http1, mode, HalfClose::Answer).await;
        let head = HeadWrites { split_at: Some(0), pause_us: 600_000_000, ..HeadWrites::default() };
        let endless = Plan { size: 1 << 40, ..slow(3) };
        for (aborted, plan) in [(1, Plan { head, ..Plan::default() }), (2, endless)] {
            let requests = scene.endpoint.requests();
            let mut client = Client::connect(scene.agent.addr).await.unwrap();
            client.send(&plan.request()).await.unwrap();
            client.finish().await.unwrap();
            eventually(SOON, || scene.endpoint.requests() == requests + 1).await;
            if plan.size > 0 {
                assert_eq!(client.head().await.unwrap().status, 200);
            }
            client.reset().unwrap();
            eventually(Duration::from_secs(10), || scene.endpoint.aborted() == aborted).await;
        }
    }
}

/// The client half-closes while the EPP decides, and while the agent connects to an endpoint.
#[tokio::test]
async fn client_half_closed_before_dispatch_is_answered() {
    const WAIT: Duration = Duration::from_millis(400);
    let ways = MODES.map(|mode| (Front::Http1, mode)).into_iter().chain([(Front::Tls1, SteeringMode::Auto)]);
    for (front, mode) in ways {
        let adjust = |config: &mut Config| {
            config.listen.half_close = HalfClose::Answer;
            config.steering.mode = mode;
        };
        let thinks = |all: &[SocketAddr]| Faulty::new(first(all), Fault::At(Moment::RequestHeaders, Harm::Delay(WAIT)));
        let scene = Scene::with(front, Back::Http1, thinks, adjust).await;
        let begin = Instant::now();
        answered(&scene, slow(5).request(), &slow(5)).await;
        assert!(begin.elapsed() >= WAIT);

        let deaf = Deaf::new().unwrap();
        let both = |all: &[SocketAddr]| {
            let named = format!("{},{}", deaf.addr, all[0]);
            Answering::new(move |_| vec![reply::pick(&named, &[])])
        };
        let scene = Scene::with(front, Back::Http1, both, |config| {
            adjust(config);
            config.pools[0].endpoints.push(deaf.addr.into());
            config.timeouts.connect = Some(WAIT);
        })
        .await;
        let begin = Instant::now();
        answered(&scene, slow(6).request(), &slow(6)).await;
        assert!(begin.elapsed() >= WAIT);
        assert_eq!(scene.agent.count("penstock_endpoint_retries_total", &[r#"reason="connect""#]), 1);
    }
}

/// Answers `/first` at once. Answers `/last` after the end of what the client sends, and then closes.
async fn last_word(listener: TcpListener) -> std::io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut bytes = Vec::new();
            while stream.read_buf(&mut bytes).await? > 0 {
                if bytes.starts_with(b"GET /first ") && bytes.ends_with(b"\r\n\r\n") {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
                    bytes.clear();
                }
            }
            assert!(bytes.starts_with(b"GET /last ") && bytes.ends_with(b"\r\n\r\n"), "{}", bytes.escape_ascii());
            tokio::time::sleep(Duration::from_millis(200)).await;
            stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {LAST}\r\n\r\n").as_bytes()).await?;
            for piece in Alphabet::Binary.bytes(7, 0, LAST).chunks(10_000) {
                stream.write_all(piece).await?;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            stream.shutdown().await
        });
    }
}

/// Bytes of the response to `/last`.
const LAST: usize = 200_000;

/// A pinned connection passes the end of each side on, and waits for the other.
#[tokio::test]
async fn half_closed_client_of_pinned_connection_is_answered() {
    for mode in MODES {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pool = Pool { pick_per: PickPer::Connection, ..builtin_pool(&[listener.local_addr().unwrap()]) };
        tokio::spawn(last_word(listener));
        let agent = TestAgent::start(pool, mode, |config| config.listen.half_close = HalfClose::Answer);
        let mut client = Client::connect(agent.addr).await.unwrap();
        assert_eq!(client.request(&Request::get("/first")).await.unwrap().text(), "ok", "{mode:?}");
        eventually(SOON, || agent.metric("penstock_pinned_connections", &[]) == 1.0).await;
        client.send(&Request::get("/last")).await.unwrap();
        client.finish().await.unwrap();
        let response = client.response().await.unwrap();
        Checker::new(7).feed(&response.body).unwrap();
        assert_eq!((response.status(), response.body.len()), (200, LAST), "{mode:?}");
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin, "{mode:?}");
        eventually(SOON, || agent.count("penstock_pins_ended_total", &[r#"reason="ok""#]) == 1).await;
    }
}

/// A client that half-closes and then leaves is noticed by the first bytes that are sent to it, which its kernel answers with a reset.
#[tokio::test]
async fn failed_write_after_half_close_ends_request() {
    for mode in MODES {
        let scene = scene(Front::Http1, Back::Http1, mode, HalfClose::Answer).await;
        let mut client = Client::connect(scene.agent.addr).await.unwrap();
        client.send(&Plan { size: 1 << 40, ..slow(8) }.request()).await.unwrap();
        client.finish().await.unwrap();
        eventually(SOON, || scene.endpoint.requests() == 1).await;
        // Before the head: everything was read, so this sends nothing.
        drop(client);
        eventually(SOON, || scene.endpoint.aborted() == 1).await;
        let gone = || scene.agent.count("penstock_requests_total", &[r#"reason="client_gone""#]);
        eventually(SOON, || gone() == 1).await;
        eventually(SOON, || scene.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
    }
}

/// The default of nginx, Envoy and Go, in each state of the request.
#[tokio::test]
async fn half_close_by_default_ends_request() {
    let ways = MODES.map(|mode| (Front::Http1, mode)).into_iter().chain([(Front::Tls1, SteeringMode::Auto)]);
    for (front, mode) in ways {
        let scene = scene(front, Back::Http1, mode, HalfClose::Cancel).await;
        let head = HeadWrites { split_at: Some(0), pause_us: 600_000_000, ..HeadWrites::default() };
        let endless = Plan { size: 1 << 40, ..slow(4) };
        for (aborted, plan) in [(1, Plan { head, ..Plan::default() }), (2, endless)] {
            let requests = scene.endpoint.requests();
            let mut client = scene.client().await;
            client.send(&plan.request()).await.unwrap();
            eventually(SOON, || scene.endpoint.requests() == requests + 1).await;
            if plan.size > 0 {
                assert_eq!(client.head().await.unwrap().status, 200);
            }
            finish(&mut client).await;
            eventually(SOON, || scene.endpoint.aborted() == aborted).await;
        }
    }
}
