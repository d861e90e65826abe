//! An EPP without a reachable replica: requests of a pool that fails closed wait for one to come back, within bounds, and one task
//! connects again for all of them.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use parking_lot::Mutex;
use penstock_agent::config::{Config, FailureMode, SteeringMode};
use penstock_tests::{
    Client, DnsServer, ModelServer, Refusing, Request, ScriptedEpp, Stage,
    agent::{TestAgent, epp_pool},
    content::Fnv,
    eventually,
    http2_frames::{END_STREAM, Frame, Http2Frames, kind},
    model_server::Options,
    scripted_epp::{Fault, Faulty, Harm, Moment, Production, Setup},
    stage::{echo, epp, json},
};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

use crate::SOON;

/// Longer than any replica is away here.
const LONG: Duration = Duration::from_secs(60);

fn waits(config: &mut Config) {
    epp(config).unreachable_wait = Some(Some(LONG));
}

/// Closes no kept connection, which could lose a POST on a busy machine.
async fn endpoint() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

/// Requests that had to wait and ended like this.
fn waited(agent: &TestAgent, outcome: &str) -> u64 {
    agent.count("penstock_epp_waits_total", &[&format!("reason=\"{outcome}\"")])
}

fn waiting(agent: &TestAgent) -> u64 {
    agent.count("penstock_epp_waiting", &[])
}

async fn status(agent: &TestAgent, request: Request) -> u16 {
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.patience = LONG;
    client.request(&request).await.unwrap().status()
}

/// A stage whose only replica refuses connections while the second value exists.
async fn away(adjust: impl FnOnce(&mut Config)) -> (Stage, Refusing) {
    let refusing = Refusing::new().unwrap();
    let stage = Stage::with(Production::new, |config| {
        waits(config);
        epp(config).addresses = vec![refusing.addr.to_string()];
        adjust(config);
    })
    .await;
    (stage, refusing)
}

