//! Retries: which unanswered requests go to the next endpoint, and how often.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use penstock_agent::config::{Config, FailureMode, Retry, SteeringMode};
use penstock_tests::agent::{TestAgent, builtin_pool, epp_pool};
use penstock_tests::client::{Client, Request, Response};
use penstock_tests::content::Fnv;
use penstock_tests::scripted_epp::{Answering, Endpoints, Production, Script, ScriptedEpp, StreamEnd, reply};
use penstock_tests::stage::{echo, json, put};
use penstock_tests::{ModelServer, Refusing, eventually, model_server::Options};

use crate::SOON;
use crate::abrupt::{Abrupt, Act, Turn};

/// No ejection, so that a list keeps the picker's order.
fn without_ejection(config: &mut Config) {
    config.pools[0].ejection.failures = 0;
}

fn retry(attempts: u32, budget_percent: u32, budget_min_per_second: u32) -> impl FnOnce(&mut Config) {
    move |config| {
        without_ejection(config);
        config.pools[0].retry = Retry { attempts, budget_percent, budget_min_per_second, ..Retry::default() };
    }
}

/// Always returns the same list.
fn list(endpoints: &[SocketAddr]) -> impl Script + use<> {
    let named = endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    Answering::new(move |_| vec![reply::pick(&named, &[])])
}

struct Scene {
    agent: TestAgent,
    client: Client,
    epp: ScriptedEpp,
}

impl Scene {
    /// A picker that always names these endpoints.
    async fn new(endpoints: &[SocketAddr], adjust: impl FnOnce(&mut Config)) -> Self {
        let epp = ScriptedEpp::start(list(endpoints)).await.unwrap();
        let agent = TestAgent::start(epp_pool(endpoints, epp.addr, FailureMode::Closed), SteeringMode::Off, adjust);
        let client = Client::connect(agent.addr).await.unwrap();
        Self { agent, client, epp }
    }

    async fn request(&mut self, request: &Request) -> Response {
        self.client.request(request).await.unwrap()
    }

    fn retries(&self, reason: &str) -> u64 {
        self.agent.count("penstock_endpoint_retries_total", &[&format!("reason=\"{reason}\"")])
    }

    fn refused(&self, reason: &str) -> u64 {
        self.agent.count("penstock_endpoint_retries_refused_total", &[&format!("reason=\"{reason}\"")])
    }

