//! Connections that are older than `listen.max_connection_age`: clients are asked to leave, and no response is cut.

use std::time::Duration;

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    BodyEnd, Client, Http2Client, ModelServer, Plan, Request,
    agent::{TestAgent, builtin_pool},
    client::{ConnectionEnd, Pace},
    eventually,
    model_server::{Framing, Lengths, Options, Pauses},
};

use crate::SOON;

const MODELS: &str = "/v1/models";
const AGE: Duration = Duration::from_millis(500);

async fn agent(server: &ModelServer, mode: SteeringMode) -> TestAgent {
    TestAgent::start(builtin_pool(&[server.addr]), mode, |config| config.listen.max_connection_age = Some(AGE))
}

/// A response that takes some times longer than a connection may live.
fn slow() -> Plan {
    let pauses = Some(Pauses { seed: 1, every: 1, up_to_us: 20_000 });
    let writes = Lengths::Random { seed: 2, max: 2000 };
    Plan { size: 200_000, framing: Framing::Chunked, writes, pauses, ..Plan::default() }
}

fn aged(agent: &TestAgent) -> u64 {
    agent.count("penstock_client_connections_aged_total", &[])
}

#[tokio::test]
async fn old_http1_connection_ends_after_a_response_that_says_so() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    for mode in [SteeringMode::Off, SteeringMode::Ingress] {
        let agent = agent(&server, mode).await;
        let mut client = Client::connect(agent.addr).await.unwrap();
        let young = client.request(&Request::get(MODELS)).await.unwrap();
        assert_eq!((young.status(), young.header("connection")), (200, None));
        // Its head is written while the connection is young.
        let plan = slow();
        client.send(&plan.request()).await.unwrap();
        let head = client.head().await.unwrap();
        assert_eq!((head.status, head.header("connection")), (200, None));
        let mut checker = plan.checker();
        let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
        assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
        assert_eq!(aged(&agent), 0);
        let last = client.request(&Request::get(MODELS)).await.unwrap();
        assert_eq!((last.status(), last.header("connection")), (200, Some("close")));
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
        eventually(SOON, || aged(&agent) == 1).await;
    }
}

#[tokio::test]
async fn old_http2_connection_ends_after_its_last_response() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let agent = agent(&server, SteeringMode::Off).await;
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    let plan = slow();
    let mut stream = client.send(&plan.request()).await.unwrap();
    assert_eq!(stream.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    let read = stream.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    assert_eq!(aged(&agent), 1);
    client.end().await.unwrap();
}
