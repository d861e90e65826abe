//! Reloads: a new configuration applies to requests that begin afterwards, and cuts none that run.

use std::{fs::Permissions, net::SocketAddr, os::unix::fs::PermissionsExt as _, time::Duration};

use nix::sys::signal::Signal;
use penstock_agent::config::{FailureMode, ListenTls, NamedEndpoints, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader, Request, ScriptedEpp,
    agent::{TestAgent, builtin_pool, epp_pool},
    agent_process::AgentProcess,
    eventually,
    model_server::{Framing, Lengths, Options, Pauses},
    reader::at_least,
    scripted_epp::{Endpoints, LlmdRouter, StreamEnd},
    tls::Certificate,
};

use crate::{ANY_PORT, SOON};

async fn servers() -> [ModelServer; 2] {
    let options = Options { idle_close: None, ..Options::default() };
    [ModelServer::start(options.clone()).await.unwrap(), ModelServer::start(options).await.unwrap()]
}

async fn served_by(client: &mut Client) -> Option<SocketAddr> {
    let response = client.request(&Request::get("/v1/models")).await.unwrap();
    assert_eq!(response.status(), 200, "{}", response.text());
    response.served_by()
}

/// A response long enough to be running during a reload.
fn long() -> Plan {
    Plan {
        framing: Framing::Chunked,
        size: 400_000,
        stream_id: 9,
        writes: Lengths::Fixed(1000),
        pauses: Some(Pauses { seed: 9, every: 1, up_to_us: 2000 }),
        ..Plan::default()
    }
}

#[tokio::test]
async fn next_request_on_connection_uses_new_configuration() {
    let [one, two] = servers().await;
    let agent = TestAgent::start(builtin_pool(&[one.addr]), SteeringMode::Off, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(served_by(&mut client).await, Some(one.addr));
    let mut config = agent.agent.config();
    config.pools = vec![builtin_pool(&[two.addr])];
    agent.agent.reload(config).unwrap();
    // Each worker takes the new configuration at its own time.
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(Client::connect(agent.addr).await.unwrap());
    }
    clients.push(client);
    let begin = std::time::Instant::now();
    for client in &mut clients {
        while served_by(client).await != Some(two.addr) {
            assert!(begin.elapsed() < SOON, "a connection never got the new configuration");
        }
        assert_eq!(served_by(client).await, Some(two.addr), "the previous configuration came back");
    }
    assert_eq!(agent.count("penstock_config_reloads_total", &["applied"]), 1);
}

