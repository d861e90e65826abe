//! The cost of request bodies that wait for their picker: the budgets in memory and in files, and the window of the client
//! connection.

use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use penstock_agent::config::{Config, FailureMode, SteeringMode};
use penstock_tests::{
    Client, Http2Client, ModelServer, ScriptedEpp, Stage,
    agent::{TestAgent, builtin_pool, epp_pool},
    content::{Alphabet, Fnv},
    eventually,
    scripted_epp::{Answering, Fault, Faulty, Harm, Moment, Production, reply},
    stage::{echo, epp, json},
};

use crate::SOON;

const MIB: u64 = 1 << 20;
/// Reads nothing of the body and answers nothing.
const HANGS: Fault = Fault::At(Moment::RequestHeaders, Harm::Silence);

fn memory(agent: &TestAgent) -> u64 {
    agent.count("penstock_request_body_memory_bytes", &[])
}

fn spilled(agent: &TestAgent) -> u64 {
    agent.count("penstock_request_body_spill_bytes", &[])
}

fn refused(agent: &TestAgent, at: &str) -> u64 {
    agent.count("penstock_request_bodies_refused_total", &[&format!("reason=\"{at}\"")])
}

/// Two pools: requests with `host: stalled` wait for an EPP that hangs, all others reach a server.
async fn two_pools(adjust: impl FnOnce(&mut Config)) -> (TestAgent, ScriptedEpp, ModelServer) {
    let server = ModelServer::start(Default::default()).await.unwrap();
    let picker = ScriptedEpp::start(Faulty::new(Production::new(&[server.addr]), HANGS)).await.unwrap();
    let text = format!(
        r#"
        [[pools]]
        name = "healthy"
        endpoints = ["{server}"]
        [[pools]]
        name = "stalled"
        endpoints = ["{server}"]
        [pools.picker]
        kind = "epp"
        address = "{picker}"
        health_interval = "off"
        decision_timeout = "off"
        [[routes]]
        headers = [{{ name = "x-pool", value = "stalled" }}]
        pool = "stalled"
        [[routes]]
        pool = "healthy"
        "#,
        server = server.addr,
        picker = picker.addr,
    );
    let Config { pools, routes, .. } = Config::parse(&text, "test.toml").unwrap();
    let agent = TestAgent::start(builtin_pool(&[]), SteeringMode::Off, |config| {
        (config.pools, config.routes) = (pools, routes);
        adjust(config);
    });
    (agent, picker, server)
}

/// Eight connections with 32 requests each: 256 MiB in all, sixteen times the budget.
#[tokio::test]
async fn bodies_waiting_for_stalled_epp_stay_within_budgets() {
    let (agent, _picker, _server) = two_pools(|config| {
        config.limits.total_body_bytes = 4 * MIB;
        config.limits.total_spill_bytes = 12 * MIB;
    })
    .await;
    let request = echo(json("m", MIB as usize)).header("x-pool", "stalled");
    let (mut clients, mut waiting) = (Vec::new(), Vec::new());
    for _ in 0..8 {
        let mut client = Http2Client::connect(agent.addr).await.unwrap();
        for _ in 0..32 {
            waiting.push(client.send(&request).await.unwrap());
        }
        clients.push(client);
    }
    let settled = || {
        let (memory, spilled) = (memory(&agent), spilled(&agent));
        assert!(memory <= 4 * MIB && spilled <= 12 * MIB, "{memory} {spilled}");
        let active = agent.metric("penstock_active_requests", &["pool=\"stalled\""]);
        active + refused(&agent, "files") as f64 == 256.0 && memory + spilled >= active as u64 * MIB
    };
    eventually(Duration::from_secs(60), settled).await;
    let active = agent.count("penstock_active_requests", &["pool=\"stalled\""]);
    assert!(active <= 16, "{active}");
    // More than the budget, so at least one is rejected; the EPP answers none.
    let mut last = Http2Client::connect(agent.addr).await.unwrap();
    let mut answers = FuturesUnordered::new();
    for _ in 0..17 {
        let mut stream = last.send(&request).await.unwrap();
        answers.push(async move { stream.response().await });
    }
    let first = tokio::time::timeout(Duration::from_secs(60), answers.next()).await;
    let response = first.expect("no request was rejected").unwrap().unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (503, "bodies_full"));
    assert_eq!(response.header("retry-after"), Some("1"));
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&penstock_tests::Request::get("/test/echo")).await.unwrap().status(), 200);
    // After the clients leave, the whole budget is free again.
    drop((waiting, answers, clients, last));
    eventually(SOON, || memory(&agent) == 0 && spilled(&agent) == 0).await;
    assert_eq!(client.request(&echo(json("m", MIB as usize))).await.unwrap().status(), 200);
}

