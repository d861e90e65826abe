//! What the agent measures of a request, against what its client measured.

use std::time::{Duration, Instant};

use penstock_agent::config::ResponseToPicker;
use penstock_tests::{
    Request, Stage, eventually,
    scripted_epp::{Fault, Faulty, Harm, Moment, Production},
    stage::epp,
};

use crate::SOON;

/// D13: the time to the pick, to the first token and between tokens, and the tokens.
#[tokio::test]
async fn times_and_tokens() {
    const THINKS: Duration = Duration::from_millis(100);
    const TOKENS: u32 = 20;
    const INTERVAL: Duration = Duration::from_millis(20);
    let thinks = Fault::At(Moment::RequestBody(usize::MAX), Harm::Delay(THINKS));
    let mut stage = Stage::with(
        |all| Faulty::new(Production::new(all), thinks),
        |config| epp(config).response_to_picker = ResponseToPicker::Usage,
    )
    .await;
    let body = format!(
        r#"{{"model":"m","stream":true,"stream_options":{{"include_usage":true}},"max_tokens":{TOKENS},"x-test-interval-us":{},"prompt":"three words long"}}"#,
        INTERVAL.as_micros()
    );
    let begin = Instant::now();
    let response =
        stage.request(&Request::post("/v1/completions", body).header("content-type", "application/json")).await;
    assert_eq!(response.status(), 200);

    let of = |name: &str| stage.agent.metric(&format!("penstock_{name}"), &[]);
    eventually(SOON, || of("request_duration_seconds_count") == 1.0).await;
    // The agent was done between the response's last byte and now.
    let took = begin.elapsed().as_secs_f64();
    let seconds = |name: &str| {
        assert_eq!(of(&format!("{name}_count")), 1.0, "{name}");
        of(&format!("{name}_sum"))
    };
    let (thinks, interval) = (THINKS.as_secs_f64(), INTERVAL.as_secs_f64());
    let (pick, first) = (seconds("epp_exchange_seconds"), seconds("ttft_seconds"));
    let (between, all) = (seconds("time_per_output_chunk_seconds"), seconds("request_duration_seconds"));
    let shown = format!("pick {pick}, first {first}, between {between}, all {all}, took {took}");
    assert!(thinks <= pick && pick + interval <= first && first < all && all <= took, "{shown}");
    // A mean over pieces, of which a few may hold more than one event, and the last come at once.
    assert!(interval / 4.0 <= between && between <= all - first, "{shown}");
    let tokens = |kind: &str| {
        let labels = [r#"gen_ai_response_model="m""#, &format!("gen_ai_token_type=\"{kind}\"")];
        stage.agent.count("penstock_gen_ai_client_inference_tokens_total", &labels)
    };
    assert_eq!((tokens("input"), tokens("output")), (3, u64::from(TOKENS)));
}
