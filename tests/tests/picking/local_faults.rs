//! Faults of the agent's own machine return their own error and never count against endpoints or replicas of EPPs.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use penstock_agent::config::{FailureMode, HealthCheck, Pool, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Namespace, ScriptedEpp,
    agent::{TestAgent, builtin_pool, epps_pool},
    eventually,
    model_server::Options,
    scripted_epp::LlmdRouter,
    stage::{epp, put},
};
use socket2::{Domain, Socket, Type};

use crate::SOON;

/// The only ephemeral port of the agent's namespace.
const PORT: u16 = 40_001;
const ORDINARY: &str = "32768 60999";
/// The EPP answers 400 to a body without a model.
const PROMPT: &str = r#"{"model":"m"}"#;

/// Opens a connection from a given port.
fn connect(from: u16, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, from)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// Sets the ephemeral ports of a namespace.
fn set_ports(namespace: &Namespace, range: &str) {
    namespace.set("net/ipv4/ip_local_port_range", range).unwrap();
}

/// A client that is connected to the agent from a port that is not ephemeral.
fn client(namespace: &Namespace, agent: &TestAgent) -> Client {
    let stream = namespace.run(|| connect(PORT + 1, agent.addr)).unwrap();
    stream.set_nonblocking(true).unwrap();
    Client::over(tokio::net::TcpStream::from_std(stream).unwrap(), agent.addr)
}

/// Starts a server in a namespace.
fn start<T: Send, F: Future<Output = anyhow::Result<T>>>(namespace: &Namespace, server: impl Fn() -> F + Send) -> T {
    let start = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(server()).unwrap()
    };
    namespace.run(start).unwrap()
}

