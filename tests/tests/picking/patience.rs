//! Slow and silent pickers: the decision deadline, the second attempt on a new connection, and the destination of a pool that
//! fails open.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use penstock_agent::config::{FailureMode, Network, Passthrough, Picker};
use penstock_tests::{
    Deaf, Refusing, Stage,
    content::Fnv,
    eventually,
    scripted_epp::{Answering, Fault, Faulty, Harm, Moment, Production, StreamEnd, reply},
    stage::{echo, epp, json},
};

use crate::SOON;

/// E13: separate from the connect timeout.
#[tokio::test]
async fn decision_over_deadline_fails() {
    let mut stage = Stage::with(
        |all| Faulty::new(Production::new(all), Fault::At(Moment::RequestHeaders, Harm::Silence)),
        |config| epp(config).decision_timeout = Some(Duration::from_millis(200)),
    )
    .await;
    let begin = Instant::now();
    assert_eq!(stage.request(&echo(json("m", 10))).await.error_code(), "picker_failed");
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(200) && took < Duration::from_secs(5), "{took:?}");
    assert_eq!(stage.agent.metric("penstock_epp_failures_total", &[r#"reason="deadline""#]), 1.0);
}

/// E13.
#[tokio::test]
async fn decision_within_deadline_is_awaited() {
    let thinks = Fault::At(Moment::RequestHeaders, Harm::Delay(Duration::from_millis(300)));
    let mut stage = Stage::new(|all| Faulty::new(Production::new(all), thinks)).await;
    assert_eq!(stage.request(&echo(json("m", 10))).await.status(), 200);
}

/// E13: `off` waits as long as the decision takes and the client stays.
#[tokio::test]
async fn decision_without_deadline_is_awaited_until_client_leaves() {
    for (timeout, status) in [(Some(Duration::from_millis(100)), 503), (None, 200)] {
        let thinks = Fault::At(Moment::RequestHeaders, Harm::Delay(Duration::from_millis(500)));
        let mut stage = Stage::with(
            |all| Faulty::new(Production::new(all), thinks),
            |config| epp(config).decision_timeout = timeout,
        )
        .await;
        assert_eq!(stage.request(&echo(json("m", 10))).await.status(), status, "{timeout:?}");
    }
    // A picker that does not read stalls the upload too.
    let silent = Fault::At(Moment::RequestHeaders, Harm::Silence);
    let stage =
        Stage::with(|all| Faulty::new(Production::new(all), silent), |config| epp(config).decision_timeout = None)
            .await;
    for body in [json("m", 10), json("m", 4 << 20)] {
        let mut client = penstock_tests::Client::connect(stage.agent.addr).await.unwrap();
        let begun = stage.epp.streams_started();
        let wire = echo(body).wire("agent");
        // The whole larger body exceeds the buffers.
        tokio::select! {
            () = async { drop(client.send_raw(&wire).await) } => {}
            () = eventually(SOON, || stage.epp.streams_started() > begun) => {}
        }
        eventually(SOON, || stage.epp.streams_started() > begun).await;
        client.reset().unwrap();
        eventually(SOON, || stage.epp.streams_open() == 0).await;
    }
    eventually(SOON, || stage.agent.metric("penstock_active_requests", &[]) == 0.0).await;
}

/// D10: the request timeout applies while the picker decides, and does not trigger fail-open.
#[tokio::test]
async fn request_timeout_holds_during_decision() {
    let silent = Fault::At(Moment::RequestHeaders, Harm::Silence);
    let mut stage = Stage::with(
        |all| Faulty::new(Production::new(all), silent).times(1),
        |config| {
            config.timeouts.request = Some(Duration::from_millis(300));
            config.pools[0].failure_mode = FailureMode::Open;
            epp(config).decision_timeout = Some(Duration::from_secs(3600));
        },
    )
    .await;
    let begin = Instant::now();
    let response = stage.request(&echo(json("m", 10))).await;
    assert_eq!((response.status(), response.error_code().as_str()), (504, "request_timeout"));
    assert!(begin.elapsed() >= Duration::from_millis(300) && begin.elapsed() < SOON);
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
    assert_eq!(stage.requests(), (0, 0));
    // The next request of the connection has its own total timeout.
    assert_eq!(stage.request(&echo(json("m", 10))).await.status(), 200);
}

/// E10, D10: an endpoint that accepts no connection in time is skipped like one that refuses.
#[tokio::test]
async fn unreachable_first_choice_is_followed_by_second() {
    let deaf = Deaf::new().unwrap();
    let list = |all: &[std::net::SocketAddr]| {
        let named = format!("{},{}", deaf.addr, all[1]);
        Answering::new(move |_| vec![reply::pick(&named, &[])])
    };
    let mut stage = Stage::with(list, |config| {
        config.timeouts.connect = Some(Duration::from_millis(200));
        config.pools[0].endpoints.push(deaf.addr.into());
    })
    .await;
    assert_eq!(stage.request(&echo("{}")).await.served_by(), Some(stage.two.addr));
}

/// E11.
#[tokio::test]
async fn fail_open_uses_default_upstream() {
    let refusing = Refusing::new().unwrap();
    let upstream = penstock_tests::ModelServer::start(Default::default()).await.unwrap();
    let mut stage = Stage::with(Production::new, |config| {
        let pool = &mut config.pools[0];
        (pool.failure_mode, pool.default_upstream) = (FailureMode::Open, Some(upstream.addr));
        let Picker::Epp(epp) = &mut pool.picker else { unreachable!("the pool has no EPP") };
        epp.addresses = vec![refusing.addr.to_string()];
    })
    .await;
    let body = json("m", 1 << 20);
    let response = stage.request(&echo(body.clone())).await;
    assert_eq!(response.served_by(), Some(upstream.addr));
    assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
    assert_eq!(stage.requests(), (0, 0));
}

/// Fails closed, so that only a second attempt can save the request.
async fn asked_again_after(fault: Fault, connections: u64) {
    let script = |all: &[_]| Faulty::new(Production::new(all), fault).times(1);
    let mut stage = Stage::with(script, |config| config.listen.workers = 1).await;
    let body = json("m", 1 << 20);
    for _ in 0..2 {
        let seen = stage.request(&echo(body.clone())).await.echoed();
        assert_eq!(seen.body_hash, Fnv::of(&body).value(), "{fault:?}");
    }
    assert_eq!(stage.epp.connections_accepted(), connections, "{fault:?}");
    assert_eq!(stage.agent.metric("penstock_epp_failures_total", &[]), 0.0, "{fault:?}");
}

#[tokio::test]
async fn lost_picker_connection_is_replaced_and_pick_repeated() {
    asked_again_after(Fault::ResetAtAccept, 2).await;
    asked_again_after(Fault::At(Moment::RequestHeaders, Harm::ResetConnection), 2).await;
    asked_again_after(Fault::At(Moment::RequestBody(1 << 19), Harm::ResetConnection), 2).await;
}

/// Undecided requests are asked again: one bad stream fails no other request.
#[tokio::test]
async fn stream_reset_fails_no_other_request() {
    let fault = Fault::At(Moment::RequestBody(1 << 10), Harm::ResetConnection);
    let stage =
        Stage::with(|all| Faulty::new(Production::new(all), fault).times(1), |config| config.listen.workers = 1).await;
    let one = || async {
        let mut client = penstock_tests::Client::connect(stage.agent.addr).await.unwrap();
        client.request(&echo(json("m", 100_000))).await.unwrap().status()
    };
    assert_eq!(join_all((0..20).map(|_| one())).await, [200; 20]);
}

/// E11, E12.
#[tokio::test]
async fn pick_outside_pool_is_a_failure() {
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
async fn pick_outside_pool_with_passthrough_is_dialled() {
    let mut stage = Stage::with(
        |all| Production::new(&all[..1]),
        |config| {
            config.pools[0].passthrough = Passthrough::Networks(vec![Network::parse("127.0.0.0/8").unwrap()]);
            config.pools[0].endpoints.remove(0);
        },
    )
    .await;
    assert_eq!(stage.request(&echo(json("m", 1000))).await.served_by(), Some(stage.one.addr));
}
