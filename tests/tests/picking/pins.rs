//! Pinned connections: one pick, every byte in both directions on each path, and each way such a connection can end.

use std::time::Duration;

use penstock_agent::config::{Config, FailureMode, Network, Passthrough, PickPer, Pool, Route, SteeringMode};
use penstock_tests::{
    Alphabet, BodyEnd, Checker, Client, ModelServer, Plan, Request, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    client::ConnectionEnd,
    content::Fnv,
    eventually,
    model_server::{After, Fault, FaultKind, Framing, Lengths, Options, Pauses},
    scripted_epp::{Answering, reply},
};

use tokio::time::timeout;

use crate::SOON;

const MODES: [SteeringMode; 4] = [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto];

struct Rig {
    agent: TestAgent,
    epp: ScriptedEpp,
    endpoints: [ModelServer; 2],
}

impl Rig {
    async fn new(mode: SteeringMode, adjust: impl FnOnce(&mut Config)) -> Self {
        let endpoints = [server().await, server().await];
        let addresses = [endpoints[0].addr, endpoints[1].addr];
        let picked = addresses[0].to_string();
        let epp = ScriptedEpp::start(Answering::new(move |_| vec![reply::pick(&picked, &[])])).await.unwrap();
        let pool = epp_pool(&addresses, epp.addr, FailureMode::Closed);
        let pool = Pool { pick_per: PickPer::Connection, ..pool };
        let agent = TestAgent::start(pool, mode, |config| {
            config.listen.workers = 1;
            adjust(config);
        });
        Self { agent, epp, endpoints }
    }

    /// A connection after its first response.
    async fn pinned(&self) -> Client {
        let mut client = Client::connect(self.agent.addr).await.unwrap();
        exchange(&mut client, &plan(Framing::ContentLength, 1000, 1)).await;
        eventually(SOON, || self.agent.metric("penstock_pinned_connections", &[]) >= 1.0).await;
        client
    }

    async fn ended(&self, reason: &str) {
        let label = format!("reason=\"{reason}\"");
        eventually(SOON, || self.agent.count("penstock_pins_ended_total", &[&label]) == 1).await;
        eventually(SOON, || self.agent.metric("penstock_pinned_connections", &[]) == 0.0).await;
        eventually(SOON, || self.endpoints.iter().all(|endpoint| endpoint.connections_open() == 0)).await;
    }
}

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

fn plan(framing: Framing, size: u64, stream_id: u64) -> Plan {
    Plan { framing, size, stream_id, ..Plan::default() }
}

/// Like `plan`, with a pause in the middle, so that the flow is armed when the rest arrives.
fn paused(framing: Framing, size: u64, stream_id: u64) -> Plan {
    Plan {
        writes: Lengths::Random { seed: stream_id, max: 10_000 },
        pauses: Some(Pauses { seed: stream_id, every: 5, up_to_us: 2000 }),
        ..plan(framing, size, stream_id)
    }
}

/// Returns the endpoint that responded.
async fn exchange(client: &mut Client, plan: &Plan) -> std::net::SocketAddr {
    let response = client.request(&plan.request()).await.unwrap();
    plan.checker().feed(&response.body).unwrap();
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, plan.size));
    response.served_by().unwrap()
}

