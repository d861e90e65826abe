//! `steering.mode = "wire"`: clients and endpoints in network namespaces of their own, and an agent between them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use penstock_agent::config::{Config, Interfaces, SteeringMode};
use penstock_tests::{
    Between, BodyEnd, Client, Plan, Request,
    agent::{TestAgent, builtin_pool},
    client::{ConnectionEnd, Pace},
    eventually,
    model_server::{After, Fault, FaultKind, Framing, Lengths, Pauses},
};

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
        let agent = TestAgent::start(builtin_pool(&[between.server.addr]), SteeringMode::Wire, |config| {
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
        let penstock_tests::client::Piece::Data(data) = client.piece(64 << 10).await.unwrap() else { panic!("an end") };
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
