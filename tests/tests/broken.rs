//! Broken connections: on every path, both sides and the picker see a break at once, and a failure of an uninvolved party
//! breaks nothing.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_agent::config::{FailureMode, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader, ScriptedEpp,
    agent::{TestAgent, builtin_pool, epp_pool},
    client::Pace,
    eventually,
    model_server::{After, Fault, FaultKind, Framing, HeadWrites, Lengths, Options, Pauses},
    reader::at_least,
    scripted_epp::{EvictAfter, Evicting, Production, StreamEnd},
};
use tokio::sync::Notify;

const SOON: Duration = Duration::from_secs(10);
/// A break reaches the other side within this time.
const AT_ONCE: Duration = Duration::from_secs(1);
const MODES: [SteeringMode; 4] = [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto];
const FRAMINGS: [Framing; 3] = [Framing::ContentLength, Framing::Chunked, Framing::UntilClose];

async fn server() -> ModelServer {
    ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap()
}

fn steered(agent: &TestAgent) -> u64 {
    agent.steered()
}

/// A body that arrives in small pieces after its head.
fn trickle(framing: Framing, size: u64) -> Plan {
    Plan {
        framing,
        size,
        stream_id: 7,
        writes: Lengths::Fixed(1000),
        pauses: Some(Pauses { seed: 7, every: 1, up_to_us: 500 }),
        ..Plan::default()
    }
}

/// Like [`trickle`], followed by a stall.
fn stalling(framing: Framing, after: u64) -> Plan {
    Plan { fault: Some(Fault { after, kind: FaultKind::Stall }), ..trickle(framing, 1 << 30) }
}

/// How the response to `plan` ends. Compares every byte before the end. A head lost to a reset counts as a reset.
async fn end(agent: &TestAgent, plan: &Plan) -> (BodyEnd, u64) {
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    match client.head().await {
        Ok(head) => assert_eq!(head.status, 200, "{plan:?}"),
        Err(error) => {
            assert!(error.to_string().contains("Reset"), "{error:#}: {plan:?}");
            return (BodyEnd::Reset, 0);
        }
    }
    let read = Reader::Fast.take(&mut client, &mut plan.checker()).await;
    let read = read.unwrap_or_else(|error| panic!("{error:#}: {plan:?}"));
    (read.end, read.len)
}

#[tokio::test]
async fn endpoint_break_reaches_client() {
    for mode in MODES {
        let server = server().await;
        let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |_| {});
        for framing in FRAMINGS {
            for kind in [FaultKind::Reset, FaultKind::Close] {
                // With the head, right after it, and in the middle.
                for after in [0, 10, 60_000] {
                    let with_body = after == 10;
                    let fault = Some(Fault { after, kind });
                    let head = HeadWrites { with_body, pause_us: 3000, ..HeadWrites::default() };
                    let plan = Plan { fault, head, ..trickle(framing, 100_000) };
                    let (end, len) = end(&agent, &plan).await;
                    let what = format!("{mode:?} {framing:?} {kind:?} after {after}: {end:?} after {len}");
                    match (framing, kind) {
                        // Without a length, this end is indistinguishable from the correct one.
                        (Framing::UntilClose, FaultKind::Close) => {
                            assert_eq!((end, len), (BodyEnd::Complete, after), "{what}");
                        }
                        (Framing::UntilClose, _) => assert_eq!(end, BodyEnd::Reset, "{what}"),
                        _ => assert_ne!(end, BodyEnd::Complete, "{what}"),
                    }
                    assert!(len <= after, "{what}");
                }
            }
        }
        eventually(SOON, || server.connections_open() == 0).await;
        assert_eq!(steered(&agent) > 0, mode != SteeringMode::Off);
    }
}

/// Only a reset tells that such a body is incomplete, and it would drop what the agent has queued for a slow client.
#[tokio::test]
async fn bytes_before_a_break_reach_slow_client_of_a_body_until_close() {
    const SENT: u64 = 60_000;
    for mode in MODES {
        let server = server().await;
        let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |_| {});
        let fault = Some(Fault { after: SENT, kind: FaultKind::ResetWhenTold });
        let plan = Plan { fault, ..trickle(Framing::UntilClose, 100_000) };
        let mut client = Client::connect_with(agent.addr, Some(2048)).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        // The client reads nothing, so that most of it is queued.
        eventually(SOON, || server.written() >= SENT).await;
        let aborted = server.aborted();
        server.resume();
        eventually(SOON, || server.connections_open() == 0).await;
        assert_eq!(client.head().await.unwrap().status, 200, "{mode:?}");
        let read = Reader::Fast.take(&mut client, &mut plan.checker()).await.unwrap();
        assert_eq!((read.end, read.len), (BodyEnd::Reset, SENT), "{mode:?}");
        assert_eq!(server.aborted(), aborted, "{mode:?}");
    }
}

