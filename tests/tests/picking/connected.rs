//! Connections to EPPs without requests: from the start, before the agent is ready, and again after a loss.

use std::{net::SocketAddr, time::Duration};

use penstock_agent::config::{Config, FailureMode, Picker, Pool, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Refusing, ScriptedEpp, Stage,
    agent::{TestAgent, epp_pool},
    eventually,
    scripted_epp::{Production, Setup},
    stage::{echo, epp, json},
};

use crate::SOON;

const LONG: Duration = Duration::from_secs(3600);
const GATE: &str = "EPP of pool default";

fn is_ready(agent: &TestAgent) -> bool {
    agent.agent.readiness().is_ready()
}

fn waits_for_epp(agent: &TestAgent) -> bool {
    agent.agent.readiness().pending().iter().any(|name| name == GATE)
}

async fn status(agent: &TestAgent) -> u16 {
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.request(&echo(json("m", 1000))).await.unwrap().status()
}

/// An agent whose only EPP is at this address.
async fn agent(epp_at: SocketAddr, mode: FailureMode, adjust: impl FnOnce(&mut Config)) -> (TestAgent, ModelServer) {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    let agent = TestAgent::start(epp_pool(&[endpoint.addr], epp_at, mode), SteeringMode::Off, adjust);
    (agent, endpoint)
}

#[tokio::test]
async fn picker_is_connected_by_each_worker_before_the_agent_is_ready() {
    let mut stage = Stage::with(Production::new, |config| config.listen.workers = 3).await;
    eventually(SOON, || is_ready(&stage.agent)).await;
    assert_eq!((stage.epp.connections_accepted(), stage.epp.streams_started()), (3, 0));
    for _ in 0..5 {
        assert_eq!(stage.request(&echo(json("m", 1000))).await.status(), 200);
    }
    assert_eq!(stage.epp.connections_accepted(), 3);
}

#[tokio::test]
async fn lost_connection_is_made_again_without_a_request() {
    let mut stage = Stage::new(Production::new).await;
    for _ in 0..3 {
        eventually(SOON, || stage.epp.connections_open() == stage.workers()).await;
        stage.epp.stop();
        stage.epp.restart().await.unwrap();
    }
    eventually(SOON, || stage.epp.connections_open() == stage.workers()).await;
    // A server that limits the age of connections.
    let before = stage.epp.connections_accepted();
    stage.epp.go_away();
    eventually(SOON, || stage.epp.connections_accepted() == before + stage.workers()).await;
    assert_eq!(stage.epp.streams_started(), 0);
    assert!(is_ready(&stage.agent));
}

/// The other replica is connected as soon as it is the one to ask.
#[tokio::test]
async fn next_replica_is_connected_when_the_first_is_lost() {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    let mut first = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let second = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let pool = penstock_tests::agent::epps_pool(&[endpoint.addr], &[first.addr, second.addr], FailureMode::Closed);
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    eventually(SOON, || is_ready(&agent)).await;
    assert_eq!((first.connections_open(), second.connections_accepted()), (2, 0));
    first.stop();
    eventually(SOON, || second.connections_open() == 2).await;
    assert_eq!((status(&agent).await, second.streams_started()), (200, 1));
    first.restart().await.unwrap();
    eventually(SOON, || first.connections_open() == 2).await;
}

#[tokio::test]
async fn closed_pool_holds_back_readiness_until_its_picker_is_connected() {
    let refusing = Refusing::new().unwrap();
    let address = refusing.addr;
    let (agent, endpoint) = agent(address, FailureMode::Closed, |config| epp(config).start_wait = Some(LONG)).await;
    eventually(SOON, || agent.agent.readiness().pending() == [GATE]).await;
    drop(refusing);
    let setup = Setup { address, ..Setup::default() };
    let mut epp = ScriptedEpp::start_with(setup, Production::new(&[endpoint.addr])).await.unwrap();
    eventually(SOON, || is_ready(&agent)).await;
    // Later losses do not make the agent unready: other nodes could not do better.
    epp.stop();
    assert_eq!(status(&agent).await, 503);
    assert!(is_ready(&agent));
}

#[tokio::test]
async fn start_wait_bounds_how_long_a_picker_holds_back_readiness() {
    let refusing = Refusing::new().unwrap();
    for wait in [Some(Duration::from_millis(300)), None] {
        let (agent, _endpoint) =
            agent(refusing.addr, FailureMode::Closed, |config| epp(config).start_wait = wait).await;
        assert_eq!(waits_for_epp(&agent), wait.is_some(), "{wait:?}");
        eventually(SOON, || is_ready(&agent)).await;
    }
}

#[tokio::test]
async fn open_pool_never_holds_back_readiness() {
    let refusing = Refusing::new().unwrap();
    let (agent, _endpoint) =
        agent(refusing.addr, FailureMode::Open, |config| epp(config).start_wait = Some(LONG)).await;
    assert!(!waits_for_epp(&agent));
    eventually(SOON, || is_ready(&agent)).await;
    assert_eq!(status(&agent).await, 200);
}

/// A reload while the start waits: the old configuration's picker is not waited for any more.
#[tokio::test]
async fn reload_ends_the_wait_for_a_picker_that_was_replaced() {
    let refusing = Refusing::new().unwrap();
    let (agent, endpoint) =
        agent(refusing.addr, FailureMode::Closed, |config| epp(config).start_wait = Some(LONG)).await;
    let other = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let mut config = agent.config();
    epp(&mut config).addresses = vec![other.addr.to_string()];
    std::thread::scope(|scope| scope.spawn(|| agent.agent.reload(config)).join()).unwrap().unwrap();
    eventually(SOON, || is_ready(&agent)).await;
    assert_eq!(status(&agent).await, 200);
}

#[tokio::test]
async fn lost_picker_of_one_pool_leaves_the_agent_ready_for_the_others() {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    let mut lost = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let kept = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let agent =
        TestAgent::start(epp_pool(&[endpoint.addr], lost.addr, FailureMode::Closed), SteeringMode::Off, |config| {
            let Picker::Epp(mut epp) = config.pools[0].picker.clone() else { unreachable!("the pool has an EPP") };
            epp.addresses = vec![kept.addr.to_string()];
            config.pools.push(Pool { name: "other".to_owned(), picker: Picker::Epp(epp), ..config.pools[0].clone() });
            let pools = ["default", "other"]
                .map(|name| format!("[[pools]]\nname = \"{name}\"\nendpoints = [\"{}\"]\n", endpoint.addr));
            let routes =
                "[[routes]]\nheaders = [{ name = \"x-lost\" }]\npool = \"default\"\n[[routes]]\npool = \"other\"\n";
            config.routes = Config::parse(&(pools.concat() + routes), "test.toml").unwrap().routes;
        });
    eventually(SOON, || is_ready(&agent)).await;
    lost.stop();
    let mut client = Client::connect(agent.addr).await.unwrap();
    let (ours, theirs) = (echo(json("m", 1000)), echo(json("m", 1000)).header("x-lost", "1"));
    for _ in 0..3 {
        assert_eq!(client.request(&theirs).await.unwrap().status(), 503);
        assert_eq!(client.request(&ours).await.unwrap().status(), 200);
        assert!(is_ready(&agent));
    }
}
