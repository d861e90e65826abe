//! Tests of the EPP client against scripted EPPs.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{FutureExt as _, poll_fn};
use http::{HeaderMap, StatusCode, request::Parts};
use penstock_proto::ext_proc::{processing_request::Request, processing_response::Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc::unbounded_channel,
};
use tonic::transport::Server;

use super::*;
use crate::{
    budget::Budget,
    config::{Epp, ServerTls},
    picker::{
        error::AskAgain,
        exchange::{Body, Decision, Event, Outcome},
        message,
    },
    tee::Rest,
};

#[path = "epp.rs"]
mod epp;
#[path = "going_away.rs"]
mod going_away;
use epp::{serve, serve_on};

fn limits() -> ExchangeLimits {
    let epp = crate::config::EppLimits { fields: 512, bytes: 1 << 17, messages: 4096, metadata_bytes: 1 << 18 };
    ExchangeLimits { replaced_body: 1 << 20, memory: Budget::unlimited(), epp }
}
const A: &str = "10.0.0.1:8000";

fn epp_settings() -> Epp {
    Epp { connect_timeout: Duration::from_secs(5), response_timeout: None, ..Epp::new("127.0.0.1:9002") }
}

fn client_to(address: &str, tls: ServerTls, connect_timeout: Duration) -> EppClient {
    let epp = Epp { addresses: vec![address.to_owned()], tls, connect_timeout, ..epp_settings() };
    EppClient::new(Arc::new(Replicas::new(&epp).unwrap()))
}

fn client(address: SocketAddr) -> EppClient {
    client_to(&address.to_string(), ServerTls::Off, Duration::from_secs(5))
}

fn post() -> Parts {
    http::Request::post("/v1/completions").header("host", "llm").body(()).unwrap().into_parts().0
}

/// Fails if `what` takes longer than any correct run.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("in time")
}

fn addresses(list: &[&str]) -> Vec<SocketAddr> {
    list.iter().map(|address| address.parse().unwrap()).collect()
}

#[track_caller]
fn picked(outcome: Result<Outcome, PickError>) -> Decision {
    match outcome {
        Ok(Outcome::Picked(decision)) => decision,
        other => panic!("no decision: {other:?}"),
    }
}

/// A stream to the first replica.
fn open(client: &EppClient, has_body: bool) -> PickStream {
    client.open(&client.replicas.snapshot().replicas[0], &post(), has_body, None, limits(), None)
}

/// Asks about a request without a body.
async fn ask(client: &EppClient) -> Result<Outcome, PickError> {
    soon(open(client, false).outcome()).await
}

#[tokio::test]
async fn picks_by_header_and_by_metadata() {
    let by_header = serve(Server::builder(), async |mut call| {
        call.next().await;
        call.pick("10.0.0.1:8000, [fd00::1]:8000").await;
    });
    let by_metadata = serve(Server::builder(), async |mut call| {
        call.next().await;
        call.pick_by_metadata("10.0.0.1:8000,[fd00::1]:8000").await;
    });
    for address in [by_header.await, by_metadata.await] {
        let decision = picked(ask(&client(address)).await);
        assert_eq!(decision.endpoints, addresses(&[A, "[fd00::1]:8000"]));
        assert_eq!(decision.body, Body::Original);
    }
}

#[tokio::test]
async fn body_pieces_arrive_while_the_client_uploads() {
    let (seen, mut arrived) = unbounded_channel();
    let address = serve(Server::builder(), move |mut call| {
        let seen = seen.clone();
        async move {
            let Request::RequestHeaders(_) = call.next().await else { panic!("no head") };
            loop {
                let Request::RequestBody(piece) = call.next().await else { panic!("no body") };
                call.keep_piece().await;
                seen.send(piece.body).unwrap();
                if piece.end_of_stream {
                    return call.pick(A).await;
                }
            }
        }
    })
    .await;
    let client = client(address);
    // The first stream opens the connection. On an open one, pieces leave without waiting for a reply.
    let mut first = open(&client, true);
    assert_eq!(soon(first.send_body("first".into(), true)).await.unwrap(), None);
    picked(soon(first.outcome()).await);
    assert_eq!(soon(arrived.recv()).await.unwrap(), "first");
    let mut stream = open(&client, true);
    for (piece, end) in [("one", false), ("two", false), ("three", true)] {
        assert_eq!(soon(stream.send_body(piece.into(), end)).await.unwrap(), None);
        assert_eq!(soon(arrived.recv()).await.unwrap(), piece);
    }
    assert_eq!(picked(soon(stream.outcome()).await).body, Body::Original);
}

