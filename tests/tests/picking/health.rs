//! Endpoint health: ejection after failures or failed checks, recovery, and the last endpoint's exemption.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use penstock_agent::config::{Config, Ejection, FailureMode, HealthCheck, Pool, SteeringMode};
use penstock_tests::agent::{TestAgent, builtin_pool, epp_pool};
use penstock_tests::client::Client;
use penstock_tests::scripted_epp::{Answering, ScriptedEpp, reply};
use penstock_tests::stage::put;
use penstock_tests::{ModelServer, eventually, model_server::Options};
use tokio::net::TcpListener;

use crate::SOON;
use crate::abrupt::{Abrupt, Act};

/// Longer than any test.
const LONG: Duration = Duration::from_secs(3600);

struct Switch(Arc<AtomicBool>);

impl Switch {
    fn set(&self, well: bool) {
        self.0.store(well, Ordering::Relaxed);
    }
}

/// An endpoint that can be switched on and off; initially off.
async fn switched() -> (Abrupt, Switch) {
    let well = Arc::new(AtomicBool::new(false));
    let look = Arc::clone(&well);
    let abrupt = Abrupt::start(move |_| if look.load(Ordering::Relaxed) { Act::Answer } else { Act::Close }).await;
    (abrupt, Switch(well))
}

async fn model_server() -> ModelServer {
    ModelServer::start(Options::default()).await.unwrap()
}

async fn agent(pool: Pool) -> (TestAgent, Client) {
    let agent = TestAgent::start(pool, SteeringMode::Off, |config: &mut Config| config.listen.workers = 1);
    let client = Client::connect(agent.addr).await.unwrap();
    (agent, client)
}

fn ejecting(endpoints: &[SocketAddr], base: Duration) -> Pool {
    Pool { ejection: Ejection { failures: 3, base, max: LONG, ..Ejection::default() }, ..builtin_pool(endpoints) }
}

fn endpoints(agent: &TestAgent, state: &str) -> u64 {
    agent.count("penstock_endpoints", &[&format!("state=\"{state}\"")])
}

/// The endpoint that responds.
async fn served(client: &mut Client) -> Option<SocketAddr> {
    client.request(&put("{}")).await.unwrap().served_by()
}