/// A body that spills because of other bodies arrives unchanged.
#[tokio::test]
async fn spilled_body_reaches_picker_and_endpoint_whole() {
    for (total, own) in [(0, 1 << 20), (100_000, 1 << 20), (1 << 30, 0)] {
        let mut stage = Stage::with(Production::new, |config| {
            config.limits.total_body_bytes = total;
            config.limits.body_memory_bytes = own;
        })
        .await;
        for length in [1, 5000, 300_000, 3_000_000] {
            let body = json("m", length);
            let echo = stage.request(&echo(body.clone())).await.echoed();
            assert_eq!(
                (echo.body_length, echo.body_hash),
                (body.len() as u64, Fnv::of(&body).value()),
                "{length} of {total}"
            );
            let streams = stage.epp.streams();
            assert_eq!(streams.last().unwrap().request_body().0, body, "{length} of {total}");
        }
        eventually(SOON, || memory(&stage.agent) == 0 && spilled(&stage.agent) == 0).await;
    }
}

#[tokio::test]
async fn bodies_stay_in_memory_with_files_disabled() {
    let mut stage = Stage::with(Production::new, |config| {
        config.limits.total_spill_bytes = 0;
        config.limits.body_memory_bytes = 1000;
        config.limits.total_body_bytes = 2 * MIB;
    })
    .await;
    assert_eq!(stage.request(&echo(json("m", 1_000_000))).await.status(), 200);
    let response = stage.request(&echo(json("m", 3_000_000))).await;
    assert_eq!((response.status(), response.error_code().as_str()), (503, "bodies_full"));
    assert_eq!(stage.agent.count("penstock_request_bodies_spilled_total", &[]), 0);
}

/// The EPP's body counts against the budget; exhaustion is not the EPP's failure, and an open pool does not fail open.
#[tokio::test]
async fn replacement_body_from_epp_counts_against_budget() {
    let large = Alphabet::Text.bytes(7, 0, 500_000);
    let server = ModelServer::start(Default::default()).await.unwrap();
    let (named, given) = (server.addr.to_string(), large.clone());
    let picker = Answering::new(move |exchange| {
        let length = exchange.request_body.len();
        let body = bytes::Bytes::from(given[..length * 10].to_vec());
        let mut replies = vec![reply::pick(&named, &[])];
        replies.extend(reply::request_body(&body));
        replies
    });
    let picker = ScriptedEpp::start(picker).await.unwrap();
    let pool = epp_pool(&[server.addr], picker.addr, FailureMode::Open);
    let agent = TestAgent::start(pool, SteeringMode::Off, |config| config.limits.total_body_bytes = 200_000);
    let mut client = Client::connect(agent.addr).await.unwrap();
    for length in [10_000, 40_000, 10_000] {
        let body = format!("{}{{}}", " ".repeat(length - 2));
        let response = client.request(&echo(body)).await.unwrap();
        if length == 10_000 {
            let echo = response.echoed();
            assert_eq!((echo.body_length, echo.body_hash), (100_000, Fnv::of(&large[..100_000]).value()));
        } else {
            assert_eq!((response.status(), response.error_code().as_str()), (503, "bodies_full"));
            assert_eq!(response.header("retry-after"), Some("1"));
        }
        eventually(SOON, || memory(&agent) == 0 && spilled(&agent) == 0).await;
    }
    assert_eq!(refused(&agent, "memory"), 1);
    assert_eq!(agent.count("penstock_epp_failures_total", &[]), 0);
}

/// Six stalled uploads exceed the window of their connection.
#[tokio::test]
async fn uploads_to_stalled_epp_leave_connection_window_to_others() {
    let (agent, picker, server) = two_pools(|_| {}).await;
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    let stalled = echo(json("m", MIB as usize)).header("x-pool", "stalled");
    let mut waiting = Vec::new();
    for _ in 0..6 {
        waiting.push(client.send(&stalled).await.unwrap());
    }
    eventually(SOON, || picker.streams_started() == 6).await;
    let begin = Instant::now();
    for _ in 0..3 {
        let body = json("m", 2 * MIB as usize);
        let echo = client.request(&echo(body.clone())).await.unwrap().echoed();
        assert_eq!((echo.body_length, echo.body_hash), (body.len() as u64, Fnv::of(&body).value()));
    }
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert_eq!((server.requests(), agent.count("penstock_active_requests", &["pool=\"stalled\""])), (3, 6));
}

/// A body that the agent does not read because its EPP is slow is not the client's slowness.
#[tokio::test]
async fn slow_epp_never_causes_408() {
    let delay = Duration::from_millis(900);
    for moment in [Moment::RequestHeaders, Moment::RequestBody(100_000), Moment::RequestBody(usize::MAX)] {
        let mut stage = Stage::with(
            |all| Faulty::new(Production::new(all), Fault::At(moment, Harm::Delay(delay))),
            |config| {
                config.timeouts.body = Some(Duration::from_millis(200));
                config.limits.total_body_bytes = 100_000;
                epp(config).decision_timeout = None;
            },
        )
        .await;
        let begin = Instant::now();
        assert_eq!(stage.request(&echo(json("m", 4_000_000))).await.status(), 200);
        assert!(begin.elapsed() >= delay);
    }
}
