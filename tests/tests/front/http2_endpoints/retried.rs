//! Streams that an endpoint refuses or ends early, closed connections, and endpoints that cannot be reached.

use std::net::SocketAddr;

use h2::Reason;
use penstock_tests::stage::put;

use super::*;

/// Running streams on a connection after GOAWAY may finish; new requests use another connection.
#[tokio::test]
async fn connection_after_goaway_gets_no_requests() {
    let server = server(Http2Options::default()).await;
    let agent = agent(server.addr, |_| {});
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    let plan = Plan { size: 8 << 20, ..Plan::default() };
    let mut running = client.send(&plan.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    let mut other = Http2Client::connect(agent.addr).await.unwrap();
    for round in 2..5 {
        server.leave();
        for _ in 0..5 {
            assert_eq!(other.request(&plain("x")).await.unwrap().status(), 200);
        }
        eventually(SOON, || server.connections_accepted() >= round).await;
    }
    let mut checker = plan.checker();
    let read = running.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
}

/// Whether or not the agent has noticed that the endpoint stopped.
#[tokio::test]
async fn restarted_endpoint_is_dialled_again() {
    let mut first = server(Http2Options::default()).await;
    let addr = first.addr;
    let agent = agent(addr, |config| config.pools[0].ejection.failures = 0);
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&plain("x")).await.unwrap().status(), 200);
    for _ in 0..10 {
        first.stop();
        first = server(Http2Options { listen: addr, ..Http2Options::default() }).await;
        assert_eq!(client.request(&plain("x")).await.unwrap().echoed().count, 1);
    }
}

/// A request that was refused unprocessed is sent again, with its body.
#[tokio::test]
async fn refused_stream_is_retried() {
    let server = server(Http2Options { refuses: 2, ..Http2Options::default() }).await;
    let agent = agent(server.addr, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    let body = json("m", 200_000);
    let seen = client.request(&echo(body.clone())).await.unwrap().echoed();
    assert_eq!((seen.body_length, seen.body_hash), (body.len() as u64, Fnv::of(&body).value()));
    assert_eq!((server.refused(), server.requests()), (2, 1));
    assert_eq!(agent.count("penstock_endpoint_retries_total", &["reason=\"stream_refused\""]), 2);
}

/// The number of attempts is limited.
#[tokio::test]
async fn endpoint_refusing_every_stream_counts_as_failed() {
    let server = server(Http2Options { refuses: u64::MAX, ..Http2Options::default() }).await;
    let agent = agent(server.addr, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&echo(json("m", 10))).await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
    assert!(server.refused() < 20, "{}", server.refused());
}

/// GOAWAY names the unprocessed requests, which are retried.
#[tokio::test]
async fn streams_unprocessed_at_goaway_are_retried() {
    let addr = scripted_endpoint(|number, mut frames| async move {
        let head = frames.find(|frame| frame.kind == kind::HEADERS).await?.unwrap();
        if number == 0 {
            frames.send(&Frame::new(kind::GOAWAY, 0, 0, [0; 8])).await?;
        } else {
            frames.send(&ok_head(head.stream)).await?;
        }
        frames.find(|_| false).await?;
        Ok(())
    })
    .await;
    let agent = agent(addr, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&echo(json("m", 50_000))).await.unwrap().status(), 200);
    assert_eq!(agent.count("penstock_endpoint_retries_total", &["reason=\"stream_refused\""]), 1);
}

/// A request that GOAWAY declares processed is not retried.
#[tokio::test]
async fn stream_processed_at_goaway_is_not_retried() {
    let addr = scripted_endpoint(|_, mut frames| async move {
        let head = frames.find(|frame| frame.kind == kind::HEADERS).await?.unwrap();
        frames.send(&Frame::new(kind::GOAWAY, 0, 0, [0, 0, 0, 1, 0, 0, 0, 0])).await?;
        frames.send(&ok_head(head.stream)).await?;
        frames.find(|_| false).await?;
        Ok(())
    })
    .await;
    let agent = agent(addr, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    for _ in 0..3 {
        assert_eq!(client.request(&echo(json("m", 50_000))).await.unwrap().status(), 200);
    }
    assert_eq!(agent.count("penstock_endpoint_retries_total", &[]), 0);
}

#[tokio::test]
async fn unreachable_endpoint_is_followed_by_next_in_list() {
    let (dead, alive) = (Refusing::new().unwrap(), server(Http2Options::default()).await);
    let both = [dead.addr, alive.addr];
    let epp = ScriptedEpp::start(LlmdRouter::over(Endpoints::new(&both).offering(2))).await.unwrap();
    let pool = Pool { app_protocol: AppProtocol::H2c, ..epp_pool(&both, epp.addr, FailureMode::Closed) };
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    for mut client in [Client::connect(agent.addr).await.unwrap(), Client::connect(agent.addr).await.unwrap()] {
        let body = json("m", 100_000);
        let response = client.request(&echo(body.clone())).await.unwrap();
        assert_eq!(response.served_by(), Some(alive.addr));
        assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
    }
}

/// GOAWAY counts the request as processed, then the connection ends: it may have been executed.
#[tokio::test]
async fn request_below_goaway_last_stream_is_executed_once() {
    let requests = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&requests);
    let addr = scripted_endpoint(move |_, mut frames| {
        let counted = std::sync::Arc::clone(&counted);
        async move {
            let head = frames.find(|frame| frame.kind == kind::HEADERS).await?.unwrap();
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            // ENHANCE_YOUR_CALM, as gRPC servers respond to too many PINGs.
            let [a, b, c, d] = head.stream.to_be_bytes();
            frames.send(&Frame::new(kind::GOAWAY, 0, 0, [a, b, c, d, 0, 0, 0, 11])).await
        }
    })
    .await;
    let agent = agent(addr, |config| config.pools[0].retry.attempts = 2);
    let mut client = Client::connect(agent.addr).await.unwrap();
    for executed in 1..=3 {
        let response = client.request(&echo(json("m", 50_000))).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
        assert_eq!(requests.load(std::sync::atomic::Ordering::Relaxed), executed);
    }
}

