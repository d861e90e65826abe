//! Response scenarios: which path carries the bytes, and which party may leave meanwhile.

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    BodyEnd, Client, Plan, Request, Stage,
    client::Pace,
    eventually,
    model_server::Framing,
    scripted_epp::{Endpoints, Personality, StreamEnd},
};

use crate::{SOON, told::first_and_last};

async fn stage<P: Personality>(mode: SteeringMode) -> Stage {
    Stage::with(|all| P::over(Endpoints::new(all)), |config| config.steering.mode = mode).await
}

const TOKENS: usize = 40;

async fn a_stream<P: Personality>(mode: SteeringMode) {
    let mut stage = stage::<P>(mode).await;
    let body = format!(
        r#"{{"model":"m","stream":true,"stream_options":{{"include_usage":true}},"max_tokens":{TOKENS},"x-test-interval-us":1000,"prompt":"p"}}"#
    );
    let request = Request::post("/v1/completions", body).header("content-type", "application/json");
    let mut texts = Vec::new();
    for _ in 0..2 {
        let response = stage.request(&request).await;
        assert_eq!(response.read.end, BodyEnd::Complete);
        let events = response.events();
        // The tokens, the end of the only choice, the usage, and the end.
        assert_eq!((events.len(), events.last().map(String::as_str)), (TOKENS + 3, Some("[DONE]")));
        let served = response.served_by().unwrap();
        let (name, value) = P::mark(served);
        assert_eq!(response.header(name), Some(value.as_str()));
        texts.push(response.text());
    }
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::HalfClosed) == 2).await;
    for (stream, text) in stage.epp.streams().iter().zip(texts) {
        assert_eq!(stream.response_body(), (first_and_last(&text).into_bytes(), 1));
    }
    let steered = stage.agent.steered();
    assert_eq!(steered > 0, mode != SteeringMode::Off, "{steered}");
}

/// E7, E18: a streamed completion, relayed.
pub(crate) async fn relayed_stream_is_reported_to_picker<P: Personality>() {
    a_stream::<P>(SteeringMode::Off).await;
}

/// E7, E18: a streamed completion, steered; the picker is told all the same.
pub(crate) async fn steered_stream_is_reported_to_picker<P: Personality>() {
    a_stream::<P>(SteeringMode::Auto).await;
}

/// E20: a picker that dies during a response cuts nothing; the next request uses the restarted one.
pub(crate) async fn picker_death_cuts_no_response<P: Personality>() {
    for mode in [SteeringMode::Off, SteeringMode::Auto] {
        let mut stage = stage::<P>(mode).await;
        // Larger than all buffers in between, so that it flows only as the client reads.
        let plan = Plan { size: 24 << 20, framing: Framing::Chunked, ..Plan::default() };
        let mut client = Client::connect_with(stage.agent.addr, Some(64 << 10)).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        stage.epp.stop();
        let mut checker = plan.checker();
        let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
        assert_eq!((read.end, read.len, checker.offset()), (BodyEnd::Complete, plan.size, plan.size), "{mode:?}");
        stage.epp.restart().await.unwrap();
        eventually(SOON, || stage.epp.connections_open() == stage.workers()).await;
        assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200, "{mode:?}");
    }
}

/// E18: a departing client ends the endpoint's work and the picker's stream, on every path.
pub(crate) async fn client_disconnect_ends_picker_stream<P: Personality>() {
    for mode in [SteeringMode::Off, SteeringMode::Auto] {
        let stage = stage::<P>(mode).await;
        let body = r#"{"model":"m","stream":true,"max_tokens":1000000,"x-test-interval-us":1000,"prompt":"p"}"#;
        let request = Request::post("/v1/completions", body).header("content-type", "application/json");
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        client.send(&request).await.unwrap();
        client.head().await.unwrap();
        client.piece(1000).await.unwrap();
        client.reset().unwrap();
        eventually(SOON, || (stage.one.aborted(), stage.one.connections_open()) == (1, 0)).await;
        eventually(SOON, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
        // The connections to the picker stay open.
        eventually(SOON, || stage.epp.connections_open() == stage.workers()).await;
        assert_eq!(stage.epp.connections_accepted(), stage.workers(), "{mode:?}");
    }
}
