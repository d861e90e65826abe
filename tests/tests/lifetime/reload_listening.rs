//! Reloads of what the agent listens with: workers, addresses, the limit of connections, the steering mode.

use std::net::{SocketAddr, TcpStream};

use nix::sys::signal::Signal;
use penstock_agent::config::SteeringMode;
use penstock_tests::{
    BodyEnd, Checker, Client, ModelServer, Plan, Reader, Request, TestAgent,
    agent::builtin_pool,
    agent_process::AgentProcess,
    eventually,
    model_server::{Framing, Lengths, Options, Pauses},
    reader::at_least,
};

use crate::{ANY_PORT, MODELS, SOON};

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

fn long() -> Plan {
    let pauses = Some(Pauses { seed: 9, every: 1, up_to_us: 4000 });
    let framing = Framing::Chunked;
    Plan { framing, size: 1_000_000, stream_id: 9, writes: Lengths::Fixed(1000), pauses, ..Plan::default() }
}

/// Begins a response that runs during what follows.
async fn begin(address: SocketAddr) -> (Client, Checker) {
    let mut client = Client::connect(address).await.unwrap();
    client.send(&long().request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let mut checker = long().checker();
    assert_eq!(at_least(&mut client, &mut checker, 20_000).await.unwrap(), None);
    (client, checker)
}

async fn finish((mut client, mut checker): (Client, Checker)) {
    assert!(checker.offset() < long().size / 2, "the response was not running");
    let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
    assert_eq!((read.end, checker.offset()), (BodyEnd::Complete, long().size));
}

/// Every one of many new connections is answered, whichever socket of the agent it gets.
async fn is_served(address: SocketAddr) {
    for _ in 0..64 {
        let mut client = Client::connect(address).await.unwrap();
        assert_eq!(client.request(&Request::get(MODELS)).await.unwrap().status(), 200);
    }
}

/// The worker threads of a process.
fn workers(agent: &AgentProcess) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.process.id())).unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    let is_worker = |name: &String| {
        let number = name.trim().strip_prefix("penstock-");
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    names.filter(is_worker).count()
}