    fn fallbacks(&self, index: &str) -> u64 {
        self.agent.count("penstock_fallback_attempts_total", &[r#"pool="default""#, &format!("index=\"{index}\"")])
    }
}

async fn model_server() -> ModelServer {
    ModelServer::start(Options::default()).await.unwrap()
}

/// What an acknowledged request's endpoint does next.
const ENDS: [fn() -> Act; 3] = [|| Act::Close, || Act::Reset, || Act::CloseEarly];

/// E10, D5, E8: the endpoint that answered is reported as served.
#[tokio::test]
async fn acknowledged_idempotent_request_is_retried_on_next_endpoint() {
    for act in ENDS {
        let (abrupt, good) = (Abrupt::start(move |_| act()).await, model_server().await);
        let mut scene = Scene::new(&[abrupt.addr, good.addr], without_ejection).await;
        for len in [100, 3 << 20] {
            let body = json("m", len);
            let response = scene.request(&put(body.clone())).await;
            assert_eq!(response.served_by(), Some(good.addr));
            assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
        }
        assert_eq!((abrupt.requests(), good.requests()), (2, 2));
        assert_eq!((scene.retries("closed_before_response"), scene.fallbacks("1")), (2, 2));
        eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 2).await;
        assert_eq!(scene.epp.streams()[0].served(), Some(good.addr.to_string()));
    }
}

/// For any size and any further endpoints: a byte of the request has been acknowledged.
#[tokio::test]
async fn acknowledged_post_is_executed_once() {
    for act in ENDS {
        let (abrupt, good) = (Abrupt::start(move |_| act()).await, model_server().await);
        let mut scene = Scene::new(&[abrupt.addr, good.addr], retry(10, 100, 100)).await;
        for (taken, len) in [(1, 100), (2, 3 << 20)] {
            let response = scene.request(&echo(json("m", len))).await;
            assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
            assert_eq!((abrupt.requests(), good.requests()), (taken, 0));
            assert_eq!(scene.refused("method"), taken as u64);
        }
    }
}

/// Also on a kept connection: this is not the usual race of such connections, because the endpoint has the request.
#[tokio::test]
async fn acknowledged_post_on_kept_connection_is_executed_once() {
    let ends: [fn() -> Act; 2] = [|| Act::Close, || Act::Reset];
    for (attempts, end, len) in
        [0, 2].into_iter().flat_map(|n| ends.map(|end| [(n, end, 100), (n, end, 40_000)])).flatten()
    {
        let taking = move |turn: Turn| if turn.connection == 1 && turn.request == 1 { Act::Answer } else { end() };
        let (abrupt, good) = (Abrupt::start(taking).await, model_server().await);
        let mut scene = Scene::new(&[abrupt.addr, good.addr], |config| {
            retry(attempts, 100, 100)(config);
            config.listen.workers = 1;
        })
        .await;
        assert_eq!(scene.request(&echo(json("m", 100))).await.text(), "ok");
        let response = scene.request(&echo(json("m", len))).await;
        assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
        assert_eq!((abrupt.requests(), good.requests()), (2, 0));
        assert_eq!(scene.retries("kept_connection_closed"), 0);
    }
}

/// `retry.methods` defines which methods are idempotent in the pool.
#[tokio::test]
async fn retry_methods_are_configurable() {
    let (abrupt, good) = (Abrupt::start(|_| Act::Close).await, model_server().await);
    let mut scene = Scene::new(&[abrupt.addr, good.addr], |config| {
        without_ejection(config);
        config.pools[0].retry.methods = vec![http::Method::POST];
    })
    .await;
    assert_eq!(scene.request(&echo(json("m", 100))).await.served_by(), Some(good.addr));
    let response = scene.request(&put(json("m", 100))).await;
    assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
    assert_eq!((abrupt.requests(), good.requests(), scene.refused("method")), (2, 1, 1));
}

/// D5: also in the middle of a long list, after an unreachable endpoint.
#[tokio::test]
async fn picker_list_is_walked_in_order() {
    let (dead, abrupt, good) = (Refusing::new().unwrap(), Abrupt::start(|_| Act::Close).await, model_server().await);
    let mut scene = Scene::new(&[dead.addr, abrupt.addr, good.addr], without_ejection).await;
    assert_eq!(scene.request(&put("{}")).await.served_by(), Some(good.addr));
    assert_eq!((scene.retries("connect"), scene.retries("closed_before_response")), (1, 1));
    assert_eq!((scene.fallbacks("1"), scene.fallbacks("2"), scene.fallbacks("3")), (1, 1, 0));
}

/// D5.
#[tokio::test]
async fn response_after_first_byte_is_not_retried() {
    let (begins, good) = (Abrupt::start(|_| Act::Begin).await, model_server().await);
    let mut scene = Scene::new(&[begins.addr, good.addr], without_ejection).await;
    let response = scene.request(&echo("{}")).await;
    assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
    assert_eq!((begins.requests(), good.requests()), (1, 0));
    assert_eq!(scene.agent.count("penstock_endpoint_retries_total", &[]), 0);
}

/// D5, D10: the endpoint may be executing it.
#[tokio::test]
async fn first_byte_timeout_is_not_retried() {
    let (silent, good) = (Abrupt::start(|_| Act::Silence).await, model_server().await);
    let mut scene = Scene::new(&[silent.addr, good.addr], |config| {
        without_ejection(config);
        config.timeouts.first_byte = Some(Duration::from_millis(200));
    })
    .await;
    let response = scene.request(&echo("{}")).await;
    assert_eq!((response.status(), response.error_code().as_str()), (504, "first_byte_timeout"));
    assert_eq!(good.requests(), 0);
}

/// D5: attempts count executions, so with zero retries there is exactly one.
#[tokio::test]
async fn attempts_are_limited() {
    for attempts in [0, 1, 2] {
        let [a, b, c] = [
            Abrupt::start(|_| Act::Close).await,
            Abrupt::start(|_| Act::Close).await,
            Abrupt::start(|_| Act::Close).await,
        ];
        let good = model_server().await;
        let mut scene = Scene::new(&[a.addr, b.addr, c.addr, good.addr], retry(attempts, 100, 100)).await;
        let response = scene.request(&put("{}")).await;
        assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
        assert_eq!(a.requests() + b.requests() + c.requests(), 1 + attempts as usize);
        assert_eq!((good.requests(), scene.refused("attempts")), (0, 1));
    }
}

/// D5: ten seconds' worth at one per second, with no share of the requests.
#[tokio::test]
async fn retries_are_limited_by_budget() {
    let (abrupt, good) = (Abrupt::start(|_| Act::Close).await, model_server().await);
    let mut scene = Scene::new(&[abrupt.addr, good.addr], retry(2, 0, 1)).await;
    let mut answered = 0;
    for _ in 0..30 {
        answered += u64::from(scene.request(&put("{}")).await.status() == 200);
    }
    // One more for each second that this took.
    assert!((10..20).contains(&answered), "{answered}");
    assert_eq!((good.requests(), scene.refused("budget")), (answered, 30 - answered));
}

/// D5: nothing was sent, so nothing counts.
#[tokio::test]
async fn failed_connects_use_no_budget() {
    let dead: Vec<_> = (0..5).map(|_| Refusing::new().unwrap()).collect();
    let good = model_server().await;
    let list: Vec<_> = dead.iter().map(|dead| dead.addr).chain([good.addr]).collect();
    let mut scene = Scene::new(&list, retry(0, 0, 0)).await;
    for _ in 0..20 {
        assert_eq!(scene.request(&echo("{}")).await.served_by(), Some(good.addr));
    }
    assert_eq!((scene.retries("connect"), scene.fallbacks("5")), (100, 20));
}

/// D5: the built-in picker and a pool that fails open have lists too.
#[tokio::test]
async fn builtin_and_fail_open_picks_are_retried() {
    let (abrupt, good) = (Abrupt::start(|_| Act::Close).await, model_server().await);
    let dead: Vec<_> = (0..4).map(|_| Refusing::new().unwrap()).collect();
    let endpoints: Vec<_> = dead.iter().map(|dead| dead.addr).chain([abrupt.addr, good.addr]).collect();
    let refusing = Refusing::new().unwrap();
    let generous = |config: &mut Config| retry(1, 100, 100)(config);
    for pool in [builtin_pool(&endpoints), epp_pool(&endpoints, refusing.addr, FailureMode::Open)] {
        let agent = TestAgent::start(pool, SteeringMode::Off, generous);
        let mut client = Client::connect(agent.addr).await.unwrap();
        for _ in 0..12 {
            let response = client.request(&put(json("m", 1000))).await.unwrap();
            assert_eq!(response.served_by(), Some(good.addr));
        }
    }
    assert!(abrupt.requests() > 0);
}

/// A single endpoint: such a retry uses no budget and has no other endpoint to go to.
async fn one_endpoint(act: impl Fn(Turn) -> Act + Send + Sync + 'static) -> (Abrupt, Scene) {
    let abrupt = Abrupt::start(act).await;
    let scene = Scene::new(&[abrupt.addr], retry(0, 0, 0)).await;
    (abrupt, scene)
}

const TIMES: u64 = 300;

/// D3, D4: no byte of the request was acknowledged, so it is sent again whatever its method, without using budget.
#[tokio::test]
async fn stale_kept_connections_are_replaced() {
    let (abrupt, mut scene) = one_endpoint(|_| Act::AnswerAndVanish).await;
    for n in 0..TIMES {
        let request = if n % 2 == 0 { echo(json("m", 40_000)) } else { Request::get("/test/echo") };
        assert_eq!(scene.request(&request).await.text(), "ok", "request {n}");
    }
    assert_eq!(scene.retries("kept_connection_closed"), TIMES - 1);
    assert_eq!(abrupt.requests() as u64, TIMES);
}

/// Answers one request per connection and closes it when told to, after the given delay.
fn closing(told: Receiver<Duration>) -> SocketAddr {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\"}") {
                let mut bytes = [0; 4096];
                let n = stream.read(&mut bytes).unwrap();
                request.extend_from_slice(&bytes[..n]);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
            let Ok(delay) = told.recv() else { return };
            let begin = Instant::now();
            while begin.elapsed() < delay {
                std::hint::spin_loop();
            }
        }
    });
    addr
}

