//! Requests that wait for their pick while the configuration is reloaded: they keep the settings that they began with, and see every
//! later change of what the agent discovers.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use penstock_agent::config::{self, Config, FailureMode, Pool, SteeringMode};
use penstock_proto::ext_proc::HttpHeaders;
use penstock_tests::{
    Client, ModelServer, Request, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    eventually,
    scripted_epp::{Answer, Exchange, Production, Script, Setup, reply},
    stage::epp,
    within,
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

fn epp_settings(change: impl FnOnce(&mut config::Epp)) -> impl FnOnce(&mut Config) {
    |config| change(epp(config))
}

type Reload = Box<dyn FnOnce(&mut Config)>;

/// Reloads of everything that names the EPP or says how it is asked.
fn reloads_of_the_epp() -> Vec<(&'static str, Reload)> {
    vec![
        ("nothing", Box::new(|_| {})),
        ("another pool before", Box::new(another_pool_before)),
        ("decision timeout", Box::new(epp_settings(|epp| epp.decision_timeout = Some(Duration::from_secs(50))))),
        ("fewer waiting", Box::new(epp_settings(|epp| epp.unreachable_wait_requests = 1))),
        ("header", Box::new(epp_settings(|epp| epp.header = "x-other".parse().expect("a name")))),
        ("connect timeout", Box::new(epp_settings(|epp| epp.connect_timeout += Duration::from_secs(1)))),
        ("health checks", Box::new(epp_settings(|epp| epp.health_interval = Some(Duration::from_secs(1))))),
        ("another EPP", Box::new(epp_settings(|epp| epp.addresses = vec!["127.0.0.1:1".to_owned()]))),
        ("no EPP", Box::new(|config| config.pools[0].picker = config::Picker::Builtin)),
        ("no such pool", Box::new(|config| config.pools = vec![Pool::new("other", ["127.0.0.1:1".parse().unwrap()])])),
    ]
}

/// Requests of several configurations wait at once.
#[tokio::test]
async fn requests_that_wait_for_an_unreachable_picker_are_served_whatever_is_reloaded() {
    for (number, (what, change)) in (1..).zip(reloads_of_the_epp()) {
        // On addresses of their own, because another test may take a port that is free for a time.
        let setup = Setup { address: ([127, 78, 0, number], 0).into(), ..Setup::default() };
        let server = ModelServer::start(Default::default()).await.unwrap();
        let mut picker = ScriptedEpp::start_with(setup, Production::new(&[server.addr])).await.unwrap();
        let pool = epp_pool(&[server.addr], picker.addr, FailureMode::Closed);
        let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
            epp(config).unreachable_wait = Some(Some(Duration::from_secs(60)));
        });
        picker.stop();
        let waiting = async |count: u64| {
            eventually(SOON, || agent.count("penstock_epp_waiting", &[]) == count).await;
        };
        let mut requests = Vec::new();
        let request = || {
            let address = agent.addr;
            tokio::spawn(async move {
                let mut client = Client::connect(address).await.unwrap();
                client.request(&Request::get("/v1/models")).await.unwrap().status()
            })
        };
        for count in 1..3 {
            requests.push(request());
            waiting(count).await;
            // The first reload changes nothing of the pool, so that two configurations have waiting requests.
            let mut config = agent.agent.config();
            config.timeouts.idle = Some(Duration::from_secs(60 + count));
            agent.agent.reload(config).unwrap();
        }
        let mut config = agent.agent.config();
        change(&mut config);
        agent.agent.reload(config).unwrap();
        waiting(2).await;
        picker.restart().await.unwrap();
        for request in requests {
            assert_eq!(request.await.unwrap(), 200, "{what}");
        }
        waiting(0).await;
        // Without a request that could ask it, an EPP that is not configured any more is left alone.
        // One that is has a connection of each worker that asks it, and one for the health checks.
        let is_left = what.starts_with("no ") || what == "another EPP";
        let expected = if is_left { 0..=0 } else { 1..=3 };
        let open = || picker.connections_open();
        assert!(
            within(SOON, || expected.contains(&open())).await,
            "{what}: {} connections, expected {expected:?}",
            open()
        );
    }
}

/// The hint that an EPP gets names the endpoints at the time of the question.
#[tokio::test]
async fn request_that_waited_for_its_picker_gives_a_current_hint() {
    let mut world = World::new().await;
    let [one, two] = world.servers.each_ref().map(|server| server.addr);
    world.reload(|config| {
        epp(config).unreachable_wait = Some(Some(Duration::from_secs(60)));
        config.pools[0].subset.endpoints = vec![one, two];
    });
    world.pick.send_replace(Some(two));
    world.epp.stop();
    let address = world.agent.addr;
    let request = tokio::spawn(async move {
        let mut client = Client::connect(address).await.unwrap();
        client.request(&Request::get("/v1/models")).await.unwrap().served_by()
    });
    eventually(SOON, || world.agent.count("penstock_epp_waiting", &[]) == 1).await;
    write(&world.file, &[one, two], "");
    world.has_endpoints(2, 0).await;
    world.epp.restart().await.unwrap();
    assert_eq!(request.await.unwrap(), Some(two));
    let hint = world.epp.streams().last().expect("a stream").subset();
    assert_eq!(hint, Some(vec![one.to_string(), two.to_string()]));
}