/// One pick for all requests of a connection; the next connection gets a new pick.
#[tokio::test]
async fn connection_stays_with_its_endpoint() {
    for mode in MODES {
        let rig = Rig::new(mode, |_| {}).await;
        let mut first = rig.pinned().await;
        let home = exchange(&mut first, &paused(Framing::Chunked, 300_000, 2)).await;
        for (turn, framing) in [Framing::ContentLength, Framing::Chunked].into_iter().cycle().take(6).enumerate() {
            assert_eq!(exchange(&mut first, &paused(framing, 100_000, turn as u64)).await, home);
        }
        assert_eq!(rig.epp.streams_started(), 1);
        // Bodies in both directions, one of them large.
        let body = Alphabet::Text.bytes(9, 0, 1 << 20);
        let echo = first.request(&Request::post("/test/echo", body.clone())).await.unwrap().echoed();
        assert_eq!((echo.body_length, echo.body_hash), (body.len() as u64, Fnv::of(&body).value()), "{mode:?}");
        drop(first);
        rig.ended("ok").await;
        let (down, up) = (rig.agent.steered(), rig.agent.steered_up());
        assert_eq!(down > 0, mode != SteeringMode::Off, "{mode:?} {down}");
        assert_eq!(up > 0, matches!(mode, SteeringMode::Ingress | SteeringMode::Auto), "{mode:?} {up}");
        let local = rig.agent.count("penstock_body_bytes_total", &["path=\"local\""]);
        assert_eq!(local > 0, rig.agent.carries_tunnels_locally(), "{mode:?}: {local} bytes");
        assert!(rig.agent.count("penstock_upstream_bytes_total", &[]) > 1 << 20, "{mode:?}");

        let mut second = Client::connect(rig.agent.addr).await.unwrap();
        exchange(&mut second, &plan(Framing::ContentLength, 10, 1)).await;
        assert_eq!(rig.epp.streams_started(), 2);
    }
}

/// Bytes that the client sent after its first request reach the endpoint too.
#[tokio::test]
async fn pipelined_requests_reach_endpoint() {
    for mode in MODES {
        let rig = Rig::new(mode, |_| {}).await;
        let mut client = Client::connect(rig.agent.addr).await.unwrap();
        let plans: Vec<Plan> = (1..=4).map(|id| paused(Framing::ContentLength, 20_000 * id, id)).collect();
        let wire: Vec<u8> = plans.iter().flat_map(|plan| plan.request().wire("agent")).collect();
        client.send_raw(&wire).await.unwrap();
        for plan in &plans {
            assert_eq!(client.head().await.unwrap().status, 200);
            let mut checker = Checker::new(plan.stream_id);
            let read = client.read_body(penstock_tests::client::Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await;
            let read = read.unwrap();
            assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "{mode:?}");
        }
        assert_eq!(rig.epp.streams_started(), 1);
    }
}

/// The endpoint's close reaches the client after the last byte, and its reset as a reset.
#[tokio::test]
async fn endpoint_close_or_reset_reaches_client() {
    for mode in MODES {
        let rig = Rig::new(mode, |_| {}).await;
        let mut client = rig.pinned().await;
        let last = Plan { after: After::Close, ..paused(Framing::UntilClose, 700_000, 3) };
        exchange(&mut client, &last).await;
        drop(client);
        rig.ended("ok").await;

        let rig = Rig::new(mode, |_| {}).await;
        let mut client = rig.pinned().await;
        let fault = Some(Fault { after: 200_000, kind: FaultKind::Reset });
        let broken = Plan { fault, ..paused(Framing::ContentLength, 400_000, 4) };
        client.send(&broken.request()).await.unwrap();
        client.head().await.unwrap();
        let mut checker = broken.checker();
        let read = client.read_body(penstock_tests::client::Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await;
        assert_eq!(read.unwrap().end, BodyEnd::Reset, "{mode:?}");
        rig.ended("endpoint_broke").await;
    }
}

/// The client's reset reaches the endpoint.
#[tokio::test]
async fn client_reset_reaches_endpoint() {
    for mode in MODES {
        let rig = Rig::new(mode, |_| {}).await;
        let mut client = rig.pinned().await;
        client.send(&paused(Framing::Chunked, 1 << 30, 6).request()).await.unwrap();
        client.head().await.unwrap();
        client.piece(1000).await.unwrap();
        client.reset().unwrap();
        rig.ended("client_gone").await;
    }
}

/// At its maximum age a connection closes once it is quiet; data in transit is delivered first. The agent does not know message
/// ends, so the close must not look orderly.
#[tokio::test]
async fn pin_over_max_age_ends_when_quiet() {
    for mode in MODES {
        let rig = Rig::new(mode, |config| config.pools[0].pin.age = Some(Duration::from_millis(50))).await;
        let mut client = rig.pinned().await;
        let pauses = Some(Pauses { seed: 1, every: 1, up_to_us: 20_000 });
        let long = Plan { writes: Lengths::Fixed(2000), pauses, ..plan(Framing::ContentLength, 60_000, 7) };
        exchange(&mut client, &long).await;
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Reset, "{mode:?}");
        rig.ended("over").await;
    }
}

