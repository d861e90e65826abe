//! The suite's setup: pools of pods with their own addresses, each pool with a picker that follows the request's selection;
//! gateways in front of them, configured in TOML; and requests.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::Result;
use futures_util::future::join_all;
use penstock_agent::config::{Config, SteeringMode};
use penstock_tests::{
    Client, Http2Options, Http2Server, ModelServer, Plan, Request, Response, ScriptedEpp,
    agent::{TestAgent, builtin_pool},
    content::Alphabet,
    model_server::{Echo, Framing, HeadWrites, Lengths, Options, Pauses},
    scripted_epp::Lwepp,
};

/// A different address of this machine on each call; tests in other processes have others.
fn address() -> IpAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let process = std::process::id().to_be_bytes()[3];
    // Neither in 127.0 nor ending in 0.
    Ipv4Addr::new(127, 1 + process % 250, high, low + 1).into()
}

/// A model server.
pub(crate) struct Pod {
    pub(crate) addr: SocketAddr,
    server: Server,
}

enum Server {
    Http1(ModelServer),
    H2c(Http2Server),
}

impl Pod {
    async fn http1(listen: SocketAddr) -> Result<Self> {
        let server = ModelServer::start(Options { listen, ..Options::default() }).await?;
        Ok(Self { addr: server.addr, server: Server::Http1(server) })
    }

    async fn h2c(listen: SocketAddr) -> Result<Self> {
        let server = Http2Server::start(Http2Options { listen, ..Http2Options::default() }).await?;
        Ok(Self { addr: server.addr, server: Server::H2c(server) })
    }

    fn requests(&self) -> u64 {
        match &self.server {
            Server::Http1(server) => server.requests(),
            Server::H2c(server) => server.requests(),
        }
    }

    fn connections_accepted(&self) -> u64 {
        match &self.server {
            Server::Http1(server) => server.connections_accepted(),
            Server::H2c(server) => server.connections_accepted(),
        }
    }

    /// The requests so far.
    pub(crate) fn seen(&self) -> Vec<Echo> {
        match &self.server {
            Server::Http1(server) => server.seen(),
            Server::H2c(server) => server.seen(),
        }
    }
}

/// An InferencePool with its EPP.
pub(crate) struct InferencePool {
    name: &'static str,
    pub(crate) pods: Vec<Pod>,
    pub(crate) epp: ScriptedEpp,
    /// The EPP address in the gateway's configuration.
    epp_address: SocketAddr,
    failure_mode: &'static str,
    app_protocol: Option<&'static str>,
    /// The pods' addresses and their common ports; no ports if each pod has its own.
    endpoints: Vec<String>,
    ports: Vec<u16>,
}

impl InferencePool {
    /// Starts `pods` pods, each on its own port.
    pub(crate) async fn start(name: &'static str, pods: usize) -> Self {
        let pods = join_all((0..pods).map(|_| Pod::http1((address(), 0).into()))).await;
        Self::each_on_its_port(name, pods).await
    }

    /// The same with HTTP/2 pods (h2c), declared in the pool.
    pub(crate) async fn h2c(name: &'static str, pods: usize) -> Self {
        let pods = join_all((0..pods).map(|_| Pod::h2c((address(), 0).into()))).await;
        Self::each_on_its_port(name, pods).await.speaking("h2c")
    }

    async fn each_on_its_port(name: &'static str, pods: Vec<Result<Pod>>) -> Self {
        let pods: Vec<Pod> = pods.into_iter().collect::<Result<_>>().expect("pods");
        let endpoints = pods.iter().map(|pod| pod.addr.to_string()).collect();
        Self::over(name, pods, endpoints, Vec::new()).await
    }

    /// Starts `pods` pods with three ranks each, on the same three ports.
    pub(crate) async fn data_parallel(name: &'static str, pods: usize) -> Self {
        let first = address();
        let mut ranks = Vec::new();
        for _ in 0..3 {
            ranks.push(Pod::http1((first, 0).into()).await.expect("could not start a rank"));
        }
        let ports: Vec<u16> = ranks.iter().map(|rank| rank.addr.port()).collect();
        let mut addresses = vec![first];
        for _ in 1..pods {
            let address = address();
            addresses.push(address);
            for &port in &ports {
                ranks.push(Pod::http1((address, port).into()).await.expect("could not start a rank"));
            }
        }
        Self::over(name, ranks, addresses.iter().map(ToString::to_string).collect(), ports).await
    }

    async fn over(name: &'static str, pods: Vec<Pod>, endpoints: Vec<String>, ports: Vec<u16>) -> Self {
        let addresses: Vec<SocketAddr> = pods.iter().map(|pod| pod.addr).collect();
        let epp = ScriptedEpp::start(Lwepp::new(&addresses)).await.expect("an EPP");
        Self { name, pods, epp_address: epp.addr, epp, failure_mode: "closed", app_protocol: None, endpoints, ports }
    }

    pub(crate) fn failing_open(self) -> Self {
        Self { failure_mode: "open", ..self }
    }

    /// Configures the gateway to use this protocol.
    pub(crate) fn speaking(self, app_protocol: &'static str) -> Self {
        Self { app_protocol: Some(app_protocol), ..self }
    }