/// The agent's namespace has one ephemeral port, which is taken.
#[tokio::test]
async fn port_exhaustion_does_not_count_against_endpoints() {
    let namespace = Namespace::new().unwrap();
    let servers = [(); 2].map(|()| start(&namespace, || ModelServer::start(Options::default())));
    let addresses = servers.each_ref().map(|server| server.addr);
    let every = Duration::from_millis(50);
    let check = HealthCheck { interval: every, unhealthy_after: 1, ..HealthCheck::new("/health".parse().unwrap()) };
    let mut pool = Pool { health: Some(check), ..builtin_pool(&addresses) };
    pool.ejection.failures = 1;
    let agent = namespace
        .run(|| {
            TestAgent::start(pool, SteeringMode::Off, |config| {
                config.listen.workers = 1;
                config.timeouts.endpoint_keep_alive = Duration::from_millis(1);
            })
        })
        .unwrap();
    let mut client = client(&namespace, &agent);
    assert_eq!(client.request(&put("{}")).await.unwrap().status(), 200);

    let taken = namespace.run(|| addresses.map(|address| connect(PORT, address))).unwrap();
    set_ports(&namespace, &format!("{PORT} {PORT}"));
    let faults = || agent.count("penstock_local_faults_total", &[r#"reason="ports""#]);
    for _ in 0..5 {
        let response = client.request(&put("{}")).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (503, "local_fault"));
        assert_eq!(response.header("retry-after"), Some("1"));
    }
    // The failures of requests, then those of checks.
    let before = faults();
    assert!(before >= 10, "{before}");
    eventually(SOON, || faults() >= before + 4).await;
    for state in ["ejected", "unhealthy"] {
        assert_eq!(agent.count("penstock_endpoints", &[&format!("state=\"{state}\"")]), 0, "{state}");
    }
    assert_eq!(agent.count("penstock_ejections_total", &[]), 0);
    assert_eq!(agent.count("penstock_endpoint_check_failures_total", &[]), 0);

    drop(taken);
    set_ports(&namespace, ORDINARY);
    let response = client.request(&put("{}")).await.unwrap();
    assert!(addresses.contains(&response.served_by().unwrap()));
}

/// An agent whose EPP has two replicas, all in a namespace, and a client of it.
struct TwoReplicas {
    namespace: Namespace,
    agent: TestAgent,
    client: Client,
    replicas: [ScriptedEpp; 2],
    _servers: [ModelServer; 2],
}

impl TwoReplicas {
    /// `wait` is how long a request waits for a replica. The first request was answered.
    async fn start(wait: Option<Duration>) -> Self {
        let namespace = Namespace::new().unwrap();
        let servers = [(); 2].map(|()| start(&namespace, || ModelServer::start(Options::default())));
        let addresses = servers.each_ref().map(|server| server.addr);
        let replicas = [(); 2].map(|()| start(&namespace, || ScriptedEpp::start(LlmdRouter::new(&addresses))));
        let pool = epps_pool(&addresses, &replicas.each_ref().map(|epp| epp.addr), FailureMode::Closed);
        let begin = || {
            TestAgent::start(pool, SteeringMode::Off, |config| {
                config.listen.workers = 1;
                let epp = epp(config);
                epp.health_interval = Some(Duration::from_millis(50));
                epp.unreachable_wait = Some(wait);
            })
        };
        let agent = namespace.run(begin).unwrap();
        let mut client = client(&namespace, &agent);
        assert_eq!(client.request(&put(PROMPT)).await.unwrap().status(), 200);
        eventually(SOON, || agent.count("penstock_epp_replicas", &[r#"state="serving""#]) == 2).await;
        Self { namespace, agent, client, replicas, _servers: servers }
    }

    /// Takes the only port towards each replica until the connections are dropped, and ends the agent's connections to them.
    async fn exhaust_ports(&self) -> [TcpStream; 2] {
        let addresses = self.replicas.each_ref().map(|epp| epp.addr);
        let taken = self.namespace.run(|| addresses.map(|address| connect(PORT, address))).unwrap();
        set_ports(&self.namespace, &format!("{PORT} {PORT}"));
        self.replicas.iter().for_each(ScriptedEpp::go_away);
        eventually(SOON, || self.agent.count("penstock_epp_connections", &[]) == 0).await;
        taken
    }

    fn end_exhaustion(&self, taken: [TcpStream; 2]) {
        drop(taken);
        set_ports(&self.namespace, ORDINARY);
    }

    fn faults(&self) -> u64 {
        self.agent.count("penstock_local_faults_total", &[r#"reason="ports""#])
    }
}

#[tokio::test]
async fn port_exhaustion_does_not_make_replicas_unreachable() {
    let mut stage = TwoReplicas::start(None).await;
    let taken = stage.exhaust_ports().await;
    let before = stage.faults();
    for _ in 0..5 {
        let response = stage.client.request(&put(PROMPT)).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
        let text = response.text();
        assert!(text.contains("the agent cannot open connections to the EPP"), "{text}");
    }
    for metric in ["penstock_epp_failures_total", "penstock_epp_asked_again_total"] {
        assert_eq!(stage.agent.count(metric, &[r#"reason="local_fault""#]), 5, "{metric}");
        assert_eq!(stage.agent.count(metric, &[]), 5, "{metric}");
    }
    // Each request tries both replicas.
    let after = stage.faults();
    assert!(after >= before + 10, "{before} then {after}");
    // Health checks go on failing to connect.
    eventually(SOON, || stage.faults() >= after + 10).await;
    assert_eq!(stage.agent.count("penstock_epp_replicas", &[r#"state="unreachable""#]), 0);
    assert_eq!(stage.agent.count("penstock_epp_replicas", &[r#"state="serving""#]), 2);

    // No request waits for a task that connects again.
    stage.end_exhaustion(taken);
    let asked = stage.replicas[0].streams_started();
    assert_eq!(stage.client.request(&put(PROMPT)).await.unwrap().status(), 200);
    assert_eq!(stage.replicas[0].streams_started(), asked + 1);
}

#[tokio::test]
async fn request_waits_for_the_end_of_port_exhaustion() {
    let mut stage = TwoReplicas::start(Some(SOON)).await;
    let taken = stage.exhaust_ports().await;
    let begin = Instant::now();
    stage.client.send(&put(PROMPT)).await.unwrap();
    let again = || stage.agent.count("penstock_epp_asked_again_total", &[r#"reason="local_fault""#]);
    eventually(SOON, || again() >= 3).await;
    // Once at first, and then after pauses of at least 50 ms.
    let (times, most) = (again(), 1 + begin.elapsed().as_millis() / 50);
    assert!(u128::from(times) <= most, "{times} of {most}");
    stage.end_exhaustion(taken);
    assert_eq!(stage.client.head().await.unwrap().status, 200);
    assert_eq!(stage.agent.count("penstock_epp_waits_total", &[r#"reason="served""#]), 1);
}

/// connect(2) returns the same error as without a free port, but it lasts.
#[tokio::test]
async fn replica_without_a_source_address_is_unreachable() {
    let namespace = Namespace::new().unwrap();
    namespace.set("net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    let server = start(&namespace, || ModelServer::start(Options::default()));
    let replica = start(&namespace, || ScriptedEpp::start(LlmdRouter::new(&[server.addr])));
    let unreachable: SocketAddr = "[2001:db8::5]:9002".parse().unwrap();
    let pool = epps_pool(&[server.addr], &[unreachable, replica.addr], FailureMode::Closed);
    let begin = || {
        TestAgent::start(pool, SteeringMode::Off, |config| {
            config.listen.workers = 1;
            epp(config).health_interval = Some(Duration::from_millis(50));
        })
    };
    let agent = namespace.run(begin).unwrap();
    let mut client = client(&namespace, &agent);
    for _ in 0..5 {
        assert_eq!(client.request(&put(PROMPT)).await.unwrap().status(), 200);
    }
    eventually(SOON, || agent.count("penstock_epp_replicas", &[r#"state="unreachable""#]) == 1).await;
    assert_eq!(agent.count("penstock_local_faults_total", &[r#"reason="ports""#]), 0);
    assert!(agent.count("penstock_local_faults_total", &[r#"reason="address_family""#]) > 0);
}
