//! Faults of the agent's own machine return their own error and never count against endpoints.

use std::net::{Ipv4Addr, SocketAddr};

use penstock_agent::config::{HealthCheck, Pool, SteeringMode};
use penstock_tests::agent::{TestAgent, builtin_pool};
use penstock_tests::client::Client;
use penstock_tests::model_server::Options;
use penstock_tests::stage::put;
use penstock_tests::{ModelServer, Namespace, eventually};
use socket2::{Domain, Socket, Type};

use crate::SOON;

/// Opens a connection from a given port.
fn connect(from: u16, to: SocketAddr) -> std::net::TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, from)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// The agent's namespace has one ephemeral port, which is taken.
#[tokio::test]
async fn port_exhaustion_does_not_count_against_endpoints() {
    const PORT: u16 = 40_001;
    let namespace = Namespace::new().unwrap();
    let start = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(ModelServer::start(Options::default())).unwrap()
    };
    let servers = [namespace.run(start).unwrap(), namespace.run(start).unwrap()];
    let addresses = servers.each_ref().map(|server| server.addr);
    let every = std::time::Duration::from_millis(50);
    let check = HealthCheck { interval: every, unhealthy_after: 1, ..HealthCheck::new("/health".parse().unwrap()) };
    let mut pool = Pool { health: Some(check), ..builtin_pool(&addresses) };
    pool.ejection.failures = 1;
    let agent = namespace
        .run(|| {
            TestAgent::start(pool, SteeringMode::Off, |config| {
                config.listen.workers = 1;
                config.timeouts.endpoint_keep_alive = std::time::Duration::from_millis(1);
            })
        })
        .unwrap();
    let stream = namespace.run(|| connect(PORT + 1, agent.addr)).unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut client = Client::over(tokio::net::TcpStream::from_std(stream).unwrap(), agent.addr);
    assert_eq!(client.request(&put("{}")).await.unwrap().status(), 200);

    let taken = namespace.run(|| addresses.map(|address| connect(PORT, address))).unwrap();
    let ports = |range: String| {
        namespace.run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range).unwrap()).unwrap();
    };
    ports(format!("{PORT} {PORT}"));
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
    ports("32768 60999".to_owned());
    let response = client.request(&put("{}")).await.unwrap();
    assert!(addresses.contains(&response.served_by().unwrap()));
}
