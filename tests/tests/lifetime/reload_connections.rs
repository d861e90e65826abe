//! Client connections that outlive reloads: they hold nothing of the configurations before, and their next request and their idle
//! time follow the current one.

use std::time::Duration;

use penstock_agent::config::{Config, FailureMode, PickPer, Picker, SteeringMode};
use penstock_tests::{
    Client, Http2Client, ModelServer, Request, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    client::ConnectionEnd,
    eventually,
    model_server::Options,
    scripted_epp::{Answering, reply},
    stage::epp,
};

use crate::SOON;

struct World {
    agent: TestAgent,
    epp: ScriptedEpp,
    _server: ModelServer,
}

impl World {
    async fn new(adjust: impl FnOnce(&mut Config)) -> Self {
        let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
        let picked = server.addr.to_string();
        let epp = ScriptedEpp::start(Answering::new(move |_| vec![reply::pick(&picked, &[])])).await.unwrap();
        let pool = epp_pool(&[server.addr], epp.addr, FailureMode::Closed);
        let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
            config.listen.workers = 1;
            adjust(config);
        });
        Self { agent, epp, _server: server }
    }

    fn reload(&self, change: impl FnOnce(&mut Config)) {
        let mut config = self.agent.agent.config();
        change(&mut config);
        self.agent.agent.reload(config).unwrap();
    }
}

fn get() -> Request {
    Request::get("/v1/models")
}

/// Each connection begins under another configuration, whose EPP has settings of its own. Then the EPP is removed.
#[tokio::test]
async fn connections_keep_no_picker_that_is_not_configured_any_more() {
    for pick_per in [PickPer::Request, PickPer::Lease, PickPer::Connection] {
        let world = World::new(|config| config.pools[0].pick_per = pick_per).await;
        let (mut http1, mut http2) = (Vec::new(), Vec::new());
        for number in 0..3 {
            let mut unused = Client::connect(world.agent.addr).await.unwrap();
            let mut one = Client::connect(world.agent.addr).await.unwrap();
            let mut two = Http2Client::connect(world.agent.addr).await.unwrap();
            assert_eq!(one.request(&get()).await.unwrap().status(), 200);
            assert_eq!(two.request(&get()).await.unwrap().status(), 200);
            // An empty line does not begin a request.
            unused.send_raw(b"\r\n").await.unwrap();
            http1.extend([unused, one]);
            http2.push(two);
            world.reload(|config| epp(config).header = format!("x-picked-{number}").parse().unwrap());
            // Its connection is made before the next one.
            eventually(SOON, || world.agent.count("penstock_epp_connections_opened_total", &[]) == 2 + number).await;
            eventually(SOON, || world.epp.connections_open() == 1).await;
        }
        world.reload(|config| config.pools[0].picker = Picker::Builtin);
        eventually(SOON, || world.epp.connections_open() == 0).await;
        eventually(SOON, || world.agent.count("penstock_epp_connections", &[]) == 0).await;
        for client in &mut http1 {
            assert_eq!(client.request(&get()).await.unwrap().status(), 200);
        }
        for client in &mut http2 {
            assert_eq!(client.request(&get()).await.unwrap().status(), 200);
        }
    }
}

#[tokio::test]
async fn next_request_of_idle_connection_has_the_current_limits() {
    let world = World::new(|config| config.limits.head_bytes = 2048).await;
    let large = get().header("x-large", "x".repeat(4000));
    let mut client = Client::connect(world.agent.addr).await.unwrap();
    assert_eq!(client.request(&large).await.unwrap().status(), 431);
    let mut clients =
        [Client::connect(world.agent.addr).await.unwrap(), Client::connect(world.agent.addr).await.unwrap()];
    assert_eq!(clients[0].request(&get()).await.unwrap().status(), 200);
    world.reload(|config| config.limits.head_bytes = 64 << 10);
    // The worker has the new configuration when new connections do.
    let begin = std::time::Instant::now();
    while Client::connect(world.agent.addr).await.unwrap().request(&large).await.unwrap().status() != 200 {
        assert!(begin.elapsed() < SOON);
    }
    for client in &mut clients {
        assert_eq!(client.request(&large).await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn idle_connections_are_closed_after_the_current_time() {
    for before in [None, Some(Duration::from_secs(3600))] {
        let world = World::new(|config| config.timeouts.keep_alive = before).await;
        let mut http1 = Client::connect(world.agent.addr).await.unwrap();
        let mut http2 = Http2Client::connect(world.agent.addr).await.unwrap();
        assert_eq!(http1.request(&get()).await.unwrap().status(), 200);
        assert_eq!(http2.request(&get()).await.unwrap().status(), 200);
        world.reload(|config| config.timeouts.keep_alive = Some(Duration::from_millis(200)));
        assert_eq!(http1.until_end().await.unwrap(), ConnectionEnd::Fin);
        http2.end().await.unwrap();
        eventually(SOON, || world.agent.count("penstock_client_idle_closes_total", &[]) == 2).await;
    }
}
