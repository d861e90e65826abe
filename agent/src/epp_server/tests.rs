//! Tests the server on port 0 with the generated client, one test per behaviour that proxies rely on.

use std::{
    future::pending,
    pin::pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use penstock_proto::{
    core::{HeaderValueOption, Metadata},
    ext_proc::{
        BodySendMode, CommonResponse, HttpBody, HttpTrailers, ImmediateResponse, ProtocolConfiguration,
        StreamedBodyResponse, body_mutation::Mutation, external_processor_client::ExternalProcessorClient,
        processing_request::Request as Ask, processing_response::Response as Reply,
    },
    health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient},
};
use prost_types::{ListValue, Struct, Value, value::Kind};
use tokio::{net::TcpStream, sync::mpsc, task::JoinHandle, time::timeout};
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code,
    codegen::Service,
    transport::{Channel, Endpoint, Uri},
};

use super::*;
use crate::{
    config::{self, ServerTls},
    picker::message,
    server_tls,
};

mod bounded;
mod client;

use client::{DialTls, Epp, Exchange};

/// Limit for events that have to happen. No passing test waits for it.
const SOON: Duration = Duration::from_secs(10);
const BODY: &[u8] = br#"{"model":"llama","prompt":"hi"}"#;

fn response_end() -> Ask {
    Ask::ResponseBody(HttpBody { body: Bytes::new(), end_of_stream: true })
}

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8000))
}

fn config(endpoints: u8) -> EppServerConfig {
    EppServerConfig {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        endpoints: (1..=endpoints).map(endpoint).collect(),
        tls: EppServerTls::Off,
        max_inflight: None,
        delay: None,
        max_body: 10 << 20,
        session_headers: Vec::new(),
        client_ca: None,
        limits: EppServerLimits::default(),
    }
}

fn head(method: &str, end_of_stream: bool) -> Ask {
    let request = http::Request::builder().method(method).uri("/v1/completions").header("host", "pool");
    let request = request
        .header("x-request-id", "7")
        .header("content-length", "31")
        .header("cookie", "a")
        .header("cookie", "b")
        .header("x-gateway-destination-endpoint", "1.2.3.4:5");
    message::request_head(&request.body(()).unwrap().into_parts().0, end_of_stream)
}

fn set(options: &[HeaderValueOption]) -> Vec<(&str, &str)> {
    let fields = options.iter().filter_map(|option| option.header.as_ref());
    fields.map(|field| (field.key.as_str(), std::str::from_utf8(&field.raw_value).unwrap())).collect()
}

fn text(text: &str) -> Kind {
    Kind::StringValue(text.to_owned())
}

fn list(texts: &[&str]) -> Kind {
    Kind::ListValue(ListValue { values: texts.iter().map(|one| Value { kind: Some(text(one)) }).collect() })
}

#[tokio::test]
async fn request_without_body_is_answered_at_once() {
    let epp = Epp::start(config(2)).await;
    let mut exchange = epp.open().await;
    exchange.send(head("GET", true)).await;
    let (reply, destination) = exchange.header_reply().await;
    assert_eq!(destination, "10.0.0.1:8000,10.0.0.2:8000");
    assert!(reply.clear_route_cache);
    let set_headers = reply.header_mutation.unwrap().set_headers;
    assert_eq!(set(&set_headers), [("x-gateway-destination-endpoint", &*destination), ("x-request-id", "7")]);
}

#[tokio::test]
async fn body_is_awaited_and_returned_in_pieces() {
    let epp = Epp::start(config(1)).await;
    let mut exchange = epp.open().await;
    let body = format!(r#"{{"prompt":"{}","model":"llama"}}"#, "x".repeat(200_000));
    exchange.send(head("POST", false)).await;
    let (first, rest) = body.as_bytes().split_at(150_000);
    for piece in message::request_body(Bytes::copy_from_slice(first), false) {
        exchange.send(piece).await;
    }
    // After a complete exchange on the same connection, a premature reply would have arrived.
    epp.pick().await;
    assert!(poll_once(exchange.replies.message()).is_pending());
    for piece in message::request_body(Bytes::copy_from_slice(rest), true) {
        exchange.send(piece).await;
    }

    let (reply, destination) = exchange.header_reply().await;
    assert_eq!(destination, "10.0.0.1:8000");
    let length = body.len().to_string();
    let set_headers = reply.header_mutation.unwrap().set_headers;
    let expected =
        [("x-gateway-destination-endpoint", "10.0.0.1:8000"), ("content-length", &length), ("x-request-id", "7")];
    assert_eq!(set(&set_headers), expected);
    let pieces = exchange.request_pieces().await;
    assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [62_000, 62_000, 62_000, body.len() - 186_000]);
    assert_eq!(pieces.concat(), body.as_bytes());
}

