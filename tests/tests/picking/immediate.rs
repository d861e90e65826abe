//! Immediate replies and evictions by the picker.

use std::sync::Arc;

use penstock_agent::config::FailureMode;
use penstock_proto::ext_proc::{
    BodyMutation, HttpHeaders, body_mutation::Mutation, common_response::ResponseStatus, processing_response::Response,
};
use penstock_tests::{
    BodyEnd, Plan, Stage,
    client::Pace,
    eventually,
    model_server::{Fault as ServerFault, FaultKind},
    scripted_epp::{
        Answer, Answering, End, EvictAfter, Evicting, Exchange, Fault, Faulty, Harm, Moment, Production, Script,
        StreamEnd, reply,
    },
    stage::{echo, epp, json},
};
use tokio::sync::Notify;

use crate::SOON;

fn refusing(all: &[std::net::SocketAddr], moment: Moment) -> Faulty<Production> {
    Faulty::new(Production::new(all), Fault::At(moment, Harm::Immediate(429))).times(1)
}

fn evicting(all: &[std::net::SocketAddr], after: EvictAfter, now: &Arc<Notify>) -> Evicting<Production> {
    Evicting { inner: Production::new(all), after, now: Arc::clone(now) }
}

/// E5: forwarded as the picker sent them.
#[tokio::test]
async fn immediate_reply_status_fields_and_body_reach_client() {
    let fields = [("retry-after", "7"), ("x-why", "queue full"), ("content-type", "application/json")];
    let body = r#"{"error":"later"}"#;
    let mut stage = Stage::new(|_| Answering::new(move |_| vec![reply::immediate(429, &fields, body)])).await;
    for _ in 0..2 {
        let response = stage.request(&echo(json("m", 1000))).await;
        assert_eq!((response.status(), response.text().as_str()), (429, body));
        for (name, value) in fields {
            assert_eq!(response.header(name), Some(value));
        }
    }
    assert_eq!(stage.requests(), (0, 0));
}

/// The field says that the agent itself answered, and why.
#[tokio::test]
async fn picker_cannot_set_the_reason_of_the_agent() {
    const REASON: &[(&str, &str)] =
        &[("x-penstock-reason", "no_route"), ("X-Penstock-Reason", "no_route"), ("x-why", "1")];
    let mut stage = Stage::new(|_| Answering::new(|_| vec![reply::immediate(429, REASON, "later")])).await;
    let response = stage.request(&echo("{}")).await;
    let fields = (response.header("x-penstock-reason"), response.header("x-why"));
    assert_eq!((response.status(), fields), (429, (None, Some("1"))));

    struct Marking(String);
    #[tonic::async_trait]
    impl Script for Marking {
        async fn request_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
            exchange.send(reply::pick(&self.0, REASON)).await
        }

        async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
            exchange.send(reply::response_headers(REASON)).await
        }
    }
    let mut stage = Stage::new(|all| Marking(all[0].to_string())).await;
    let response = stage.request(&echo("")).await;
    let fields = (response.header("x-penstock-reason"), response.header("x-why"));
    assert_eq!(fields, (None, Some("1")));
    let seen = response.echoed();
    assert_eq!((seen.header("x-penstock-reason"), seen.header("x-why")), (None, Some("1")));
}

/// E5, E11: an immediate reply reaches the client in a pool that fails open too.
#[tokio::test]
async fn immediate_reply_in_open_pool_is_not_a_failure() {
    let mut stage = Stage::with(
        |all| refusing(all, Moment::RequestHeaders),
        |config| config.pools[0].failure_mode = FailureMode::Open,
    )
    .await;
    assert_eq!(stage.request(&echo("{}")).await.status(), 429);
    assert_eq!(stage.requests(), (0, 0));
}

/// E5: an eviction before the pick is the response.
#[tokio::test]
async fn immediate_reply_after_whole_body_keeps_connection() {
    let mut stage = Stage::new(|all| refusing(all, Moment::RequestBody(usize::MAX))).await;
    let response = stage.request(&echo(json("m", 200_000))).await;
    assert_eq!((response.status(), response.text().as_str()), (429, "request evicted by flow control"));
    assert_eq!(response.header("x-llm-d-request-dropped-reason"), Some("evicted"));
    assert_eq!(response.header("connection"), None);
    assert_eq!(stage.request(&echo(json("m", 200_000))).await.status(), 200);
}

