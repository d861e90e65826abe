//! What the agent measures of a request, against what its client measured.

use std::time::{Duration, Instant};

use penstock_agent::config::{ResponseToPicker, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Request, Stage,
    agent::{TestAgent, builtin_pool},
    eventually,
    model_server::Options,
    scripted_epp::{Fault, Faulty, Harm, Moment, Production},
    stage::epp,
};

use crate::SOON;

/// D13: the time to the pick, to the first token and between tokens, and the token counts.
#[tokio::test]
async fn request_times_and_tokens_match_client() {
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
    // The agent finished between the response's last byte and now.
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
    // A mean over pieces; a few may hold several events, and the last ones arrive together.
    assert!(interval / 4.0 <= between && between <= all - first, "{shown}");
    let tokens = |kind: &str| {
        let labels = [r#"gen_ai_response_model="m""#, &format!("gen_ai_token_type=\"{kind}\"")];
        stage.agent.count("penstock_gen_ai_client_inference_tokens_total", &labels)
    };
    assert_eq!((tokens("input"), tokens("output")), (3, u64::from(TOKENS)));
}

/// Time to first token, time between tokens and tokens per second by model, equal for a relayed and a steered stream. The bounds
/// come from the endpoint's pauses: a machine may be late, never early.
#[tokio::test]
async fn event_stream_times_by_model_match_on_every_path() {
    tokio::join!(streams(SteeringMode::Off), streams(SteeringMode::Ingress));
}

async fn streams(mode: SteeringMode) {
    const TOKENS: u32 = 15;
    const INTERVAL: Duration = Duration::from_millis(20);
    let server = ModelServer::start(Options::default()).await.unwrap();
    let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |config| config.limits.metric_models = 2);
    let mut took = Vec::new();
    for model in ["one", "deux-é", "one", "nobody-knows", "nobody-knows-either"] {
        let body = format!(
            r#"{{"model":"{model}","stream":true,"max_tokens":{TOKENS},"x-test-interval-us":{},"prompt":"a"}}"#,
            INTERVAL.as_micros()
        );
        let begin = Instant::now();
        let mut client = Client::connect(agent.addr).await.unwrap();
        let request = Request::post("/v1/completions", body).header("content-type", "application/json");
        assert_eq!(client.request(&request).await.unwrap().events().len(), TOKENS as usize + 2);
        eventually(SOON, || agent.count("penstock_requests_total", &[]) == took.len() as u64 + 1).await;
        took.push(begin.elapsed().as_secs_f64());
    }
    // Responses without events have no tokens.
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
    eventually(SOON, || agent.count("penstock_requests_total", &[]) == took.len() as u64 + 1).await;
    assert_eq!(agent.count("penstock_body_bytes_total", &["path=\"ingress\""]) > 0, mode != SteeringMode::Off);

    let of = |name: &str, model: &str| {
        let labels = ["pool=\"default\"", &format!("gen_ai_request_model=\"{model}\"")];
        let [count, sum] =
            ["count", "sum"].map(|part| agent.metric(&format!("penstock_gen_ai_server_{name}_{part}"), &labels));
        (count as u64, sum)
    };
    let interval = INTERVAL.as_secs_f64();
    for (model, count, took) in [("one", 2, took[0] + took[2]), ("deux-é", 1, took[1]), ("other", 2, took[3] + took[4])]
    {
        let (first, between, rate) = (
            of("time_to_first_token_seconds", model),
            of("time_per_output_token_seconds", model),
            of("output_tokens_per_second", model),
        );
        let shown = format!("{mode:?} {model}: first {first:?}, between {between:?}, rate {rate:?}, took {took}");
        assert_eq!((first.0, between.0, rate.0), (count, count, count), "{shown}");
        let times = count as f64;
        // The endpoint pauses before its first token too.
        assert!(times * interval <= first.1 && first.1 < took, "{shown}");
        // Three messages end a stream at once; the first may be seen late, by at most three quarters of a stream.
        let messages = f64::from(TOKENS + 3);
        let least = times * interval * f64::from(TOKENS - 1) / messages / 4.0;
        assert!(least <= between.1 && between.1 <= took - first.1, "{shown}");
        assert!(times * times / between.1 <= rate.1 * 1.000_001 && rate.1 <= times * times / least, "{shown}");
    }
    let all = agent.count("penstock_gen_ai_server_time_to_first_token_seconds_count", &[]);
    assert_eq!((all, agent.count("penstock_metric_models_overflow_total", &[])), (5, 2));
}
