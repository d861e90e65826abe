//! Request scenarios: what the picker is told, what it answers, and what the endpoint gets.

use std::time::Duration;

use penstock_agent::config::FailureMode;
use penstock_tests::{
    Refusing, Request, Response, Stage,
    content::Fnv,
    eventually,
    model_server::Echo,
    scripted_epp::{Endpoints, Personality, Refusal, StreamEnd, header},
    stage::{echo, epp, json},
};

use crate::SOON;

async fn stage<P: Personality>() -> Stage {
    Stage::new(|all| P::over(Endpoints::new(all))).await
}

fn all<'a>(seen: &'a Echo, name: &str) -> Vec<&'a str> {
    seen.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
}

/// Asserts that the endpoint got the picker's version of `body` with a correct length.
fn assert_sent_on<P: Personality>(seen: &Echo, body: &[u8], rewritten: Option<&str>) {
    let expected = P::sent_on(body, rewritten);
    assert_eq!((seen.body_length, seen.body_hash), (expected.len() as u64, Fnv::of(&expected).value()));
    assert_eq!(all(seen, "content-length"), [expected.len().to_string()]);
    assert!(all(seen, "transfer-encoding").is_empty());
}

/// Asserts that the picker was told the served endpoint and one end, and that its mark is on the response.
async fn assert_told<P: Personality>(stage: &Stage, stream: usize, response: &Response) {
    let served = response.served_by().unwrap();
    let (name, value) = P::mark(served);
    let marks: Vec<_> = response.head.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).collect();
    assert_eq!(marks.iter().map(|(_, value)| value).collect::<Vec<_>>(), [&value]);
    eventually(SOON, || stage.epp.streams()[stream].end == Some(StreamEnd::HalfClosed)).await;
    let told = &stage.epp.streams()[stream];
    assert_eq!(told.served(), Some(served.to_string()));
    assert_eq!(told.response_body(), (response.body.clone(), 1));
}

/// E7, E8: a GET ends with its head; the pick is followed, and the picker is told about the response.
pub(crate) async fn request_without_body_is_picked<P: Personality>() {
    let mut stage = stage::<P>().await;
    let response = stage.request(&Request::get("/test/echo")).await;
    let seen = response.echoed();
    assert_eq!((seen.body_framing.as_str(), seen.body_length), ("none", 0));
    assert_eq!(response.served_by(), Some(stage.one.addr));
    assert_told::<P>(&stage, 0, &response).await;
    assert!(!stage.epp.streams()[0].kinds().contains(&"request_body"));
}

/// E1, E3, E7, E8: the request most clients make.
pub(crate) async fn small_chat_request_is_served<P: Personality>() {
    let mut stage = stage::<P>().await;
    let body = br#"{"model":"m","messages":[{"role":"user","content":"which way"}],"max_tokens":3}"#;
    let chat = Request::post("/v1/chat/completions", body.as_slice()).header("content-type", "application/json");
    let response = stage.request(&chat).await;
    let answer: serde_json::Value = response.json().unwrap();
    assert_eq!((answer["model"].as_str(), answer["usage"]["completion_tokens"].as_u64()), (Some("m"), Some(3)));
    assert_sent_on::<P>(&stage.one.seen()[0], body, None);
    assert!(stage.epp.streams()[0].request_body() == (body.to_vec(), 1));
    assert_told::<P>(&stage, 0, &response).await;
}

/// E1, E3: every byte of a long prompt reaches picker and endpoint.
pub(crate) async fn bodies_of_300_kb_and_3_mb_arrive_whole<P: Personality>() {
    let mut stage = stage::<P>().await;
    for (stream, len) in [300_000, 3_000_000].into_iter().enumerate() {
        let body = json("m", len);
        let response = stage.request(&echo(body.clone())).await;
        assert_sent_on::<P>(&response.echoed(), &body, None);
        assert!(stage.epp.streams()[stream].request_body() == (body, 1), "{len}");
        assert_told::<P>(&stage, stream, &response).await;
    }
}