/// D7: the other endpoint serves the failed requests.
#[tokio::test]
async fn three_consecutive_failures_eject_endpoint() {
    let ((bad, _), good) = (switched().await, model_server().await);
    let (agent, mut client) = agent(ejecting(&[bad.addr, good.addr], LONG)).await;
    assert_eq!((endpoints(&agent, "ready"), endpoints(&agent, "ejected")), (2, 0));
    for _ in 0..30 {
        assert_eq!(served(&mut client).await, Some(good.addr));
    }
    assert_eq!(bad.requests(), 3);
    assert_eq!((endpoints(&agent, "ready"), endpoints(&agent, "ejected")), (1, 1));
    assert_eq!(agent.count("penstock_ejections_total", &[r#"pool="default""#]), 1);
}

/// D7.
#[tokio::test]
async fn successful_probe_recovers_endpoint() {
    let ((bad, switch), good) = (switched().await, model_server().await);
    let (agent, mut client) = agent(ejecting(&[bad.addr, good.addr], Duration::from_millis(50))).await;
    // The first ejection, then a failed probe.
    while agent.count("penstock_ejections_total", &[]) < 2 {
        assert_eq!(served(&mut client).await, Some(good.addr));
    }
    assert_eq!((bad.requests(), endpoints(&agent, "ejected")), (4, 1));
    switch.set(true);
    until_served(&mut client, bad.addr).await;
    assert_eq!((endpoints(&agent, "ready"), endpoints(&agent, "ejected")), (2, 0));
}

/// D7.
#[tokio::test]
async fn last_endpoint_is_never_ejected() {
    let (bad, switch) = switched().await;
    let (agent, mut client) = agent(ejecting(&[bad.addr], LONG)).await;
    for _ in 0..10 {
        let response = client.request(&put("{}")).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
    }
    assert_eq!((bad.requests(), endpoints(&agent, "ejected")), (10, 0));
    switch.set(true);
    assert_eq!(served(&mut client).await, Some(bad.addr));
}

/// D7, E10: the picker's list is followed, with ejected endpoints moved to its end.
#[tokio::test]
async fn ejected_endpoints_move_to_end_of_picker_list() {
    let ((bad, switch), (also, _)) = (switched().await, switched().await);
    let good = model_server().await;
    let named = format!("{},{}", bad.addr, good.addr);
    let only = bad.addr.to_string();
    let script = move |exchange: &penstock_tests::scripted_epp::Exchange| {
        let alone = exchange.request_headers.iter().any(|(name, _)| name == "x-alone");
        vec![reply::pick(if alone { &only } else { &named }, &[])]
    };
    let epp = ScriptedEpp::start(Answering::new(script)).await.unwrap();
    let all = [bad.addr, good.addr, also.addr];
    let ejection = ejecting(&all, LONG).ejection;
    let (agent, mut client) = agent(Pool { ejection, ..epp_pool(&all, epp.addr, FailureMode::Closed) }).await;
    for _ in 0..10 {
        assert_eq!(served(&mut client).await, Some(good.addr));
    }
    assert_eq!((bad.requests(), endpoints(&agent, "ejected")), (3, 1));
    switch.set(true);
    let response = client.request(&put("{}").header("x-alone", "1")).await.unwrap();
    assert_eq!(response.served_by(), Some(bad.addr), "the only endpoint was not used");
}

async fn until_served(client: &mut Client, by: SocketAddr) {
    let served = async { while served(client).await != Some(by) {} };
    tokio::time::timeout(SOON, served).await.expect("the endpoint got no request");
}

fn checked(endpoints: &[SocketAddr], interval: Duration, timeout: Duration) -> Pool {
    let rules = HealthCheck { interval, timeout, unhealthy_after: 2, ..HealthCheck::new("/health".parse().unwrap()) };
    Pool { health: Some(rules), ..builtin_pool(endpoints) }
}

const OFTEN: Duration = Duration::from_millis(20);

#[tokio::test]
async fn endpoint_without_checks_is_not_probed() {
    let server = model_server().await;
    let (_agent, mut client) = agent(builtin_pool(&[server.addr])).await;
    assert_eq!(served(&mut client).await, Some(server.addr));
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn endpoint_with_failing_checks_is_avoided_until_success() {
    let (one, two) = (model_server().await, model_server().await);
    let (agent, mut client) = agent(checked(&[one.addr, two.addr], OFTEN, SOON)).await;
    one.set_healthy(false);
    eventually(SOON, || endpoints(&agent, "unhealthy") == 1).await;
    for _ in 0..10 {
        assert_eq!(served(&mut client).await, Some(two.addr));
    }
    assert!(agent.count("penstock_endpoint_check_failures_total", &[r#"reason="status""#]) >= 2);
    one.set_healthy(true);
    eventually(SOON, || endpoints(&agent, "ready") == 2).await;
    until_served(&mut client, one.addr).await;
    let check = one.seen().into_iter().find(|seen| seen.target == "/health").unwrap();
    assert_eq!((check.method.as_str(), check.header("host")), ("GET", Some(one.addr.to_string().as_str())));
}

#[tokio::test]
async fn endpoints_all_failing_checks_are_still_used() {
    let one = model_server().await;
    one.set_healthy(false);
    let (agent, mut client) = agent(checked(&[one.addr], OFTEN, SOON)).await;
    eventually(SOON, || endpoints(&agent, "unhealthy") == 1).await;
    assert_eq!(served(&mut client).await, Some(one.addr));
}

#[tokio::test]
async fn check_over_timeout_fails() {
    // The kernel accepts connections, and nothing responds.
    let deaf = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let good = model_server().await;
    let endpoints_of = [deaf.local_addr().unwrap(), good.addr];
    let (agent, mut client) = agent(checked(&endpoints_of, OFTEN, Duration::from_secs(1))).await;
    eventually(SOON, || endpoints(&agent, "unhealthy") == 1).await;
    assert!(agent.count("penstock_endpoint_check_failures_total", &[r#"reason="timeout""#]) >= 2);
    for _ in 0..3 {
        assert_eq!(served(&mut client).await, Some(good.addr));
    }
}

#[tokio::test]
async fn checks_are_spread_over_interval() {
    // A gap of a quarter interval between two checks exceeds the delays of a busy machine.
    const INTERVAL: Duration = Duration::from_secs(4);
    let mut servers = Vec::new();
    for _ in 0..4 {
        servers.push(Abrupt::start(|_| Act::Answer).await);
    }
    let addresses: Vec<_> = servers.iter().map(|server| server.addr).collect();
    let (_agent, _client) = agent(checked(&addresses, INTERVAL, SOON)).await;
    eventually(SOON, || servers.iter().all(|server| server.requests() > 0)).await;
    let first = servers[0].begun()[0];
    let after: Vec<_> = servers.iter().map(|server| server.begun()[0].duration_since(first)).collect();
    assert!(after.is_sorted(), "{after:?}");
    // Delays are expected; half an interval too early is not.
    assert!(after[3] >= INTERVAL / 2, "{after:?}");
}
