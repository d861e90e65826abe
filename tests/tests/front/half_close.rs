//! Clients that close their sending side after the request (`listen.half_close`).

use std::time::Duration;

use penstock_agent::config::{Config, HalfClose, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, Plan, Request,
    client::{ConnectionEnd, Piece},
    eventually,
    model_server::{Fault, FaultKind, Framing, HeadWrites, Lengths, Pauses},
    stage::json,
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
        let fault = Some(Fault { after: 100_000, kind: FaultKind::UntilTold });
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
