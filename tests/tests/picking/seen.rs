//! Faults observed in another proxy with a picker, and the correct behaviour. Cases covered in no other file.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use penstock_agent::config::{FailureMode, ResponseToPicker};
use penstock_tests::{
    Client, Plan, Response, Stage,
    content::Fnv,
    eventually,
    model_server::Framing,
    scripted_epp::{
        Dynamo, Endpoints, Fault, Faulty, Gathering, Gie, Harm, LlmdRouter, Lwepp, Moment, Personality, Production,
        StreamEnd,
    },
    stage::{echo, epp, json},
};

use crate::SOON;

/// When the picker has received the whole request.
const ASKED: Moment = Moment::RequestBody(usize::MAX);

/// Observed: with a full-duplex body, a hung picker leaves the client waiting forever. E11, E12, E13: the deadline holds for a
/// picker that has read everything, and for one that acknowledges each piece and never decides.
#[tokio::test]
async fn hung_picker_after_whole_request_follows_failure_mode() {
    async fn hangs<P: Personality>(mode: FailureMode) {
        for body in [json("m", 10), json("m", 300_000)] {
            let mut stage = Stage::with(
                |all| Faulty::new(P::over(Endpoints::new(all)), Fault::At(ASKED, Harm::Silence)),
                |config| {
                    config.pools[0].failure_mode = mode;
                    epp(config).decision_timeout = Some(Duration::from_millis(300));
                },
            )
            .await;
            let response = stage.request(&echo(body.clone())).await;
            match mode {
                FailureMode::Open => assert_eq!(response.echoed().body_hash, Fnv::of(&body).value()),
                FailureMode::Closed => {
                    assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
                    assert_eq!(stage.requests(), (0, 0));
                }
            }
            assert_eq!(stage.agent.count("penstock_epp_failures_total", &[r#"reason="deadline""#]), 1);
            assert_eq!(stage.epp.streams_started(), 1, "the picker was asked again after the deadline");
        }
    }
    tokio::join!(
        hangs::<LlmdRouter>(FailureMode::Open),
        hangs::<LlmdRouter>(FailureMode::Closed),
        hangs::<Lwepp>(FailureMode::Open),
        hangs::<Lwepp>(FailureMode::Closed),
    );
}

/// E13: a second attempt does not extend the deadline.
#[tokio::test]
async fn decision_deadline_spans_both_attempts() {
    const DEADLINE: Duration = Duration::from_secs(3);
    let mut stage = Stage::with(
        |all| {
            let silent = Faulty::new(Production::new(all), Fault::At(ASKED, Harm::Silence));
            let resets = Faulty::new(silent, Fault::At(ASKED, Harm::ResetConnection)).times(1);
            Faulty::new(resets, Fault::At(ASKED, Harm::Delay(DEADLINE - Duration::from_secs(1)))).times(1)
        },
        |config| epp(config).decision_timeout = Some(DEADLINE),
    )
    .await;
    let begin = Instant::now();
    assert_eq!(stage.request(&echo(json("m", 1000))).await.error_code(), "picker_failed");
    let took = begin.elapsed();
    assert_eq!(stage.epp.streams_started(), 2);
    assert!(took >= DEADLINE && took < DEADLINE + DEADLINE / 2, "{took:?}");
}

/// Observed: one TCP reset on the picker's connection fails every request on it. Each undecided request is asked again over one
/// new connection, whether or not the picker had replied to pieces of its body.
#[tokio::test]
async fn connection_reset_fails_no_waiting_request() {
    async fn resets<P: Personality>() {
        const WAITING: usize = 40;
        let script = |all: &[_]| Gathering::new(P::over(Endpoints::new(all)), WAITING).then(Harm::ResetConnection);
        let stage = Stage::with(script, |config| config.listen.workers = 1).await;
        let body = json("m", 200_000);
        let sent_on = Fnv::of(&P::sent_on(&body, None)).value();
        let one = || async {
            let mut client = Client::connect(stage.agent.addr).await.unwrap();
            client.request(&echo(body.clone())).await.unwrap().echoed().body_hash
        };
        assert_eq!(join_all((0..WAITING).map(|_| one())).await, [sent_on; WAITING]);
        assert_eq!((stage.epp.streams_started(), stage.epp.connections_accepted()), (2 * WAITING, 2));
        assert_eq!(stage.agent.count("penstock_epp_failures_total", &[]), 0);
    }
    resets::<Gie>().await;
    resets::<LlmdRouter>().await;
    resets::<Lwepp>().await;
    resets::<Dynamo>().await;
}

/// Observed: a request with a length goes out in chunks, though the picker set the length; a response that the picker sees loses
/// its length. E3, E7: both keep their framing, and every stream is half-closed at its end.
#[tokio::test]
async fn framing_is_kept_both_ways_in_full_duplex() {
    async fn keeps<P: Personality>() {
        let mut stage = Stage::with(
            |all| P::over(Endpoints::new(all)),
            |config| epp(config).response_to_picker = ResponseToPicker::Body,
        )
        .await;
        for (number, framing) in [Framing::ContentLength, Framing::Chunked].into_iter().enumerate() {
            let plan = Plan { size: 200_000, framing, ..Plan::default() };
            let body = json("m", 150_000);
            let response = stage.request(&echo(body.clone()).header("x-test-plan", plan.header())).await;
            plan.checker().feed(&response.body).unwrap();
            let declared = ["content-length", "transfer-encoding"].map(|name| values(&response, name));
            let expected =
                if framing == Framing::Chunked { [vec![], vec!["chunked"]] } else { [vec!["200000"], vec![]] };
            assert_eq!((response.body.len(), declared), (200_000, expected));

            eventually(SOON, || stage.epp.streams_ended(StreamEnd::HalfClosed) == number + 1).await;
            assert!(stage.epp.streams()[number].response_body() == (response.body, 1), "{framing:?}");
        }
        for seen in [stage.one.seen(), stage.two.seen()].concat() {
            let length = P::sent_on(&json("m", 150_000), None).len().to_string();
            assert_eq!(
                (seen.body_framing.as_str(), seen.header("content-length")),
                ("content-length", Some(length.as_str()))
            );
            assert_eq!(seen.header("transfer-encoding"), None);
        }
    }
    tokio::join!(keeps::<Gie>(), keeps::<LlmdRouter>(), keeps::<Lwepp>(), keeps::<Dynamo>());
}

fn values<'a>(response: &'a Response, name: &str) -> Vec<&'a str> {
    let named = response.head.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
    named.map(|(_, value)| value.as_str()).collect()
}