/// D3, D4: an idempotent request is answered, whatever was acknowledged at that moment. The delay of the close adapts: later if the
/// agent found the connection closed, earlier if it used the connection, so that close and request come as close together as
/// possible.
#[tokio::test]
async fn kept_connection_closing_under_request_is_replaced() {
    let (tell, told) = std::sync::mpsc::channel();
    let endpoint = closing(told);
    let agent = TestAgent::start(builtin_pool(&[endpoint]), SteeringMode::Off, |config| {
        retry(1, 100, 100)(config);
        config.listen.workers = 1;
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    let request = put(json("m", 1000));
    assert_eq!(client.request(&request).await.unwrap().text(), "ok");
    let step = |delay: Duration| Duration::from_micros(5).max(delay / 16);
    let (mut delay, mut before, mut found_closed) = (Duration::ZERO, 0, 0);
    for n in 0..2 * TIMES {
        tell.send(delay).unwrap();
        assert_eq!(client.request(&request).await.unwrap().text(), "ok", "request {n}");
        // With or without an acknowledgement of the request.
        let used = agent.count("penstock_endpoint_retries_total", &[]);
        if used > before {
            delay = delay.saturating_sub(step(delay));
        } else {
            delay += step(delay);
            found_closed += 1;
        }
        before = used;
    }
    println!("{found_closed} times closed before, {before} times closed after; at the end {delay:?} after the client");
    assert!(found_closed > 20 && before > 20, "{found_closed} {before}");
}

/// D5: a request that kills endpoints reaches no more of them than its attempts.
#[tokio::test]
async fn request_killing_endpoints_stops_at_attempt_limit() {
    let mortal = |turn: Turn| if turn.connection == 1 && turn.request == 1 { Act::Answer } else { Act::Close };
    let (one, two) = (Abrupt::start(mortal).await, Abrupt::start(mortal).await);
    let picker = Production::over(Endpoints::new(&[one.addr, two.addr]).offering(2));
    let epp = ScriptedEpp::start(picker).await.unwrap();
    let pool = epp_pool(&[one.addr, two.addr], epp.addr, FailureMode::Closed);
    let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
        retry(1, 100, 100)(config);
        config.listen.workers = 1;
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    for _ in 0..2 {
        assert_eq!(client.request(&put(json("m", 100))).await.unwrap().text(), "ok");
    }
    let response = client.request(&put(json("m", 100))).await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
    assert_eq!((one.requests(), two.requests()), (3, 1), "expected the first on the kept and on a new connection");
}
