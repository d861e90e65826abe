//! Departing clients, and a departing agent.

use std::{net::SocketAddr, time::Duration};

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    BodyEnd, Client, Deaf, ModelServer, Plan, Request, Stage,
    agent::{TestAgent, builtin_pool},
    client::{ConnectionEnd, Pace},
    eventually,
    model_server::{HeadWrites, Options},
    scripted_epp::{Answering, Fault, Faulty, Harm, Moment, Production, StreamEnd, reply},
    stage::{echo, epp, json},
};

use crate::SOON;

/// A departed client is noticed within this time.
const AT_ONCE: Duration = Duration::from_secs(2);

/// E18: before the pick.
#[tokio::test]
async fn client_disconnect_before_pick_cancels_stream() {
    let silent = Fault::At(Moment::RequestBody(usize::MAX), Harm::Silence);
    let stage = Stage::new(|all| Faulty::new(Production::new(all), silent)).await;
    leaves(&stage, &echo(json("m", 100_000)), || {
        stage.epp.streams().first().is_some_and(|stream| stream.request_body().1 == 1)
    })
    .await;
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
    assert_eq!(stage.requests(), (0, 0));
    eventually(SOON, || stage.agent.metric("penstock_client_aborts_total", &[]) == 1.0).await;
    // The connections to the picker stay open.
    eventually(SOON, || stage.epp.connections_open() == stage.workers()).await;
    assert_eq!(stage.epp.connections_accepted(), stage.workers());
}

/// Sends `request` and resets the connection once `then` holds.
async fn leaves(stage: &Stage, request: &Request, then: impl FnMut() -> bool) {
    let mut client = Client::connect(stage.agent.addr).await.unwrap();
    client.send(request).await.unwrap();
    eventually(SOON, then).await;
    client.reset().unwrap();
}