/// E2: the picker gets pieces while the client uploads; the endpoint gets a Content-Length instead of chunks.
pub(crate) async fn slow_chunked_upload_arrives_with_length<P: Personality>() {
    let mut stage = stage::<P>().await;
    let body = json("m", 200_000);
    let request = Request::new("POST", "/test/echo")
        .header("content-type", "application/json")
        .chunked(body.clone(), 7000)
        .piecewise(20_000, Duration::from_millis(3));
    let response = stage.request(&request).await;
    assert_sent_on::<P>(&response.echoed(), &body, None);
    let told = &stage.epp.streams()[0];
    assert!(told.request_body() == (body, 1));
    assert!(told.kinds().iter().filter(|kind| **kind == "request_body").count() > 4, "{:?}", told.kinds());
}

/// E3, E4: a body changed by the picker replaces the client's, with its own length.
pub(crate) async fn rewritten_model_reaches_endpoint<P: Personality>() {
    let mut stage = Stage::new(|all| P::over(Endpoints::new(all)).rewriting("a-model-with-a-much-longer-name")).await;
    for body in [json("m", 10), json("m", 150_000)] {
        let seen = stage.request(&echo(body.clone())).await.echoed();
        assert_sent_on::<P>(&seen, &body, Some("a-model-with-a-much-longer-name"));
    }
    let chunked = Request::new("POST", "/test/echo").header("content-type", "application/json");
    let seen = stage.request(&chunked.chunked(json("m", 1000), 100)).await.echoed();
    assert_sent_on::<P>(&seen, &json("m", 1000), Some("a-model-with-a-much-longer-name"));
}

/// E4: fields that the picker sets replace the client's or are added; repeated fields that it only echoes stay unchanged; on the
/// response its mark is set and the framing stays.
pub(crate) async fn fields_are_changed_both_ways<P: Personality>() {
    let fields = [("x-both", "picker"), ("x-new", "1")];
    let mut stage = Stage::new(|all| P::over(Endpoints::new(all)).adding(&fields)).await;
    let request =
        echo(json("m", 100)).header("x-both", "client").header("x-own", "a").header("x-own", "b").header("host", "h");
    let response = stage.request(&request).await;
    let seen = response.echoed();
    assert_eq!((all(&seen, "x-both"), all(&seen, "x-new")), (vec!["picker"], vec!["1"]));
    assert_eq!((all(&seen, "x-own"), all(&seen, "host")), (vec!["a", "b"], vec!["h"]));
    assert_eq!((seen.method.as_str(), seen.target.as_str()), ("POST", "/test/echo"));
    assert_eq!(response.header("content-length"), Some(response.body.len().to_string().as_str()));
    assert_eq!(response.header("transfer-encoding"), None);
    assert_told::<P>(&stage, 0, &response).await;
}

/// E4, E21, D15: the picker's fields for prefill and similar reach the endpoint as set; the client's copies are removed.
pub(crate) async fn disaggregation_fields_reach_endpoint<P: Personality>() {
    const FIELDS: [(&str, &str); 7] = [
        ("x-prefiller-host-port", "10.0.0.7:8000"),
        ("x-encoder-hosts-ports", "10.0.0.8:8000,10.0.0.9:8000"),
        ("x-data-parallel-host-port", "10.0.0.7:8003"),
        ("x-kv-cache-source-host-port", "10.0.0.6:5600"),
        ("x-dynamo-prefill-worker-id", "7"),
        ("x-dynamo-decode-worker-id", "8"),
        ("x-dynamo-dp-rank", "3"),
    ];
    let mut with = Stage::new(|all| P::over(Endpoints::new(all)).adding(&FIELDS)).await;
    let mut without = stage::<P>().await;
    let posing = FIELDS.iter().fold(echo(json("m", 10)), |request, (name, _)| request.header(name, "6.6.6.6:6"));
    let posing = posing.header("X_Prefiller_Host_Port", "6.6.6.6:6");
    let (set, unset) = (with.request(&posing).await.echoed(), without.request(&posing).await.echoed());
    for (name, value) in FIELDS {
        assert_eq!(all(&set, name), [value], "{name}");
        assert!(all(&unset, name).is_empty(), "{name}");
        for stage in [&with, &without] {
            assert_eq!(header(&stage.epp.streams()[0].request_headers(), name), None, "{name}");
        }
    }
    assert!(!set.headers.iter().chain(&unset.headers).any(|(_, value)| value.contains("6.6.6.6")));
}