/// 400 requests a second, while the only replica drains, is killed, and is away for 1.5 s.
async fn lose_nothing(mode: FailureMode) {
    const REQUESTS: usize = 1200;
    const BEFORE: usize = 200;
    // On addresses of their own, because another test may take a port that is free for long.
    let number = if mode == FailureMode::Closed { 1 } else { 2 };
    let setup = Setup { address: ([127, 77, 0, number], 0).into(), ..Setup::default() };
    let (one, two) = (endpoint().await, endpoint().await);
    let mut epp = ScriptedEpp::start_with(setup, Production::new(&[one.addr, two.addr])).await.unwrap();
    let agent = TestAgent::start(epp_pool(&[one.addr, two.addr], epp.addr, mode), SteeringMode::Off, |config| {
        if mode == FailureMode::Closed {
            waits(config);
        }
    });
    let (addr, body) = (agent.addr, json("m", 500));
    // Clients that have no request, so that most requests open no connection.
    let idle = Arc::<Mutex<Vec<Client>>>::default();
    let request = async move || {
        let kept = idle.lock().pop();
        let mut client = match kept {
            Some(client) => client,
            None => Client::connect(addr).await.unwrap(),
        };
        client.patience = LONG;
        let response = client.request(&echo(body.clone())).await.unwrap();
        assert_eq!(response.status(), 200, "{}", response.text());
        assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
        idle.lock().push(client);
    };
    let (mut requests, mut pace) = (JoinSet::new(), interval(Duration::from_micros(2500)));
    // A busy machine gets fewer requests a second.
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut begin = async |count| {
        for _ in 0..count {
            pace.tick().await;
            let request = request.clone();
            requests.spawn(async move { request().await });
        }
    };
    begin(BEFORE).await;
    epp.go_away();
    epp.stop();
    let failed_open = || agent.count("penstock_epp_exchange_seconds_count", &[r#"outcome="fail_open""#]);
    let restart = async {
        sleep(Duration::from_millis(1500)).await;
        // On a busy machine a request may take longer to notice.
        eventually(SOON, || failed_open() > 0 || waiting(&agent) > 0).await;
        epp.restart().await.unwrap();
    };
    tokio::join!(restart, begin(REQUESTS - BEFORE));
    requests.join_all().await;
    assert_eq!(one.requests() + two.requests(), REQUESTS as u64);
    let (asked, begun) = (epp.streams_started(), Instant::now());
    while epp.streams_started() == asked {
        request().await;
        assert!(begun.elapsed() < SOON, "the EPP is not asked again");
    }
    let failed_open = failed_open();
    let outcomes = ["served", "in_vain", "full", "left"].map(|outcome| waited(&agent, outcome));
    match mode {
        FailureMode::Closed => assert!(outcomes[0] > 0 && outcomes[1..] == [0, 0, 0], "{outcomes:?}"),
        FailureMode::Open => assert!(failed_open > 0 && outcomes == [0; 4], "{failed_open}, {outcomes:?}"),
    }
    assert_eq!(waiting(&agent), 0);
}

#[tokio::test]
async fn restart_of_the_only_replica_loses_no_request_of_a_closed_pool() {
    lose_nothing(FailureMode::Closed).await;
}

#[tokio::test]
async fn restart_of_the_only_replica_loses_no_request_of_an_open_pool() {
    lose_nothing(FailureMode::Open).await;
}

/// A pool that fails open waits if it is told to, and then fails open.
#[tokio::test]
async fn wait_without_a_replica_ends_in_the_failure_mode() {
    for (mode, expected) in [(FailureMode::Closed, 503), (FailureMode::Open, 200)] {
        let (stage, _away) = away(|config| {
            config.pools[0].failure_mode = mode;
            epp(config).unreachable_wait = Some(Some(Duration::from_millis(300)));
        })
        .await;
        let begin = Instant::now();
        assert_eq!(status(&stage.agent, echo(json("m", 1000))).await, expected, "{mode:?}");
        assert!(begin.elapsed() >= Duration::from_millis(300), "{mode:?}: {:?}", begin.elapsed());
        assert_eq!((waited(&stage.agent, "in_vain"), waiting(&stage.agent)), (1, 0), "{mode:?}");
    }
}

#[tokio::test]
async fn decision_timeout_ends_a_wait() {
    let (stage, _away) = away(|config| epp(config).decision_timeout = Some(Duration::from_millis(200))).await;
    assert_eq!(status(&stage.agent, echo(json("m", 1000))).await, 503);
    assert_eq!(waited(&stage.agent, "in_vain"), 1);
}

#[tokio::test]
async fn waiting_requests_are_bounded_in_number() {
    let (stage, away) = away(|config| epp(config).unreachable_wait_requests = 2).await;
    let all = async {
        let two = [echo(json("m", 1000)), echo(json("m", 1000))].map(|request| status(&stage.agent, request));
        join_all(two).await
    };
    let third = async {
        eventually(SOON, || waiting(&stage.agent) == 2).await;
        let refused = status(&stage.agent, echo(json("m", 1000))).await;
        let setup = Setup { address: away.addr, ..Setup::default() };
        drop(away);
        let back = ScriptedEpp::start_with(setup, Production::new(&[stage.one.addr])).await.unwrap();
        (refused, back)
    };
    let (two, (refused, _back)) = tokio::join!(all, third);
    assert_eq!((two, refused), (vec![200, 200], 503));
    assert_eq!(["served", "full", "in_vain"].map(|outcome| waited(&stage.agent, outcome)), [2, 1, 0]);
}

/// The bytes that arrive while a request waits count, too.
#[tokio::test]
async fn waiting_requests_are_bounded_in_bytes() {
    let (mut stage, _away) = away(|config| epp(config).unreachable_wait_bytes = 10_000).await;
    let wire = echo(json("m", 20_000)).wire("agent");
    let (first, rest) = wire.split_at(wire.len() / 4);
    stage.client.send_raw(first).await.unwrap();
    eventually(SOON, || waiting(&stage.agent) == 1).await;
    stage.client.send_raw(rest).await.unwrap();
    assert_eq!(stage.client.response().await.unwrap().status(), 503);
    assert_eq!((waited(&stage.agent, "full"), waiting(&stage.agent)), (1, 0));
}

#[tokio::test]
async fn client_that_leaves_while_waiting_is_noticed() {
    let (stage, _away) = away(|_| {}).await;
    let Stage { mut client, agent, .. } = stage;
    client.send(&echo(json("m", 1000))).await.unwrap();
    eventually(SOON, || waiting(&agent) == 1).await;
    drop(client);
    eventually(SOON, || waiting(&agent) == 0).await;
    assert_eq!(waited(&agent, "left"), 1);
}

/// The number of connections depends on the time that the replica is away and not on the number of requests.
#[tokio::test]
async fn unreachable_replica_is_connected_by_one_task() {
    let stage = Stage::with(
        |all| Faulty::new(Production::new(all), Fault::ResetAtAccept),
        |config| {
            epp(config).unreachable_wait = Some(Some(Duration::from_millis(500)));
        },
    )
    .await;
    let begin = Instant::now();
    for _ in 0..2 {
        let all = (0..100).map(|_| status(&stage.agent, Request::get("/test/echo")));
        assert_eq!(join_all(all).await, [503; 100]);
    }
    // Two workers, each of which tries twice, and the first short pauses of the task.
    let most = 10 + 5 * begin.elapsed().as_secs_f64().ceil() as u64;
    assert!(stage.epp.connections_accepted() <= most, "{} > {most}", stage.epp.connections_accepted());
    assert_eq!(waited(&stage.agent, "in_vain"), 200);
}

/// A replica that accepts connections and says nothing is not reachable.
#[tokio::test]
async fn replica_that_completes_no_handshake_is_waited_for() {
    let stage = Stage::with(
        |all| Faulty::new(Production::new(all), Fault::Deaf).times(3),
        |config| {
            waits(config);
            config.listen.workers = 1;
            epp(config).connect_timeout = Duration::from_millis(200);
        },
    )
    .await;
    assert_eq!(status(&stage.agent, echo(json("m", 1000))).await, 200);
    assert_eq!((waited(&stage.agent, "served"), stage.epp.streams_started()), (1, 1));
}

/// The other replica serves meanwhile, and requests return to the first one once it is back.
#[tokio::test]
async fn replica_that_refuses_delays_no_request() {
    let refusing = Refusing::new().unwrap();
    let address = refusing.addr;
    let stage = Stage::with(Production::new, |config| {
        waits(config);
        let other = epp(config).addresses[0].clone();
        epp(config).addresses = vec![address.to_string(), other];
    })
    .await;
    for _ in 0..10 {
        assert_eq!(status(&stage.agent, echo(json("m", 1000))).await, 200);
    }
    assert_eq!(waited(&stage.agent, "served"), 0);
    drop(refusing);
    let setup = Setup { address, ..Setup::default() };
    let first = ScriptedEpp::start_with(setup, Production::new(&[stage.one.addr])).await.unwrap();
    let begin = Instant::now();
    while first.streams_started() == 0 {
        assert_eq!(status(&stage.agent, echo(json("m", 1000))).await, 200);
        assert!(begin.elapsed() < SOON, "the first replica is not asked again");
    }
    assert_eq!(stage.agent.count("penstock_epp_failures_total", &[]), 0);
}

/// A request may be what makes the EPP fail, so waiting does not ask more often about one whose stream was lost.
#[tokio::test]
async fn request_that_breaks_connections_is_asked_twice() {
    let fault = Fault::At(Moment::RequestHeaders, Harm::ResetConnection);
    let stage = Stage::with(|all| Faulty::new(Production::new(all), fault), waits).await;
    assert_eq!(status(&stage.agent, echo(json("m", 1000))).await, 503);
    assert_eq!(stage.epp.streams_started(), 2);
}

/// An EPP that drains, or a proxy in front of one, says that it is unavailable. The pool waits for that, too.
#[tokio::test]
async fn unavailable_replica_is_asked_again_until_it_serves() {
    let fault = Fault::At(Moment::RequestHeaders, Harm::Status(tonic::Code::Unavailable));
    let stage = Stage::with(|all| Faulty::new(Production::new(all), fault).times(3), waits).await;
    let body = json("m", 100_000);
    let mut client = Client::connect(stage.agent.addr).await.unwrap();
    client.patience = LONG;
    let seen = client.request(&echo(body.clone())).await.unwrap().echoed();
    assert_eq!(seen.body_hash, Fnv::of(&body).value());
    assert_eq!((waited(&stage.agent, "served"), waiting(&stage.agent), stage.epp.streams_started()), (1, 0, 4));
}

/// A proxy in front of an EPP that is away answers with a page of its own: a 503 other than gRPC's.
#[tokio::test]
async fn error_page_of_a_proxy_is_waited_for_by_its_status() {
    for (status, is_waited_for) in [("502", true), ("503", true), ("429", true), ("404", false), ("200", false)] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let Ok(mut frames) = Http2Frames::accept(tcp).await else { continue };
                tokio::spawn(async move {
                    while let Ok(Some(head)) = frames.find(|frame| frame.kind == kind::HEADERS).await {
                        let page = [(":status", status), ("content-type", "text/html")];
                        let _ = frames.send(&Frame::headers(head.stream, false, &page)).await;
                        let _ = frames.send(&Frame::new(kind::DATA, END_STREAM, head.stream, *b"<html></html>")).await;
                    }
                });
            }
        });
        let limit = Duration::from_millis(500);
        let stage = Stage::with(Production::new, |config| {
            epp(config).addresses = vec![address.to_string()];
            epp(config).unreachable_wait = Some(Some(limit));
        })
        .await;
        let begin = Instant::now();
        assert_eq!(self::status(&stage.agent, echo(json("m", 1000))).await, 503, "{status}");
        assert_eq!(begin.elapsed() >= limit, is_waited_for, "{status}");
        assert_eq!(waited(&stage.agent, "in_vain"), u64::from(is_waited_for), "{status}");
    }
}

