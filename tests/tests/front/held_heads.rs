//! `response_to_picker = "body"`: the head of a response waits for the EPP's reply to it or its first answer for the body, however late
//! that is. A status, fields and a body of one reply go out together or not at all; and the EPP may decline the body.

use std::time::Duration;

use bytes::Bytes;
use penstock_agent::config::{Config, FailureMode, ResponseToPicker, SteeringMode};
use penstock_proto::ext_proc::{
    BodyMutation, CommonResponse, HeaderMutation, HeadersResponse, HttpBody, HttpHeaders, ProcessingResponse,
    body_mutation::Mutation, common_response::ResponseStatus, processing_response::Response as Reply,
};
use penstock_tests::{
    BodyEnd, Plan, Response, eventually,
    model_server::{Fault, FaultKind, Framing, Lengths},
    scripted_epp::{Answer, Exchange, Script, StreamEnd, reply},
    stage::epp,
};

use crate::{
    SOON,
    scene::{Back, Front, Scene, WAYS},
};

const RESPONSE_TIMEOUT: Duration = Duration::from_millis(50);
/// Later than the timeout.
const LATE: Duration = Duration::from_millis(250);
const BLOCKED: &str = "blocked by policy";

/// What a picker does about a response.
#[derive(Clone, Debug)]
enum Does {
    /// Replaces head and body with the reply to the head, after this time; by turns at once.
    Blocks(Duration),
    /// Changes the head after this time, and then answers for the body.
    Changes(Duration),
    /// Answers for the body, and not for the head.
    IgnoresHead,
    /// Replies to the head with a body after the first answer.
    BlocksAfterAnswer,
    /// Replies to the head twice, the second time with a body.
    BlocksAfterReply,
    /// Replaces the body together with more fields than are allowed.
    BlocksExcessively,
    /// Wants nothing of the body after this time.
    Declines(Duration, Option<BodyMutation>),
    /// The same when pieces of the body are on their way, for each of which it still has this answer.
    DeclinesAndAnswers(ProcessingResponse),
    IsSilent,
    /// Reads nothing after the head.
    Stalls,
}

struct Picker {
    endpoint: String,
    does: Does,
}

fn last(header_mutation: HeaderMutation, body_mutation: Option<BodyMutation>) -> ProcessingResponse {
    let status = ResponseStatus::ContinueAndReplace.into();
    let response =
        CommonResponse { status, header_mutation: Some(header_mutation), body_mutation, ..CommonResponse::default() };
    let reply = Reply::ResponseHeaders(HeadersResponse { response: Some(response) });
    ProcessingResponse { response: Some(reply), ..ProcessingResponse::default() }
}

fn change() -> HeaderMutation {
    let mut change = reply::mutation(&[(":status", "403"), ("content-type", "text/plain"), ("x-blocked", "1")]);
    change.remove_headers = vec!["content-encoding".to_owned()];
    change
}

fn blocks() -> ProcessingResponse {
    let body = Mutation::Body(Bytes::from_static(BLOCKED.as_bytes()));
    last(change(), Some(BodyMutation { mutation: Some(body) }))
}

#[tonic::async_trait]
impl Script for Picker {
    async fn request_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        exchange.send(reply::pick(&self.endpoint, &[])).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        match &self.does {
            Does::Blocks(after) => {
                tokio::time::sleep(*after).await;
                exchange.send(blocks()).await
            }
            Does::Changes(after) => {
                tokio::time::sleep(*after).await;
                exchange.send(reply::response_mutation(change())).await
            }
            Does::BlocksAfterReply => {
                exchange.send(reply::response_headers(&[])).await?;
                tokio::time::sleep(LATE).await;
                exchange.send(blocks()).await
            }
            Does::BlocksExcessively => {
                let many: Vec<String> = (0..2000).map(|n| format!("x-{n}")).collect();
                let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "1")).collect();
                let body = Mutation::Body(Bytes::from_static(BLOCKED.as_bytes()));
                exchange.send(last(reply::mutation(&many), Some(BodyMutation { mutation: Some(body) }))).await
            }
            Does::Declines(after, mutation) => {
                tokio::time::sleep(*after).await;
                exchange.send(last(reply::mutation(&[("x-declined", "1")]), mutation.clone())).await
            }
            Does::DeclinesAndAnswers(_) => {
                tokio::time::sleep(LATE).await;
                exchange.send(last(reply::mutation(&[]), None)).await
            }
            Does::Stalls => std::future::pending().await,
            Does::IgnoresHead | Does::BlocksAfterAnswer | Does::IsSilent => Ok(()),
        }
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        match &self.does {
            Does::DeclinesAndAnswers(answer) => exchange.send(answer.clone()).await,
            Does::Changes(_) => {
                let text = if body.end_of_stream { BLOCKED } else { "" };
                exchange.send(reply::response_body(text.into(), body.end_of_stream)).await
            }
            Does::IgnoresHead => exchange.send(reply::response_body(body.body.clone(), body.end_of_stream)).await,
            Does::BlocksAfterAnswer => {
                exchange.send(reply::response_body_unchanged()).await?;
                tokio::time::sleep(LATE).await;
                exchange.send(blocks()).await
            }
            _ => Ok(()),
        }
    }
}

