//! Sources of a pool's endpoints besides its list: a DNS name and a watched file. Also endpoints that drain or are removed.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use penstock_agent::config::{Config, FailureMode, NamedEndpoints, Pool, SteeringMode};
use penstock_tests::agent::{TestAgent, builtin_pool, epp_pool};
use penstock_tests::client::{BodyEnd, Client, Pace};
use penstock_tests::dns_server::DnsServer;
use penstock_tests::model_server::Options;
use penstock_tests::scripted_epp::{Answering, ScriptedEpp, reply};
use penstock_tests::stage::echo;
use penstock_tests::{ModelServer, Plan, Refusing, eventually};
use tempfile::TempDir;

use crate::SOON;

async fn model_server() -> ModelServer {
    ModelServer::start(Options::default()).await.unwrap()
}

async fn model_server_at(listen: SocketAddr) -> ModelServer {
    ModelServer::start(Options { listen, ..Options::default() }).await.unwrap()
}

fn start(pool: Pool) -> TestAgent {
    TestAgent::start(pool, SteeringMode::Off, |config| config.listen.workers = 1)
}

async fn client(agent: &TestAgent) -> Client {
    Client::connect(agent.addr).await.unwrap()
}

async fn served(client: &mut Client) -> Option<SocketAddr> {
    client.request(&echo("{}")).await.unwrap().served_by()
}

async fn code(client: &mut Client) -> (u16, String) {
    let response = client.request(&echo("{}")).await.unwrap();
    (response.status(), response.error_code())
}

