//! Picker failures: a pool that fails open serves from its own endpoints with the body intact; one that fails closed returns 503
//! and sends nothing. Covers every fault, moment and body.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use penstock_agent::config::{Config, FailureMode, ServerTls};
use penstock_tests::{
    Refusing, Request, Stage,
    content::Fnv,
    eventually,
    scripted_epp::{Answering, Fault, Faulty, Harm, Moment, Production, reply},
    stage::{echo, epp, json},
};
use tokio::sync::Semaphore;
use tonic::Code;

use crate::SOON;

/// The decision deadline if the picker must miss it.
const DECISION: Duration = Duration::from_secs(2);
/// The decision deadline otherwise: an upper bound for a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// The request body.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Body {
    None,
    /// 1 KiB.
    Small,
    /// 20 MiB: larger than every window and buffer; the kept part spills to a file.
    Large,
    /// 2 MiB, of which the client sends the last eighth after the picker has failed. The part before exceeds the picker's window
    /// and the agent's queue, so that a stalled picker is detected.
    Paused,
}

const BODIES: [Body; 4] = [Body::None, Body::Small, Body::Large, Body::Paused];
const MODES: [FailureMode; 2] = [FailureMode::Open, FailureMode::Closed];

/// Limits how many large bodies run concurrently.
static LARGE: Semaphore = Semaphore::const_new(2);

impl Body {
    /// The bytes and their hash; each byte is a function of its offset.
    fn content(self) -> (Bytes, u64) {
        type Made = LazyLock<(Bytes, u64)>;
        fn generate(len: usize) -> (Bytes, u64) {
            let body = json("m", len);
            let hash = Fnv::of(&body).value();
            (body.into(), hash)
        }
        static SMALL: Made = LazyLock::new(|| generate(1 << 10));
        static LARGE: Made = LazyLock::new(|| generate(20 << 20));
        static PAUSED: Made = LazyLock::new(|| generate(2 << 20));
        match self {
            Self::None => (Bytes::new(), Fnv::of(b"").value()),
            Self::Small => SMALL.clone(),
            Self::Large => LARGE.clone(),
            Self::Paused => PAUSED.clone(),
        }
    }

    fn request(self) -> Request {
        if self == Self::None { Request::get("/test/echo") } else { echo(self.content().0) }
    }
}

/// The picker's fault.
#[derive(Clone, Copy, Debug, PartialEq)]
enum PickerFault {
    /// Nothing listens on its address.
    Absent,
    /// It does not speak TLS, although the pool requires it.
    Tls,
    Faulty(Fault),
}

/// The expected behaviour of the pool.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expected {
    /// The failure mode applies, with one of these reasons.
    Fail(&'static [&'static str]),
    /// The pool follows the pick that preceded the fault.
    Follow,
    /// Either: whether the pick is sent before the connection breaks is a race.
    Either,
}

/// A pool with this failure mode and picker fault. `refusing` is the address of the absent picker.
async fn stage(wrong: PickerFault, mode: FailureMode, expected: Expected, refusing: &Refusing) -> Stage {
    let fault = if let PickerFault::Faulty(fault) = wrong { Some(fault) } else { None };
    let never = Fault::At(Moment::ResponseBody, Harm::Close);
    Stage::with(
        |all| Faulty::new(Production::new(all), fault.unwrap_or(never)),
        |config| {
            config.listen.workers = 1;
            config.pools[0].failure_mode = mode;
            // A picker that is silent after its decision is waited for as long.
            let silent = matches!(wrong, PickerFault::Faulty(Fault::At(_, Harm::Silence)));
            let misses = matches!(expected, Expected::Fail(reasons) if reasons.contains(&"deadline"));
            epp(config).decision_timeout = Some(if misses || silent { DECISION } else { LONG });
            if wrong == PickerFault::Faulty(Fault::Deaf) {
                epp(config).connect_timeout = DECISION;
            }
            match wrong {
                PickerFault::Absent => epp(config).addresses = vec![refusing.addr.to_string()],
                PickerFault::Tls => epp(config).tls = ServerTls::Insecure,
                PickerFault::Faulty(_) => {}
            }
        },
    )
    .await
}