async fn scene(back: Back, way: (Front, SteeringMode), does: Does, adjust: impl FnOnce(&mut Config)) -> Scene {
    let picker = |all: &[std::net::SocketAddr]| Picker { endpoint: all[0].to_string(), does };
    Scene::with(way.0, back, picker, |config| {
        config.steering.mode = way.1;
        config.listen.workers = 1;
        epp(config).response_to_picker = ResponseToPicker::Body;
        epp(config).response_timeout = Some(RESPONSE_TIMEOUT);
        adjust(config);
    })
    .await
}

fn plan(framing: Framing, kind: &str) -> Plan {
    let fields = [("content-type", kind), ("content-encoding", "gzip"), ("x-own", "1")];
    let headers = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Plan { size: 5000, framing, headers, chunks: Lengths::Fixed(500), ..Plan::default() }
}

fn plans() -> [Plan; 3] {
    [
        plan(Framing::ContentLength, "application/json"),
        plan(Framing::Chunked, "application/json"),
        plan(Framing::Chunked, "text/event-stream"),
    ]
}

const WAYS_HERE: [(Front, SteeringMode); 3] = [WAYS[0], WAYS[3], WAYS[4]];

fn assert_blocked(response: &Response, what: &str) {
    assert_eq!((response.status(), response.read.end), (403, BodyEnd::Complete), "{what}: {}", response.text());
    assert_eq!(response.text(), BLOCKED, "{what}");
    let fields = ["content-type", "x-blocked", "content-encoding", "x-own"].map(|name| response.header(name));
    assert_eq!(fields, [Some("text/plain"), Some("1"), None, Some("1")], "{what}");
    assert!(response.header("content-length").is_none_or(|length| length == BLOCKED.len().to_string()), "{what}");
}