#[tokio::test]
async fn epp_that_replaces_the_body_after_reading_it_is_supported() {
    let address = serve(Server::builder(), async |mut call| {
        let mut body = Bytes::from(call.body().await);
        call.pick(A).await;
        while !body.is_empty() {
            let piece = body.split_to(body.len().min(62_000));
            call.stream_body(piece, body.is_empty()).await;
        }
    })
    .await;
    // More than fits into the queue and a server's initial window.
    let body: Bytes = (0..900_000_u32).map(|n| n as u8).collect();
    let mut stream = open(&client(address), true);
    for piece in body.chunks(200_000) {
        assert_eq!(soon(stream.send_body(body.slice_ref(piece), false)).await.unwrap(), None);
    }
    let mut outcome = soon(stream.send_body(Bytes::new(), true)).await.transpose();
    if outcome.is_none() {
        outcome = Some(soon(stream.outcome()).await);
    }
    let Body::Replaced(pieces) = picked(outcome.unwrap()).body else { panic!("not replaced") };
    assert!(pieces.concat() == body);
}

#[tokio::test]
async fn blocked_send_ends_with_the_immediate_reply() {
    let address = serve(Server::builder(), async |mut call| {
        call.next().await;
        // Reads one more message and then lets the window fill up.
        call.next().await;
        call.immediate(429).await;
        std::future::pending::<()>().await;
    })
    .await;
    let mut stream = open(&client(address), true);
    let piece = Bytes::from(vec![b'x'; 32 << 20]);
    let Some(Outcome::Immediate(reply)) = soon(stream.send_body(piece, false)).await.unwrap() else { panic!("picked") };
    assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn cancelled_send_loses_no_byte() {
    let (gate, opened) = tokio::sync::watch::channel(false);
    let address = serve(Server::builder(), move |mut call| {
        let mut opened = opened.clone();
        async move {
            opened.wait_for(|open| *open).await.unwrap();
            let body = call.body().await;
            call.pick(&format!("10.0.0.1:{}", body.len() >> 10)).await;
            call.keep_piece().await;
            call.stream_body(Bytes::new(), true).await;
        }
    })
    .await;
    let mut stream = open(&client(address), true);
    let piece = Bytes::from(vec![b'x'; 8 << 20]);
    assert!(stream.send_body(piece, false).now_or_never().is_none(), "more than the queue takes");
    gate.send(true).unwrap();
    assert_eq!(soon(stream.send_body(Bytes::new(), true)).await.unwrap(), None);
    assert_eq!(picked(soon(stream.outcome()).await).endpoints, addresses(&["10.0.0.1:8192"]));
}

#[tokio::test]
async fn stream_that_ends_without_a_pick_is_an_error() {
    let closes = serve(Server::builder(), async |mut call| drop(call.next().await)).await;
    let fails = serve(Server::builder(), async |mut call| {
        call.next().await;
        call.reply(Err(tonic::Status::failed_precondition("not like this"))).await;
    })
    .await;
    let fails_late = serve(Server::builder(), async |mut call| {
        call.next().await;
        call.keep_piece().await;
        call.reply(Err(tonic::Status::unavailable("not the leader"))).await;
    })
    .await;
    let answers = serve(Server::builder(), async |call| call.immediate(503).await).await;
    for (address, reason, again) in [
        (closes, "closed_without_pick", AskAgain::Never),
        (fails, "failed_precondition", AskAgain::Never),
        (fails_late, "unavailable", AskAgain::OtherReplica),
    ] {
        let mut stream = open(&client(address), true);
        let error = soon(stream.outcome()).await.unwrap_err();
        assert_eq!((error.reason(), error.retry()), (reason, again), "{error}");
    }
    let Ok(Outcome::Immediate(reply)) = ask(&client(answers)).await else { panic!("no answer") };
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn head_reply_alone_is_a_pick_at_the_deadline() {
    let address = serve(Server::builder(), async |mut call| {
        call.body().await;
        call.pick(A).await;
        call.send(Response::ResponseHeaders(epp::head(&[]))).await;
        std::future::pending::<()>().await;
    })
    .await;
    let client = client(address);
    let mut stream = open(&client, true);
    assert_eq!(stream.at_deadline().unwrap_err().reason(), "deadline");
    let mut stream = open(&client, true);
    assert_eq!(soon(stream.send_body(Bytes::new(), true)).await.unwrap(), None);
    // The reply to the response's head follows the pick, so the pick has arrived. It decides nothing itself.
    let event = soon(poll_fn(|cx| stream.poll_event(cx))).await;
    assert!(matches!(event, Some(Ok(Event::ResponseHead(_)))), "{event:?}");
    assert_eq!(picked(stream.at_deadline()).endpoints, addresses(&[A]));
}

#[tokio::test]
async fn connection_to_a_dead_epp_fails_at_once_and_is_retried() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let client = client(address);
    for _ in 0..2 {
        let error = ask(&client).await.unwrap_err();
        assert_eq!((error.reason(), error.retry()), ("connect", AskAgain::OtherReplica), "{error}");
    }
    let listener = TcpListener::bind(address).await.unwrap();
    serve_on(listener, Server::builder(), async |call| call.pick(A).await);
    assert_eq!(picked(ask(&client).await).endpoints, addresses(&[A]));
}

#[tokio::test]
async fn requests_that_wait_for_a_connection_fail_together() {
    // Accepts TCP connections and sends nothing, so that the TLS handshake hangs.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let client = client_to(&address, ServerTls::Insecure, Duration::from_millis(250));
    let start = Instant::now();
    let asked = futures_util::future::join_all((0..40).map(|_| ask(&client))).await;
    assert!(asked.iter().all(|outcome| outcome.as_ref().is_err_and(|error| error.reason() == "connect")));
    assert!(start.elapsed() < Duration::from_secs(5), "one after the other: {:?}", start.elapsed());
}

/// The HTTP/2 SETTINGS frame without settings.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

#[tokio::test]
async fn lost_connection_is_not_reused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = client(listener.local_addr().unwrap());
    let mut waiting: Vec<_> = (0..3).map(|_| open(&client, false)).collect();
    let lose = async {
        let (mut connection, _) = listener.accept().await.unwrap();
        connection.read_exact(&mut [0; 24]).await.unwrap();
        connection.write_all(&SETTINGS).await.unwrap();
    };
    let outcomes = futures_util::future::join_all(waiting.iter_mut().map(PickStream::outcome));
    let (outcomes, ()) = soon(async { tokio::join!(outcomes, lose) }).await;
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert_eq!((error.reason(), error.retry()), ("reset", AskAgain::SameReplicaOnce), "{error}");
    }
    serve_on(listener, Server::builder(), async |call| call.pick(A).await);
    assert_eq!(picked(ask(&client).await).endpoints, addresses(&[A]));
}

