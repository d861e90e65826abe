//! Several replicas of one EPP: the order in which they are asked, and that no request is lost when they swap roles, die or
//! restart.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use penstock_agent::config::{Config, FailureMode, SteeringMode};
use penstock_proto::health::health_check_response::ServingStatus;
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Refusing, Request, ScriptedEpp,
    agent::{TestAgent, epps_pool},
    client::Pace,
    content::Fnv,
    eventually,
    scripted_epp::{
        Accept, Answer, Elected, Election, Exchange, Fault, Faulty, Follower, Harm, Moment, Production, Script,
        StreamEnd,
    },
    stage::{echo, epp, json},
};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::SOON;

/// The interval between health checks.
const INTERVAL: Duration = Duration::from_millis(50);

async fn endpoint() -> ModelServer {
    ModelServer::start(Default::default()).await.unwrap()
}

/// One endpoint and these replicas of an EPP, in this order; fails closed, without health checks.
fn agent(endpoint: &ModelServer, epps: &[SocketAddr], adjust: impl FnOnce(&mut Config)) -> TestAgent {
    TestAgent::start(epps_pool(&[endpoint.addr], epps, FailureMode::Closed), SteeringMode::Off, adjust)
}

fn checked(config: &mut Config) {
    epp(config).health_interval = Some(INTERVAL);
}

fn has_state(agent: &TestAgent, replica: SocketAddr, state: &str) -> bool {
    agent.count("penstock_epp_replicas", &[&format!("replica=\"{replica}\""), &format!("state=\"{state}\"")]) == 1
}

fn asked_again(agent: &TestAgent, reason: &str) -> u64 {
    agent.count("penstock_epp_asked_again_total", &[&format!("reason=\"{reason}\"")])
}

fn failures(agent: &TestAgent) -> u64 {
    agent.count("penstock_epp_failures_total", &[])
}

/// Sends requests one after another; returns how many streams each replica has seen since the test began.
async fn ask(agent: &TestAgent, requests: usize, epps: &[&ScriptedEpp]) -> Vec<usize> {
    let mut client = Client::connect(agent.addr).await.unwrap();
    for _ in 0..requests {
        assert_eq!(client.request(&echo(json("m", 1000))).await.unwrap().status(), 200);
    }
    epps.iter().map(|epp| epp.streams_started()).collect()
}

/// Answers health checks with this status.
struct Reporting<S>(S, Result<ServingStatus, Code>);

#[tonic::async_trait]
impl<S: Script> Script for Reporting<S> {
    fn health(&self, _: &str) -> Result<ServingStatus, Status> {
        self.1.map_err(|code| Status::new(code, "scripted"))
    }

    async fn request_headers(
        &self,
        exchange: &mut Exchange,
        headers: &penstock_proto::ext_proc::HttpHeaders,
    ) -> Answer {
        self.0.request_headers(exchange, headers).await
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &penstock_proto::ext_proc::HttpBody) -> Answer {
        self.0.request_body(exchange, body).await
    }
}

/// E17: a replica's health decides whether it is asked first. One without a health service is taken to serve.
#[tokio::test]
async fn replica_not_serving_is_avoided() {
    use ServingStatus::{NotServing, ServiceUnknown, Serving, Unknown};
    let cases = [
        (Ok(Serving), "serving", true),
        (Ok(ServiceUnknown), "unknown", true),
        (Ok(Unknown), "unknown", true),
        (Err(Code::Unimplemented), "unknown", true),
        (Err(Code::NotFound), "unknown", true),
        (Ok(NotServing), "not_serving", false),
        (Err(Code::Unavailable), "not_serving", false),
    ];
    let endpoint = endpoint().await;
    for (health, state, is_asked) in cases {
        let inner = || Production::new(&[endpoint.addr]);
        let first = ScriptedEpp::start(Reporting(inner(), health)).await.unwrap();
        let second = ScriptedEpp::start(inner()).await.unwrap();
        let agent = agent(&endpoint, &[first.addr, second.addr], checked);
        eventually(SOON, || has_state(&agent, first.addr, state) && has_state(&agent, second.addr, "serving")).await;
        // Of two serving replicas, the first gets everything.
        let expected = if is_asked { [10, 0] } else { [0, 10] };
        assert_eq!(ask(&agent, 10, &[&first, &second]).await, expected, "{health:?}");
        assert_eq!(first.health_checks()[0], "envoy.service.ext_proc.v3.ExternalProcessor");
    }
}