/// Status, fields and body of one reply; again and again, though the EPP is known to be late.
#[tokio::test]
async fn reply_to_the_head_applies_as_a_whole_however_late() {
    for back in [Back::Http1, Back::Http2] {
        for way in WAYS_HERE {
            for after in [Duration::ZERO, LATE] {
                for does in [Does::Blocks(after), Does::Changes(after)] {
                    let what = format!("{back:?} {way:?} {does:?}");
                    let scene = scene(back, way, does, |_| {}).await;
                    for plan in plans() {
                        for _ in 0..2 {
                            assert_blocked(&scene.request(&plan.request()).await, &what);
                        }
                    }
                    let status = || scene.agent.count("penstock_requests_total", &["status=\"403\""]);
                    eventually(SOON, || status() == 6).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn answer_for_the_body_releases_the_head_without_a_reply() {
    for way in WAYS_HERE {
        let scene = scene(Back::Http1, way, Does::IgnoresHead, |_| {}).await;
        for plan in plans() {
            for _ in 0..3 {
                let response = scene.request(&plan.request()).await;
                assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{way:?}");
                plan.checker().feed(&response.body).unwrap();
                assert_eq!((response.body.len(), response.header("content-encoding")), (5000, Some("gzip")));
            }
        }
    }
}

/// What the client gets is never the endpoint's head with the EPP's body.
#[tokio::test]
async fn body_without_its_head_breaks_the_response_off() {
    for way in WAYS_HERE {
        for does in [Does::BlocksAfterAnswer, Does::BlocksAfterReply, Does::BlocksExcessively] {
            for plan in plans() {
                let what = format!("{way:?} {does:?} {:?}", plan.framing);
                let scene = scene(Back::Http1, way, does.clone(), |_| {}).await;
                let mut client = scene.client().await;
                client.send(&plan.request()).await.unwrap();
                let status = client.head().await.unwrap().status;
                let mut body = Vec::new();
                let read = client.read_body(|bytes| {
                    body.extend_from_slice(bytes);
                    Ok(())
                });
                let end = read.await.unwrap().end;
                assert!(status == 503 || status == 200 && end != BodyEnd::Complete, "{what}: {status} {end:?}");
                assert!(!String::from_utf8_lossy(&body).contains(BLOCKED), "{what}");
                let counted = || scene.agent.count("penstock_epp_bodies_unanswered_total", &["reason=\"broken_off\""]);
                eventually(SOON, || counted() == 1).await;
            }
        }
    }
}

/// CONTINUE_AND_REPLACE without a body: the endpoint's body goes out at once, and the EPP is told nothing more.
#[tokio::test]
async fn declined_body_goes_out_as_it_is() {
    let unchanged =
        [None, Some(BodyMutation::default()), Some(BodyMutation { mutation: Some(Mutation::ClearBody(false)) })];
    for way in WAYS_HERE {
        for after in [Duration::ZERO, LATE] {
            for mutation in unchanged.clone() {
                let does = Does::Declines(after, mutation);
                let what = format!("{way:?} {does:?}");
                let scene = scene(Back::Http1, way, does, |config| {
                    config.pools[0].failure_mode = FailureMode::Closed;
                    if after.is_zero() {
                        epp(config).response_timeout = Some(SOON);
                    }
                })
                .await;
                for plan in plans() {
                    let response = scene.request(&plan.request()).await;
                    assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{what}");
                    plan.checker().feed(&response.body).unwrap();
                    assert_eq!((response.body.len(), response.header("x-declined")), (5000, Some("1")), "{what}");
                }
                eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 3).await;
                if after.is_zero() {
                    assert!(
                        scene.epp.streams().iter().all(|stream| !stream.kinds().contains(&"response_body")),
                        "{what}"
                    );
                }
                assert_eq!(scene.agent.count("penstock_epp_failures_total", &[]), 0, "{what}");
                assert_eq!(scene.agent.count("penstock_epp_bodies_unanswered_total", &[]), 0, "{what}");
            }
        }
    }
}

/// Answers for pieces that were on their way when the EPP declined: the pieces have gone out.
#[tokio::test]
async fn answers_after_a_declined_body_change_nothing() {
    let answers = [
        reply::response_body_unchanged(),
        reply::response_body(Bytes::from_static(b"more"), false),
        reply::response_body(Bytes::from_static(b"end"), true),
    ];
    for way in WAYS_HERE {
        for answer in &answers {
            let scene = scene(Back::Http1, way, Does::DeclinesAndAnswers(answer.clone()), |_| {}).await;
            // They come before the second half of the body.
            let fault = Some(Fault { after: 2500, kind: FaultKind::StallMs(700) });
            for plan in plans().map(|plan| Plan { fault, ..plan }) {
                let response = scene.request(&plan.request()).await;
                assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{way:?} {answer:?}");
                plan.checker().feed(&response.body).unwrap();
                assert_eq!(response.body.len(), 5000, "{way:?} {answer:?}");
            }
        }
    }
}

/// The endpoint breaks off before a byte of the body, while the head is held: the client gets an error instead of a cut response.
#[tokio::test]
async fn response_without_a_byte_of_its_body_is_an_error() {
    for way in WAYS_HERE {
        let scene = scene(Back::Http1, way, Does::IsSilent, |_| {}).await;
        for plan in plans() {
            let fault = Some(Fault { after: 0, kind: FaultKind::Close });
            let response = scene.request(&Plan { fault, ..plan }.request()).await;
            assert_eq!((response.status(), response.read.end), (502, BodyEnd::Complete), "{way:?}");
        }
    }
}

/// The head does not go out before the failure mode has decided.
#[tokio::test]
async fn silent_picker_holds_the_head_for_the_idle_time() {
    assert_held_for_the_idle_time(&Does::IsSilent, 5000).await;
}

/// More than its window: then the endpoint is not read either.
#[tokio::test]
async fn picker_that_stops_reading_holds_the_head_for_the_idle_time() {
    assert_held_for_the_idle_time(&Does::Stalls, 3 << 20).await;
}

async fn assert_held_for_the_idle_time(does: &Does, size: u64) {
    for way in WAYS_HERE {
        for (failure_mode, status) in [(FailureMode::Closed, 503), (FailureMode::Open, 200)] {
            let scene = scene(Back::Http1, way, does.clone(), |config| {
                config.pools[0].failure_mode = failure_mode;
                config.timeouts.idle = Some(Duration::from_millis(500));
            })
            .await;
            for plan in plans().map(|plan| Plan { size, chunks: Lengths::Fixed(50_000), ..plan }) {
                let response = scene.request(&plan.request()).await;
                assert_eq!((response.status(), response.read.end), (status, BodyEnd::Complete), "{way:?}");
                if status == 200 {
                    plan.checker().feed(&response.body).unwrap();
                    assert_eq!(response.body.len() as u64, size);
                }
            }
        }
    }
}
