//! A picker that keeps its streams open and never replies to response heads.

use std::time::{Duration, Instant};

use penstock_agent::config::ResponseToPicker;
use penstock_tests::{
    Stage,
    scripted_epp::{Fault, Faulty, Harm, Moment, Production},
    stage::{echo, epp, json},
};

use crate::SOON;

/// Long enough for a working picker, even on a busy machine.
const WAIT: Duration = Duration::from_secs(1);
const MARK: &str = "x-went-into-resp-headers";

fn replies(stage: &Stage, reply: &str) -> u64 {
    stage.agent.count("penstock_epp_head_replies_total", &[&format!("reason=\"{reply}\"")])
}

/// Silent about the heads of the first `times` responses.
async fn silent(times: u64) -> Stage {
    let fault = Fault::At(Moment::ResponseHeaders, Harm::Silence);
    Stage::with(
        |all| Faulty::new(Production::new(all), fault).times(times),
        |config| {
            config.listen.workers = 1;
            epp(config).response_timeout = Some(WAIT);
            assert_eq!(epp(config).response_to_picker, ResponseToPicker::Usage);
        },
    )
    .await
}

/// E20: the first few responses wait; later ones do not.
#[tokio::test]
async fn picker_silent_on_responses_is_awaited_three_times() {
    let mut stage = silent(u64::MAX).await;
    let begin = Instant::now();
    for request in 0..20 {
        let response = stage.request(&echo(json("m", 100))).await;
        assert_eq!((response.status(), response.header(MARK)), (200, None), "{request}");
    }
    assert!(begin.elapsed() >= 3 * WAIT);
    assert_eq!((replies(&stage, "timed_out"), replies(&stage, "not_awaited")), (3, 17));
    assert_eq!(replies(&stage, "in_time"), 0);
}

/// E20: a reply within the deadline ends that state, and replies count again.
#[tokio::test]
async fn picker_that_replies_again_is_awaited_again() {
    let mut stage = silent(5).await;
    for _ in 0..5 {
        assert_eq!(stage.request(&echo(json("m", 100))).await.header(MARK), None);
    }
    let begin = Instant::now();
    while replies(&stage, "in_time") == 0 {
        assert!(begin.elapsed() < SOON, "a request still waited");
        assert_eq!(stage.request(&echo(json("m", 100))).await.status(), 200);
    }
    assert_eq!(stage.request(&echo(json("m", 100))).await.header(MARK), Some("true"));
    assert_eq!(replies(&stage, "timed_out"), 3);
    assert!(replies(&stage, "not_awaited") >= 3);
}
