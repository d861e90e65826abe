//! A panic ends only the request it occurs in; a panic in a shared part makes the agent exit.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use http::request::Parts;
use penstock_agent::{
    Agent,
    config::{
        Bpffs, Config, Epp, FailureMode, HealthCheck, InferencePoolRef, InferencePoolVersion, Interfaces, Picker, Pool,
        SteeringMode,
    },
    panics,
    parts::{Point, Probe},
    run::{Signals, until_ended},
};
use penstock_tests::{
    ApiServer, Between, BodyEnd, Client, Http2Client, ModelServer, Mounted, Plan, Reader, Request, ScriptedEpp,
    agent::{TestAgent, builtin_pool, epp_pool},
    api_server::objects::NAMESPACE,
    client::{ConnectionEnd, Piece},
    eventually,
    model_server::{Fault, FaultKind, Framing, Options},
    reader::at_least,
    scripted_epp::Production,
};

use crate::{ANY_PORT, SOON};

const FAULT: &str = "injected fault";
const HERE: &str = "tests/tests/lifetime/panics.rs";

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

/// Counts panics of this test binary and prints them as usual.
fn count_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let shown = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            panics::record(panic);
            // A backtrace takes seconds on the panicking thread.
            if panics::message(panic.payload()) != FAULT {
                shown(panic);
            }
        }));
    });
}

fn wants(parts: &Parts, place: &str) -> bool {
    parts.headers.get("x-fault").is_some_and(|value| value == place)
}

/// A probe that panics in the requests that ask for it.
fn faulty() -> Probe {
    Probe::new(|point| match point {
        Point::Request(parts) if wants(parts, "request") => panic!("{FAULT}"),
        Point::Response(parts) if wants(parts, "response") => panic!("{FAULT}"),
        Point::Body(parts) if wants(parts, "body") => panic!("{FAULT}"),
        _ => {}
    })
}