/// D6, E18: with a partial body and with no body sent; by an orderly close and by a reset.
#[tokio::test]
async fn client_disconnect_during_upload_cancels_stream() {
    for reset in [false, true] {
        let stage = Stage::new(Production::new).await;
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        let wire = echo(json("m", 1 << 20)).wire("agent");
        client.send_raw(&wire[..100_000]).await.unwrap();
        eventually(SOON, || stage.epp.streams().first().is_some_and(|stream| !stream.request_body().0.is_empty()))
            .await;
        if reset {
            client.reset().unwrap();
        } else {
            drop(client);
        }
        eventually(AT_ONCE, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
        eventually(AT_ONCE, || stage.agent.metric("penstock_active_requests", &[]) == 0.0).await;
        assert_eq!(stage.requests(), (0, 0));
    }
}

/// D6, E18: while the picker stops reading the body; by an orderly close and by a reset.
#[tokio::test]
async fn client_disconnect_with_stalled_picker_cancels_stream() {
    for reset in [false, true] {
        let deaf = Fault::At(Moment::RequestHeaders, Harm::Silence);
        let stage = Stage::new(|all| Faulty::new(Production::new(all), deaf)).await;
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        // Larger than all buffers in between.
        let wire = echo(json("m", 16 << 20)).wire("agent");
        client.send_raw(&wire[..12 << 20]).await.unwrap();
        eventually(SOON, || stage.epp.streams_started() == 1).await;
        if reset {
            client.reset().unwrap();
        } else {
            drop(client);
        }
        eventually(AT_ONCE, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
        eventually(AT_ONCE, || stage.agent.metric("penstock_active_requests", &[]) == 0.0).await;
        assert_eq!(stage.requests(), (0, 0));
    }
}

/// Before the model is known, and with it the pool.
#[tokio::test]
async fn client_disconnect_before_the_model_is_counted() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    let wire = echo(json("m", 1 << 20)).wire("agent");
    client.send_raw(&wire[..500]).await.unwrap();
    eventually(SOON, || agent.count("penstock_request_body_memory_bytes", &[]) > 0).await;
    client.reset().unwrap();
    eventually(SOON, || agent.count("penstock_client_aborts_total", &[]) == 1).await;
    assert_eq!(server.requests(), 0);
}

/// D6, E18: while the agent connects to an endpoint.
#[tokio::test]
async fn client_disconnect_during_connect_ends_request() {
    let deaf = Deaf::new().unwrap();
    let named = deaf.addr.to_string();
    let stage = Stage::with(
        |_| Answering::new(move |_| vec![reply::pick(&named, &[])]),
        |config| {
            config.timeouts.connect = None;
            config.pools[0].endpoints.push(deaf.addr.into());
        },
    )
    .await;
    let picked = || stage.agent.metric("penstock_epp_exchange_seconds_count", &["outcome=\"picked\""]) == 1.0;
    leaves(&stage, &echo("{}"), picked).await;
    eventually(AT_ONCE, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
    eventually(AT_ONCE, || stage.agent.metric("penstock_client_aborts_total", &[]) == 1.0).await;
}

/// D6, E18: the client has already sent its next request, so its close follows unread bytes.
#[tokio::test]
async fn client_disconnect_after_pipelined_request_is_noticed() {
    for reset in [false, true] {
        let stage = Stage::new(|all| Production::new(&all[..1])).await;
        let head = HeadWrites { split_at: Some(0), pause_us: 3_600_000_000, ..HeadWrites::default() };
        let wire = Plan { head, ..Plan::default() }.request().wire("agent");
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        client.send_raw(&[wire.clone(), wire].concat()).await.unwrap();
        eventually(SOON, || stage.one.requests() == 1).await;
        if reset {
            client.reset().unwrap();
        } else {
            drop(client);
        }
        eventually(AT_ONCE, || stage.one.aborted() == 1 && stage.one.connections_open() == 0).await;
        eventually(AT_ONCE, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
        assert_eq!(stage.one.requests(), 1);
    }
}

/// D6, E18: while the response head waits for the picker's reply.
#[tokio::test]
async fn client_disconnect_during_response_decision_ends_request() {
    let silent = Fault::At(Moment::ResponseHeaders, Harm::Silence);
    let stage = Stage::with(
        |all| Faulty::new(Production::new(&all[..1]), silent),
        |config| epp(config).response_timeout = Some(Duration::from_secs(3600)),
    )
    .await;
    let plan = Plan { size: 64 << 20, ..Plan::default() };
    let told = || stage.epp.streams().first().is_some_and(|stream| stream.kinds().contains(&"response_headers"));
    leaves(&stage, &plan.request(), told).await;
    eventually(AT_ONCE, || stage.one.aborted() == 1 && stage.one.connections_open() == 0).await;
    eventually(AT_ONCE, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
}

/// E18: before the response.
#[tokio::test]
async fn client_disconnect_before_response_ends_request() {
    let stage = Stage::new(|all| Production::new(&all[..1])).await;
    let request = Request::post("/v1/completions", r#"{"model":"m","prompt":"p","max_tokens":1}"#)
        .header("content-type", "application/json")
        .header("x-test-interval-us", "3600000000");
    leaves(&stage, &request, || stage.one.running() == 1).await;
    eventually(SOON, || stage.one.aborted() == 1 && stage.one.connections_open() == 0).await;
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
}

/// E18: in the middle of the response.
#[tokio::test]
async fn client_disconnect_during_response_ends_request() {
    let stage = Stage::new(|all| Production::new(&all[..1])).await;
    let plan = Plan { size: 64 << 20, ..Plan::default() };
    let mut client = Client::connect_with(stage.agent.addr, Some(64 << 10)).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    client.head().await.unwrap();
    drop(client);
    eventually(SOON, || stage.one.aborted() == 1 && stage.one.connections_open() == 0).await;
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
}

fn refused(addr: SocketAddr) -> bool {
    std::net::TcpStream::connect(addr).is_err()
}

/// A response that flows only as fast as its client reads, and an idle connection.
async fn one_running_one_idle() -> (Stage, Client, Plan) {
    let mut stage = Stage::new(|all| Production::new(&all[..1])).await;
    assert_eq!(stage.request(&echo(json("m", 10))).await.status(), 200);
    let plan = Plan { size: 32 << 20, ..Plan::default() };
    let mut running = Client::connect_with(stage.agent.addr, Some(64 << 10)).await.unwrap();
    running.send(&plan.request()).await.unwrap();
    running.head().await.unwrap();
    (stage, running, plan)
}

#[tokio::test]
async fn drain_finishes_response_and_closes_idle_connections() {
    let (mut stage, mut running, plan) = one_running_one_idle().await;
    stage.agent.agent.drain();
    assert_eq!(stage.client.until_end().await.unwrap(), ConnectionEnd::Fin);
    eventually(SOON, || refused(stage.agent.addr)).await;
    assert!(!stage.agent.agent.is_done());
    let mut checker = plan.checker();
    let read = running.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    assert_eq!(running.until_end().await.unwrap(), ConnectionEnd::Fin);
    eventually(SOON, || stage.agent.agent.is_done()).await;
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::HalfClosed) == 2).await;
}

#[tokio::test]
async fn forced_shutdown_resets_response() {
    let (stage, mut running, plan) = one_running_one_idle().await;
    stage.agent.agent.force();
    let mut checker = plan.checker();
    let read = running.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_ne!(read.end, BodyEnd::Complete);
    eventually(SOON, || stage.agent.agent.is_done()).await;
    eventually(SOON, || stage.one.aborted() == 1).await;
}