fn poll_once<F: Future>(future: F) -> Poll<F::Output> {
    pin!(future).poll(&mut Context::from_waker(std::task::Waker::noop()))
}

#[tokio::test]
async fn empty_message_ends_the_body_and_second_end_is_ignored() {
    let epp = Epp::start(config(1)).await;
    let mut exchange = epp.open().await;
    exchange.send(head("POST", false)).await;
    exchange.send(Ask::RequestBody(HttpBody { body: Bytes::from_static(BODY), end_of_stream: false })).await;
    for _ in 0..2 {
        exchange.send(Ask::RequestBody(HttpBody { body: Bytes::new(), end_of_stream: true })).await;
    }
    exchange.picked().await;
    exchange.respond(endpoint(1)).await;
}

#[tokio::test]
async fn trailers_end_the_body() {
    let epp = Epp::start(config(1)).await;
    let mut exchange = epp.open().await;
    exchange.send(head("POST", false)).await;
    exchange.send(Ask::RequestBody(HttpBody { body: Bytes::from_static(BODY), end_of_stream: false })).await;
    exchange.send(Ask::RequestTrailers(HttpTrailers::default())).await;
    exchange.header_reply().await;
    // No piece of the body may end the request.
    let Reply::RequestBody(reply) = exchange.reply().await else { panic!("not a body reply") };
    let mutation = reply.response.unwrap().body_mutation.unwrap().mutation.unwrap();
    let whole = StreamedBodyResponse { body: Bytes::from_static(BODY), end_of_stream: false };
    assert_eq!(mutation, Mutation::StreamedResponse(whole));
    assert!(matches!(exchange.reply().await, Reply::RequestTrailers(_)));
}

#[tokio::test]
async fn response_is_echoed() {
    let epp = Epp::start(config(1)).await;
    let (_, mut exchange) = epp.pick().await;
    let mut headers = http::HeaderMap::new();
    headers.insert("content-type", "text/event-stream".parse().unwrap());
    headers.insert("transfer-encoding", "chunked".parse().unwrap());
    headers.append("set-cookie", "a".parse().unwrap());
    headers.append("set-cookie", "b".parse().unwrap());
    exchange.send(message::response_head(http::StatusCode::OK, &headers, false)).await;
    let Reply::ResponseHeaders(reply) = exchange.reply().await else { panic!("not a header reply") };
    let set_headers = reply.response.unwrap().header_mutation.unwrap().set_headers;
    assert_eq!(set(&set_headers), [("content-type", "text/event-stream"), ("x-went-into-resp-headers", "true")]);

    for (body, end_of_stream) in [("data: 1\n\n", false), ("", true)] {
        exchange.send(Ask::ResponseBody(HttpBody { body: body.into(), end_of_stream })).await;
        let Reply::ResponseBody(reply) = exchange.reply().await else { panic!("not a body reply") };
        let Mutation::StreamedResponse(piece) = reply.response.unwrap().body_mutation.unwrap().mutation.unwrap() else {
            panic!("not a streamed piece")
        };
        assert_eq!((&piece.body[..], piece.end_of_stream), (body.as_bytes(), end_of_stream));
    }
    exchange.send(Ask::ResponseTrailers(HttpTrailers::default())).await;
    assert!(matches!(exchange.reply().await, Reply::ResponseTrailers(_)));
}

