//! When the picker fails: a pool that fails open answers from its own endpoints with the body intact, one that fails closed
//! says 503 and sends nothing anywhere; whatever the fault, its moment, and the body.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use penstock_agent::config::{FailureMode, Picker};
use penstock_tests::{
    Refusing, Request, Stage,
    content::Fnv,
    scripted_epp::{Fault, Faulty, Harm, Moment, Production},
    stage::{echo, epp, json},
};
use tonic::Code;

/// Long enough for a picker that answers, on a busy machine too.
const DECISION: Duration = Duration::from_secs(2);

/// What the request brings, in bytes of prompt.
const BODIES: [Option<usize>; 3] = [None, Some(1 << 10), Some(1 << 20)];

/// What the pool is to do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expected {
    /// Fail, as its mode says.
    Fail,
    /// Follow the pick, which had come before the fault.
    Follow,
    /// Either: whether the pick gets out before the connection is cut is chance.
    Either,
}

/// One request with that body through a pool of that mode; the picker fails every time.
async fn check(fault: Option<Fault>, mode: FailureMode, prompt: Option<usize>, expected: Expected) {
    let refusing = Refusing::new().unwrap();
    let mut stage = Stage::with(
        |all| Faulty::new(Production::new(all), fault.unwrap_or(Fault::Deaf)),
        |config| {
            config.listen.workers = 1;
            config.pools[0].failure_mode = mode;
            epp(config).decision_timeout = DECISION;
            if fault.is_none() {
                epp(config).address = refusing.addr.to_string();
            }
        },
    )
    .await;
    let body = prompt.map(|len| json("m", len)).unwrap_or_default();
    let request = if prompt.is_some() { echo(body.clone()) } else { Request::get("/test/echo") };
    let response = stage.request(&request).await;
    let case = format!("{fault:?}, {mode:?}, {prompt:?}: {} {}", response.status(), response.error_code());
    let opens = mode == FailureMode::Open || expected == Expected::Follow;
    if opens || (expected == Expected::Either && response.status() == 200) {
        let seen = response.echoed();
        assert!([stage.one.addr, stage.two.addr].contains(&response.served_by().unwrap()), "{case}");
        assert_eq!((seen.body_length, seen.body_hash != 0), (body.len() as u64, true), "{case}");
        assert!(prompt.is_none() || seen.body_hash == Fnv::of(&body).value(), "{case}");
    } else {
        assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"), "{case}");
        assert_eq!(stage.requests(), (0, 0), "{case}");
    }
    let outcome = if mode == FailureMode::Open { r#"outcome="fail_open""# } else { r#"outcome="fail_closed""# };
    let failures = stage.agent.metric("penstock_epp_exchange_seconds_count", &[outcome]);
    match expected {
        Expected::Fail => assert_eq!(failures, 1.0, "{case}"),
        Expected::Follow => assert_eq!(failures, 0.0, "{case}"),
        Expected::Either => {}
    }
    // Without an unread body the connection is as good as before.
    assert!(response.header("connection").is_none() || (response.status() == 503 && prompt.is_some()), "{case}");
}

async fn matrix(fault: impl Fn(usize) -> Option<Fault>, expected: impl Fn(Option<usize>) -> Option<Expected>) {
    let modes = [FailureMode::Open, FailureMode::Closed];
    let cases = modes.into_iter().flat_map(|mode| BODIES.map(|body| (mode, body)));
    let checks = cases.filter_map(|(mode, body)| {
        let expected = expected(body)?;
        Some(check(fault(body.unwrap_or_default()), mode, body, expected))
    });
    join_all(checks).await;
}

fn always(_: Option<usize>) -> Option<Expected> {
    Some(Expected::Fail)
}

#[tokio::test]
async fn it_refuses_connections() {
    matrix(|_| None, always).await;
}

#[tokio::test]
async fn it_resets_connections_at_once() {
    matrix(|_| Some(Fault::ResetAtAccept), always).await;
}

#[tokio::test]
async fn it_accepts_connections_and_no_more() {
    matrix(|_| Some(Fault::Deaf), always).await;
}

async fn at_head(harm: Harm) {
    matrix(|_| Some(Fault::At(Moment::RequestHeaders, harm)), always).await;
}

async fn at_half_of_body(harm: Harm) {
    let expected = |body: Option<usize>| body.map(|_| Expected::Fail);
    matrix(|body| Some(Fault::At(Moment::RequestBody(body / 2), harm)), expected).await;
}

/// The reply to the head is the whole pick where there is no body. With one, the rest of the answer is missing: that is
/// the client's body where the picker is merely silent about it, and a failure where the stream is lost.
async fn after_head_reply(harm: Harm, loses_stream: bool) {
    let expected = |body: Option<usize>| match (loses_stream, body) {
        (false, _) => Some(Expected::Follow),
        (true, None) => Some(Expected::Either),
        (true, Some(_)) => Some(Expected::Fail),
    };
    matrix(|_| Some(Fault::At(Moment::HeaderReply, harm)), expected).await;
}

#[tokio::test]
async fn it_is_silent() {
    tokio::join!(at_head(Harm::Silence), at_half_of_body(Harm::Silence), after_head_reply(Harm::Silence, false));
}

#[tokio::test]
async fn it_resets_the_connection() {
    let harm = Harm::ResetConnection;
    tokio::join!(at_head(harm), at_half_of_body(harm), after_head_reply(harm, true));
}

#[tokio::test]
async fn it_dies() {
    tokio::join!(at_head(Harm::Die), at_half_of_body(Harm::Die), after_head_reply(Harm::Die, true));
}

#[tokio::test]
async fn it_answers_a_grpc_error() {
    let harm = Harm::Status(Code::Unavailable);
    tokio::join!(at_head(harm), at_half_of_body(harm), after_head_reply(harm, true));
}

#[tokio::test]
async fn it_closes_the_stream_without_a_pick() {
    tokio::join!(at_head(Harm::Close), at_half_of_body(Harm::Close), after_head_reply(Harm::Close, false));
}

#[tokio::test]
async fn the_decision_has_a_deadline() {
    let mut stage = Stage::with(
        |all| Faulty::new(Production::new(all), Fault::At(Moment::RequestHeaders, Harm::Silence)),
        |config| epp(config).decision_timeout = Duration::from_millis(200),
    )
    .await;
    let begin = Instant::now();
    assert_eq!(stage.request(&echo(json("m", 10))).await.error_code(), "picker_failed");
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(200) && took < Duration::from_secs(5), "{took:?}");
    assert_eq!(stage.agent.metric("penstock_epp_failures_total", &[r#"reason="deadline""#]), 1.0);
}

#[tokio::test]
async fn a_picker_that_thinks_for_less_than_the_deadline_is_waited_for() {
    let thinks = Fault::At(Moment::RequestHeaders, Harm::Delay(Duration::from_millis(300)));
    let mut stage = Stage::new(|all| Faulty::new(Production::new(all), thinks)).await;
    assert_eq!(stage.request(&echo(json("m", 10))).await.status(), 200);
}

#[tokio::test]
async fn the_default_upstream_is_where_it_opens_to() {
    let refusing = Refusing::new().unwrap();
    let upstream = penstock_tests::ModelServer::start(Default::default()).await.unwrap();
    let mut stage = Stage::with(Production::new, |config| {
        let pool = &mut config.pools[0];
        (pool.failure_mode, pool.default_upstream) = (FailureMode::Open, Some(upstream.addr));
        let Picker::Epp(epp) = &mut pool.picker else { unreachable!("the pool has an EPP") };
        epp.address = refusing.addr.to_string();
    })
    .await;
    let body = json("m", 1 << 20);
    let response = stage.request(&echo(body.clone())).await;
    assert_eq!(response.served_by(), Some(upstream.addr));
    assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
    assert_eq!(stage.requests(), (0, 0));
}

/// With failure mode closed, so that only a second question can save the request.
async fn asked_again_after(fault: Fault, connections: u64) {
    let mut stage = Stage::new(|all| Faulty::new(Production::new(all), fault).times(1)).await;
    let body = json("m", 1 << 20);
    for _ in 0..2 {
        let seen = stage.request(&echo(body.clone())).await.echoed();
        assert_eq!(seen.body_hash, Fnv::of(&body).value(), "{fault:?}");
    }
    assert_eq!(stage.epp.connections_accepted(), connections, "{fault:?}");
    assert_eq!(stage.agent.metric("penstock_epp_failures_total", &[]), 0.0, "{fault:?}");
}

#[tokio::test]
async fn a_lost_connection_is_replaced_and_the_request_asked_again() {
    asked_again_after(Fault::ResetAtAccept, 2).await;
    asked_again_after(Fault::At(Moment::RequestHeaders, Harm::ResetConnection), 2).await;
    asked_again_after(Fault::At(Moment::RequestBody(1 << 19), Harm::ResetConnection), 2).await;
}

/// Those without a decision are asked again: one bad stream fails nobody else.
#[tokio::test]
async fn one_reset_fails_none_of_the_requests_on_the_connection() {
    let fault = Fault::At(Moment::RequestBody(1 << 10), Harm::ResetConnection);
    let stage =
        Stage::with(|all| Faulty::new(Production::new(all), fault).times(1), |config| config.listen.workers = 1).await;
    let one = || async {
        let mut client = penstock_tests::Client::connect(stage.agent.addr).await.unwrap();
        client.request(&echo(json("m", 100_000))).await.unwrap().status()
    };
    assert_eq!(join_all((0..20).map(|_| one())).await, [200; 20]);
}

#[tokio::test]
async fn a_pick_outside_the_pool_is_a_failure() {
    for (mode, status, code) in [(FailureMode::Closed, 502, "endpoint_not_in_pool"), (FailureMode::Open, 200, "")] {
        let mut stage = Stage::with(
            |all| Production::new(&all[..1]),
            |config| {
                config.pools[0].failure_mode = mode;
                config.pools[0].endpoints.remove(0);
            },
        )
        .await;
        let response = stage.request(&echo(json("m", 1000))).await;
        assert_eq!((response.status(), response.error_code().as_str()), (status, code));
        assert_eq!(stage.requests(), (0, u64::from(status == 200)));
    }
}

#[tokio::test]
async fn passthrough_lets_a_pick_outside_the_pool_be_dialled() {
    let mut stage = Stage::with(
        |all| Production::new(&all[..1]),
        |config| {
            config.pools[0].passthrough = true;
            config.pools[0].endpoints.remove(0);
        },
    )
    .await;
    assert_eq!(stage.request(&echo(json("m", 1000))).await.served_by(), Some(stage.one.addr));
}