/// Sends this body through a pool with this failure mode and picker fault, then one more request.
async fn check(wrong: PickerFault, mode: FailureMode, body: Body, expected: Expected) {
    let _large = if body == Body::Large { Some(LARGE.acquire().await) } else { None };
    let refusing = Refusing::new().unwrap();
    let mut stage = stage(wrong, mode, expected, &refusing).await;
    stage.client.patience = LONG;
    let (bytes, hash) = body.content();
    let response = if body == Body::Paused {
        let wire = body.request().wire("agent");
        let (first, rest) = wire.split_at(wire.len() / 8 * 7);
        stage.client.send_raw(first).await.unwrap();
        eventually(SOON, || stage.agent.metric("penstock_epp_failures_total", &[]) > 0.0).await;
        if mode == FailureMode::Open {
            stage.client.send_raw(rest).await.unwrap();
        }
        stage.client.response().await.unwrap()
    } else {
        // A pool that fails closed responds at once and need not read the rest of a large body.
        let sent = stage.client.send_raw(&body.request().wire("agent")).await;
        assert!(sent.is_ok() || (mode == FailureMode::Closed && body == Body::Large), "{sent:?}");
        stage.client.response().await.unwrap()
    };
    let case = format!("{wrong:?}, {mode:?}, {body:?}: {} {}", response.status(), response.error_code());
    let opens = mode == FailureMode::Open || expected == Expected::Follow;
    if opens || (expected == Expected::Either && response.status() == 200) {
        let seen = response.echoed();
        assert!([stage.one.addr, stage.two.addr].contains(&response.served_by().unwrap()), "{case}");
        assert_eq!((seen.body_length, seen.body_hash), (bytes.len() as u64, hash), "{case}");
        assert_eq!(stage.requests().0 + stage.requests().1, 1, "{case}");
    } else {
        assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"), "{case}");
        // The agent's own count: a port may have belonged to another test's server, whose agent still dials it.
        assert_eq!(stage.agent.count("penstock_endpoint_connections_total", &[]), 0, "{case}");
    }
    let outcome = if mode == FailureMode::Open { r#"outcome="fail_open""# } else { r#"outcome="fail_closed""# };
    let failures = stage.agent.count("penstock_epp_exchange_seconds_count", &[outcome]);
    match expected {
        Expected::Fail(reasons) => {
            let reason =
                |reason: &&str| stage.agent.count("penstock_epp_failures_total", &[&format!("reason=\"{reason}\"")]);
            let counted: u64 = reasons.iter().map(reason).sum();
            assert_eq!((failures, counted), (1, 1), "{case}: {}", stage.agent.agent.metrics().encode());
        }
        Expected::Follow => assert_eq!(failures, 0, "{case}"),
        Expected::Either => {}
    }
    // With the body fully read, the connection stays usable.
    if response.header("connection").is_some() {
        assert!(response.status() == 503 && body != Body::None, "{case}");
        return;
    }
    let again = stage.request(&Request::get("/test/echo")).await;
    assert!(
        again.status() == 200 || (mode == FailureMode::Closed && again.status() == 503),
        "{case}, {}",
        again.status()
    );
}

async fn matrix(wrong: impl Fn(Body) -> PickerFault, expected: impl Fn(Body) -> Option<Expected>) {
    let cases = MODES.into_iter().flat_map(|mode| BODIES.map(|body| (mode, body)));
    let checks = cases.filter_map(|(mode, body)| Some(check(wrong(body), mode, body, expected(body)?)));
    join_all(checks).await;
}

async fn always(wrong: PickerFault, reasons: &'static [&'static str]) {
    matrix(|_| wrong, |_| Some(Expected::Fail(reasons))).await;
}

/// E11, E12: nothing listens at the picker's address.
#[tokio::test]
async fn refused_connection_follows_failure_mode() {
    always(PickerFault::Absent, &["connect"]).await;
}

/// E11, E12, E16: the picker does not speak TLS.
#[tokio::test]
async fn failed_tls_handshake_follows_failure_mode() {
    always(PickerFault::Tls, &["connect"]).await;
}

/// E11, E12.
#[tokio::test]
async fn immediate_reset_follows_failure_mode() {
    always(PickerFault::Faulty(Fault::ResetAtAccept), &["connect", "reset"]).await;
}

/// E11, E12, E13: a picker that accepts connections and says nothing is not connected.
#[tokio::test]
async fn accepted_but_silent_connection_follows_failure_mode() {
    always(PickerFault::Faulty(Fault::Deaf), &["connect"]).await;
}

async fn at_head(harm: Harm, reasons: &'static [&'static str]) {
    always(PickerFault::Faulty(Fault::At(Moment::RequestHeaders, harm)), reasons).await;
}