#[tokio::test]
async fn body_modes_of_the_proxy_are_respected() {
    let epp = Epp::start(config(1)).await;
    let configured = |request: BodySendMode, response: BodySendMode, ask| ProcessingRequest {
        request: Some(ask),
        metadata_context: None,
        protocol_config: Some(ProtocolConfiguration {
            request_body_mode: request.into(),
            response_body_mode: response.into(),
            send_body_without_waiting_for_header_response: false,
        }),
    };

    let mut exchange = epp.open().await;
    let first = configured(BodySendMode::None, BodySendMode::Streamed, head("POST", false));
    exchange.asks.send(first).await.unwrap();
    exchange.header_reply().await;
    exchange.send(response_end()).await;
    let Reply::ResponseBody(reply) = exchange.reply().await else { panic!("not a body reply") };
    assert_eq!(reply.response, Some(CommonResponse::default()));

    let mut exchange = epp.open().await;
    let first = configured(BodySendMode::Buffered, BodySendMode::None, head("POST", false));
    exchange.asks.send(first).await.unwrap();
    let status = timeout(SOON, exchange.replies.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(status.message(), "request_body_mode is BUFFERED, expected FULL_DUPLEX_STREAMED");
}

#[tokio::test]
async fn invalid_body_is_refused_with_400() {
    let epp = Epp::start(config(1)).await;
    for (body, expected) in [
        (&b"{\"model\":}"[..], "the body is not JSON: byte 9: found `}`, expected a value"),
        (b"", "the body is not JSON: byte 0: found the end of the body, expected a value"),
        (b"{\"prompt\":1}", "the body has no model"),
        (b"{\"model\":[1]}", "found model [1], expected a string"),
    ] {
        let exchange = epp.open().await;
        exchange.post(body).await;
        let refused = exchange.refused().await;
        assert_eq!(refused.status.unwrap().code, 400);
        assert_eq!(refused.body, format!("inference error: BadRequest - {expected}"));
    }
}

#[tokio::test]
async fn body_over_the_limit_is_refused_before_its_end() {
    let epp = Epp::start(EppServerConfig { max_body: 100, ..config(1) }).await;
    let exchange = epp.open().await;
    exchange.send(head("POST", false)).await;
    exchange.send(Ask::RequestBody(HttpBody { body: vec![b' '; 101].into(), end_of_stream: false })).await;
    let refused = exchange.refused().await;
    assert_eq!(refused.status.unwrap().code, 413);
    assert_eq!(refused.body, "inference error: PayloadTooLarge - the body is longer than 100 bytes");
}

#[tokio::test]
async fn subset_hint_is_respected_in_every_form() {
    let epp = Epp::start(config(3)).await;
    for (subset, expected) in [
        (list(&["10.0.0.2:8000"]), "10.0.0.2:8000"),
        (list(&["10.0.0.3", "10.9.9.9:1"]), "10.0.0.3:8000"),
        (text("10.0.0.2:8000, 10.0.0.7:8000"), "10.0.0.2:8000"),
    ] {
        let mut exchange = epp.with_subset(subset).await;
        exchange.post(BODY).await;
        assert_eq!(exchange.picked().await, expected);
    }
}

#[tokio::test]
async fn subset_hint_on_the_last_message_is_respected() {
    let epp = Epp::start(config(3)).await;
    let mut exchange = epp.with_subset(list(&["10.0.0.3:8000"])).await;
    let subset = exchange.metadata.take();
    exchange.send(head("POST", false)).await;
    exchange.metadata = subset;
    exchange.send(Ask::RequestBody(HttpBody { body: Bytes::from_static(BODY), end_of_stream: true })).await;
    assert_eq!(exchange.picked().await, "10.0.0.3:8000");
}

#[tokio::test]
async fn request_without_eligible_endpoint_is_refused_with_503() {
    let epp = Epp::start(config(2)).await;
    for subset in [list(&[]), text(""), list(&["10.0.0.9:8000"]), list(&["10.0.0.1:1"])] {
        let exchange = epp.with_subset(subset).await;
        exchange.send(head("GET", true)).await;
        let refused = exchange.refused().await;
        assert_eq!(refused.status.unwrap().code, 503);
        assert_eq!(refused.body, "inference error: ServiceUnavailable - no endpoint is eligible");
        let reason = [("x-llm-d-request-dropped-reason", "rejected-no-endpoints")];
        assert_eq!(set(&refused.headers.unwrap().set_headers), reason);
    }
    let exchange = Epp::start(config(0)).await.open().await;
    exchange.post(BODY).await;
    assert_eq!(exchange.refused().await.status.unwrap().code, 503);
}

#[tokio::test]
async fn request_is_refused_with_429_if_all_endpoints_are_at_the_limit() {
    let epp = Epp::start(EppServerConfig { max_inflight: Some(1), ..config(2) }).await;
    let (first, _first) = epp.pick().await;
    let (second, mut busy) = epp.pick().await;
    assert_eq!((&*first, &*second), ("10.0.0.1:8000,10.0.0.2:8000", "10.0.0.2:8000"));
    let exchange = epp.open().await;
    exchange.post(BODY).await;
    let refused = exchange.refused().await;
    assert_eq!(refused.status.unwrap().code, 429);
    let reason = [("x-llm-d-request-dropped-reason", "rejected-saturated")];
    assert_eq!(set(&refused.headers.unwrap().set_headers), reason);

    busy.respond(endpoint(2)).await;
    busy.send(response_end()).await;
    assert!(matches!(busy.reply().await, Reply::ResponseBody(_)));
    let (third, _third) = epp.pick().await;
    assert_eq!(third, "10.0.0.2:8000", "the end of the response frees the endpoint while the stream is open");
}

#[tokio::test]
async fn end_of_the_stream_frees_the_endpoint() {
    let epp = Epp::start(EppServerConfig { max_inflight: Some(1), ..config(1) }).await;
    let (_, exchange) = epp.pick().await;
    drop(exchange);
    let again = async {
        loop {
            let mut exchange = epp.open().await;
            exchange.post(BODY).await;
            if matches!(exchange.reply().await, Reply::RequestHeaders(_)) {
                return;
            }
        }
    };
    timeout(SOON, again).await.expect("the endpoint becomes free");
}

#[tokio::test]
async fn request_is_counted_where_it_was_served_and_skipped_endpoints_are_avoided() {
    let epp = Epp::start(EppServerConfig { max_inflight: Some(1), ..config(3) }).await;
    let (picked, mut exchange) = epp.pick().await;
    assert_eq!(picked, "10.0.0.1:8000,10.0.0.2:8000,10.0.0.3:8000");
    exchange.respond(endpoint(2)).await;
    let (next, _next) = epp.pick().await;
    assert_eq!(next, "10.0.0.3:8000,10.0.0.1:8000", "1 failed and is last, 2 is busy");
}

/// Without a session, each request would go to an idle endpoint.
#[tokio::test]
async fn requests_of_a_session_get_the_same_pick() {
    let session_headers = ["x-session-id", "x-request-id"].map(HeaderName::from_static).to_vec();
    let epp = Epp::start(EppServerConfig { session_headers, ..config(3) }).await;
    let ((first, _one), (second, _two), (third, _three)) = (epp.pick().await, epp.pick().await, epp.pick().await);
    assert_eq!((&first, &first), (&second, &third));
}

#[tokio::test]
async fn pick_is_delayed_as_configured() {
    let delay = Duration::from_millis(20);
    let epp = Epp::start(EppServerConfig { delay: Some(delay), ..config(1) }).await;
    let started = Instant::now();
    epp.pick().await;
    assert!(started.elapsed() >= delay);
}

#[tokio::test]
async fn body_before_head_is_an_error() {
    let epp = Epp::start(config(1)).await;
    let mut exchange = epp.open().await;
    exchange.send(Ask::RequestBody(HttpBody::default())).await;
    assert_eq!(timeout(SOON, exchange.replies.message()).await.unwrap().unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn health_is_served_for_the_names_that_proxies_use() {
    let epp = Epp::start(config(1)).await;
    let mut client = HealthClient::new(epp.channel.clone());
    for service in ["", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"] {
        let reply = client.check(HealthCheckRequest { service: service.into() }).await.unwrap();
        assert_eq!(reply.get_ref().status(), ServingStatus::Serving, "{service}");
    }
    let unknown = client.check(HealthCheckRequest { service: "inference-extension".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}

#[tokio::test]
async fn shutdown_finishes_open_streams_and_refuses_new_ones() {
    let epp = Epp::start(config(1)).await;
    let (_, mut exchange) = epp.pick().await;
    epp.stop.send(()).unwrap();
    let refused = async { while TcpStream::connect(epp.address).await.is_ok() {} };
    timeout(SOON, refused).await.expect("the listener is closed");
    exchange.respond(endpoint(1)).await;
    assert!(!epp.served.is_finished());
    exchange.send(response_end()).await;
    assert!(matches!(exchange.reply().await, Reply::ResponseBody(_)));
    drop(exchange);
    timeout(SOON, epp.served).await.expect("the server ends after the stream").unwrap().unwrap();
}

#[tokio::test]
async fn tls_is_served_with_a_self_signed_certificate() {
    let epp = Epp::start(EppServerConfig { tls: EppServerTls::SelfSigned, ..config(1) }).await;
    let uri = format!("http://{}", epp.address);
    let channel = Endpoint::from_shared(uri)
        .unwrap()
        .connect_with_connector(DialTls { address: epp.address, client_certificate: None })
        .await
        .unwrap();
    let epp = Epp { channel, ..epp };
    assert_eq!(epp.pick().await.0, "10.0.0.1:8000");
}
