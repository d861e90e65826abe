//! A thousand and more concurrent requests with a slow picker, on one worker.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use penstock_agent::config::{FailureMode, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Plan, ScriptedEpp, Stage,
    agent::{TestAgent, epp_pool},
    alone, eventually,
    model_server::{Fault as ServerFault, FaultKind},
    scripted_epp::{Fault, Faulty, Gathering, Harm, Moment, Production, Script, Setup},
    stage::{echo, json},
};

const SOON: Duration = Duration::from_secs(10);
const THINKS: Duration = Duration::from_millis(50);
const REQUESTS: u32 = 1000;

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

async fn timed(client: &mut Client) -> Duration {
    let begin = Instant::now();
    let response = client.request(&echo(json("m", 100))).await.unwrap();
    assert_eq!(response.status(), 200);
    begin.elapsed()
}

/// Serial requests give the cost of one request for all parties (client, agent, picker and endpoint share the machine): their
/// time less the 50 ms. In the worst order the last of a thousand requests waits for the work of all others, but for nobody's
/// 50 ms, so none takes longer than 50 ms plus a thousand times that cost. The bound allows four times as much for a shared
/// machine, which still detects serial waiting: that would take 50 s.
#[tokio::test]
async fn thousand_requests_wait_for_picks_concurrently() {
    let _alone = alone().await;
    let thinks = Fault::At(Moment::RequestBody(usize::MAX), Harm::Delay(THINKS));
    let mut stage =
        Stage::with(|all| Faulty::new(Production::new(all), thinks), |config| config.listen.workers = 1).await;
    let mut alone = Vec::new();
    for _ in 0..30 {
        alone.push(timed(&mut stage.client).await);
    }
    let cost = median(&mut alone).saturating_sub(THINKS).max(Duration::from_millis(1));

    let mut clients = Vec::new();
    for _ in 0..REQUESTS {
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        client.patience = Duration::from_secs(60);
        clients.push(client);
    }
    let begin = Instant::now();
    let mut times = join_all(clients.iter_mut().map(timed)).await;
    let wall = begin.elapsed();
    let (median, max) = (median(&mut times), times[times.len() - 1]);
    println!("alone 50 ms + {cost:?}; of {REQUESTS}: median {median:?}, max {max:?}, all {wall:?}");
    let bound = THINKS + 4 * REQUESTS * cost;
    assert!(median >= THINKS && median <= bound / 2, "median {median:?}, bound {bound:?}");
    assert!(max <= bound, "max {max:?}, bound {bound:?}");
    assert!(wall < REQUESTS * THINKS / 4, "{wall:?}");
    assert_eq!(stage.epp.streams_started(), 1030, "a request was asked about more than once");
    assert_eq!(stage.epp.connections_accepted(), 1);
}

/// E15: the agent does not limit streams, where other proxies stop at 100 or 1024 and return 500. The picker answers no request
/// before all of them wait, over one connection.
#[tokio::test]
async fn more_than_1024_requests_are_picked_concurrently() {
    let _alone = alone().await;
    const AT_ONCE: usize = 1100;
    let stage =
        Stage::with(|all| Gathering::new(Production::new(all), AT_ONCE), |config| config.listen.workers = 1).await;
    let one = || async {
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        client.patience = Duration::from_secs(60);
        client.request(&echo(json("m", 100))).await.unwrap().status()
    };
    assert_eq!(join_all((0..AT_ONCE).map(|_| one())).await, [200; AT_ONCE]);
    assert_eq!((stage.epp.streams_started(), stage.epp.connections_accepted()), (AT_ONCE, 1));
}

/// E15: requests above the picker's limit of streams do not fail.
#[tokio::test]
async fn picker_stream_limit_fails_no_request() {
    let _alone = alone().await;
    const LIMIT: usize = 10;
    // Answers no request before the limit is reached.
    let (_endpoint, epp, agent) = limited(LIMIT, |all| Gathering::new(Production::new(all), LIMIT)).await;
    let one = || async {
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.request(&echo(json("m", 100))).await.unwrap().status()
    };
    assert_eq!(join_all((0..200).map(|_| one())).await, [200; 200]);
    assert_eq!(epp.streams_started(), 200);
    assert!(epp.connections_accepted() <= 20, "{}", epp.connections_accepted());
}

/// Each stream lasts as long as its response, so a request that waited for one could wait for minutes.
#[tokio::test]
async fn picker_at_its_stream_limit_gets_another_connection() {
    let _alone = alone().await;
    const LIMIT: usize = 2;
    let (endpoint, epp, agent) = limited(LIMIT, Production::new).await;
    let stall = ServerFault { after: 5000, kind: FaultKind::Stall };
    let plan = Plan { size: 10_000, fault: Some(stall), ..Plan::default() };
    let mut clients = Vec::new();
    for number in 1..=6 {
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200, "{number}");
        clients.push(client);
    }
    assert_eq!((endpoint.requests(), epp.streams_open(), epp.connections_accepted()), (6, 6, 3));
    // A stream that has ended leaves room on its connection.
    clients.remove(0);
    eventually(SOON, || epp.streams_open() == 5).await;
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&echo(json("m", 100))).await.unwrap().status(), 200);
    assert_eq!(epp.connections_accepted(), 3);
    assert_eq!(agent.count("penstock_epp_stalls_total", &[]), 0);
}

/// One worker with a picker that takes this many streams on a connection.
async fn limited<S: Script>(
    streams: usize,
    script: impl FnOnce(&[SocketAddr]) -> S,
) -> (ModelServer, ScriptedEpp, TestAgent) {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    let setup = Setup { max_streams: Some(streams as u32), ..Setup::default() };
    let epp = ScriptedEpp::start_with(setup, script(&[endpoint.addr])).await.unwrap();
    let pool = epp_pool(&[endpoint.addr], epp.addr, FailureMode::Closed);
    let agent = TestAgent::start(pool, SteeringMode::Off, |config| config.listen.workers = 1);
    (endpoint, epp, agent)
}