/// It is reset when it has acknowledged nothing for its time limit.
#[tokio::test]
async fn client_that_reads_nothing_after_a_break_is_reset_after_the_idle_time() {
    for mode in MODES {
        let server = server().await;
        let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |config| {
            config.timeouts.idle = Some(Duration::from_secs(1));
        });
        let fault = Some(Fault { after: 60_000, kind: FaultKind::ResetWhenTold });
        let mut client = Client::connect_with(agent.addr, Some(2048)).await.unwrap();
        client.send(&Plan { fault, ..trickle(Framing::UntilClose, 100_000) }.request()).await.unwrap();
        eventually(SOON, || server.written() >= 60_000).await;
        server.resume();
        let open = || agent.metric("penstock_client_connections", &[]);
        eventually(SOON, || open() == 0.0).await;
        client.head().await.unwrap();
        let end = client.read_body(Pace::Fast, |_| Ok(())).await.unwrap().end;
        assert_eq!(end, BodyEnd::Reset, "{mode:?}");
    }
}

#[tokio::test]
async fn wrong_lengths_break_response() {
    for mode in MODES {
        let server = server().await;
        let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |config| config.listen.workers = 1);
        for size in [100, 100_000] {
            let more = Plan { length_error: 10, after: After::SilentClose, ..trickle(Framing::ContentLength, size) };
            let (found, len) = end(&agent, &more).await;
            assert_eq!((found == BodyEnd::Complete, len), (false, size), "{mode:?}");
        }
        for size in [100, 100_000] {
            let accepted = server.connections_accepted();
            // The surplus arrives with the last byte that counts.
            let less = Plan { length_error: -10, ..trickle(Framing::ContentLength, size) };
            let mut client = Client::connect(agent.addr).await.unwrap();
            for _ in 0..2 {
                client.send(&less.request()).await.unwrap();
                let head = client.head().await.unwrap();
                assert_eq!(head.header("x-request-count"), Some("1"), "{mode:?}");
                let read = Reader::Fast.take(&mut client, &mut less.checker()).await.unwrap();
                assert_eq!((read.end, read.len), (BodyEnd::Complete, size - 10), "{mode:?}");
            }
            assert_eq!(server.connections_accepted(), accepted + 2, "{mode:?}");
        }
    }
}

/// How a client ends a response early.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Leaves {
    Closes,
    Resets,
    /// It shuts down its sending side and keeps reading, which looks like a close.
    HalfCloses,
}

/// While the endpoint has more to send, while it pauses, and while the client does not read.
#[tokio::test]
async fn client_disconnect_aborts_endpoint() {
    for (mode, framing) in MODES.into_iter().flat_map(|mode| FRAMINGS.map(|framing| (mode, framing))) {
        let server = server().await;
        let epp = ScriptedEpp::start(Production::new(&[server.addr])).await.unwrap();
        let pool = epp_pool(&[server.addr], epp.addr, FailureMode::Closed);
        let agent = TestAgent::start(pool, mode, |config| config.listen.workers = 1);
        let plans = [
            stalling(framing, 100_000),
            trickle(framing, 1 << 30),
            Plan { pauses: None, writes: Lengths::Fixed(64 << 10), ..trickle(framing, 1 << 30) },
        ];
        let ways = [Leaves::Closes, Leaves::Resets, Leaves::HalfCloses];
        let cases = plans.iter().flat_map(|plan| ways.map(|leaves| (plan, leaves)));
        for ((plan, leaves), count) in cases.zip(1..) {
            println!("{mode:?} {framing:?} {leaves:?} {:?} {:?}", plan.writes, plan.fault);
            let mut client = Client::connect(agent.addr).await.unwrap();
            client.send(&plan.request()).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            let mut checker = plan.checker();
            // Chunked payload is smaller than its wire size.
            assert_eq!(at_least(&mut client, &mut checker, 90_000).await.unwrap(), None);
            match leaves {
                Leaves::Closes => drop(client),
                Leaves::Resets => client.reset().unwrap(),
                Leaves::HalfCloses => {
                    client.finish().await.unwrap();
                    let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
                    match framing {
                        Framing::UntilClose => assert_eq!(read.end, BodyEnd::Reset),
                        _ => assert_ne!(read.end, BodyEnd::Complete),
                    }
                }
            }
            eventually(AT_ONCE, || (server.aborted(), server.connections_open()) == (count, 0)).await;
            // tonic may report a cancellation to its server as an orderly close; the agent's own tests check this precisely.
            let ended = |end| epp.streams_ended(end) as u64;
            eventually(AT_ONCE, || ended(StreamEnd::Cancelled) + ended(StreamEnd::HalfClosed) == count).await;
            eventually(AT_ONCE, || agent.count("penstock_client_aborts_total", &[]) == count).await;
        }
        // A busy machine may relay one of them.
        assert_eq!(steered(&agent) > 0, mode != SteeringMode::Off);
    }
}

