//! A thousand requests whose picker takes its time, on one worker; and how many it may have at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use penstock_agent::config::{FailureMode, SteeringMode};
use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_tests::{
    Client, ModelServer, ScriptedEpp, Stage,
    agent::{TestAgent, epp_pool},
    scripted_epp::{Answer, Exchange, Fault, Faulty, Harm, Moment, Production, Script, Setup},
    stage::{echo, json},
};
use tokio::sync::Barrier;

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

/// What one request costs all that take part (client, agent, picker and endpoint share the machine) is taken from requests
/// one at a time: their time less the 50 ms. In the worst order the last of a thousand waits for the work of all the others,
/// but for nobody's 50 ms; so none takes longer than 50 ms and a thousand times that cost. Four times as much is allowed for
/// a machine that others use too, which still tells it from waiting in turn: that would be 50 s.
#[tokio::test]
async fn a_thousand_requests_wait_for_their_picks_side_by_side() {
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
        clients.push(Client::connect(stage.agent.addr).await.unwrap());
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
    assert_eq!(stage.epp.streams_started(), 1030, "each is asked once");
    assert_eq!(stage.epp.connections_accepted(), 1);
}

/// Answers nobody before so many are there, and notes how many streams were open at once.
struct Together {
    inner: Production,
    all: Barrier,
    open: AtomicUsize,
    most: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl Script for Together {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        self.most.fetch_max(self.open.fetch_add(1, Relaxed) + 1, Relaxed);
        self.all.wait().await;
        self.inner.request_headers(exchange, headers).await
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.inner.request_body(exchange, body).await
    }

    async fn half_close(&self, _: &mut Exchange) -> Answer {
        self.open.fetch_sub(1, Relaxed);
        Ok(())
    }
}

/// `requests` at once on one worker, with one connection to a picker that answers `together` at a time. Returns how many
/// streams were open at once.
async fn at_once(requests: usize, together: usize, max_streams: Option<u32>) -> usize {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    let (inner, most) = (Production::new(&[endpoint.addr]), Arc::default());
    let script = Together { inner, all: Barrier::new(together), open: AtomicUsize::new(0), most: Arc::clone(&most) };
    let epp = ScriptedEpp::start_with(Setup { max_streams, ..Setup::default() }, script).await.unwrap();
    let pool = epp_pool(&[endpoint.addr], epp.addr, FailureMode::Closed);
    let agent = TestAgent::start(pool, SteeringMode::Off, |config| config.listen.workers = 1);
    let one = async || {
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.request(&echo(json("m", 100))).await.unwrap().status()
    };
    assert_eq!(join_all((0..requests).map(|_| one())).await, vec![200; requests]);
    assert_eq!((epp.streams_started(), epp.connections_accepted()), (requests, 1));
    most.load(Relaxed)
}

/// E15: as many streams at once as there are requests. Where others have a cap, it is 100 or 1024.
#[tokio::test]
async fn there_is_no_limit_on_streams_but_the_servers() {
    assert_eq!(at_once(1100, 1100, None).await, 1100);
}

/// E15: beyond the server's limit requests wait, and none fails.
#[tokio::test]
async fn the_servers_limit_on_streams_makes_requests_wait() {
    assert_eq!(at_once(200, 10, Some(10)).await, 10);
}