/// E17: health checks, not requests, detect a hung replica.
#[tokio::test]
async fn silent_replica_is_avoided() {
    struct Deaf(Arc<AtomicBool>, Production);
    #[tonic::async_trait]
    impl Script for Deaf {
        fn accept(&self) -> Accept {
            if self.0.load(Relaxed) { Accept::Silent } else { Accept::Serve }
        }

        async fn request_headers(
            &self,
            exchange: &mut Exchange,
            headers: &penstock_proto::ext_proc::HttpHeaders,
        ) -> Answer {
            self.1.request_headers(exchange, headers).await
        }

        async fn request_body(&self, exchange: &mut Exchange, body: &penstock_proto::ext_proc::HttpBody) -> Answer {
            self.1.request_body(exchange, body).await
        }
    }
    let (endpoint, deaf) = (endpoint().await, Arc::new(AtomicBool::new(true)));
    let inner = || Production::new(&[endpoint.addr]);
    let first = ScriptedEpp::start(Deaf(Arc::clone(&deaf), inner())).await.unwrap();
    let second = ScriptedEpp::start(inner()).await.unwrap();
    let agent = agent(&endpoint, &[first.addr, second.addr], |config| {
        checked(config);
        // Also the health-check timeout: the second replica must meet it on a busy machine.
        epp(config).connect_timeout = Duration::from_secs(1);
    });
    eventually(SOON, || has_state(&agent, first.addr, "unreachable")).await;
    assert_eq!(ask(&agent, 10, &[&first, &second]).await, [0, 10]);
    deaf.store(false, Relaxed);
    eventually(SOON, || has_state(&agent, first.addr, "serving")).await;
    assert_eq!(ask(&agent, 10, &[&first, &second]).await, [10, 10]);
    assert_eq!(failures(&agent), 0);
}

/// E17: health decides the order, not whether a replica is asked at all.
#[tokio::test]
async fn replicas_all_unhealthy_are_still_asked() {
    let endpoint = endpoint().await;
    let draining = || Reporting(Production::new(&[endpoint.addr]), Ok(ServingStatus::NotServing));
    let (gone, first, second) = (
        Refusing::new().unwrap(),
        ScriptedEpp::start(draining()).await.unwrap(),
        ScriptedEpp::start(draining()).await.unwrap(),
    );
    let agent = agent(&endpoint, &[gone.addr, first.addr, second.addr], checked);
    eventually(SOON, || {
        has_state(&agent, gone.addr, "unreachable")
            && has_state(&agent, first.addr, "not_serving")
            && has_state(&agent, second.addr, "not_serving")
    })
    .await;
    assert_eq!(ask(&agent, 10, &[&first, &second]).await, [10, 0]);
    assert_eq!(failures(&agent), 0);
}

/// E17: the light picker has its own health service name and port.
#[tokio::test]
async fn health_service_name_and_port_are_configurable() {
    let endpoint = endpoint().await;
    let health = ScriptedEpp::start(Reporting(Production::new(&[]), Ok(ServingStatus::NotServing))).await.unwrap();
    let picker = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let agent = agent(&endpoint, &[picker.addr], |config| {
        checked(config);
        epp(config).health_port = Some(health.addr.port());
        epp(config).health_service = "inference-extension".to_owned();
    });
    eventually(SOON, || has_state(&agent, picker.addr, "not_serving")).await;
    assert_eq!(health.health_checks()[0], "inference-extension");
    assert!(picker.health_checks().is_empty());
    assert_eq!(ask(&agent, 1, &[&picker]).await, [1]);
}

/// E17: checks come from one place over one persistent connection, not from each worker.
#[tokio::test]
async fn replica_is_checked_once_for_all_workers() {
    let endpoint = endpoint().await;
    let picker = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let begin = Instant::now();
    let _agent = agent(&endpoint, &[picker.addr], |config| {
        checked(config);
        config.listen.workers = 8;
    });
    eventually(SOON, || picker.health_checks().len() == 10).await;
    assert!(begin.elapsed() >= 9 * INTERVAL, "{:?}", begin.elapsed());
    assert!(picker.connections_accepted() <= 9, "{}", picker.connections_accepted());
}