/// A server that ends may have accepted connections that it does not serve.
#[tokio::test]
async fn connection_lost_before_its_settings_is_made_again_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = client(listener.local_addr().unwrap());
    let lose = async {
        for _ in 0..2 {
            let (mut connection, _) = listener.accept().await.unwrap();
            connection.read_exact(&mut [0; 24]).await.unwrap();
        }
    };
    let (outcome, ()) = soon(async { tokio::join!(ask(&client), lose) }).await;
    let error = outcome.unwrap_err();
    assert_eq!((error.reason(), error.retry()), ("connect", AskAgain::SameReplicaOnce), "{error}");
    let (outcome, ()) = soon(async {
        tokio::join!(ask(&client), async {
            let (mut connection, _) = listener.accept().await.unwrap();
            connection.read_exact(&mut [0; 24]).await.unwrap();
            drop(connection);
            serve_on(listener, Server::builder(), async |call| call.pick(A).await);
        })
    })
    .await;
    assert_eq!(picked(outcome).endpoints, addresses(&[A]));
}

#[tokio::test]
async fn response_head_and_end_reach_the_epp() {
    let (seen, mut end) = unbounded_channel();
    let address = serve(Server::builder(), move |mut call| {
        let seen = seen.clone();
        async move {
            call.next().await;
            call.pick(A).await;
            call.next().await;
            call.send(Response::ResponseHeaders(epp::head(&[("x-session-token", "t")]))).await;
            seen.send((call.message().await, call.message().await)).unwrap();
        }
    })
    .await;
    let mut stream = open(&client(address), false);
    picked(soon(stream.outcome()).await);
    let wait = Some(Duration::from_secs(20));
    let reply = stream.response_headers(StatusCode::OK, &HeaderMap::new(), A.parse().unwrap(), false, wait).await;
    let ResponseReply::Mutation(Some(mutation)) = reply else { panic!("{reply:?}") };
    assert_eq!(mutation.set_headers[0].header.as_ref().unwrap().raw_value, "t");
    stream.finish(Rest::default());

    let (last, close) = soon(end.recv()).await.unwrap();
    let last = last.unwrap().expect("a last message");
    let Some(Request::ResponseBody(body)) = last.request else { panic!("no response body") };
    assert!(body.end_of_stream);
    let metadata = last.metadata_context.expect("metadata").filter_metadata;
    assert!(format!("{:?}", metadata["envoy.lb"]).contains(A));
    assert_eq!(close.expect("a half-close, not a reset"), None);
}

