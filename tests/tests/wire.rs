//! `steering.mode = "wire"`: clients and endpoints in network namespaces of their own, and an agent between them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use penstock_agent::config::{Config, FailureMode, Interfaces, Pool, ResponseToPicker, SteeringMode};
use penstock_tests::{
    Between, BodyEnd, Checker, Client, Plan, Request,
    agent::{TestAgent, builtin_pool, epp_pool},
    client::{ConnectionEnd, Pace, Piece},
    eventually,
    model_server::{After, Fault, FaultKind, Framing, Lengths, Pauses},
    scripted_epp::{LlmdRouter, ScriptedEpp, Tokens},
    stage::epp,
};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Long enough for a delayed acknowledgement, after which the flow can begin.
const PAUSE: FaultKind = FaultKind::StallMs(400);

struct Stage {
    agent: TestAgent,
    between: Between,
}

impl Stage {
    fn new(adjust: impl FnOnce(&mut Config)) -> Self {
        let between = Between::new().unwrap();
        Self::over(between, |server| builtin_pool(&[server]), adjust)
    }

    fn over(between: Between, pool: impl FnOnce(SocketAddr) -> Pool, adjust: impl FnOnce(&mut Config)) -> Self {
        let agent = TestAgent::start(pool(between.server.addr), SteeringMode::Wire, |config| {
            config.listen.address = SocketAddr::from((between.front, 0));
            config.steering.interfaces = Interfaces::Named(between.interfaces.to_vec());
            adjust(config);
        });
        Self { agent, between }
    }

    async fn client(&self) -> Client {
        let mut client = self.between.connect(self.agent.addr).await.unwrap();
        client.patience = SOON;
        client
    }

    fn flows(&self, path: &str, reason: &str) -> u64 {
        self.agent.count("penstock_flows_total", &[&format!("path=\"{path}\""), &format!("reason=\"{reason}\"")])
    }

    fn requests(&self, reason: &str) -> u64 {
        self.agent.count("penstock_requests_total", &[&format!("reason=\"{reason}\"")])
    }

    fn carried(&self, path: &str) -> u64 {
        self.agent.count("penstock_body_bytes_total", &[&format!("path=\"{path}\"")])
    }
}

/// A stream that pauses once after `before` bytes, and then has `rest` more.
fn plan(framing: Framing, before: u64, rest: u64) -> Plan {
    Plan {
        framing,
        size: before + rest,
        stream_id: before,
        chunks: Lengths::Fixed(300),
        writes: Lengths::Fixed(1200),
        pauses: Some(Pauses { seed: rest, every: 50, up_to_us: 500 }),
        fault: Some(Fault { after: before, kind: PAUSE }),
        after: After::Close,
        ..Plan::default()
    }
}

fn streamed(plan: &Plan) -> Request {
    plan.request().header("accept", "text/event-stream")
}

/// Requests a plan, compares every byte, and returns how body and connection ended.
async fn exchange(stage: &Stage, plan: &Plan) -> (BodyEnd, ConnectionEnd) {
    let mut client = stage.client().await;
    client.send(&streamed(plan)).await.unwrap();
    let head = client.head().await.unwrap();
    assert_eq!((head.status, head.header("connection")), (200, Some("close")));
    let mut checker = plan.checker();
    let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!(checker.offset(), plan.size, "{plan:?}");
    (read.end, client.until_end().await.unwrap())
}

#[tokio::test]
async fn streams_are_exact_in_any_framing() {
    let stage = Stage::new(|_| {});
    let mut total = 0;
    for framing in [Framing::Chunked, Framing::UntilClose, Framing::ContentLength] {
        for rest in [20 * KIB, 4 * MIB] {
            let (_, end) = exchange(&stage, &plan(framing, 20 * KIB, rest)).await;
            assert_eq!(end, ConnectionEnd::Fin, "{framing:?}");
            total += 1;
            eventually(SOON, || stage.flows("wire", "forced") == total).await;
        }
    }
    assert!(stage.carried("wire") > 3 * 4 * MIB, "{}", stage.carried("wire"));
    assert!(stage.carried("relay") < total * 100 * KIB);
    // A request is counted after its flow.
    eventually(SOON, || stage.requests("ok") == total).await;
    assert_eq!(stage.between.server.aborted(), 0);
}

