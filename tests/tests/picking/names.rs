//! A picker behind a DNS name: each address is a replica, answers hold for their TTL, and only requests that need DNS wait for it.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use penstock_agent::config::{Config, FailureMode, SteeringMode};
use penstock_tests::{
    Client, DnsServer, ModelServer, Request, ScriptedEpp,
    agent::{TestAgent, epps_pool},
    eventually,
    scripted_epp::{Production, Setup},
    stage::epp,
};

use crate::SOON;

const NAME: &str = "epp.test";
const LONG: Duration = Duration::from_secs(300);

async fn endpoint() -> ModelServer {
    ModelServer::start(Default::default()).await.unwrap()
}

/// Replicas on one port at several addresses of this machine, like pods.
async fn pods(endpoint: &ModelServer, addresses: &[&str]) -> Vec<ScriptedEpp> {
    for _ in 0..10 {
        let mut pods: Vec<ScriptedEpp> = Vec::new();
        for address in addresses {
            let port = pods.first().map_or(0, |pod| pod.addr.port());
            let setup = Setup { address: SocketAddr::new(ip(address), port), ..Setup::default() };
            // Another process may use that port on another address.
            let Ok(pod) = ScriptedEpp::start_with(setup, Production::new(&[endpoint.addr])).await else { break };
            pods.push(pod);
        }
        if pods.len() == addresses.len() {
            return pods;
        }
    }
    panic!("found no common free port at {addresses:?}");
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

fn agent(endpoint: &ModelServer, dns: &DnsServer, port: u16, adjust: impl FnOnce(&mut Config)) -> TestAgent {
    let pool = epps_pool(&[endpoint.addr], &[], FailureMode::Closed);
    TestAgent::start(pool, SteeringMode::Off, |config| {
        config.listen.workers = 1;
        config.dns.servers = vec![dns.addr];
        config.dns.min_ttl = Duration::from_millis(20);
        epp(config).addresses = vec![format!("{NAME}:{port}")];
        adjust(config);
    })
}

/// The pod that gets the request.
async fn asked(client: &mut Client, pods: &[ScriptedEpp]) -> IpAddr {
    let before: Vec<_> = pods.iter().map(ScriptedEpp::streams_started).collect();
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
    let mut asked = pods.iter().zip(before).filter(|(pod, before)| pod.streams_started() > *before);
    asked.next().expect("no pod was asked").0.addr.ip()
}

fn replicas(agent: &TestAgent) -> u64 {
    agent.count("penstock_epp_replicas", &[])
}

/// E17.
#[tokio::test]
async fn resolved_addresses_become_replicas_in_sorted_order() {
    let (endpoint, dns) = (endpoint().await, DnsServer::start().await.unwrap());
    let mut pods = pods(&endpoint, &["127.0.0.2", "127.0.0.3", "127.0.0.4"]).await;
    let (two, three, four) = (ip("127.0.0.2"), ip("127.0.0.3"), ip("127.0.0.4"));
    dns.set(NAME, &[four, three], LONG);
    let agent = agent(&endpoint, &dns, pods[0].addr.port(), |config| config.dns.max_ttl = Duration::from_millis(20));
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(asked(&mut client, &pods).await, three);
    assert_eq!(replicas(&agent), 2);
    // A replica is added; the order is the same for every agent, whenever it looked up the name.
    dns.set(NAME, &[three, two, four], LONG);
    eventually(SOON, || replicas(&agent) == 3).await;
    assert_eq!(asked(&mut client, &pods).await, two);
    // A replica is removed, and its connection with it.
    dns.set(NAME, &[three, four], LONG);
    eventually(SOON, || replicas(&agent) == 2).await;
    assert_eq!(asked(&mut client, &pods).await, three);
    eventually(SOON, || pods[0].connections_open() == 0).await;
    // A failed lookup changes nothing.
    dns.remove(NAME);
    let before = dns.queries(NAME);
    eventually(SOON, || dns.queries(NAME) > before).await;
    assert_eq!((asked(&mut client, &pods).await, replicas(&agent)), (three, 2));
    pods[1].stop();
    assert_eq!(asked(&mut client, &pods).await, four);
    assert_eq!(agent.count("penstock_epp_failures_total", &[]), 0);
}

/// E17: answers hold for their TTL, whatever the number of requests.
#[tokio::test]
async fn name_is_resolved_again_after_ttl() {
    let (endpoint, dns) = (endpoint().await, DnsServer::start().await.unwrap());
    let pods = pods(&endpoint, &["127.0.0.2", "127.0.0.3"]).await;
    dns.set(NAME, &[ip("127.0.0.2")], Duration::from_secs(1));
    let begin = Instant::now();
    let agent = agent(&endpoint, &dns, pods[0].addr.port(), |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    asked(&mut client, &pods).await;
    dns.set(NAME, &[ip("127.0.0.3")], LONG);
    let first = dns.queries(NAME);
    eventually(SOON, || dns.queries(NAME) > first).await;
    assert!(begin.elapsed() >= Duration::from_secs(1));
    eventually(SOON, || replicas(&agent) == 1 && agent.agent.metrics().encode().contains("127.0.0.3")).await;
    let second = dns.queries(NAME);
    for _ in 0..50 {
        assert_eq!(asked(&mut client, &pods).await, ip("127.0.0.3"));
    }
    assert_eq!(dns.queries(NAME), second);
}

/// E17: a picker that moved is found before the TTL of its old address ends.
#[tokio::test]
async fn failed_replica_triggers_immediate_lookup() {
    let (endpoint, dns) = (endpoint().await, DnsServer::start().await.unwrap());
    let mut pods = pods(&endpoint, &["127.0.0.2", "127.0.0.3"]).await;
    dns.set(NAME, &[ip("127.0.0.2")], LONG);
    let agent = agent(&endpoint, &dns, pods[0].addr.port(), |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(asked(&mut client, &pods).await, ip("127.0.0.2"));
    dns.set(NAME, &[ip("127.0.0.3")], LONG);
    pods[0].stop();
    // The request that detects the failed replica may be answered before the DNS lookup completes.
    let begin = Instant::now();
    loop {
        let response = client.request(&Request::get("/test/echo")).await.unwrap();
        if response.status() == 200 {
            break;
        }
        assert_eq!(response.error_code(), "picker_failed");
        assert!(begin.elapsed() < SOON, "the name was not resolved again");
    }
    assert!(agent.agent.metrics().encode().contains("127.0.0.3"));
    assert_eq!(asked(&mut client, &pods).await, ip("127.0.0.3"));
}

/// E11, E13: a silent DNS server delays requests by `connect_timeout`, and never blocks the worker.
#[tokio::test]
async fn unanswered_name_fails_after_connect_timeout() {
    const CONNECT: Duration = Duration::from_secs(1);
    let (endpoint, dns) = (endpoint().await, DnsServer::start().await.unwrap());
    dns.silence(true);
    let agent = agent(&endpoint, &dns, 9002, |config| {
        config.pools[0].failure_mode = FailureMode::Open;
        epp(config).connect_timeout = CONNECT;
    });
    let begin = Instant::now();
    let one = async || {
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.request(&Request::get("/test/echo")).await.unwrap().status()
    };
    assert_eq!(join_all((0..20).map(|_| one())).await, [200; 20]);
    assert!(begin.elapsed() >= CONNECT && begin.elapsed() < 10 * CONNECT, "took {:?}", begin.elapsed());
    assert_eq!(agent.count("penstock_epp_failures_total", &[r#"reason="unresolved""#]), 20);
}

/// E13: the decision deadline holds during a lookup.
#[tokio::test]
async fn decision_deadline_holds_during_lookup() {
    const DECISION: Duration = Duration::from_millis(200);
    let (endpoint, dns) = (endpoint().await, DnsServer::start().await.unwrap());
    dns.silence(true);
    let agent = agent(&endpoint, &dns, 9002, |config| {
        epp(config).connect_timeout = LONG;
        epp(config).decision_timeout = Some(DECISION);
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    let begin = Instant::now();
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().error_code(), "picker_failed");
    assert!(begin.elapsed() >= DECISION && begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert_eq!(agent.count("penstock_epp_failures_total", &[r#"reason="deadline""#]), 1);
}

/// A nonexistent name is known to be so, and no request waits for it.
#[tokio::test]
async fn nonexistent_name_fails_at_once() {
    let (endpoint, dns) = (endpoint().await, DnsServer::start().await.unwrap());
    let agent = agent(&endpoint, &dns, 9002, |config| epp(config).connect_timeout = LONG);
    let mut client = Client::connect(agent.addr).await.unwrap();
    for _ in 0..2 {
        assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().error_code(), "picker_failed");
    }
    assert_eq!(agent.count("penstock_epp_failures_total", &[r#"reason="unresolved""#]), 2);
}