#[tokio::test]
async fn response_body_is_sent_as_the_epp_takes_it() {
    const PIECES: u8 = 40;
    let (seen, mut told) = unbounded_channel();
    let (take, may_take) = tokio::sync::watch::channel(false);
    let address = serve(Server::builder(), move |mut call| {
        let (seen, mut may_take) = (seen.clone(), may_take.clone());
        async move {
            call.next().await;
            call.pick(A).await;
            let Request::ResponseHeaders(_) = call.next().await else { panic!("no response") };
            may_take.wait_for(|may| *may).await.unwrap();
            while let Ok(Some(message)) = call.message().await {
                let Some(Request::ResponseBody(piece)) = message.request else { panic!("no response body") };
                seen.send((piece.body, piece.end_of_stream)).unwrap();
            }
        }
    })
    .await;
    let mut stream = open(&client(address), false);
    picked(soon(stream.outcome()).await);
    stream.response_headers(StatusCode::OK, &HeaderMap::new(), A.parse().unwrap(), false, None).await;
    // Together larger than the EPP's window.
    let mut pieces: Vec<_> = (0..PIECES).map(|n| Bytes::from(vec![n; message::PIECE])).collect();
    let mut left = pieces.clone();
    left.reverse();
    let taken = std::cell::Cell::new(0);
    let mut next = || left.pop().inspect(|_| taken.set(taken.get() + 1));
    assert!(stream.evicted_while_sending(&mut next).now_or_never().is_none());
    assert!(taken.get() < PIECES, "{} pieces were sent to an EPP that reads none", taken.get());
    take.send(true).unwrap();
    tokio::select! {
        _ = stream.evicted_while_sending(&mut next) => panic!("no eviction"),
        () = soon(async { while told.len() < usize::from(PIECES / 2) { tokio::task::yield_now().await } }) => {}
    }
    left.reverse();
    stream.finish(Rest { pieces: left });
    let mut all = Vec::new();
    while let Some((piece, end)) = soon(told.recv()).await {
        all.push(piece);
        if end {
            break;
        }
    }
    // The end comes with the last piece, or alone.
    pieces.extend((all.len() > pieces.len()).then(Bytes::new));
    assert!(all == pieces);
}

#[tokio::test]
async fn immediate_reply_after_the_pick_evicts() {
    let address = serve(Server::builder(), async |mut call| {
        call.next().await;
        call.pick(A).await;
        let Request::ResponseHeaders(_) = call.next().await else { panic!("no response") };
        call.send(Response::ResponseHeaders(epp::head(&[]))).await;
        call.immediate(429).await;
    })
    .await;
    let client = client(address);
    for wait in [None, Some(Duration::from_secs(20))] {
        let mut stream = open(&client, false);
        picked(soon(stream.outcome()).await);
        let served = A.parse().unwrap();
        let reply = stream.response_headers(StatusCode::OK, &HeaderMap::new(), served, false, wait).await;
        assert_eq!(matches!(reply, ResponseReply::Mutation(Some(_))), wait.is_some());
        assert_eq!(soon(stream.evicted()).await.status, StatusCode::TOO_MANY_REQUESTS);
        stream.finish(Rest::default());
    }
}

#[tokio::test]
async fn response_continues_after_the_stream_ended() {
    for error in [None, Some(tonic::Status::internal("gone"))] {
        let address = serve(Server::builder(), move |mut call| {
            let error = error.clone();
            async move {
                call.next().await;
                call.pick(A).await;
                call.next().await;
                if let Some(error) = error {
                    call.reply(Err(error)).await;
                }
            }
        })
        .await;
        let mut stream = open(&client(address), false);
        picked(soon(stream.outcome()).await);
        let wait = Some(Duration::from_secs(20));
        let served = A.parse().unwrap();
        let reply = stream.response_headers(StatusCode::OK, &HeaderMap::new(), served, false, wait).await;
        assert_eq!(reply, ResponseReply::Mutation(None));
        assert!(stream.evicted().now_or_never().is_none());
    }
}

/// tonic reports a cancellation to servers as an orderly end, so this test reads HTTP/2 itself.
#[tokio::test]
async fn dropped_stream_is_reset_and_finished_stream_half_closed() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = client(listener.local_addr().unwrap());
    let (seen, mut events) = unbounded_channel();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(tcp).await.unwrap();
        while let Some(Ok((request, respond))) = connection.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut body = request.into_body();
                loop {
                    // The end may be a separate empty frame.
                    let data = body.data().await.transpose().map(|data| data.is_some_and(|data| !data.is_empty()));
                    let over = !matches!(data, Ok(true));
                    seen.send(data).unwrap();
                    if over {
                        break;
                    }
                }
                drop(respond);
            });
        }
    });
    for finish in [false, true] {
        let mut stream = open(&client, true);
        tokio::select! {
            _ = stream.outcome() => panic!("no outcome"),
            started = soon(events.recv()) => assert!(started.unwrap().unwrap()),
        }
        if finish {
            stream.finish(Rest::default());
        } else {
            drop(stream);
        }
        match soon(events.recv()).await.unwrap() {
            Ok(data) => assert_eq!((data, finish), (false, true)),
            Err(error) => assert_eq!((error.reason(), finish), (Some(h2::Reason::CANCEL), false)),
        }
    }
}