/// What follows the last chunk, and what the sizes of chunks say besides.
#[tokio::test]
async fn chunked_streams_are_whole_with_every_end() {
    let stage = Stage::new(|_| {});
    let mut total = 0;
    for (trailers, extension) in [(0, None), (1, None), (40, None), (0, Some("a=b")), (3, Some("name=\"value\""))] {
        for (rest, chunk) in [(0, 100), (600, 100), (50 * KIB, 300), (50 * KIB, 20_000)] {
            let trailers = (0..trailers).map(|number| (format!("x-sum-{number}"), "0\t1 2 3".to_owned()));
            let plan = Plan {
                trailers: trailers.collect(),
                chunk_extension: extension.map(str::to_owned),
                chunks: Lengths::Fixed(chunk),
                ..plan(Framing::Chunked, 20 * KIB, 1000 + rest)
            };
            let (end, connection) = exchange(&stage, &plan).await;
            assert_eq!((end, connection), (BodyEnd::Complete, ConnectionEnd::Fin), "{plan:?}");
            total += 1;
            eventually(SOON, || stage.requests("ok") == total).await;
            assert_eq!(stage.flows("wire", "forced"), total, "{plan:?}");
        }
    }
}

/// A stream of the completions API. `last`: bytes of its last event, which has the usage.
fn events(count: usize, last: usize) -> String {
    let part =
        |n: usize| format!("data: {}\r\n\r\n", json!({"choices": [{"text": format!("word {n} ")}], "usage": null}));
    let usage = json!({"prompt_tokens": 11, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}});
    let end = format!("{{\"text\":\"{}\",\"choices\":[],\"usage\":{usage}}}", "x".repeat(last));
    (0..count).map(part).chain([format!("data: {end}\r\n\r\n"), "data: [DONE]\r\n\r\n".to_owned()]).collect()
}

/// A stage whose pool asks a picker that is told this of responses.
async fn told(told: ResponseToPicker) -> (Stage, ScriptedEpp) {
    let between = Between::new().unwrap();
    let picker = ScriptedEpp::start(LlmdRouter::new(&[between.server.addr])).await.unwrap();
    let pool = |server| epp_pool(&[server], picker.addr, FailureMode::Closed);
    let adjust = |config: &mut Config| {
        epp(config).response_to_picker = told;
        config.steering.min_bytes = 0;
    };
    (Stage::over(between, pool, adjust), picker)
}

fn asked(plan: &Plan, text: &str) -> Request {
    let body = json!({"model": "m", "stream": true, "prompt": "p", "x-test-says": text}).to_string();
    let kind = ("content-type".to_owned(), "text/event-stream".to_owned());
    let plan = Plan { says: true, headers: vec![kind], after: After::Close, ..plan.clone() };
    Request::post("/v1/completions", body)
        .header("content-type", "application/json")
        .header("x-test-plan", plan.header())
}