#[tokio::test]
async fn immediate_reply_before_whole_body_stops_upload() {
    let mut stage = Stage::new(|all| refusing(all, Moment::RequestBody(1))).await;
    let wire = echo(json("m", 300_000)).wire("agent");
    stage.client.send_raw(&wire[..150_000]).await.unwrap();
    let response = stage.client.response().await.unwrap();
    assert_eq!((response.status(), response.header("connection")), (429, Some("close")));
    stage.client.until_end().await.unwrap();
    assert_eq!(stage.requests(), (0, 0));
}

/// E6: before the response head is sent.
#[tokio::test]
async fn eviction_before_response_head_reaches_client_as_response() {
    // Sent in place of the reply to the response head.
    let mut stage =
        Stage::with(|all| refusing(all, Moment::ResponseHeaders), |config| epp(config).response_timeout = Some(SOON))
            .await;
    let body = json("m", 100_000);
    assert_eq!(stage.request(&echo(body.clone())).await.status(), 429);
    eventually(SOON, || stage.one.connections_open() == 0).await;
    assert_eq!(stage.request(&echo(body)).await.status(), 200);
    assert_eq!(stage.agent.metric("penstock_evictions_total", &[]), 1.0);
}

/// E6: during the body, the endpoint and client connections break off (`broken.rs` covers every path).
#[tokio::test]
async fn eviction_during_response_breaks_it_off() {
    let now = Arc::new(Notify::new());
    let mut stage = Stage::new(|all| evicting(all, EvictAfter::ResponseHead, &now)).await;
    let stall = ServerFault { after: 5000, kind: FaultKind::Stall };
    let plan = Plan { size: 10_000, fault: Some(stall), ..Plan::default() };
    stage.client.send(&plan.request()).await.unwrap();
    assert_eq!(stage.client.head().await.unwrap().status, 200);
    now.notify_one();
    let mut checker = plan.checker();
    let read = stage.client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_ne!(read.end, BodyEnd::Complete);
    eventually(SOON, || stage.one.aborted() == 1 && stage.one.connections_open() == 0).await;
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::Script) == 1).await;
    assert_eq!(stage.agent.metric("penstock_evictions_total", &[]), 1.0);
}

/// E6: after dispatch, before the response.
#[tokio::test]
async fn eviction_after_dispatch_reaches_client_as_response() {
    let now = Arc::new(Notify::new());
    let mut stage = Stage::new(|all| evicting(all, EvictAfter::Pick, &now)).await;
    let mut plan = Plan::default();
    (plan.head.split_at, plan.head.pause_us) = (Some(0), 3_600_000_000);
    stage.client.send(&plan.request()).await.unwrap();
    eventually(SOON, || stage.one.requests() == 1).await;
    now.notify_one();
    let response = stage.client.response().await.unwrap();
    assert_eq!((response.status(), response.text().as_str()), (429, "request evicted by flow control"));
    eventually(SOON, || stage.one.connections_open() == 0).await;
}

/// RFC 9110 §15.3.6. The connection stays in step.
#[tokio::test]
async fn immediate_reply_205_has_no_content() {
    let mut stage = Stage::new(|_| Answering::new(|_| vec![reply::immediate(205, &[("x-why", "reset")], "no")])).await;
    for _ in 0..2 {
        let response = stage.request(&echo(json("m", 1000))).await;
        assert_eq!((response.status(), response.text().as_str()), (205, ""));
        assert_eq!((response.header("content-length"), response.header("content-type")), (Some("0"), None));
        assert_eq!(response.header("x-why"), Some("reset"));
    }
}

/// Replaces the body and evicts the request while the client still uploads.
struct Hasty(String);

#[tonic::async_trait]
impl Script for Hasty {
    async fn request_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        let mut message = reply::pick(&self.0, &[]);
        if let Some(Response::RequestHeaders(head)) = &mut message.response {
            let common = head.response.get_or_insert_default();
            common.set_status(ResponseStatus::ContinueAndReplace);
            common.body_mutation = Some(BodyMutation { mutation: Some(Mutation::Body("whole".into())) });
        }
        exchange.send(message).await?;
        exchange.send(reply::immediate(429, &[], "evicted")).await?;
        Err(End::Close)
    }
}

/// E6: not only after the upload.
#[tokio::test]
async fn eviction_after_an_early_decision_stops_upload() {
    let mut stage = Stage::new(|all| Hasty(all[0].to_string())).await;
    let wire = echo(json("m", 300_000)).wire("agent");
    stage.client.send_raw(&wire[..150_000]).await.unwrap();
    let response = stage.client.response().await.unwrap();
    assert_eq!((response.status(), response.header("connection")), (429, Some("close")));
    stage.client.until_end().await.unwrap();
    assert_eq!((stage.requests(), stage.agent.metric("penstock_evictions_total", &[])), ((0, 0), 1.0));
}