/// The samples of gauges of the pool "second" whose names begin like this.
fn gauges(agent: &TestAgent, prefix: &str) -> Vec<String> {
    let text = agent.agent.metrics().encode();
    let gauges = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" gauge"));
    let gauges: Vec<_> = gauges.filter(|name| name.starts_with(prefix)).collect();
    let is_one = |line: &&str| line.split('{').next().is_some_and(|name| gauges.contains(&name));
    text.lines().filter(is_one).filter(|line| line.contains(r#"pool="second""#)).map(str::to_owned).collect()
}

#[tokio::test]
async fn removed_pool_returns_404_and_leaves_metrics() {
    let [one, two] = servers().await;
    let epp = ScriptedEpp::start(LlmdRouter::over(Endpoints::new(&[two.addr]))).await.unwrap();
    let mut second = epp_pool(&[two.addr], epp.addr, FailureMode::Closed);
    second.name = "second".to_owned();
    second.endpoints_file = Some("/nonexistent".into());
    second.endpoints_dns = Some(NamedEndpoints { name: "localhost".to_owned(), ports: vec![two.addr.port()] });
    let agent = TestAgent::start(builtin_pool(&[one.addr]), SteeringMode::Off, |config| {
        config.pools.push(second);
        config.routes = vec![penstock_agent::config::Route::to("second")];
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(served_by(&mut client).await, Some(two.addr));
    assert_eq!(agent.count("penstock_endpoints", &["second", "ready"]), 1);
    let states = ["penstock_endpoints", "penstock_endpoint_source_up", "penstock_epp_replicas"];
    for state in states {
        eventually(SOON, || !gauges(&agent, state).is_empty()).await;
    }
    let mut config = agent.agent.config();
    config.pools.pop();
    let other = vec![penstock_agent::config::HostPattern::Exact("x".to_owned())];
    config.routes =
        vec![penstock_agent::config::Route { hosts: other, ..penstock_agent::config::Route::to("default") }];
    agent.agent.reload(config).unwrap();
    let begin = std::time::Instant::now();
    while client.request(&Request::get("/v1/models")).await.unwrap().status() != 404 {
        assert!(begin.elapsed() < SOON, "the route was not removed");
    }
    // What counts requests and connections ends with them, what says how things are with the pool.
    eventually(SOON, || gauges(&agent, "penstock_").iter().all(|line| line.ends_with(" 0"))).await;
    for state in states {
        assert_eq!(gauges(&agent, state), Vec::<String>::new());
    }
    assert_eq!(agent.count("penstock_endpoints", &["default", "ready"]), 1);
}

/// The picker stream of a running request continues to its end; the next request fails open as newly configured.
#[tokio::test]
async fn removed_picker_is_told_end_of_running_request() {
    let [one, _two] = servers().await;
    let mut epp = ScriptedEpp::start(LlmdRouter::over(Endpoints::new(&[one.addr]))).await.unwrap();
    let pool = epp_pool(&[one.addr], epp.addr, FailureMode::Closed);
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    let plan = long();
    client.send(&plan.request()).await.unwrap();
    let mut checker = plan.checker();
    assert_eq!(client.head().await.unwrap().status, 200);
    assert_eq!(at_least(&mut client, &mut checker, 20_000).await.unwrap(), None);
    let mut config = agent.agent.config();
    config.pools[0].failure_mode = FailureMode::Open;
    agent.agent.reload(config).unwrap();
    let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    eventually(SOON, || epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
    epp.stop();
    let begin = std::time::Instant::now();
    while client.request(&Request::get("/v1/models")).await.unwrap().status() != 200 {
        assert!(begin.elapsed() < SOON, "the pool still fails closed");
    }
}

#[tokio::test]
async fn reload_changing_startup_settings_is_rejected_whole() {
    let [one, two] = servers().await;
    let agent = TestAgent::start(builtin_pool(&[one.addr]), SteeringMode::Off, |_| {});
    let mut config = agent.agent.config();
    config.pools = vec![builtin_pool(&[two.addr])];
    config.listen.workers += 1;
    config.steering.max_flows += 1;
    let refused = agent.agent.reload(config).unwrap_err().to_string();
    assert_eq!(refused, "steering.max_flows cannot change at run time: restart the agent");
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(served_by(&mut client).await, Some(one.addr));
    assert_eq!(agent.count("penstock_config_reloads_total", &["refused"]), 1);
}

/// TLS clients agree on HTTP/2 in the handshake, which is configured once.
#[test]
fn http2_cannot_be_switched_off_under_tls() {
    let folder = tempfile::tempdir().unwrap();
    let (cert_file, key_file) = Certificate::new("agent.example").unwrap().write(folder.path()).unwrap();
    let agent = TestAgent::start(builtin_pool(&["127.0.0.1:1".parse().unwrap()]), SteeringMode::Off, |config| {
        config.listen.tls =
            Some(ListenTls { address: "127.0.0.1:0".parse().unwrap(), cert_file, key_file, ..ListenTls::default() });
    });
    for (streams, is_refused) in [(100, false), (0, true)] {
        let mut config = agent.agent.config();
        config.listen.http2_max_streams = streams;
        assert_eq!(agent.agent.reload(config).is_err(), is_refused, "{streams}");
    }
}

#[tokio::test]
async fn sighup_cuts_no_stream() {
    for steering in ["off", "ingress"] {
        let [one, two] = servers().await;
        let mut agent = AgentProcess::start(ANY_PORT, one.addr, steering, "").await.unwrap();
        let mut client = Client::connect(agent.addr).await.unwrap();
        let plan = long();
        client.send(&plan.request()).await.unwrap();
        let mut checker = plan.checker();
        assert_eq!(client.head().await.unwrap().status, 200);
        assert_eq!(at_least(&mut client, &mut checker, 20_000).await.unwrap(), None);

        agent.write_config(two.addr, "").unwrap();
        agent.process.signal(Signal::SIGHUP).unwrap();
        agent.process.line("configuration reloaded", SOON).await.unwrap();
        let mut another = Client::connect(agent.addr).await.unwrap();
        let begin = std::time::Instant::now();
        while served_by(&mut another).await != Some(two.addr) {
            assert!(begin.elapsed() < SOON, "{steering}: the new configuration never took effect");
        }
        let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
        assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "{steering}");
        let begin = std::time::Instant::now();
        while served_by(&mut client).await != Some(two.addr) {
            assert!(begin.elapsed() < SOON, "{steering}: the connection never got the new configuration");
        }
    }
}

#[tokio::test]
async fn invalid_configuration_changes_nothing() {
    let [one, two] = servers().await;
    let mut agent = AgentProcess::start(ANY_PORT, one.addr, "off", "").await.unwrap();
    agent.write_config(two.addr, "[timeouts]\nidle = \"never\"").unwrap();
    agent.process.signal(Signal::SIGHUP).unwrap();
    let line = agent.process.line("configuration reload failed, keeping the current one", SOON).await.unwrap();
    assert!(line.contains("timeouts.idle") && line.contains("never"), "{line}");
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(served_by(&mut client).await, Some(one.addr));
    assert_eq!(agent.metric("penstock_config_reloads_total", &["invalid"]).await.unwrap(), 1.0);
}

#[tokio::test]
async fn old_name_of_setting_is_logged_at_start_and_reload() {
    let [one, two] = servers().await;
    let mut agent = AgentProcess::start(ANY_PORT, one.addr, "off", "[limits]\nheaders = 64").await.unwrap();
    let is_warning = |line: &String| line.contains("old name") && line.contains("limits.head_fields");
    assert!(agent.process.output().iter().any(is_warning), "{:#?}", agent.process.output());
    agent.write_config(two.addr, "[bbr]\nheader = \"x-model\"").unwrap();
    agent.process.signal(Signal::SIGHUP).unwrap();
    let line = agent.process.line("bbr.model_header", SOON).await.unwrap();
    assert!(line.contains("old name"), "{line}");
    agent.process.line("configuration reloaded", SOON).await.unwrap();
}

/// A file on a filesystem that does not answer, here a named pipe that no one writes, keeps no signal waiting.
#[tokio::test]
async fn reload_that_cannot_read_its_file_does_not_delay_the_stop() {
    let [one, _] = servers().await;
    let mut agent = AgentProcess::start(ANY_PORT, one.addr, "off", "[timeouts]\nlame_duck = \"off\"").await.unwrap();
    std::fs::remove_file(agent.config_path()).unwrap();
    nix::unistd::mkfifo(agent.config_path(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::set_permissions(agent.config_path(), Permissions::from_mode(0o644)).unwrap();
    // Signals that arrive together are one.
    let begin = std::time::Instant::now();
    loop {
        agent.process.signal(Signal::SIGHUP).unwrap();
        let told = agent.process.line("the previous reload still reads its files", Duration::from_millis(200)).await;
        if told.is_ok() {
            break;
        }
        assert!(begin.elapsed() < SOON, "{:#?}", agent.process.output());
    }
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(served_by(&mut client).await, Some(one.addr));
    let status = agent.process.stop(SOON).unwrap();
    assert!(status.success(), "{status}");
}
