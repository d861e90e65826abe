//! Requests that wait for their pick while the configuration is reloaded: they keep the settings that they began with, and see every
//! later change of what the agent discovers.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use penstock_agent::config::{self, Config, FailureMode, Pool, SteeringMode};
use penstock_proto::ext_proc::HttpHeaders;
use penstock_tests::{
    Client, ModelServer, Request, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    eventually,
    scripted_epp::{Answer, Exchange, Script, reply},
};
use tokio::{sync::watch, task::JoinHandle};

use crate::SOON;

/// Holds every request until it is told what to pick.
struct Held(watch::Receiver<Option<SocketAddr>>);

#[tonic::async_trait]
impl Script for Held {
    async fn request_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        let endpoint = *self.0.clone().wait_for(Option::is_some).await.expect("the test has ended");
        let endpoint = endpoint.expect("an endpoint").to_string();
        exchange.send(reply::pick(&endpoint, &[])).await
    }
}

/// A pool whose endpoints come from a file, and an EPP that holds its requests.
struct World {
    agent: TestAgent,
    epp: ScriptedEpp,
    pick: watch::Sender<Option<SocketAddr>>,
    servers: [ModelServer; 2],
    file: PathBuf,
    _folder: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let servers = [
            ModelServer::start(Default::default()).await.unwrap(),
            ModelServer::start(Default::default()).await.unwrap(),
        ];
        let (pick, told) = watch::channel(None);
        let epp = ScriptedEpp::start(Held(told)).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("endpoints.toml");
        write(&file, &[servers[0].addr], "");
        let pool = Pool { endpoints_file: Some(file.clone()), ..epp_pool(&[], epp.addr, FailureMode::Closed) };
        let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
        let world = Self { agent, epp, pick, servers, file, _folder: folder };
        world.has_endpoints(1, 0).await;
        world
    }

    async fn has_endpoints(&self, ready: u64, draining: u64) {
        let count = |state: &str| self.agent.count("penstock_endpoints", &[&format!("state=\"{state}\"")]);
        eventually(SOON, || (count("ready"), count("draining")) == (ready, draining)).await;
    }

    /// A request that the EPP holds.
    async fn waiting(&self) -> JoinHandle<(u16, String, Option<SocketAddr>)> {
        let (before, address) = (self.epp.streams_started(), self.agent.addr);
        let request = tokio::spawn(async move {
            let mut client = Client::connect(address).await.unwrap();
            let response = client.request(&Request::get("/v1/models")).await.unwrap();
            (response.status(), response.error_code(), response.served_by())
        });
        eventually(SOON, || self.epp.streams_started() > before).await;
        request
    }

    fn reload(&self, change: impl FnOnce(&mut Config)) {
        let mut config = self.agent.agent.config();
        change(&mut config);
        self.agent.agent.reload(config).unwrap();
    }
}

fn write(file: &std::path::Path, endpoints: &[SocketAddr], more: &str) {
    let endpoints: String = endpoints.iter().map(|endpoint| format!("\"{endpoint}\", ")).collect();
    let next = file.with_extension("next");
    std::fs::write(&next, format!("endpoints = [{endpoints}{more}]")).unwrap();
    std::fs::rename(next, file).unwrap();
}

fn unrelated(config: &mut Config) {
    config.timeouts.idle = Some(Duration::from_secs(77));
}

fn rules_of_the_pool(config: &mut Config) {
    config.pools[0].ejection.failures += 1;
    config.pools[0].subset.prefer = vec![config::Locality::Node];
}

fn another_pool_before(config: &mut Config) {
    config.pools.insert(0, Pool::new("other", ["127.0.0.1:1".parse().unwrap()]));
    config.routes = vec![config::Route::to("default")];
}

/// The endpoints of other pools.
fn others(world: &World) -> u64 {
    world.agent.agent.config().pools.iter().filter(|pool| pool.name != "default").count() as u64
}

/// Reloads that leave the pool's sources as they are.
const RELOADS: [fn(&mut Config); 3] = [unrelated, rules_of_the_pool, another_pool_before];

#[tokio::test]
async fn waiting_request_goes_to_an_endpoint_that_was_added_after_a_reload() {
    for (number, change) in RELOADS.into_iter().enumerate() {
        let world = World::new().await;
        let [one, two] = world.servers.each_ref().map(|server| server.addr);
        let request = world.waiting().await;
        world.reload(change);
        write(&world.file, &[one, two], "");
        world.has_endpoints(2 + others(&world), 0).await;
        world.pick.send_replace(Some(two));
        assert_eq!(request.await.unwrap(), (200, String::new(), Some(two)), "reload {number}");
    }
}

#[tokio::test]
async fn waiting_request_goes_to_no_endpoint_that_was_removed_or_drains_after_a_reload() {
    for (number, change) in RELOADS.into_iter().enumerate() {
        for drains in [false, true] {
            let world = World::new().await;
            let [one, two] = world.servers.each_ref().map(|server| server.addr);
            let nowhere = "127.0.0.1:1".parse().unwrap();
            let request = world.waiting().await;
            world.reload(change);
            let draining = if drains { format!("{{ address = \"{one}\", draining = true }}") } else { String::new() };
            write(&world.file, &[two, nowhere], &draining);
            world.has_endpoints(2 + others(&world), u64::from(drains)).await;
            world.pick.send_replace(Some(one));
            let answer = request.await.unwrap();
            assert_eq!(answer, (502, "endpoint_not_in_pool".to_owned(), None), "reload {number}, drains: {drains}");
        }
    }
}
