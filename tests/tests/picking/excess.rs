//! Picker messages above the limits: the picker has failed, and the failure mode decides. Such changes to a response are not
//! applied.

use std::net::SocketAddr;

use bytes::Bytes;
use penstock_agent::config::{Config, EppLimits, FailureMode};
use penstock_proto::{
    ext_proc::{HttpBody, HttpHeaders, ProcessingResponse},
    prost_types::{Struct, Value, value::Kind},
};
use penstock_tests::{
    Stage,
    content::Fnv,
    scripted_epp::{Answer, Answering, Exchange, Production, Script, reply},
    stage::{echo, epp, json},
};

/// Returns replies to a request, including the pick.
type Excess = fn(&str) -> Vec<ProcessingResponse>;

fn fields(count: usize) -> Vec<(String, String)> {
    (0..count).map(|n| (format!("x-field-{n}"), n.to_string())).collect()
}

fn pick_with(picked: &str, fields: &[(String, String)]) -> ProcessingResponse {
    let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    reply::pick(picked, &fields)
}

fn many_fields(picked: &str) -> Vec<ProcessingResponse> {
    vec![pick_with(picked, &fields(40_000))]
}

fn many_removals(picked: &str) -> Vec<ProcessingResponse> {
    let mut mutation = reply::mutation(&[(reply::DESTINATION, picked)]);
    mutation.remove_headers = (0..1000).map(|n| format!("x-field-{n}")).collect();
    vec![reply::request_headers(mutation)]
}

fn large_field(picked: &str) -> Vec<ProcessingResponse> {
    vec![pick_with(picked, &[("x-large".to_owned(), "x".repeat(200_000))])]
}

/// Replies with nothing in them.
fn many_messages(picked: &str) -> Vec<ProcessingResponse> {
    let changes_nothing = |_| reply::response_trailers();
    (0..6000).map(changes_nothing).chain([reply::pick(picked, &[])]).collect()
}

fn large_metadata(picked: &str) -> Vec<ProcessingResponse> {
    let mut message = reply::pick(picked, &[]);
    let large = Value { kind: Some(Kind::StringValue("x".repeat(300_000))) };
    message.dynamic_metadata.get_or_insert(Struct::default()).fields.insert("other".to_owned(), large);
    vec![message]
}

fn large_answer(_: &str) -> Vec<ProcessingResponse> {
    vec![reply::immediate(429, &[("x-large", &"x".repeat(200_000))], "no")]
}

fn answer_of_many_fields(_: &str) -> Vec<ProcessingResponse> {
    let fields = fields(40_000);
    let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    vec![reply::immediate(429, &fields, "no")]
}

fn answer_with_a_large_body(_: &str) -> Vec<ProcessingResponse> {
    vec![reply::immediate(429, &[], &"x".repeat(1_100_000))]
}

async fn check(excess: Excess, reason: &str) {
    for mode in [FailureMode::Closed, FailureMode::Open] {
        let script = |all: &[SocketAddr]| {
            let picked = all[0].to_string();
            // Excess before the body's replies, which would complete the pick.
            Answering::new(move |_| excess(&picked))
        };
        let mut stage = Stage::with(script, |config: &mut Config| {
            config.limits.body_bytes = 1 << 20;
            config.pools[0].failure_mode = mode;
        })
        .await;
        let body = json("m", 1000);
        for request in [echo(body.clone()), penstock_tests::Request::get("/test/echo")] {
            let response = stage.request(&request).await;
            if mode == FailureMode::Open {
                let seen = response.echoed();
                assert!(!seen.headers.iter().any(|(name, _)| name.starts_with("x-field-")), "{reason}");
                assert!(seen.body_length == 0 || seen.body_hash == Fnv::of(&body).value(), "{reason}");
            } else {
                assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"), "{reason}");
                assert_eq!(stage.requests(), (0, 0), "{reason}");
            }
        }
        let label = format!("reason=\"{reason}\"");
        assert_eq!(stage.agent.count("penstock_epp_failures_total", &[&label]), 2, "{mode:?}, {reason}");
    }
}

#[tokio::test]
async fn excessive_mutations_are_a_failure() {
    for excess in [many_fields, many_removals, large_field] {
        check(excess, "mutation_too_large").await;
    }
}

#[tokio::test]
async fn excessive_messages_and_metadata_are_a_failure() {
    check(many_messages, "too_many_messages").await;
    check(large_metadata, "metadata_too_large").await;
}

#[tokio::test]
async fn excessive_immediate_replies_are_a_failure() {
    for excess in [large_answer, answer_of_many_fields, answer_with_a_large_body] {
        check(excess, "reply_too_large").await;
    }
}

/// As many fields as the setting allows, besides those of a head at its own limit.
#[tokio::test]
async fn mutations_within_limits_are_applied() {
    let script = |all: &[SocketAddr]| {
        let picked = all[0].to_string();
        Answering::new(move |_| vec![pick_with(&picked, &fields(15))])
    };
    let mut stage = Stage::with(script, |config| {
        epp(config).limits = EppLimits { fields: 16, ..EppLimits::default() };
    })
    .await;
    let request = (0..100).fold(echo("{}"), |request, n| request.header(&format!("x-own-{n}"), n.to_string()));
    let seen = stage.request(&request).await.echoed();
    let with = |prefix: &str| seen.headers.iter().filter(|(name, _)| name.starts_with(prefix)).count();
    assert_eq!((with("x-own-"), with("x-field-")), (100, 15));
}

/// Picks, then changes each response head too much.
struct ExcessiveResponse(Production);

#[tonic::async_trait]
impl Script for ExcessiveResponse {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        self.0.request_headers(exchange, headers).await
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.0.request_body(exchange, body).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        let fields = fields(40_000);
        let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        exchange.send(reply::response_headers(&fields)).await
    }
}

#[tokio::test]
async fn excessive_response_mutation_is_not_applied() {
    let mut stage = Stage::with(
        |all| ExcessiveResponse(Production::new(all)),
        |config| {
            epp(config).response_timeout = Some(crate::SOON);
        },
    )
    .await;
    let body = Bytes::from(json("m", 1000));
    for _ in 0..2 {
        let response = stage.request(&echo(body.clone())).await;
        assert_eq!(response.header("x-field-0"), None);
        assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
    }
    let failures = stage.agent.count("penstock_epp_failures_total", &[r#"reason="mutation_too_large""#]);
    assert_eq!(failures, 2);
}