fn endpoints(agent: &TestAgent, state: &str) -> u64 {
    agent.count("penstock_endpoints", &[r#"pool="default""#, &format!("state=\"{state}\"")])
}

async fn until_ready(agent: &TestAgent, endpoints_there: u64) {
    eventually(SOON, || endpoints(agent, "ready") == endpoints_there).await;
    eventually(SOON, || agent.agent.readiness().is_ready()).await;
}

fn failures(agent: &TestAgent, source: &str, reason: &str) -> u64 {
    let labels = [&*format!("source=\"{source}\""), &*format!("reason=\"{reason}\"")];
    agent.count("penstock_endpoint_source_failures_total", &labels)
}

fn sources_up(agent: &TestAgent, source: &str) -> u64 {
    agent.count("penstock_endpoint_source_up", &[&format!("source=\"{source}\"")])
}

struct File {
    folder: TempDir,
    path: PathBuf,
}

impl File {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        Self { folder, path }
    }

    fn pool(&self) -> Pool {
        Pool { endpoints_file: Some(self.path.clone()), ..builtin_pool(&[]) }
    }

    /// In place, as editors and `kubectl cp` do.
    fn write(&self, text: &str) {
        std::fs::write(&self.path, text).unwrap();
    }

    /// Atomically, by a rename.
    fn replace(&self, text: &str) {
        let next = self.folder.path().join("next");
        std::fs::write(&next, text).unwrap();
        std::fs::rename(next, &self.path).unwrap();
    }
}

fn toml<T: Display>(endpoints: &[T]) -> String {
    let list: Vec<String> = endpoints.iter().map(|endpoint| format!("\"{endpoint}\"")).collect();
    format!("endpoints = [{}]\n", list.join(", "))
}

fn draining(endpoint: SocketAddr, rest: &[SocketAddr]) -> String {
    let rest: String = rest.iter().map(|endpoint| format!(", \"{endpoint}\"")).collect();
    format!("endpoints = [{{ address = \"{endpoint}\", draining = true }}{rest}]\n")
}

#[tokio::test]
async fn endpoint_file_changes_are_followed() {
    let (one, two) = (model_server().await, model_server().await);
    let file = File::new("endpoints.toml");
    file.write(&toml(&[one.addr]));
    let agent = start(file.pool());
    until_ready(&agent, 1).await;
    let mut client = client(&agent).await;
    assert_eq!(served(&mut client).await, Some(one.addr));
    for (turn, (server, how)) in
        [(&two, File::replace as fn(&File, &str)), (&one, File::write), (&two, File::replace)].into_iter().enumerate()
    {
        let begin = Instant::now();
        how(&file, &toml(&[server.addr]));
        while served(&mut client).await != Some(server.addr) {
            assert!(begin.elapsed() < SOON, "change {turn}");
        }
        println!("change {turn} took effect after {:?}", begin.elapsed());
    }
    assert_eq!((sources_up(&agent, "file"), failures(&agent, "file", "wrong")), (1, 0));
}

/// Updates like a kubelet: the names in a volume link into a folder that is itself behind a link, which is swapped.
fn publish(volume: &Path, version: &str, text: &str) {
    let folder = format!("..{version}");
    std::fs::create_dir(volume.join(&folder)).unwrap();
    std::fs::write(volume.join(&folder).join("endpoints.json"), text).unwrap();
    std::os::unix::fs::symlink(&folder, volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}

#[tokio::test]
async fn config_map_changes_are_followed() {
    let (one, two) = (model_server().await, model_server().await);
    let json = |addr: SocketAddr| format!(r#"{{"endpoints": [{{"address": "{addr}", "zone": null}}]}}"#);
    let file = File::new("endpoints.json");
    publish(file.folder.path(), "1", &json(one.addr));
    std::os::unix::fs::symlink("..data/endpoints.json", &file.path).unwrap();
    let agent = start(file.pool());
    until_ready(&agent, 1).await;
    let mut client = client(&agent).await;
    assert_eq!(served(&mut client).await, Some(one.addr));
    publish(file.folder.path(), "2", &json(two.addr));
    std::fs::remove_dir_all(file.folder.path().join("..1")).unwrap();
    let begin = Instant::now();
    while served(&mut client).await != Some(two.addr) {
        assert!(begin.elapsed() < SOON);
    }
}

/// The error is logged once.
#[tokio::test]
async fn broken_file_keeps_previous_endpoints() {
    let (one, two) = (model_server().await, model_server().await);
    let file = File::new("endpoints.toml");
    file.write(&toml(&[one.addr]));
    let agent = start(file.pool());
    until_ready(&agent, 1).await;
    let mut client = client(&agent).await;
    file.write("endpoints = [\"10.0.0.1\"]");
    eventually(SOON, || sources_up(&agent, "file") == 0).await;
    assert_eq!(served(&mut client).await, Some(one.addr));
    file.replace("");
    eventually(SOON, || failures(&agent, "file", "wrong") == 2).await;
    std::fs::remove_file(&file.path).unwrap();
    eventually(SOON, || failures(&agent, "file", "missing") == 1).await;
    assert_eq!(served(&mut client).await, Some(one.addr));
    file.write(&toml(&[two.addr]));
    eventually(SOON, || sources_up(&agent, "file") == 1).await;
    assert_eq!(served(&mut client).await, Some(two.addr));
    assert_eq!((failures(&agent, "file", "wrong"), failures(&agent, "file", "missing")), (2, 1));
    assert!(agent.agent.readiness().is_ready(), "a broken file made a ready agent unready");
}

#[tokio::test]
async fn pool_waits_for_missing_file() {
    let one = model_server().await;
    let file = File::new("endpoints.toml");
    let agent = start(file.pool());
    eventually(SOON, || failures(&agent, "file", "missing") == 1).await;
    eventually(SOON, || agent.agent.readiness().pending() == ["endpoints of pool default"]).await;
    let mut client = client(&agent).await;
    assert_eq!(code(&mut client).await, (503, "no_endpoint".to_owned()));
    file.write(&toml(&[one.addr]));
    until_ready(&agent, 1).await;
    assert_eq!(served(&mut client).await, Some(one.addr));
}

/// D8: a running stream ends normally, and no new request starts there.
async fn finishes_and_gets_nothing_new(leave: impl FnOnce(&File, SocketAddr, &[SocketAddr]), left: (u64, u64)) {
    let (one, others) = (model_server().await, [model_server().await, model_server().await]);
    let file = File::new("endpoints.toml");
    file.write(&toml(&[one.addr]));
    let agent = start(file.pool());
    until_ready(&agent, 1).await;
    let mut running = client(&agent).await;
    // Larger than the buffers in between while the client does not read.
    let plan = Plan { size: 40 << 20, ..Plan::default() };
    running.send(&plan.request()).await.unwrap();
    running.head().await.unwrap();
    leave(&file, one.addr, &others.each_ref().map(|other| other.addr));
    eventually(SOON, || (endpoints(&agent, "ready"), endpoints(&agent, "draining")) == left).await;
    let mut client = client(&agent).await;
    for _ in 0..6 {
        assert!(served(&mut client).await.is_some());
    }
    assert_eq!((others[0].requests(), others[1].requests()), (3, 3));
    assert!(one.written() < plan.size);
    let mut checker = plan.checker();
    let read = running.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((checker.offset(), read.end), (plan.size, BodyEnd::Complete));
    assert_eq!((one.requests(), one.aborted()), (1, 0));
}

/// D8.
#[tokio::test]
async fn draining_endpoint_finishes_and_gets_nothing_new() {
    finishes_and_gets_nothing_new(|file, one, others| file.replace(&draining(one, others)), (2, 1)).await;
}

/// D8.
#[tokio::test]
async fn removed_endpoint_finishes_and_gets_nothing_new() {
    finishes_and_gets_nothing_new(|file, _, others| file.replace(&toml(others)), (2, 0)).await;
}

/// D8: in a picker's list, and when the picker fails.
#[tokio::test]
async fn draining_endpoint_in_pick_is_skipped() {
    let (one, two) = (model_server().await, model_server().await);
    let file = File::new("endpoints.toml");
    file.write(&draining(one.addr, &[two.addr]));
    let (both, only) = (format!("{},{}", one.addr, two.addr), one.addr.to_string());
    let epp = ScriptedEpp::start(Answering::new(move |exchange| {
        let alone = exchange.request_headers.iter().any(|(name, _)| name == "x-alone");
        vec![reply::pick(if alone { &only } else { &both }, &[])]
    }))
    .await
    .unwrap();
    let refusing = Refusing::new().unwrap();
    for (picker, mode) in [(epp.addr, FailureMode::Closed), (refusing.addr, FailureMode::Open)] {
        let pool = Pool { endpoints_file: Some(file.path.clone()), ..epp_pool(&[], picker, mode) };
        let agent = start(pool);
        until_ready(&agent, 1).await;
        let mut client = client(&agent).await;
        for _ in 0..5 {
            assert_eq!(served(&mut client).await, Some(two.addr));
        }
        if mode == FailureMode::Closed {
            let response = client.request(&echo("{}").header("x-alone", "1")).await.unwrap();
            assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_not_in_pool"));
        }
    }
    assert_eq!(one.connections_accepted(), 0);
}

const NAME: &str = "models.test";

fn ip(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, last))
}

fn named(dns: &DnsServer, ports: &[u16], min_ttl: Duration) -> (Pool, impl FnOnce(&mut Config) + use<>) {
    let named = NamedEndpoints { name: NAME.to_owned(), ports: ports.to_vec() };
    let server = dns.addr;
    let settings = move |config: &mut Config| {
        config.listen.workers = 1;
        config.dns.servers = vec![server];
        config.dns.timeout = Duration::from_millis(300);
        (config.dns.min_ttl, config.dns.max_ttl) = (min_ttl, min_ttl.max(Duration::from_millis(50)));
    };
    (Pool { endpoints_dns: Some(named), ..builtin_pool(&[]) }, settings)
}

const AT_ONCE: Duration = Duration::from_millis(20);

/// Two servers on one port at different addresses.
async fn twins() -> (ModelServer, ModelServer) {
    let one = model_server_at(SocketAddr::new(ip(2), 0)).await;
    let two = model_server_at(SocketAddr::new(ip(3), one.addr.port())).await;
    (one, two)
}

#[tokio::test]
async fn name_is_resolved_again_after_ttl() {
    let (one, two) = twins().await;
    let dns = DnsServer::start().await.unwrap();
    dns.set(NAME, &[ip(2)], Duration::ZERO);
    let (pool, settings) = named(&dns, &[one.addr.port()], AT_ONCE);
    let agent = TestAgent::start(pool, SteeringMode::Off, settings);
    until_ready(&agent, 1).await;
    let mut client = client(&agent).await;
    assert_eq!(served(&mut client).await, Some(one.addr));
    dns.set(NAME, &[ip(2), ip(3)], Duration::ZERO);
    until_ready(&agent, 2).await;
    let both = [served(&mut client).await, served(&mut client).await];
    assert!(both.contains(&Some(one.addr)) && both.contains(&Some(two.addr)), "{both:?}");
    dns.set(NAME, &[ip(3)], Duration::ZERO);
    until_ready(&agent, 1).await;
    assert_eq!(served(&mut client).await, Some(two.addr));
}

#[tokio::test]
async fn name_is_not_resolved_before_ttl() {
    let (one, _two) = twins().await;
    let dns = DnsServer::start().await.unwrap();
    dns.set(NAME, &[ip(2)], Duration::from_secs(3600));
    let (pool, settings) = named(&dns, &[one.addr.port()], AT_ONCE);
    let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
        settings(config);
        config.dns.max_ttl = Duration::from_secs(3600);
    });
    until_ready(&agent, 1).await;
    let asked = dns.queries(NAME);
    dns.set(NAME, &[ip(3)], Duration::ZERO);
    let mut client = client(&agent).await;
    let begin = Instant::now();
    while begin.elapsed() < 10 * AT_ONCE {
        assert_eq!(served(&mut client).await, Some(one.addr));
    }
    assert_eq!(dns.queries(NAME), asked);
}