/// E4: the picker's span becomes the parent of the endpoint's, in place of the client's.
pub(crate) async fn picker_trace_context_reaches_endpoint<P: Personality>() {
    let client = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let picker = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01";
    let mut stage = Stage::new(|all| P::over(Endpoints::new(all)).adding(&[("traceparent", picker)])).await;
    let seen = stage.request(&echo(json("m", 10)).header("traceparent", client)).await.echoed();
    assert_eq!(all(&seen, "traceparent"), [picker]);
}

/// E7: requests on one connection are picked one by one, over the worker's connection to the picker.
pub(crate) async fn each_request_of_a_connection_is_picked<P: Personality>() {
    let mut stage = stage::<P>().await;
    let mut served = Vec::new();
    for stream in 0..4 {
        let response = stage.request(&echo(json("m", 1000))).await;
        served.push(response.served_by().unwrap());
        assert_told::<P>(&stage, stream, &response).await;
    }
    assert_eq!(served, [stage.one.addr, stage.two.addr].repeat(2));
    assert_eq!(stage.epp.streams_started(), 4);
    assert!(stage.epp.connections_accepted() <= stage.workers(), "{}", stage.epp.connections_accepted());
}

/// E8, E10: the next endpoint of the list gets the same body, and is reported as the served one.
pub(crate) async fn dead_first_choice_is_followed_by_second<P: Personality>() {
    let dead = Refusing::new().unwrap();
    let mut stage = Stage::with(
        |all| P::over(Endpoints::new(&[dead.addr, all[1]]).offering(2)),
        |config| config.pools[0].endpoints.push(dead.addr.into()),
    )
    .await;
    let body = json("m", 100_000);
    let response = stage.request(&echo(body.clone())).await;
    assert_eq!(response.served_by(), Some(stage.two.addr));
    assert_sent_on::<P>(&response.echoed(), &body, None);
    assert_told::<P>(&stage, 0, &response).await;
}

/// E5, E11, E12: a picker without endpoints signals it in its own way: the client gets its immediate reply or, without one, the
/// pool's failure mode decides. The connection stays usable.
pub(crate) async fn picker_without_endpoints_answers_or_failure_mode_decides<P: Personality>() {
    for mode in [FailureMode::Closed, FailureMode::Open] {
        let script = |_: &[_]| P::over(Endpoints::new(&[]));
        let mut stage = Stage::with(script, |config| config.pools[0].failure_mode = mode).await;
        for (request, has_body) in [(echo(json("m", 1000)), true), (Request::get("/test/echo"), false)] {
            let response = stage.request(&request).await;
            match (P::refusal(has_body), mode) {
                (Refusal::Immediate(status), _) => {
                    assert_eq!(response.status(), status);
                    assert!(response.text().starts_with("inference error: "), "{}", response.text());
                }
                (Refusal::Fails, FailureMode::Closed) => {
                    assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
                }
                (Refusal::Fails, FailureMode::Open) => assert_eq!(response.status(), 200),
            }
            assert_eq!(response.header("connection"), None, "{mode:?} {has_body}");
        }
        let opens = P::refusal(true) == Refusal::Fails && mode == FailureMode::Open;
        let (one, two) = stage.requests();
        assert_eq!(one + two, if opens { 2 } else { 0 }, "{mode:?}");
    }
}

/// E17: under its own health service name it reports serving; under another name it is taken to serve.
pub(crate) async fn health_service_name_decides_health<P: Personality>() {
    let mut serving = 0;
    for service in ["envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension"] {
        let mut stage = Stage::with(
            |all| P::over(Endpoints::new(all)),
            |config| {
                epp(config).health_interval = Some(Duration::from_millis(20));
                epp(config).health_service = service.to_owned();
            },
        )
        .await;
        eventually(SOON, || stage.epp.health_checks().len() > 1).await;
        assert!(stage.epp.health_checks().iter().all(|asked| asked == service));
        let state = |state| stage.agent.count("penstock_epp_replicas", &[&format!("state=\"{state}\"")]);
        assert_eq!(state("serving") + state("unknown"), 1, "{service}");
        serving += state("serving");
        assert_eq!(stage.request(&echo(json("m", 100))).await.status(), 200);
    }
    assert!(serving > 0);
}