#[tokio::test]
async fn picker_is_told_the_usage_of_streams() {
    let (stage, picker) = told(ResponseToPicker::Usage).await;
    let mut total = 0;
    for framing in [Framing::Chunked, Framing::UntilClose, Framing::ContentLength] {
        // The flow carries all but the first event, or much more than what is kept; the last event fits what is kept, or not.
        for (count, last, chunk) in [(3, 10, 50), (300, 10, 70), (300, 10, 5000), (300, 9000, 300)] {
            let text = events(count, last);
            let plan = Plan {
                framing,
                chunks: Lengths::Fixed(chunk),
                writes: Lengths::Fixed(700),
                trailers: if framing == Framing::Chunked { vec![("x-sum".to_owned(), "1".to_owned())] } else { vec![] },
                pauses: Some(Pauses { seed: chunk, every: 5, up_to_us: 500 }),
                fault: Some(Fault { after: 150, kind: PAUSE }),
                ..Plan::default()
            };
            let mut client = stage.client().await;
            let response = client.request(&asked(&plan, &text)).await.unwrap();
            assert_eq!((response.read.end, response.text()), (BodyEnd::Complete, text), "{plan:?}");
            total += 1;
            eventually(SOON, || stage.requests("ok") == total && picker.books()[total as usize - 1].complete).await;
            let books = &picker.books()[total as usize - 1];
            let tokens = Tokens { prompt: Some(11), completion: Some(count as u64), cached: Some(3) };
            assert_eq!((books.tokens, books.malformed.len(), books.messages), (tokens, 0, 2), "{plan:?} {books:?}");
            assert_eq!(stage.flows("wire", "forced"), total, "{plan:?}");
        }
    }
    let tokens = "penstock_gen_ai_client_inference_tokens_total";
    assert_eq!(stage.agent.count(tokens, &[r#"gen_ai_token_type="output""#]), 3 * (3 + 3 * 300));
}

#[tokio::test]
async fn response_of_which_the_picker_gets_every_byte_is_relayed() {
    let (stage, picker) = told(ResponseToPicker::Body).await;
    let text = events(300, 10);
    let plan = Plan { fault: Some(Fault { after: 150, kind: PAUSE }), framing: Framing::Chunked, ..Plan::default() };
    let response = stage.client().await.request(&asked(&plan, &text)).await.unwrap();
    assert_eq!(response.text(), text);
    eventually(SOON, || stage.requests("ok") == 1 && picker.books()[0].complete).await;
    assert_eq!((stage.flows("relay", "picker_body"), stage.carried("wire")), (1, 0));
}

#[tokio::test]
async fn many_streams_at_once_are_exact() {
    let stage = Arc::new(Stage::new(|_| {}));
    let streams = (0..40).map(|number| {
        let stage = Arc::clone(&stage);
        tokio::spawn(async move { exchange(&stage, &plan(Framing::Chunked, 1000 + number, 200 * KIB)).await })
    });
    for stream in streams.collect::<Vec<_>>() {
        assert_eq!(stream.await.unwrap().1, ConnectionEnd::Fin);
    }
    eventually(SOON, || stage.requests("ok") == 40 && stage.flows("wire", "forced") == 40).await;
}

#[tokio::test]
async fn other_responses_are_relayed_on_kept_connections() {
    let stage = Stage::new(|_| {});
    let mut client = stage.client().await;
    let unasked = plan(Framing::Chunked, 1000, 20 * KIB);
    let unasked = Plan { after: After::KeepAlive, fault: None, ..unasked };
    for _ in 0..2 {
        let response = client.request(&unasked.request()).await.unwrap();
        unasked.checker().feed(&response.body).unwrap();
        assert_eq!(response.header("connection"), None);
    }
    // The endpoint was asked to close, and the client was not told to.
    let small = Plan { size: 10, after: After::KeepAlive, ..Plan::default() };
    let response = client.request(&streamed(&small)).await.unwrap();
    assert_eq!((response.body.len(), response.header("connection")), (10, None));
    eventually(SOON, || stage.flows("relay", "complete") + stage.flows("relay", "small") == 1).await;
    assert_eq!((stage.flows("relay", "not_streamed"), stage.carried("wire")), (2, 0));
    let response = client.request(&unasked.request()).await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn client_that_leaves_ends_the_response() {
    let stage = Stage::new(|_| {});
    let endless =
        Plan { fault: Some(Fault { after: 20 * KIB, kind: PAUSE }), ..plan(Framing::Chunked, 20 * KIB, 1 << 32) };
    let mut client = stage.client().await;
    client.send(&streamed(&endless)).await.unwrap();
    client.head().await.unwrap();
    let mut checker = endless.checker();
    while checker.offset() < MIB {
        let Piece::Data(data) = client.piece(64 << 10).await.unwrap() else { panic!("an end") };
        checker.feed(&data).unwrap();
    }
    drop(client);
    eventually(SOON, || stage.between.server.aborted() == 1 && stage.requests("client_gone") == 1).await;
    assert!(stage.carried("wire") >= MIB - 100 * KIB);
}

#[tokio::test]
async fn endpoint_that_breaks_is_seen_by_the_client() {
    for (kind, seen) in [(FaultKind::Reset, BodyEnd::Reset), (FaultKind::Close, BodyEnd::Truncated)] {
        let stage = Stage::new(|_| {});
        let broken = Plan {
            // Pauses in which the flow begins.
            pauses: Some(Pauses { seed: 1, every: 4, up_to_us: 100_000 }),
            fault: Some(Fault { after: 200 * KIB, kind }),
            ..plan(Framing::Chunked, 0, 400 * KIB)
        };
        let mut client = stage.client().await;
        client.send(&streamed(&broken)).await.unwrap();
        client.head().await.unwrap();
        let mut checker = broken.checker();
        let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
        assert_eq!(read.end, seen);
        drop(client);
        eventually(SOON, || stage.requests("endpoint_broke") == 1).await;
        assert!(stage.carried("wire") > 0, "the flow did not begin");
    }
}

/// Only the reset tells that such a body is incomplete, whenever it arrives.
#[tokio::test]
async fn body_until_close_that_breaks_never_ends_orderly() {
    let stage = Arc::new(Stage::new(|_| {}));
    let streams = (0..40).map(|number| {
        let stage = Arc::clone(&stage);
        tokio::spawn(async move {
            let broken = Plan {
                pauses: Some(Pauses { seed: number, every: 1, up_to_us: 2000 }),
                fault: Some(Fault { after: 1000 * number, kind: FaultKind::Reset }),
                ..plan(Framing::UntilClose, number, 200 * KIB)
            };
            let mut client = stage.client().await;
            client.send(&streamed(&broken)).await.unwrap();
            // The reset may discard the head.
            if client.head().await.is_ok_and(|head| head.status == 200) {
                let mut checker = broken.checker();
                let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
                assert_eq!(read.end, BodyEnd::Reset, "stream {number} after {} bytes", checker.offset());
            }
        })
    });
    for stream in streams.collect::<Vec<_>>() {
        stream.await.unwrap();
    }
}

#[tokio::test]
async fn idle_stream_is_reset_on_both_sides() {
    let stage = Stage::new(|config| config.timeouts.idle = Some(Duration::from_millis(1500)));
    let silent =
        Plan { fault: Some(Fault { after: 20 * KIB, kind: PAUSE }), ..plan(Framing::Chunked, 20 * KIB, 40 * KIB) };
    let silent = Plan { pauses: Some(Pauses { seed: 1, every: 40, up_to_us: 3_600_000_000 }), ..silent };
    let mut client = stage.client().await;
    client.send(&streamed(&silent)).await.unwrap();
    client.head().await.unwrap();
    let mut checker = silent.checker();
    let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await;
    assert!(read.is_err() || read.is_ok_and(|read| read.end != BodyEnd::Complete), "the body looks complete");
    eventually(SOON, || stage.requests("idle_timeout") == 1 && stage.between.server.connections_open() == 0).await;
    assert!(stage.carried("wire") > 0);
}

#[tokio::test]
async fn stream_without_a_route_is_reset() {
    let stage = Stage::new(|_| {});
    let (client, checker) = running(&stage).await;
    stage.between.cut_off_the_server().unwrap();
    expect_reset(client, checker).await;
    eventually(SOON, || stage.requests("unrouted") == 1).await;
}

/// A stream that has begun and does not end by itself, of which the client has read something that the kernel carried.
async fn running(stage: &Stage) -> (Client, Checker) {
    let plan = plan(Framing::Chunked, 20 * KIB, 1 << 40);
    let mut client = stage.client().await;
    client.send(&streamed(&plan)).await.unwrap();
    client.head().await.unwrap();
    let mut checker = plan.checker();
    while checker.offset() < MIB {
        read_some(&mut client, &mut checker).await;
    }
    (client, checker)
}

async fn read_some(client: &mut Client, checker: &mut Checker) {
    let Piece::Data(data) = client.piece(64 << 10).await.unwrap() else { panic!("an end") };
    checker.feed(&data).unwrap();
}

/// The status and document of the admin port.
async fn flows(stage: &Stage, method: &str, rest: &str) -> (u16, serde_json::Value) {
    let mut admin = Client::connect(stage.agent.agent.admin_address()).await.unwrap();
    let response = admin.request(&Request::new(method, &format!("/flows{rest}"))).await.unwrap();
    (response.status(), response.json().unwrap_or_default())
}

/// Reads to the end, which must be a reset.
async fn expect_reset(mut client: Client, mut checker: Checker) {
    let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!(read.end, BodyEnd::Reset);
}

#[tokio::test]
async fn admin_port_lists_flows_and_ends_one_or_all() {
    let stage = Stage::new(|_| {});
    assert_eq!(flows(&stage, "GET", "").await, (200, json!([])));
    let (one, mut other, third) = (running(&stage).await, running(&stage).await, running(&stage).await);
    let (status, list) = flows(&stage, "GET", "").await;
    let listed: Vec<_> = list.as_array().unwrap().iter().map(|flow| flow["client"].as_str().unwrap()).collect();
    assert_eq!((status, listed.len()), (200, 3), "{list}");
    for (client, _) in [&one, &other, &third] {
        assert!(listed.contains(&client.local_addr().unwrap().to_string().as_str()), "{list}");
    }
    for flow in list.as_array().unwrap() {
        assert_eq!((&flow["endpoint"], &flow["adopted"]), (&json!(stage.between.server.addr), &json!(false)), "{list}");
        assert!(flow["bytes"].as_u64().unwrap() > MIB / 2, "{list}");
    }

    let address = one.0.local_addr().unwrap();
    assert_eq!(flows(&stage, "DELETE", &format!("/{address}")).await, (200, json!({ "ended": 1 })));
    expect_reset(one.0, one.1).await;
    eventually(SOON, || stage.requests("deleted") == 1 && stage.between.server.aborted() == 1).await;
    assert_eq!(flows(&stage, "DELETE", &format!("/{address}")).await, (404, json!({ "ended": 0 })));
    // The others run on.
    let before = other.1.offset();
    while other.1.offset() < before + 8 * MIB {
        read_some(&mut other.0, &mut other.1).await;
    }
    assert_eq!(flows(&stage, "DELETE", "").await, (200, json!({ "ended": 2 })));
    expect_reset(other.0, other.1).await;
    expect_reset(third.0, third.1).await;
    eventually(SOON, || stage.requests("deleted") == 3 && stage.between.server.connections_open() == 0).await;
    assert_eq!(flows(&stage, "GET", "").await, (200, json!([])));
}