#[tokio::test]
async fn silent_endpoint_breaks_response_after_idle_timeout() {
    for mode in MODES {
        for framing in FRAMINGS {
            let server = server().await;
            let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |config| {
                config.timeouts.idle = Some(Duration::from_millis(300));
            });
            let (end, len) = end(&agent, &stalling(framing, 50_000)).await;
            let expected = if framing == Framing::UntilClose { BodyEnd::Reset } else { BodyEnd::Truncated };
            assert_eq!(end, expected, "{mode:?} {framing:?} after {len}");
            if framing == Framing::ContentLength {
                assert_eq!(len, 50_000, "the bytes before the break were not delivered");
            }
            eventually(AT_ONCE, || (server.aborted(), server.connections_open()) == (1, 0)).await;
            let reasons = ["reason=\"idle_timeout\""];
            eventually(AT_ONCE, || agent.count("penstock_requests_total", &reasons) == 1).await;
        }
    }
}

/// D10: on every path, even while bytes keep arriving.
#[tokio::test]
async fn response_over_total_timeout_is_broken_off() {
    for mode in MODES {
        for framing in FRAMINGS {
            let server = server().await;
            let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |config| {
                config.timeouts.request = Some(Duration::from_millis(300));
            });
            let begin = Instant::now();
            let (end, len) = end(&agent, &trickle(framing, 1 << 30)).await;
            let expected = if framing == Framing::UntilClose { BodyEnd::Reset } else { BodyEnd::Truncated };
            assert_eq!(end, expected, "{mode:?} {framing:?} after {len}");
            assert!(begin.elapsed() >= Duration::from_millis(300) && begin.elapsed() < SOON, "{:?}", begin.elapsed());
            eventually(AT_ONCE, || (server.aborted(), server.connections_open()) == (1, 0)).await;
            let reasons = ["reason=\"request_timeout\"", "status=\"200\""];
            eventually(AT_ONCE, || agent.count("penstock_requests_total", &reasons) == 1).await;
            assert_eq!(steered(&agent) > 0, mode != SteeringMode::Off);
        }
    }
}

/// E6: in the middle of a response, for every framing and path.
#[tokio::test]
async fn eviction_breaks_off_response() {
    for mode in MODES {
        let mut in_all = 0;
        for framing in FRAMINGS {
            for plan in [stalling(framing, 100_000), trickle(framing, 1 << 30)] {
                let server = server().await;
                let evict = Arc::new(Notify::new());
                let inner = Production::new(&[server.addr]);
                let script = Evicting { inner, after: EvictAfter::ResponseHead, now: Arc::clone(&evict) };
                let epp = ScriptedEpp::start(script).await.unwrap();
                let pool = epp_pool(&[server.addr], epp.addr, FailureMode::Closed);
                let agent = TestAgent::start(pool, mode, |_| {});
                let mut client = Client::connect(agent.addr).await.unwrap();
                client.send(&plan.request()).await.unwrap();
                assert_eq!(client.head().await.unwrap().status, 200);
                let mut checker = plan.checker();
                assert_eq!(at_least(&mut client, &mut checker, 90_000).await.unwrap(), None);
                evict.notify_one();
                let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
                match framing {
                    Framing::UntilClose => assert_eq!(read.end, BodyEnd::Reset, "{mode:?}"),
                    _ => assert_ne!(read.end, BodyEnd::Complete, "{mode:?} {framing:?}"),
                }
                eventually(AT_ONCE, || (server.aborted(), server.connections_open()) == (1, 0)).await;
                eventually(AT_ONCE, || agent.count("penstock_evictions_total", &[]) == 1).await;
                in_all += steered(&agent);
            }
        }
        assert_eq!(in_all > 0, mode != SteeringMode::Off);
    }
}

#[tokio::test]
async fn picker_death_cuts_no_response() {
    for mode in MODES {
        let server = server().await;
        let mut epp = ScriptedEpp::start(Production::new(&[server.addr])).await.unwrap();
        let pool = epp_pool(&[server.addr], epp.addr, FailureMode::Closed);
        let agent = TestAgent::start(pool, mode, |_| {});
        for framing in FRAMINGS {
            // Larger than all buffers in between, so that the response is incomplete when the picker dies.
            let pause = Some(Fault { after: 100_000, kind: FaultKind::StallMs(300) });
            let plan = Plan { fault: pause, pauses: None, ..trickle(framing, 32 << 20) };
            let mut client = Client::connect_with(agent.addr, Some(64 << 10)).await.unwrap();
            client.send(&plan.request()).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            let mut checker = plan.checker();
            assert_eq!(at_least(&mut client, &mut checker, 90_000).await.unwrap(), None);
            epp.stop();
            let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
            assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "{mode:?} {framing:?}");
            epp.restart().await.unwrap();
            let workers = agent.config().listen.workers as u64;
            eventually(SOON, || epp.connections_open() == workers).await;
        }
        eventually(SOON, || agent.count("penstock_requests_total", &["reason=\"ok\""]) == 3).await;
        assert_eq!(steered(&agent) > 0, mode != SteeringMode::Off);
    }
}