#[tokio::test]
async fn failed_lookup_keeps_previous_endpoints() {
    let (one, two) = twins().await;
    let dns = DnsServer::start().await.unwrap();
    dns.set(NAME, &[ip(2)], Duration::ZERO);
    let (pool, settings) = named(&dns, &[one.addr.port()], AT_ONCE);
    let agent = TestAgent::start(pool, SteeringMode::Off, settings);
    until_ready(&agent, 1).await;
    let mut client = client(&agent).await;
    dns.remove(NAME);
    eventually(SOON, || failures(&agent, "dns", "no_address") >= 2).await;
    assert_eq!((served(&mut client).await, sources_up(&agent, "dns")), (Some(one.addr), 0));
    dns.silence(true);
    eventually(SOON, || failures(&agent, "dns", "timeout") >= 1).await;
    assert_eq!(served(&mut client).await, Some(one.addr));
    dns.set(NAME, &[ip(3)], Duration::ZERO);
    dns.silence(false);
    eventually(SOON, || sources_up(&agent, "dns") == 1).await;
    assert_eq!(served(&mut client).await, Some(two.addr));
}

#[tokio::test]
async fn pool_waits_for_unresolved_name() {
    let one = model_server_at(SocketAddr::new(ip(2), 0)).await;
    let dns = DnsServer::start().await.unwrap();
    let (pool, settings) = named(&dns, &[one.addr.port()], AT_ONCE);
    let agent = TestAgent::start(pool, SteeringMode::Off, settings);
    eventually(SOON, || failures(&agent, "dns", "no_address") >= 3).await;
    assert_eq!(agent.agent.readiness().pending(), ["endpoints of pool default"]);
    dns.set(NAME, &[ip(2)], Duration::ZERO);
    until_ready(&agent, 1).await;
    assert_eq!(served(&mut client(&agent).await).await, Some(one.addr));
}

