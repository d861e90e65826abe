//! Clients that leave, and an agent that does.

use std::{net::SocketAddr, time::Duration};

use penstock_tests::{
    BodyEnd, Client, Plan, Request, Stage,
    client::{ConnectionEnd, Pace},
    eventually,
    scripted_epp::{Fault, Faulty, Harm, Moment, Production, StreamEnd},
    stage::{echo, json},
};

use crate::SOON;

/// E18: before the pick.
#[tokio::test]
async fn a_client_that_leaves_while_the_picker_thinks_cancels_the_stream() {
    let silent = Fault::At(Moment::RequestBody(usize::MAX), Harm::Silence);
    let stage = Stage::new(|all| Faulty::new(Production::new(all), silent)).await;
    leaves(&stage, &echo(json("m", 100_000)), || {
        stage.epp.streams().first().is_some_and(|stream| stream.request_body().1 == 1)
    })
    .await;
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
    assert_eq!(stage.requests(), (0, 0));
    eventually(SOON, || stage.agent.metric("penstock_client_aborts_total", &[]) == 1.0).await;
    // The connection to the picker lives on.
    assert_eq!(stage.epp.connections_open(), 1);
}

/// Sends `request` and resets the connection when `then` holds.
async fn leaves(stage: &Stage, request: &Request, then: impl FnMut() -> bool) {
    let mut client = Client::connect(stage.agent.addr).await.unwrap();
    client.send(request).await.unwrap();
    eventually(SOON, then).await;
    client.reset().unwrap();
}

/// Takes no connections, though it listens: those that it has not accepted fill its queue. They end with the second of the pair.
fn full() -> (std::net::TcpListener, Vec<std::net::TcpStream>) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let listener = std::net::TcpListener::from(socket);
    let addr = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&addr, Duration::from_millis(200)) {
        queued.push(stream);
    }
    (listener, queued)
}

/// E18, D6: while the endpoints of the list do not even take the connection.
#[tokio::test]
async fn a_client_that_leaves_while_no_endpoint_can_be_reached_ends_it_all() {
    let (full, _queued) = full();
    let full = full.local_addr().unwrap();
    let stage = Stage::with(
        |_| Production::new(&[full]),
        |config| {
            config.pools[0].endpoints = vec![full.into()];
            config.timeouts.connect = Some(Duration::from_secs(60));
        },
    )
    .await;
    let dialled = || stage.agent.metric("penstock_epp_exchange_seconds_count", &[r#"outcome="picked""#]) == 1.0;
    leaves(&stage, &echo(json("m", 100)), dialled).await;
    eventually(SOON, || stage.agent.metric("penstock_client_aborts_total", &[]) == 1.0).await;
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
}

/// E18: before the response.
#[tokio::test]
async fn a_client_that_leaves_while_the_endpoint_thinks_ends_it_all() {
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
async fn a_client_that_leaves_during_its_response_ends_it_all() {
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

/// A response that flows only as far as its client reads, and an idle connection.
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
async fn draining_lets_a_response_finish_and_closes_what_is_idle() {
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
async fn forcing_breaks_a_response_off_visibly() {
    let (stage, mut running, plan) = one_running_one_idle().await;
    stage.agent.agent.force();
    let mut checker = plan.checker();
    let read = running.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_ne!(read.end, BodyEnd::Complete);
    eventually(SOON, || stage.agent.agent.is_done()).await;
    eventually(SOON, || stage.one.aborted() == 1).await;
}