/// A drain of the endpoint ends its pins; a drain of the agent ends all.
#[tokio::test]
async fn pin_ends_when_endpoint_or_agent_drains() {
    for mode in [SteeringMode::Off, SteeringMode::Auto] {
        let rig = Rig::new(mode, |_| {}).await;
        let mut client = rig.pinned().await;
        let home = exchange(&mut client, &plan(Framing::ContentLength, 10, 1)).await;
        let mut config = rig.agent.config();
        for endpoint in &mut config.pools[0].endpoints {
            endpoint.draining = endpoint.address == home;
        }
        rig.agent.agent.reload(config).unwrap();
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Reset, "{mode:?}");
        rig.ended("over").await;

        let rig = Rig::new(mode, |_| {}).await;
        let mut client = rig.pinned().await;
        rig.agent.agent.drain();
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Reset, "{mode:?}");
        eventually(SOON, || rig.agent.agent.is_done()).await;
    }
}

/// Admits every endpoint of the tests.
fn local() -> Passthrough {
    Passthrough::Networks(vec![Network::parse("127.0.0.0/8").unwrap()])
}

/// Another pool that would send its requests there does not keep the pin.
#[tokio::test]
async fn pin_ends_when_its_own_pool_loses_the_endpoint() {
    for keep in [None, Some(Passthrough::Off), Some(local())] {
        let rig = Rig::new(SteeringMode::Off, |config| {
            let mut other = Pool::new("other", config.pools[0].endpoints.iter().map(|endpoint| endpoint.address));
            other.passthrough = keep.clone().unwrap_or_default();
            config.pools.extend(keep.is_some().then_some(other));
            config.routes = vec![Route::to("default")];
        })
        .await;
        let mut client = rig.pinned().await;
        let home = exchange(&mut client, &plan(Framing::ContentLength, 10, 1)).await;
        let mut config = rig.agent.agent.config();
        config.pools[0].endpoints.retain(|endpoint| endpoint.address != home);
        rig.agent.agent.reload(config).unwrap();
        let end = timeout(SOON, client.until_end()).await.expect("the pin goes on").unwrap();
        assert_eq!(end, ConnectionEnd::Reset);
        rig.ended("over").await;
    }
}

/// An address that the pool admits by passthrough, or that moves between its sources, stays in use.
#[tokio::test]
async fn pin_stays_while_its_pool_admits_the_endpoint() {
    let rig = Rig::new(SteeringMode::Off, |_| {}).await;
    let mut client = rig.pinned().await;
    let home = exchange(&mut client, &plan(Framing::ContentLength, 10, 1)).await;
    let mut config = rig.agent.agent.config();
    // At another place.
    config.pools.insert(0, Pool::new("first", ["127.0.0.1:1".parse().unwrap()]));
    config.routes = vec![Route::to("default")];
    config.pools[1].endpoints.retain(|endpoint| endpoint.address != home);
    config.pools[1].passthrough = local();
    rig.agent.agent.reload(config).unwrap();
    // The pin looks at its endpoint once a second.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(exchange(&mut client, &plan(Framing::ContentLength, 10, 2)).await, home);
}

/// A connection without traffic for the idle timeout is broken off.
#[tokio::test]
async fn idle_pin_is_broken_off() {
    for mode in MODES {
        let rig = Rig::new(mode, |config| config.timeouts.idle = Some(Duration::from_millis(300))).await;
        let mut client = rig.pinned().await;
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Reset, "{mode:?}");
        rig.ended("idle_timeout").await;
    }
}