/// Sends a request whose first replica fails like this before a decision; `reason` is the metric's label.
async fn check_retried_on_next_replica(fault: Option<Fault>, reasons: &[&str]) {
    let (endpoint, refusing) = (endpoint().await, Refusing::new().unwrap());
    let inner = || Production::new(&[endpoint.addr]);
    let first = ScriptedEpp::start(Faulty::new(inner(), fault.unwrap_or(Fault::Deaf))).await.unwrap();
    let second = ScriptedEpp::start(inner()).await.unwrap();
    let first_addr = if fault.is_some() { first.addr } else { refusing.addr };
    let agent = agent(&endpoint, &[first_addr, second.addr], |config| config.listen.workers = 1);
    let mut client = Client::connect(agent.addr).await.unwrap();
    let body = json("m", 1 << 20);
    assert_eq!(
        client.request(&echo(body.clone())).await.unwrap().echoed().body_hash,
        Fnv::of(&body).value(),
        "{fault:?}"
    );
    let counted: u64 = reasons.iter().map(|reason| asked_again(&agent, reason)).sum();
    assert_eq!(counted, agent.count("penstock_epp_asked_again_total", &[]), "{fault:?}");
    // A replica that cannot be connected may be known before the request.
    assert!(counted >= 1 || !matches!(fault, Some(Fault::At(..))), "{fault:?}");
    // The failed replica is no longer asked first.
    let seen = first.streams_started();
    assert_eq!(ask(&agent, 5, &[&first, &second]).await, [seen, 6], "{fault:?}");
    assert_eq!(failures(&agent), 0, "{fault:?}");
}

/// E17: after a refusal, reset, GOAWAY or UNAVAILABLE before a decision, the next replica is asked, with the whole body.
#[tokio::test]
async fn undecided_request_is_retried_on_next_replica() {
    let half = Moment::RequestBody(1 << 19);
    check_retried_on_next_replica(None, &["connect"]).await;
    check_retried_on_next_replica(Some(Fault::ResetAtAccept), &["connect", "reset"]).await;
    for moment in [Moment::RequestHeaders, half, Moment::HeaderReply] {
        check_retried_on_next_replica(Some(Fault::At(moment, Harm::Status(Code::Unavailable))), &["unavailable"]).await;
        check_retried_on_next_replica(Some(Fault::At(moment, Harm::ResetConnection)), &["connect", "reset"]).await;
        check_retried_on_next_replica(Some(Fault::At(moment, Harm::Die)), &["connect", "reset"]).await;
    }
}

/// E13: the picker's own answer, or one that uses up the deadline, is not asked for again.
#[tokio::test]
async fn decided_request_is_not_retried() {
    const DECISION: Duration = Duration::from_millis(300);
    let endpoint = endpoint().await;
    let head = |harm| Fault::At(Moment::RequestHeaders, harm);
    for (fault, status, reason) in [
        (head(Harm::Status(Code::Internal)), 503, "internal"),
        (head(Harm::Status(Code::ResourceExhausted)), 503, "resource_exhausted"),
        (head(Harm::Close), 503, "closed_without_pick"),
        (head(Harm::Silence), 503, "deadline"),
        (head(Harm::Immediate(429)), 429, ""),
    ] {
        let inner = || Production::new(&[endpoint.addr]);
        let first = ScriptedEpp::start(Faulty::new(inner(), fault)).await.unwrap();
        let second = ScriptedEpp::start(inner()).await.unwrap();
        let agent =
            agent(&endpoint, &[first.addr, second.addr], |config| epp(config).decision_timeout = Some(DECISION));
        let mut client = Client::connect(agent.addr).await.unwrap();
        assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), status, "{fault:?}");
        assert_eq!((first.streams_started(), second.streams_started()), (1, 0), "{fault:?}");
        assert_eq!(failures(&agent), u64::from(!reason.is_empty()));
        assert_eq!(agent.count("penstock_epp_failures_total", &[&format!("reason=\"{reason}\"")]), failures(&agent));
    }
}