    /// Configures the gateway with this EPP address.
    pub(crate) fn with_epp_at(self, epp_address: SocketAddr) -> Self {
        Self { epp_address, ..self }
    }

    pub(crate) fn pod(&self, number: usize) -> SocketAddr {
        self.pods[number].addr
    }

    pub(crate) fn has(&self, address: SocketAddr) -> bool {
        self.pods.iter().any(|pod| pod.addr == address)
    }

    /// Requests that each pod has read.
    pub(crate) fn requests(&self) -> Vec<u64> {
        self.pods.iter().map(Pod::requests).collect()
    }

    /// Requests and connections of all pods.
    pub(crate) fn reached(&self) -> (u64, u64) {
        (self.requests().iter().sum(), self.pods.iter().map(Pod::connections_accepted).sum())
    }

    fn toml(&self) -> String {
        let Self { name, failure_mode, endpoints, ports, epp_address, .. } = self;
        let protocol = self.app_protocol.map(|protocol| format!("app_protocol = {protocol:?}\n")).unwrap_or_default();
        format!(
            "[[pools]]\nname = {name:?}\nendpoints = {endpoints:?}\nports = {ports:?}\nfailure_mode = {failure_mode:?}\n\
             {protocol}picker = {{ kind = \"epp\", address = \"{epp_address}\" }}\n"
        )
    }
}

fn configured(pools: &[&InferencePool], routes: &str) -> Config {
    let toml: String = pools.iter().map(|pool| pool.toml()).chain([routes.to_owned()]).collect();
    Config::parse(&toml, "penstock.toml").unwrap_or_else(|errors| panic!("{errors}\n{toml}"))
}

/// The agent in front of `pools`, with `routes` in TOML.
pub(crate) fn gateway(mode: SteeringMode, pools: &[&InferencePool], routes: &str) -> TestAgent {
    let told = configured(pools, routes);
    TestAgent::start(builtin_pool(&[]), mode, |config| (config.pools, config.routes) = (told.pools, told.routes))
}

/// Reloads the agent with other routes.
pub(crate) fn reroute(gateway: &TestAgent, pools: &[&InferencePool], routes: &str) {
    let routes = configured(pools, routes).routes;
    gateway.agent.reload(Config { routes, ..gateway.agent.config() }).expect("routes can change");
}

/// An event stream in pieces, so that it can be steered.
fn events() -> Plan {
    Plan {
        framing: Framing::Chunked,
        size: 2000,
        alphabet: Alphabet::Text,
        headers: vec![("content-type".to_owned(), "text/event-stream".to_owned())],
        head: HeadWrites { pause_us: 2000, ..HeadWrites::default() },
        chunks: Lengths::Fixed(250),
        writes: Lengths::Fixed(250),
        pauses: Some(Pauses { seed: 1, every: 1, up_to_us: 2000 }),
        ..Plan::default()
    }
}

/// A prompt in JSON.
pub(crate) fn post(target: &str) -> Request {
    let body = r#"{"model":"conformance","stream":true,"prompt":"write as if the critics were silent"}"#;
    Request::post(target, body).header("content-type", "application/json").header("x-test-plan", events().header())
}

pub(crate) fn get(target: &str) -> Request {
    Request::get(target).header("x-test-plan", events().header())
}

/// The picker must choose among these pods.
pub(crate) fn choosing(request: Request, pods: &[SocketAddr]) -> Request {
    let list: Vec<String> = pods.iter().map(ToString::to_string).collect();
    choosing_addresses(request, &list.join(","))
}

pub(crate) fn choosing_addresses(request: Request, list: &str) -> Request {
    request.header("test-epp-endpoint-selection", list)
}

/// On a new connection.
pub(crate) async fn send(gateway: &TestAgent, request: &Request) -> Response {
    let mut client = Client::connect(gateway.addr).await.expect("the gateway accepts");
    client.request(request).await.expect("the request failed")
}

/// The pod that sent the whole response.
pub(crate) fn served(response: &Response) -> SocketAddr {
    assert_eq!(response.status(), 200, "{}", response.text());
    let plan = events();
    let mut checker = plan.checker();
    checker.feed(&response.body).expect("the bytes that were sent");
    assert_eq!(checker.offset(), plan.size);
    response.served_by().expect("the response names no pod")
}

/// Sends the request a hundred times, ten at once, each ten on one connection; returns the pods that served.
pub(crate) async fn hundred(gateway: &TestAgent, request: &Request) -> Vec<SocketAddr> {
    let ten = || async {
        let mut client = Client::connect(gateway.addr).await.expect("the gateway accepts");
        let mut pods = Vec::new();
        for _ in 0..10 {
            pods.push(served(&client.request(request).await.expect("the request failed")));
        }
        pods
    };
    join_all((0..10).map(|_| ten())).await.concat()
}

/// Asserts that exactly the expected responses were steered.
pub(crate) fn assert_carried(gateway: &TestAgent, mode: SteeringMode) {
    let steered = gateway.steered();
    assert_eq!(steered > 0, mode != SteeringMode::Off, "{steered}");
}