#[tokio::test]
async fn panic_in_request_returns_500_and_others_continue() {
    count_panics();
    let server = server().await;
    for steering in [SteeringMode::Off, SteeringMode::Auto] {
        let agent = TestAgent::start_with(builtin_pool(&[server.addr]), steering, faulty(), |_| {});
        let plan = Plan { size: 8 << 20, ..Plan::default() };
        let mut running = Client::connect_with(agent.addr, Some(64 << 10)).await.unwrap();
        running.send(&plan.request()).await.unwrap();
        assert_eq!(running.head().await.unwrap().status, 200);
        let mut checker = plan.checker();
        for place in ["request", "response"] {
            let mut client = Client::connect(agent.addr).await.unwrap();
            assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
            let request = Request::post("/test/echo", vec![b'x'; 10_000]).header("x-fault", place);
            let failed = client.request(&request).await.unwrap();
            assert_eq!((failed.status(), failed.error_code().as_str()), (500, "internal_error"), "{place}");
            assert_eq!(failed.header("connection"), Some("close"));
            assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
        }
        let read = Reader::Fast.take(&mut running, &mut checker).await.unwrap();
        assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
        assert_eq!(agent.count("penstock_requests_total", &[r#"reason="internal_error""#]), 2);
        // The request that was read to its end is accounted for after its last byte.
        eventually(SOON, || agent.metric("penstock_active_requests", &[]) == 0.0).await;
        assert!(agent.count("penstock_panics_total", &[HERE]) >= 2);
        assert!(agent.agent.readiness().is_ready() && !agent.agent.has_failed());
    }
}

#[tokio::test]
async fn panic_in_http2_request_returns_500_and_streams_finish() {
    count_panics();
    let server = server().await;
    let agent = TestAgent::start_with(builtin_pool(&[server.addr]), SteeringMode::Off, faulty(), |_| {});
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    // Less than the connection window, and incomplete when the other request fails.
    let fault = Some(Fault { after: 500, kind: FaultKind::StallMs(500) });
    let plan = Plan { size: 10_000, fault, ..Plan::default() };
    let mut running = client.send(&plan.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    let failed = client.request(&Request::get("/v1/models").header("x-fault", "request")).await.unwrap();
    assert_eq!((failed.status(), failed.error_code().as_str()), (500, "internal_error"));
    let mut checker = plan.checker();
    let read = running.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    // The connection itself takes no more requests.
    client.end().await.unwrap();
}

/// Interim heads are no answer.
#[tokio::test]
async fn panic_after_interim_responses_returns_500() {
    count_panics();
    let server = server().await;
    let plan = Plan { interim: vec![103, 102], size: 10_000, ..Plan::default() };
    for steering in [SteeringMode::Off, SteeringMode::Auto] {
        let agent = TestAgent::start_with(builtin_pool(&[server.addr]), steering, faulty(), |_| {});
        let request = plan.request().header("x-fault", "response");
        let mut client = Client::connect(agent.addr).await.unwrap();
        let failed = client.request(&request).await.unwrap();
        assert_eq!((failed.status(), failed.error_code().as_str()), (500, "internal_error"), "{steering:?}");
        assert_eq!((failed.interim.len(), failed.header("connection")), (2, Some("close")), "{steering:?}");
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
        let failed = Http2Client::connect(agent.addr).await.unwrap().request(&request).await.unwrap();
        assert_eq!((failed.status(), failed.error_code().as_str()), (500, "internal_error"), "{steering:?}");
        assert_eq!(failed.interim.len(), 2, "{steering:?}");
    }
}

/// While the body is incomplete, for each framing.
#[tokio::test]
async fn panic_in_body_breaks_off_only_its_response() {
    count_panics();
    let server = server().await;
    for steering in [SteeringMode::Off, SteeringMode::Ingress] {
        for framing in [Framing::ContentLength, Framing::Chunked, Framing::UntilClose] {
            let agent = TestAgent::start_with(builtin_pool(&[server.addr]), steering, faulty(), |_| {});
            let stalls = Some(Fault { after: 5000, kind: FaultKind::Stall });
            let plan = Plan { framing, size: 100_000, fault: stalls, ..Plan::default() };
            let mut client = Client::connect(agent.addr).await.unwrap();
            client.send(&plan.request().header("x-fault", "body")).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            let read = Reader::Fast.take(&mut client, &mut plan.checker()).await.unwrap();
            assert!(read.end != BodyEnd::Complete && read.len < plan.size, "{steering:?} {framing:?} {read:?}");
            assert!(framing != Framing::UntilClose || read.end == BodyEnd::Reset, "{steering:?} {read:?}");
            assert_counted_once(&agent).await;
        }
    }
    assert_eq!(server.aborted(), 6);
}

#[tokio::test]
async fn panic_in_http2_body_resets_stream_and_others_finish() {
    count_panics();
    let server = server().await;
    let armed = Arc::new(AtomicBool::new(false));
    let trigger = Arc::clone(&armed);
    let probe = Probe::new(move |point| match point {
        Point::Body(parts) if wants(parts, "body") && trigger.load(Relaxed) => panic!("{FAULT}"),
        _ => {}
    });
    let agent = TestAgent::start_with(builtin_pool(&[server.addr]), SteeringMode::Off, probe, |_| {});
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    let fault = Some(Fault { after: 500, kind: FaultKind::UntilTold });
    let waits = Plan { size: 10_000, fault, ..Plan::default() };
    let mut running = client.send(&waits.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    // Larger than the client's windows, so that it cannot be sent at once.
    let plan = Plan { size: 64 << 20, ..waits.clone() };
    let mut failing = client.send(&plan.request().header("x-fault", "body")).await.unwrap();
    assert_eq!(failing.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    while checker.offset() < 500 {
        let Piece::Data(data) = failing.piece().await.unwrap() else { panic!("ended at {}", checker.offset()) };
        checker.feed(&data).unwrap();
    }
    armed.store(true, Relaxed);
    server.resume();
    let read = failing.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert!(read.end == BodyEnd::Reset && checker.offset() < plan.size, "{read:?}");
    let mut checker = waits.checker();
    let read = running.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, waits.size));
    assert_counted_once(&agent).await;
}

/// Asserts one internal error and one panic or more, and that the agent keeps serving.
async fn assert_counted_once(agent: &TestAgent) {
    eventually(SOON, || agent.metric("penstock_active_requests", &[]) == 0.0).await;
    assert_eq!(agent.count("penstock_requests_total", &[r#"reason="internal_error""#]), 1);
    assert!(agent.count("penstock_panics_total", &[HERE]) >= 1);
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
    assert!(agent.agent.readiness().is_ready() && !agent.agent.has_failed());
}

fn config(server: &ModelServer) -> Config {
    let mut config = Config::new(vec![builtin_pool(&[server.addr])]);
    config.listen.address = ANY_PORT;
    config.listen.workers = 2;
    config.admin.address = ANY_PORT;
    config.steering.mode = SteeringMode::Off;
    config.timeouts.lame_duck = None;
    config
}

/// Starts an agent and runs it to its end, as `penstock run` does; sends the agent's address first.
fn run_agent(config: Config, probe: Probe) -> (SocketAddr, SocketAddr, Life) {
    let (told, started) = std::sync::mpsc::channel();
    let life = std::thread::spawn(move || {
        let signals = Signals::install()?;
        let agent = Agent::start_with(config, probe)?;
        told.send((agent.address(), agent.admin_address()))?;
        until_ended(agent, signals, || unreachable!("no SIGHUP is sent"))
    });
    let (address, admin) = started.recv().expect("the agent did not start");
    (address, admin, life)
}

type Life = std::thread::JoinHandle<anyhow::Result<()>>;

async fn assert_fails(life: Life) {
    eventually(SOON, || life.is_finished()).await;
    let error = life.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("a part of the agent failed"), "{error}");
}

#[tokio::test]
async fn panic_in_worker_makes_agent_unready_and_others_finish() {
    count_panics();
    let server = server().await;
    let armed = Arc::new(AtomicBool::new(false));
    let trigger = Arc::clone(&armed);
    let probe = Probe::new(move |point| {
        if matches!(point, Point::Worker) && trigger.swap(false, Relaxed) {
            panic!("{FAULT}");
        }
    });
    let (address, admin, life) = run_agent(config(&server), probe);
    // Streams on both workers, so that at least one outlives the panicking worker.
    let plan = Plan { size: 4 << 20, ..Plan::default() };
    let mut running = Vec::new();
    for _ in 0..16 {
        let mut client = Client::connect_with(address, Some(64 << 10)).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut checker = plan.checker();
        assert_eq!(at_least(&mut client, &mut checker, 1000).await.unwrap(), None);
        running.push((client, checker));
    }
    armed.store(true, Relaxed);
    let begin = Instant::now();
    loop {
        let ready = Client::connect(admin).await.unwrap().request(&Request::get("/readyz")).await.unwrap();
        if ready.status() == 503 && ready.text().contains("failed: penstock-") {
            break;
        }
        assert!(begin.elapsed() < SOON, "still ready");
    }
    let (mut complete, mut broken) = (0, 0);
    for (client, checker) in &mut running {
        let read = Reader::Fast.take(client, checker).await.unwrap();
        if read.end == BodyEnd::Complete {
            assert_eq!(read.len, plan.size);
            complete += 1;
        } else {
            broken += 1;
        }
    }
    assert!(complete > 0 && broken > 0, "{complete} complete, {broken} broken");
    assert_fails(life).await;
}

/// A configuration under which the agent starts every kind of thread.
fn everything(server: &ModelServer) -> Config {
    let mut config = config(server);
    config.steering.mode = SteeringMode::Ingress;
    config.steering.max_flows = 64;
    config.tracing.otlp_endpoint = Some("http://127.0.0.1:9".to_owned());
    let mut checked = builtin_pool(&[server.addr]);
    checked.name = "checked".to_owned();
    checked.health = Some(HealthCheck::new("/health".parse().unwrap()));
    checked.picker = Picker::Epp(Epp::new("127.0.0.1:9"));
    config.pools.push(checked);
    config
}

#[tokio::test]
async fn panic_in_thread_ends_agent() {
    count_panics();
    let server = server().await;
    for part in ["penstock-control", "endpoints", "penstock-spans", "penstock-events", "admin", "penstock-0"] {
        let (_, _, life) = run_agent(everything(&server), panics_in(part));
        assert_fails(life).await;
    }
}

fn panics_in(part: &'static str) -> Probe {
    Probe::new(move |point| match point {
        Point::Thread(thread) | Point::Events(thread) if thread == part => panic!("{FAULT}"),
        _ => {}
    })
}

#[tokio::test]
async fn panic_in_thread_of_wire_or_kubernetes_ends_agent() {
    count_panics();
    let (between, api) = (Between::new().unwrap(), ApiServer::start().await.unwrap());
    let (bpffs, kubeconfig) = (Mounted::bpffs().unwrap(), api.kubeconfig());
    for part in ["penstock-wire", "penstock-adopt", "kubernetes"] {
        let mut config = config(&between.server);
        config.listen.address = SocketAddr::from((between.front, 0));
        config.steering.mode = SteeringMode::Wire;
        config.steering.max_flows = 64;
        config.steering.interfaces = Interfaces::Named(between.interfaces.to_vec());
        config.steering.bpffs = Bpffs::At(bpffs.path().to_owned());
        config.kubernetes.kubeconfig = Some(kubeconfig.path().to_owned());
        let (namespace, name) = (NAMESPACE.to_owned(), "llama".to_owned());
        let pool = InferencePoolRef { namespace, name, version: InferencePoolVersion::V1 };
        config.pools.push(Pool { inference_pool: Some(pool), ..Pool::new("found", []) });
        let (_, _, life) = run_agent(config, panics_in(part));
        assert_fails(life).await;
    }
}

/// The replica is unknown meanwhile, and its health is known again after the next check.
#[tokio::test]
async fn health_check_that_panics_is_made_again() {
    count_panics();
    let server = server().await;
    let epp = ScriptedEpp::start(Production::new(&[server.addr])).await.unwrap();
    let armed = Arc::new(AtomicBool::new(true));
    let trigger = Arc::clone(&armed);
    let probe = Probe::new(move |point| match point {
        Point::HealthCheck if trigger.swap(false, Relaxed) => panic!("{FAULT}"),
        _ => {}
    });
    let pool = epp_pool(&[server.addr], epp.addr, FailureMode::Closed);
    let agent = TestAgent::start_with(pool, SteeringMode::Off, probe, |config| {
        if let Picker::Epp(epp) = &mut config.pools[0].picker {
            epp.health_interval = Some(std::time::Duration::from_millis(200));
        }
    });
    let state = |state: &str| agent.metric("penstock_epp_replicas", &[&format!("state=\"{state}\"")]);
    eventually(SOON, || !armed.load(Relaxed)).await;
    eventually(SOON, || state("serving") == 1.0).await;
    for round in 2..4 {
        armed.store(true, Relaxed);
        eventually(SOON, || state("unknown") == 1.0).await;
        eventually(SOON, || state("serving") == 1.0).await;
        assert!(agent.count("penstock_panics_total", &["penstock-control", HERE]) >= round);
    }
    assert!(agent.agent.readiness().is_ready() && !agent.agent.has_failed());
}