#[tokio::test]
async fn workers_come_and_go_without_losing_a_connection() {
    let server = server().await;
    let mut agent = AgentProcess::start(ANY_PORT, server.addr, "auto", "").await.unwrap();
    let text = std::fs::read_to_string(agent.config_path()).unwrap();
    // A thread gets its name when it runs.
    eventually(SOON, || workers(&agent) == 2).await;
    let mut running = Vec::new();
    for (reloads, count) in [5, 1, 3, 2].into_iter().enumerate() {
        running.push(begin(agent.addr).await);
        // Connections that wait to be accepted while the sockets change hands.
        let waiting = super::upgrade::load::queue(agent.addr, 30).await;
        agent.write_text(&text.replace("workers = 2", &format!("workers = {count}"))).unwrap();
        agent.process.signal(Signal::SIGHUP).unwrap();
        for mut client in waiting {
            assert_eq!(client.response().await.unwrap().status(), 200);
        }
        let applied = async || agent.metric("penstock_config_reloads_total", &["applied"]).await.unwrap();
        let begun = std::time::Instant::now();
        while applied().await as usize != reloads + 1 {
            assert!(begun.elapsed() < SOON, "{:#?}", agent.process.output());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        is_served(agent.addr).await;
        assert!(workers(&agent) >= count);
    }
    for one in running {
        finish(one).await;
    }
    // Those that were retired have ended with their last connection.
    eventually(SOON, || workers(&agent) == 2).await;
    agent.process.terminate().unwrap();
    assert_eq!(agent.process.ended(SOON).await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn changed_address_is_served_and_the_old_port_closed() {
    let server = server().await;
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |_| {});
    let running = begin(agent.addr).await;
    let waiting = super::upgrade::load::queue(agent.addr, 30).await;
    let mut config = agent.agent.config();
    config.listen.address = "127.0.0.2:0".parse().unwrap();
    agent.agent.reload(config).unwrap();
    for mut client in waiting {
        assert_eq!(client.response().await.unwrap().status(), 200);
    }
    let address = agent.agent.address();
    assert!(address != agent.addr && address.ip().to_string() == "127.0.0.2");
    is_served(address).await;
    eventually(SOON, || TcpStream::connect(agent.addr).is_err()).await;
    finish(running).await;

    // The new address is known as the agent's own: no request is forwarded to it.
    let mut config = agent.agent.config();
    config.pools = vec![builtin_pool(&[address])];
    agent.agent.reload(config).unwrap();
    let mut client = Client::connect(address).await.unwrap();
    let begun = std::time::Instant::now();
    while client.request(&Request::get(MODELS)).await.unwrap().status() == 200 {
        assert!(begun.elapsed() < SOON, "the configuration does not apply");
    }
    assert_eq!(agent.count("penstock_requests_total", &[r#"reason="loop""#]), 0);
}

#[tokio::test]
async fn address_that_cannot_be_bound_refuses_the_whole_reload() {
    let server = server().await;
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |_| {});
    let mut config = agent.agent.config();
    // An address of no machine (RFC 5737).
    config.listen.address = "192.0.2.1:80".parse().unwrap();
    (config.listen.workers, config.pools[0].name) = (4, "other".to_owned());
    let refused = agent.agent.reload(config).unwrap_err().to_string();
    assert!(refused.starts_with("cannot listen on 192.0.2.1:80: "), "{refused}");
    assert_eq!(agent.agent.config(), agent.config());
    is_served(agent.addr).await;
    assert_eq!(agent.count("penstock_config_reloads_total", &["refused"]), 1);
}

#[tokio::test]
async fn steering_mode_applies_to_later_responses() {
    let server = server().await;
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Auto, |_| {});
    let carried = |path: &str| agent.count("penstock_body_bytes_total", &[&format!("path=\"{path}\"")]);
    let plan = Plan { size: 200_000, ..long() };
    for (mode, path) in [
        (SteeringMode::Off, "relay"),
        (SteeringMode::Ingress, "ingress"),
        (SteeringMode::Auto, "local"),
        (SteeringMode::Off, "relay"),
    ] {
        let mut config = agent.agent.config();
        config.steering.mode = mode;
        agent.agent.reload(config).unwrap();
        let begun = std::time::Instant::now();
        loop {
            let before = ["relay", "ingress", "local"].map(carried);
            let mut client = Client::connect(agent.addr).await.unwrap();
            client.send(&plan.request()).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            let read = Reader::Fast.take(&mut client, &mut plan.checker()).await.unwrap();
            assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
            // Counted before the connection's next request is answered.
            assert_eq!(client.request(&Request::get(MODELS)).await.unwrap().status(), 200);
            let after = ["relay", "ingress", "local"].map(carried);
            let most = (0..3).max_by_key(|&at| after[at] - before[at]).map(|at| ["relay", "ingress", "local"][at]);
            if most == Some(path) {
                break;
            }
            // Each worker takes the new configuration at its own time.
            assert!(begun.elapsed() < SOON, "{mode:?}: {most:?}");
        }
    }
}

#[tokio::test]
async fn limit_of_connections_changes() {
    let server = server().await;
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |config| {
        config.listen.max_connections = 1;
    });
    let status =
        async || Client::connect(agent.addr).await.unwrap().request(&Request::get(MODELS)).await.unwrap().status();
    let _running = begin(agent.addr).await;
    assert_eq!(status().await, 503);
    for (limit, expected) in [(3, 200), (1, 503)] {
        let mut config = agent.agent.config();
        config.listen.max_connections = limit;
        agent.agent.reload(config).unwrap();
        assert_eq!(agent.metric("penstock_client_connections_limit", &[]) as usize, limit);
        let begun = std::time::Instant::now();
        // A connection that was served may still be closing.
        while status().await != expected {
            assert!(begun.elapsed() < SOON, "limit {limit}");
        }
    }
}