/// E22: each address and port pair is an endpoint, and a pick means exactly one of them.
#[tokio::test]
async fn each_port_of_address_is_its_own_endpoint() {
    let (a, b) = twins().await;
    let c = model_server_at(SocketAddr::new(ip(2), 0)).await;
    let d = model_server_at(SocketAddr::new(ip(3), c.addr.port())).await;
    let dns = DnsServer::start().await.unwrap();
    dns.set(NAME, &[ip(2), ip(3)], Duration::from_secs(1));
    let epp = ScriptedEpp::start(Answering::new(|exchange| {
        let to = exchange.request_headers.iter().find(|(name, _)| name == "x-to");
        vec![reply::pick(&to.expect("the request names no endpoint").1, &[])]
    }))
    .await
    .unwrap();
    let (pool, settings) = named(&dns, &[a.addr.port(), c.addr.port()], AT_ONCE);
    let picker = epp_pool(&[], epp.addr, FailureMode::Closed).picker;
    let agent = TestAgent::start(Pool { picker, ..pool }, SteeringMode::Off, settings);
    until_ready(&agent, 4).await;
    let mut client = client(&agent).await;
    for server in [&a, &b, &c, &d, &a] {
        let response = client.request(&echo("{}").header("x-to", server.addr.to_string())).await.unwrap();
        assert_eq!(response.served_by(), Some(server.addr));
    }
    // D3: a connection is kept per address and port.
    let accepted = [&a, &b, &c, &d].map(ModelServer::connections_accepted);
    assert_eq!(accepted, [1, 1, 1, 1]);
    // Neither another port of the address nor the address alone is accepted.
    let other = model_server_at(SocketAddr::new(ip(2), 0)).await;
    let response = client.request(&echo("{}").header("x-to", other.addr.to_string())).await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_not_in_pool"));
    assert_eq!(other.connections_accepted(), 0);
}

/// A pool's list, file and name together; where they overlap, the list takes precedence.
#[tokio::test]
async fn pool_combines_all_sources() {
    let (one, two) = twins().await;
    let three = model_server().await;
    let dns = DnsServer::start().await.unwrap();
    dns.set(NAME, &[ip(2), ip(3)], Duration::from_secs(1));
    let file = File::new("endpoints.toml");
    file.write(&draining(three.addr, &[one.addr]));
    let (pool, settings) = named(&dns, &[one.addr.port()], AT_ONCE);
    let pool = Pool { endpoints: vec![three.addr.into()], endpoints_file: Some(file.path.clone()), ..pool };
    let agent = TestAgent::start(pool, SteeringMode::Off, settings);
    until_ready(&agent, 3).await;
    assert_eq!(endpoints(&agent, "draining"), 0);
    let mut client = client(&agent).await;
    let mut all = [served(&mut client).await, served(&mut client).await, served(&mut client).await];
    all.sort();
    let mut expected = [one.addr, two.addr, three.addr].map(Some);
    expected.sort();
    assert_eq!(all, expected);
}