/// It is asked in pauses, and no longer than the configured time.
#[tokio::test]
async fn wait_for_an_unavailable_replica_ends() {
    let fault = Fault::At(Moment::RequestHeaders, Harm::Status(tonic::Code::Unavailable));
    let limit = Duration::from_millis(500);
    for (mode, expected) in [(FailureMode::Closed, 503), (FailureMode::Open, 200)] {
        let stage = Stage::with(
            |all| Faulty::new(Production::new(all), fault),
            |config| {
                config.pools[0].failure_mode = mode;
                epp(config).unreachable_wait = Some(Some(limit));
            },
        )
        .await;
        let begin = Instant::now();
        assert_eq!(status(&stage.agent, echo(json("m", 1000))).await, expected, "{mode:?}");
        assert!(begin.elapsed() >= limit, "{mode:?}: {:?}", begin.elapsed());
        assert!((2..=5).contains(&stage.epp.streams_started()), "{}", stage.epp.streams_started());
        assert_eq!((waited(&stage.agent, "in_vain"), waiting(&stage.agent)), (1, 0), "{mode:?}");
    }
}

/// The EPP comes back under another address, which DNS gives while requests wait.
#[tokio::test]
async fn requests_wait_for_a_replica_at_a_new_address() {
    const NAME: &str = "epp.test";
    let (endpoint, dns) = (endpoint().await, DnsServer::start().await.unwrap());
    let (before, after): (IpAddr, IpAddr) = ("127.77.1.1".parse().unwrap(), "127.77.1.2".parse().unwrap());
    let start = async |address| {
        let setup = Setup { address, ..Setup::default() };
        ScriptedEpp::start_with(setup, Production::new(&[endpoint.addr])).await.unwrap()
    };
    let mut old = start((before, 0).into()).await;
    let port = old.addr.port();
    dns.set(NAME, &[before], Duration::from_secs(3600));
    let agent =
        TestAgent::start(epp_pool(&[endpoint.addr], old.addr, FailureMode::Closed), SteeringMode::Off, |config| {
            config.dns.servers = vec![dns.addr];
            config.dns.min_ttl = Duration::from_millis(20);
            epp(config).addresses = vec![format!("{NAME}:{port}")];
            waits(config);
        });
    assert_eq!(status(&agent, echo(json("m", 1000))).await, 200);
    old.stop();
    let requests = join_all((0..20).map(|_| status(&agent, echo(json("m", 1000)))));
    let moved = async {
        eventually(SOON, || waiting(&agent) == 20).await;
        let new = start((after, port).into()).await;
        dns.set(NAME, &[after], Duration::from_secs(3600));
        new
    };
    let (answers, new) = tokio::join!(requests, moved);
    assert_eq!(answers, [200; 20]);
    assert_eq!(new.streams_started(), 20);
    assert_eq!((waited(&agent, "served"), waiting(&agent)), (20, 0));
}

/// A server whose refusal is its answer is reachable: nothing waits.
#[tokio::test]
async fn failure_of_a_reachable_replica_is_not_waited_for() {
    for harm in [Harm::Status(tonic::Code::Internal), Harm::Close] {
        let fault = Fault::At(Moment::RequestHeaders, harm);
        let stage = Stage::with(|all| Faulty::new(Production::new(all), fault), waits).await;
        assert_eq!(status(&stage.agent, echo(json("m", 1000))).await, 503, "{harm:?}");
        assert_eq!(stage.agent.count("penstock_epp_waits_total", &[]), 0, "{harm:?}");
    }
}