/// E13: one deadline, however many replicas are asked.
#[tokio::test]
async fn decision_deadline_spans_all_replicas() {
    // Long enough that a busy machine does not turn one attempt into none or three.
    const DECISION: Duration = Duration::from_secs(3);
    let endpoint = endpoint().await;
    // Each replica uses most of the deadline before it refuses.
    let mut epps = Vec::new();
    for _ in 0..3 {
        let slow = Faulty::new(
            Production::new(&[endpoint.addr]),
            Fault::At(Moment::RequestHeaders, Harm::Status(Code::Unavailable)),
        );
        let slow = Faulty::new(slow, Fault::At(Moment::RequestHeaders, Harm::Delay(DECISION * 2 / 3)));
        epps.push(ScriptedEpp::start(slow).await.unwrap());
    }
    let addresses: Vec<_> = epps.iter().map(|epp| epp.addr).collect();
    let agent = agent(&endpoint, &addresses, |config| epp(config).decision_timeout = Some(DECISION));
    let mut client = Client::connect(agent.addr).await.unwrap();
    let begin = Instant::now();
    assert_eq!(client.request(&echo(json("m", 1000))).await.unwrap().error_code(), "picker_failed");
    assert!(begin.elapsed() >= DECISION && begin.elapsed() < 2 * DECISION, "{:?}", begin.elapsed());
    assert_eq!(agent.count("penstock_epp_failures_total", &[r#"reason="deadline""#]), 1);
    assert_eq!((epps[1].streams_started(), epps[2].streams_started()), (1, 0));
}

/// Sends requests one after another on each of several connections; each must be answered.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Vec<Arc<AtomicU64>>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    fn begin(agent: SocketAddr) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let answered: Vec<Arc<AtomicU64>> = (0..8).map(|_| Arc::default()).collect();
        let client = |answered: &Arc<AtomicU64>| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(answered));
            tokio::spawn(async move {
                let mut client = Client::connect(agent).await.unwrap();
                let body = json("m", 20_000);
                while !stop.load(Relaxed) {
                    let response = client.request(&echo(body.clone())).await.unwrap();
                    assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
                    answered.fetch_add(1, Relaxed);
                }
            })
        };
        Self { clients: answered.iter().map(client).collect(), stop, answered }
    }

    /// Waits until each connection has this many more answers: with two, one request began in between.
    async fn more(&self, requests: u64) {
        let enough: Vec<u64> = self.answered.iter().map(|answered| answered.load(Relaxed) + requests).collect();
        eventually(SOON, || {
            assert!(self.clients.iter().all(|client| !client.is_finished()), "a request failed");
            self.answered.iter().zip(&enough).all(|(answered, enough)| answered.load(Relaxed) >= *enough)
        })
        .await;
    }

    async fn end(self) {
        self.stop.store(true, Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

/// A picker that takes a moment, so that requests are always running during a change.
fn slow_picker(endpoint: &ModelServer) -> impl Script {
    let slow = Fault::At(Moment::RequestBody(usize::MAX), Harm::Delay(Duration::from_millis(3)));
    Faulty::new(Production::new(&[endpoint.addr]), slow)
}

async fn elected(endpoint: &ModelServer, election: &Election, follower: Follower) -> [ScriptedEpp; 2] {
    let replica = |replica| Elected { inner: slow_picker(endpoint), replica, election: election.clone(), follower };
    [ScriptedEpp::start(replica(0)).await.unwrap(), ScriptedEpp::start(replica(1)).await.unwrap()]
}

/// E17: leader changes under load. A former leader refuses at once, before any health check.
#[tokio::test]
async fn leader_change_loses_no_request() {
    let (endpoint, election) = (endpoint().await, Election::default());
    let epps = elected(&endpoint, &election, Follower::Refuses).await;
    let agent = agent(&endpoint, &[epps[0].addr, epps[1].addr], checked);
    let load = Load::begin(agent.addr);
    for turn in 1..=6 {
        load.more(3).await;
        let (leader, follower) = (turn % 2, 1 - turn % 2);
        election.leads(leader);
        load.more(2).await;
        eventually(SOON, || {
            has_state(&agent, epps[leader].addr, "serving") && has_state(&agent, epps[follower].addr, "not_serving")
        })
        .await;
        // Requests sent there before are answered by now.
        load.more(2).await;
        let refused = epps[follower].streams_started();
        load.more(5).await;
        assert_eq!(epps[follower].streams_started(), refused, "turn {turn}: a follower was asked");
    }
    load.end().await;
    assert_eq!(failures(&agent), 0);
    assert!(asked_again(&agent, "unavailable") > 0);
}

/// E17: a follower's reply is its reply; from then on the leader is asked, without waiting for the next check.
#[tokio::test]
async fn immediate_503_triggers_health_checks() {
    let (endpoint, election) = (endpoint().await, Election::default());
    let epps = elected(&endpoint, &election, Follower::KnowsNothing).await;
    let agent = agent(&endpoint, &[epps[0].addr, epps[1].addr], |config| {
        epp(config).health_interval = Some(Duration::from_secs(3600));
    });
    eventually(SOON, || has_state(&agent, epps[0].addr, "serving") && has_state(&agent, epps[1].addr, "not_serving"))
        .await;
    let mut client = Client::connect(agent.addr).await.unwrap();
    for leader in [1, 0] {
        election.leads(leader);
        assert_eq!(client.request(&echo(json("m", 1000))).await.unwrap().status(), 503);
        eventually(SOON, || {
            has_state(&agent, epps[leader].addr, "serving") && has_state(&agent, epps[1 - leader].addr, "not_serving")
        })
        .await;
        assert_eq!(client.request(&echo(json("m", 1000))).await.unwrap().status(), 200);
    }
}

/// E17, E20: the leader is killed under load, and a response that it picked for continues.
#[tokio::test]
async fn leader_death_loses_no_request() {
    let (endpoint, election) = (endpoint().await, Election::default());
    let mut epps = elected(&endpoint, &election, Follower::Answers).await;
    let agent = agent(&endpoint, &[epps[0].addr, epps[1].addr], checked);
    let load = Load::begin(agent.addr);
    for turn in 0..4 {
        let (leader, follower) = (turn % 2, 1 - turn % 2);
        load.more(3).await;
        let plan = Plan { size: 8 << 20, ..Plan::default() };
        let mut flowing = Client::connect_with(agent.addr, Some(64 << 10)).await.unwrap();
        flowing.send(&plan.request()).await.unwrap();
        assert_eq!(flowing.head().await.unwrap().status, 200);

        epps[leader].stop();
        load.more(2).await;
        election.leads(follower);
        eventually(SOON, || {
            has_state(&agent, epps[leader].addr, "unreachable") && has_state(&agent, epps[follower].addr, "serving")
        })
        .await;
        load.more(3).await;
        epps[leader].restart().await.unwrap();
        eventually(SOON, || has_state(&agent, epps[leader].addr, "not_serving")).await;

        let mut checker = plan.checker();
        let read = flowing.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
        assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "turn {turn}");
    }
    load.end().await;
    assert_eq!(failures(&agent), 0);
}

/// GOAWAY under load: accepted streams finish where they are, others use a new connection.
#[tokio::test]
async fn goaway_loses_no_request() {
    let endpoint = endpoint().await;
    let epp = ScriptedEpp::start(slow_picker(&endpoint)).await.unwrap();
    let other = ScriptedEpp::start(slow_picker(&endpoint)).await.unwrap();
    let agent = agent(&endpoint, &[epp.addr, other.addr], checked);
    let load = Load::begin(agent.addr);
    load.more(1).await;
    let plan = Plan { size: 8 << 20, ..Plan::default() };
    let mut flowing = Client::connect_with(agent.addr, Some(64 << 10)).await.unwrap();
    flowing.send(&plan.request()).await.unwrap();
    assert_eq!(flowing.head().await.unwrap().status, 200);
    for _ in 0..20 {
        epp.go_away();
        load.more(2).await;
    }
    load.end().await;
    assert_eq!(failures(&agent), 0);
    assert!(epp.connections_accepted() > 20, "{}", epp.connections_accepted());
    assert_eq!(other.streams_started(), 0, "the other replica was asked");
    let mut checker = plan.checker();
    flowing.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!(checker.offset(), plan.size);
    // Every stream closed orderly, including that of the response which outlived its connection's server.
    eventually(SOON, || epp.streams_open() == 0).await;
    assert_eq!(epp.streams_ended(StreamEnd::HalfClosed), epp.streams_started());
}
