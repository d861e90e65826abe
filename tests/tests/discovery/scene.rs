//! Two model servers on one port, an API server, and agents with one pool that is an InferencePool.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use penstock_agent::config::{Config, InferencePoolRef, InferencePoolVersion, Pool, SteeringMode};
use penstock_tests::api_server::objects::{self, NAMESPACE};
use penstock_tests::client::Client;
use penstock_tests::model_server::Options;
use penstock_tests::scripted_epp::{Answering, ScriptedEpp, Setup, reply};
use penstock_tests::stage::echo;
use penstock_tests::{ApiServer, ModelServer, TestAgent, eventually};
use tempfile::NamedTempFile;

use crate::SOON;

/// The InferencePool of the agents.
pub(crate) const POOL: &str = "llama";

pub(crate) struct Scene {
    pub(crate) api: ApiServer,
    pub(crate) one: ModelServer,
    pub(crate) two: ModelServer,
    kubeconfig: NamedTempFile,
}

pub(crate) fn ip(last: u8, port: u16) -> SocketAddr {
    (Ipv4Addr::new(127, 0, 0, last), port).into()
}

pub(crate) async fn model_server(listen: SocketAddr) -> ModelServer {
    ModelServer::start(Options { listen, ..Options::default() }).await.unwrap()
}

/// An EPP that picks what the field `x-to` of the request says.
pub(crate) async fn obedient_epp(address: SocketAddr) -> ScriptedEpp {
    let script = Answering::new(|exchange| {
        let to = exchange.request_headers.iter().find(|(name, _)| name == "x-to");
        vec![reply::pick(&to.expect("the request names no endpoint").1, &[])]
    });
    ScriptedEpp::start_with(Setup { address, ..Setup::default() }, script).await.unwrap()
}

pub(crate) fn named(name: &str) -> InferencePoolRef {
    let version = InferencePoolVersion::V1;
    InferencePoolRef { namespace: NAMESPACE.to_owned(), name: name.to_owned(), version }
}

pub(crate) fn discovered(pool: &str, inference_pool: &str) -> Pool {
    Pool { inference_pool: Some(named(inference_pool)), ..Pool::new(pool, []) }
}

impl Scene {
    /// The API server has no objects.
    pub(crate) async fn empty() -> Self {
        let one = model_server(ip(2, 0)).await;
        let two = model_server(ip(3, one.addr.port())).await;
        let api = ApiServer::start().await.unwrap();
        let kubeconfig = api.kubeconfig();
        Self { api, one, two, kubeconfig }
    }

    /// The InferencePool has no EPP, and both model servers are its ready Pods.
    pub(crate) async fn new() -> Self {
        let scene = Self::empty().await;
        scene.api.apply(objects::pool_without_epp(POOL, scene.port()));
        scene.api.apply(objects::pod("one", scene.one.addr));
        scene.api.apply(objects::pod("two", scene.two.addr));
        scene
    }

    /// As [`Self::new`], with an EPP.
    pub(crate) async fn with_epp(failure_mode: &str, replicas: &[SocketAddr]) -> Self {
        let scene = Self::new().await;
        scene.api.apply(objects::epp_service());
        scene.api.apply(objects::epp_slice(replicas));
        scene.api.apply(objects::pool(POOL, scene.port(), failure_mode));
        scene
    }

    pub(crate) fn port(&self) -> u16 {
        self.one.addr.port()
    }

    /// The settings of the agents.
    pub(crate) fn settings(&self, config: &mut Config) {
        config.listen.workers = 1;
        config.kubernetes.kubeconfig = Some(self.kubeconfig.path().to_owned());
        config.kubernetes.coalesce = Duration::from_millis(20);
    }

    /// An agent with these settings; it may not be ready yet.
    pub(crate) fn agent_with(&self, adjust: impl FnOnce(&mut Config)) -> TestAgent {
        TestAgent::start(discovered("default", POOL), SteeringMode::Off, |config| {
            self.settings(config);
            adjust(config);
        })
    }

    /// An agent that is ready.
    pub(crate) async fn agent(&self) -> TestAgent {
        let agent = self.agent_with(|_| {});
        until_ready(&agent).await;
        agent
    }

    /// A Pod of the first model server.
    pub(crate) fn pod_one(&self) -> serde_json::Value {
        objects::pod("one", self.one.addr)
    }
}

pub(crate) async fn until_ready(agent: &TestAgent) {
    eventually(SOON, || agent.agent.readiness().is_ready()).await;
}

pub(crate) fn endpoints(agent: &TestAgent, state: &str) -> u64 {
    agent.count("penstock_endpoints", &[r#"pool="default""#, &format!("state=\"{state}\"")])
}

/// A metric of the watch of a resource.
pub(crate) fn watch(agent: &TestAgent, name: &str, resource: &str) -> u64 {
    let labels = [&*format!("inference_pool=\"{NAMESPACE}/{POOL}\""), &*format!("resource=\"{resource}\"")];
    agent.count(&format!("penstock_kubernetes_{name}"), &labels)
}

pub(crate) fn failures(agent: &TestAgent, resource: &str, reason: &str) -> u64 {
    let labels = [&*format!("resource=\"{resource}\""), &*format!("reason=\"{reason}\"")];
    agent.count("penstock_kubernetes_failures_total", &labels)
}

/// Status, reason of the error, and the endpoint that answered.
pub(crate) async fn ask(agent: &TestAgent) -> (u16, String, Option<SocketAddr>) {
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&echo("{}")).await.unwrap();
    (response.status(), response.error_code(), response.served_by())
}

/// Waits until requests end like this: the reason of an error, or nothing. A worker notices another configuration when it is idle.
pub(crate) async fn until_asked(agent: &TestAgent, reason: &str) {
    let begin = Instant::now();
    loop {
        let (status, error, _) = ask(agent).await;
        if error == reason {
            return;
        }
        assert!(begin.elapsed() < SOON, "{status} {error}");
    }
}

/// The endpoints that answer a number of requests.
pub(crate) async fn answering(agent: &TestAgent) -> Vec<SocketAddr> {
    let mut answering = Vec::new();
    for _ in 0..6 {
        let (status, error, server) = ask(agent).await;
        answering.push(server.unwrap_or_else(|| panic!("{status} {error}")));
    }
    answering.sort_unstable();
    answering.dedup();
    answering
}

/// A request that [`obedient_epp`] sends to `to`.
pub(crate) async fn ask_for(agent: &TestAgent, to: SocketAddr) -> (u16, String, Option<SocketAddr>) {
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&echo("{}").header("x-to", to.to_string())).await.unwrap();
    (response.status(), response.error_code(), response.served_by())
}
