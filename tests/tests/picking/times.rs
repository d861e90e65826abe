//! Request timeouts: a route's override its pool's, which override `[timeouts]`.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use penstock_agent::config::{Config, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Request,
    agent::{TestAgent, builtin_pool},
    model_server::{Fault, FaultKind, Framing, HeadWrites, Lengths},
    stage::json,
    within,
};

use crate::SOON;

const SHORT: Duration = Duration::from_millis(300);
/// Much longer than that.
const LATE_MS: u64 = 900;

/// The pool `patient` has the timeouts `pool`. Requests with `x-way: pool` go directly to it, those with `route` through a route
/// with the timeouts `route`, and all others to a pool without its own timeouts. `body` is the model's.
async fn start(global: &str, pool: &str, route: &str) -> (TestAgent, ModelServer) {
    start_in(SteeringMode::Off, global, pool, route).await
}

async fn start_in(mode: SteeringMode, global: &str, pool: &str, route: &str) -> (TestAgent, ModelServer) {
    let server = ModelServer::start(Default::default()).await.unwrap();
    let endpoints = format!("endpoints = [\"{}\"]", server.addr);
    let text = format!(
        r#"
        [timeouts]
        {global}
        [[pools]]
        name = "plain"
        {endpoints}
        [[pools]]
        name = "patient"
        {endpoints}
        timeouts = {{ {pool} }}
        [[routes]]
        headers = [{{ name = "x-way", value = "pool" }}]
        pool = "patient"
        [[routes]]
        headers = [{{ name = "x-way", value = "route" }}]
        pools = [{{ name = "patient" }}]
        timeouts = {{ {route} }}
        [[routes]]
        model = "patient"
        pool = "patient"
        [[routes]]
        pool = "plain"
        "#
    );
    let Config { pools, routes, timeouts, .. } = Config::parse(&text, "test.toml").unwrap();
    let agent = TestAgent::start(builtin_pool(&[]), mode, |config| {
        (config.pools, config.routes, config.timeouts) = (pools, routes, timeouts);
    });
    (agent, server)
}

/// The status and reason of the response, or how its body ended.
async fn ask(agent: &TestAgent, request: &Request) -> String {
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(request).await.unwrap();
    match (response.status(), response.read.end) {
        (200, BodyEnd::Complete) => "ok".to_owned(),
        (200, _) => "cut".to_owned(),
        (status, _) => format!("{status} {}", response.error_code()),
    }
}

/// The results of `request` on the plain way, through the pool and through the route.
async fn by_way(agent: &TestAgent, request: &Request) -> [String; 3] {
    let way = |way: &str| request.clone().header("x-way", way);
    [ask(agent, request).await, ask(agent, &way("pool")).await, ask(agent, &way("route")).await]
}

#[tokio::test]
async fn first_byte_timeout_of_route_overrides_pool() {
    let head = HeadWrites { split_at: Some(0), pause_us: LATE_MS * 1000, ..HeadWrites::default() };
    let late = Plan { head, ..Plan::default() }.request();
    let cut = "504 first_byte_timeout";
    let (agent, _server) = start("first_byte = \"300ms\"", "first_byte = \"1m\"", "first_byte = \"200ms\"").await;
    assert_eq!(by_way(&agent, &late).await, [cut, "ok", cut]);
    let (agent, _server) = start("", "first_byte = \"300ms\"", "first_byte = \"off\"").await;
    assert_eq!(by_way(&agent, &late).await, ["ok", cut, "ok"]);
    // A different timeout of the route leaves this one to the pool.
    let (agent, _server) = start("first_byte = \"300ms\"", "first_byte = \"1m\"", "idle = \"1ms\"").await;
    assert_eq!(ask(&agent, &late.clone().header("x-way", "route")).await, "ok");
}

/// Also where the kernel carries the response.
#[tokio::test]
async fn response_idle_timeout_of_route_overrides_pool() {
    let mut all = Vec::new();
    for mode in [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto] {
        let all_but_pool = start_in(mode, "idle = \"300ms\"", "idle = \"1m\"", "idle = \"200ms\"").await;
        let only_pool = start_in(mode, "idle = \"1m\"", "idle = \"300ms\"", "idle = \"off\"").await;
        all.push((mode, all_but_pool, ["cut", "ok", "cut"]));
        all.push((mode, only_pool, ["ok", "cut", "ok"]));
    }
    let fault = Some(Fault { after: 1000, kind: FaultKind::StallMs(LATE_MS) });
    let asked = all.iter().map(|(mode, (agent, _server), expected)| async move {
        for framing in [Framing::Chunked, Framing::ContentLength] {
            let plan = Plan { size: 3000, framing, writes: Lengths::Fixed(500), fault, ..Plan::default() };
            assert_eq!(by_way(agent, &plan.request()).await, *expected, "{mode:?} {framing:?}");
        }
        assert_eq!(agent.steered() > 0, *mode != SteeringMode::Off, "{mode:?}");
        if matches!(mode, SteeringMode::Ingress | SteeringMode::Local) {
            let path = if *mode == SteeringMode::Local { r#"path="local""# } else { r#"path="ingress""# };
            // Responses that were cut are counted a moment later.
            let by_path = || agent.count("penstock_body_bytes_total", &[path]);
            assert!(
                within(SOON, || agent.steered() == by_path()).await,
                "{mode:?}: {} of {}",
                by_path(),
                agent.steered()
            );
        }
    });
    join_all(asked).await;
}

#[tokio::test]
async fn request_timeout_of_route_overrides_pool() {
    let head = HeadWrites { split_at: Some(0), pause_us: LATE_MS * 1000, ..HeadWrites::default() };
    let late = Plan { head, ..Plan::default() }.request();
    let cut = "504 request_timeout";
    let (agent, _server) = start("request = \"300ms\"", "request = \"off\"", "request = \"1m\"").await;
    assert_eq!(by_way(&agent, &late).await, [cut, "ok", "ok"]);
    let (agent, _server) = start("", "request = \"300ms\"", "first_byte = \"1m\"").await;
    assert_eq!(by_way(&agent, &late).await, ["ok", cut, cut]);
}

#[tokio::test]
async fn request_body_timeout_of_route_overrides_pool() {
    let body = json("any", 3000);
    let slow = Request::post("/test/echo", body).piecewise(2000, Duration::from_millis(LATE_MS));
    let cut = "408 body_timeout";
    let (agent, _server) = start("body = \"300ms\"", "body = \"1m\"", "body = \"200ms\"").await;
    assert_eq!(by_way(&agent, &slow).await, [cut, "ok", cut]);
    let (agent, _server) = start("", "body = \"300ms\"", "body = \"off\"").await;
    assert_eq!(by_way(&agent, &slow).await, ["ok", cut, "ok"]);
}

/// Until its body names the model, a request has the timeouts of the first route that may match.
#[tokio::test]
async fn late_model_uses_timeouts_of_first_possible_route() {
    let late = |model: &str| {
        let body = format!(r#"{{"prompt":"{}","model":"{model}"}}"#, "x".repeat(2000));
        let request = Request::post("/test/echo", body).header("content-type", "application/json");
        request.piecewise(1500, Duration::from_millis(LATE_MS))
    };
    let (agent, _server) = start("body = \"300ms\"", "body = \"1m\"", "").await;
    assert_eq!(ask(&agent, &late("patient")).await, "ok");
    let (agent, _server) = start("body = \"1m\"", "body = \"300ms\"", "").await;
    let begin = Instant::now();
    assert_eq!(ask(&agent, &late("other")).await, "408 body_timeout");
    assert!(begin.elapsed() >= SHORT);
}