/// How an endpoint ends a request that it has read whole, without a response.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Closes the connection, without GOAWAY.
    Close,
    /// Resets the connection.
    Reset,
    Stream(Reason),
}

const ENDS: [End; 6] = [
    End::Close,
    End::Reset,
    End::Stream(Reason::NO_ERROR),
    End::Stream(Reason::INTERNAL_ERROR),
    End::Stream(Reason::CANCEL),
    End::Stream(Reason::ENHANCE_YOUR_CALM),
];

/// Ends each request like this, but answers the first of the first connection if `kept`. Returns also the number of ended requests.
async fn ending(end: End, kept: bool) -> (SocketAddr, Arc<AtomicU64>) {
    let taken = Arc::<AtomicU64>::default();
    let counted = Arc::clone(&taken);
    let is_last = |frame: &Frame| matches!(frame.kind, kind::HEADERS | kind::DATA) && frame.flags & END_STREAM != 0;
    let addr = scripted_endpoint(move |number, mut frames| {
        let taken = Arc::clone(&counted);
        async move {
            if let Some(first) = if kept && number == 0 { frames.find(is_last).await? } else { None } {
                frames.send(&ok_head(first.stream)).await?;
            }
            while let Some(last) = frames.find(is_last).await? {
                taken.fetch_add(1, Relaxed);
                match end {
                    End::Close => return Ok(()),
                    End::Reset => return frames.reset(),
                    End::Stream(reason) => frames.send(&Frame::reset(last.stream, reason.into())).await?,
                }
            }
            Ok(())
        }
    })
    .await;
    (addr, taken)
}

/// On a new and on a reused connection, with a short body and one of several frames.
#[tokio::test]
async fn request_ended_without_response_is_executed_again_only_if_idempotent() {
    for (end, kept, length) in ENDS.into_iter().flat_map(|end| {
        [(false, 100), (false, 50_000), (true, 100), (true, 50_000)].map(|(kept, length)| (end, kept, length))
    }) {
        for idempotent in [false, true] {
            let case = format!("{end:?}, kept: {kept}, {length} bytes, idempotent: {idempotent}");
            let ((bad, taken), good) = (ending(end, kept).await, server(Http2Options::default()).await);
            let both = [bad, good.addr];
            let named = both.map(|addr| addr.to_string()).join(",");
            let epp = ScriptedEpp::start(Answering::new(move |_| vec![reply::pick(&named, &[])])).await.unwrap();
            let pool = Pool { app_protocol: AppProtocol::H2c, ..epp_pool(&both, epp.addr, FailureMode::Closed) };
            let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
                config.listen.workers = 1;
                config.pools[0].ejection.failures = 0;
            });
            let mut client = Client::connect(agent.addr).await.unwrap();
            if kept {
                assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200, "{case}");
            }
            let body = json("m", length);
            let retries = || agent.count("penstock_endpoint_retries_total", &["reason=\"closed_before_response\""]);
            let refused = || agent.count("penstock_endpoint_retries_refused_total", &["reason=\"method\""]);
            if idempotent {
                let response = client.request(&put(body.clone())).await.unwrap();
                assert_eq!(response.served_by(), Some(good.addr), "{case}: {}", response.text());
                assert_eq!(response.echoed().body_hash, Fnv::of(&body).value(), "{case}");
                // A connection that ends may have been too old, so the same endpoint is tried on another one.
                let tries = if kept && !matches!(end, End::Stream(_)) { 2 } else { 1 };
                assert_eq!((taken.load(Relaxed), good.requests()), (tries, 1), "{case}");
                assert_eq!((retries(), refused()), (tries, 0), "{case}");
            } else {
                let response = client.request(&echo(body)).await.unwrap();
                let found = (response.status(), response.error_code());
                assert_eq!(found, (502, "endpoint_closed".to_owned()), "{case}: {}", response.text());
                assert_eq!((taken.load(Relaxed), good.requests()), (1, 0), "{case}");
                assert_eq!((retries(), refused()), (0, 1), "{case}");
            }
        }
    }
}
