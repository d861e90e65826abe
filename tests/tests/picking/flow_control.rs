//! llm-d's picker under load: it queues requests, and drops those without a place in the queue, giving the reason.

use std::time::Duration;

use penstock_tests::{
    Client, Stage,
    scripted_epp::{Answering, Fault, Faulty, Harm, LlmdRouter, Moment, header, reply},
    stage::{echo, json},
};

/// E13: with default settings a request may queue for seconds, and delays no other request.
#[tokio::test]
async fn request_queued_for_seconds_is_not_cut() {
    let queued = Fault::At(Moment::RequestBody(usize::MAX), Harm::Delay(Duration::from_millis(2500)));
    let stage =
        Stage::with(|all| Faulty::new(LlmdRouter::new(all), queued).times(1), |config| config.listen.workers = 1).await;
    let begin = std::time::Instant::now();
    let mut first = Client::connect(stage.agent.addr).await.unwrap();
    first.send(&echo(json("m", 100_000))).await.unwrap();
    penstock_tests::eventually(crate::SOON, || {
        stage.epp.streams().first().is_some_and(|stream| stream.request_body().1 == 1)
    })
    .await;
    let mut others = Client::connect(stage.agent.addr).await.unwrap();
    for _ in 0..20 {
        assert_eq!(others.request(&echo(json("m", 1000))).await.unwrap().status(), 200);
    }
    assert_eq!(stage.epp.streams_started(), 21);
    assert_eq!(first.response().await.unwrap().status(), 200);
    assert!(begin.elapsed() >= Duration::from_millis(2500));
    assert_eq!(stage.agent.count("penstock_epp_failures_total", &[]), 0);
}

/// E5: the client gets the picker's own reason, and its connection stays usable.
#[tokio::test]
async fn drop_reason_reaches_client() {
    const REASON: &str = "x-llm-d-request-dropped-reason";
    let mut stage = Stage::new(|_| {
        Answering::new(|exchange| {
            let why = header(&exchange.request_headers, "x-why").unwrap_or_default();
            let status = header(&exchange.request_headers, "x-status").unwrap_or_default().parse().unwrap_or(500);
            let body = format!("inference error: ResourceExhausted - {why}");
            vec![reply::immediate(status, &[(REASON, why), ("retry-after", "3")], &body)]
        })
    })
    .await;
    for (status, why) in [
        (429, "rejected-saturated"),
        (503, "rejected-no-endpoints"),
        (503, "rejected-ttl-expired"),
        (503, "rejected-context-cancelled"),
        (503, "rejected-shutting-down"),
        (429, "evicted"),
        (429, "evicted-queue-pressure"),
        (429, "evicted-priority"),
    ] {
        let request = echo(json("m", 1000)).header("x-why", why).header("x-status", status.to_string());
        let response = stage.request(&request).await;
        assert_eq!(
            (response.status(), response.header(REASON), response.header("retry-after")),
            (status, Some(why), Some("3"))
        );
        assert_eq!(response.text(), format!("inference error: ResourceExhausted - {why}"));
    }
    assert_eq!(stage.requests(), (0, 0));
    assert_eq!(stage.agent.count("penstock_client_connections", &[]), 1);
}