async fn at_half_of_body(harm: Harm, reasons: &'static [&'static str]) {
    let expected = |body| (body != Body::None).then_some(Expected::Fail(reasons));
    matrix(|body| PickerFault::Faulty(Fault::At(Moment::RequestBody(body.content().0.len() / 2), harm)), expected)
        .await;
}

/// Without a body, the reply to the head is the whole pick. With a body, the rest of the picker's answer is missing: if the picker
/// is merely silent about the body (no reasons), the client's body is used; if the stream is lost, it is a failure. The fault comes
/// after the whole body, so `Paused` does not apply.
async fn after_head_reply(harm: Harm, reasons: &'static [&'static str]) {
    let expected = |body| match (reasons, body) {
        (_, Body::Paused) => None,
        ([], _) => Some(Expected::Follow),
        (_, Body::None) => Some(Expected::Either),
        (reasons, _) => Some(Expected::Fail(reasons)),
    };
    matrix(|_| PickerFault::Faulty(Fault::At(Moment::HeaderReply, harm)), expected).await;
}

async fn at_any_moment(harm: Harm, reasons: &'static [&'static str]) {
    tokio::join!(at_head(harm, reasons), at_half_of_body(harm, reasons), after_head_reply(harm, reasons));
}

/// E11, E12, E13.
#[tokio::test]
async fn silent_picker_follows_failure_mode() {
    let harm = Harm::Silence;
    tokio::join!(at_head(harm, &["deadline"]), at_half_of_body(harm, &["deadline"]), after_head_reply(harm, &[]));
}

/// E11, E12.
#[tokio::test]
async fn connection_reset_follows_failure_mode() {
    at_any_moment(Harm::ResetConnection, &["reset", "connect"]).await;
}

/// E11, E12.
#[tokio::test]
async fn picker_death_follows_failure_mode() {
    at_any_moment(Harm::Die, &["reset", "connect"]).await;
}

/// E11, E12.
#[tokio::test]
async fn grpc_error_follows_failure_mode() {
    at_any_moment(Harm::Status(Code::Unavailable), &["unavailable"]).await;
}

/// E11, E12: as gRPC servers respond to oversized messages or overload.
#[tokio::test]
async fn picker_over_its_limits_follows_failure_mode() {
    at_any_moment(Harm::Status(Code::ResourceExhausted), &["resource_exhausted"]).await;
}

/// E11, E12, E19: an orderly close after the pick is not a failure.
#[tokio::test]
async fn stream_closed_without_pick_follows_failure_mode() {
    let reasons = &["closed_without_pick"];
    tokio::join!(
        at_head(Harm::Close, reasons),
        at_half_of_body(Harm::Close, reasons),
        after_head_reply(Harm::Close, &[])
    );
}

/// E11, E12: the replacement body exceeds the agent's body limit, in pieces or in one message.
#[tokio::test]
async fn oversized_replacement_body_follows_failure_mode() {
    const LIMIT: usize = 100_000;
    let limits = |config: &mut Config, mode| {
        config.limits.body_bytes = LIMIT as u64;
        config.pools[0].failure_mode = mode;
    };
    for mode in MODES {
        let pieces: Arc<[Bytes]> = [Bytes::from(vec![b'x'; LIMIT + 1])].into();
        let message: Arc<[Bytes]> = [Bytes::from(vec![b'x'; LIMIT + (2 << 20)])].into();
        for (answer, cut, reasons) in
            [(pieces, true, ["body_too_large"].as_slice()), (message, false, &["out_of_range", "resource_exhausted"])]
        {
            let script = |all: &[std::net::SocketAddr]| {
                let picked = all[0].to_string();
                Answering::new(move |_| {
                    let body = if cut {
                        reply::request_body(&answer[0]).collect()
                    } else {
                        vec![reply::request_body_in_one(&answer[0])]
                    };
                    [reply::pick(&picked, &[])].into_iter().chain(body).collect()
                })
            };
            let mut stage = Stage::with(script, |config| limits(config, mode)).await;
            let body = json("m", 1000);
            let response = stage.request(&echo(body.clone())).await;
            if mode == FailureMode::Open {
                assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
            } else {
                assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
                assert_eq!(stage.requests(), (0, 0));
            }
            let reason =
                |reason: &&str| stage.agent.count("penstock_epp_failures_total", &[&format!("reason=\"{reason}\"")]);
            assert_eq!(reasons.iter().map(reason).sum::<u64>(), 1, "{reasons:?}");
        }
    }
}
