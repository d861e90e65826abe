//! gRPC through the agent: messages and trailers pass unchanged, and the agent's own errors are gRPC statuses.

use penstock_agent::config::{AppProtocol, FailureMode, PathPattern, Pool, Route, SteeringMode};
use penstock_proto::{
    ext_proc::{
        GrpcStatus, ProcessingRequest, external_processor_client::ExternalProcessorClient, processing_request,
        processing_response::Response as Reply,
    },
    health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient},
};
use penstock_tests::{
    Alphabet, BodyEnd, Http2Client, Refusing, Request, Response, ScriptedEpp,
    agent::{TestAgent, builtin_pool, epp_pool},
    http2_frames::{END_STREAM, Frame, Http2Frames, kind},
    http2_server::grpc::{MESSAGE, framed, streamed},
    scripted_epp::{Answering, LlmdRouter, StreamEnd, reply},
};
use tonic::{Code, transport::Channel};

use crate::{
    SOON,
    scene::{Back, Front, Scene, first},
};
use penstock_tests::eventually;

async fn scene(front: Front) -> Scene {
    Scene::with(front, Back::Http2, first, |_| {}).await
}

fn call(method: &str, message: &[u8]) -> Request {
    Request::new("POST", method)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "10S")
        .chunked(framed(message), usize::MAX)
}

fn pairs(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Asserts the endpoint's trailers and no others.
fn assert_trailers(response: &Response) {
    assert_eq!(response.read.end, BodyEnd::Complete);
    let trailers = [("grpc-status", "0"), ("x-trace-bin", "AAEC/w"), ("x-twice", "1"), ("x-twice", "2")];
    assert_eq!(response.read.trailers, pairs(&trailers));
}

#[tokio::test]
async fn unary_call_keeps_message_and_trailers() {
    for front in [Front::Http2, Front::Tls2] {
        let scene = scene(front).await;
        let mut client = scene.client().await;
        for size in [0, 10, 300_000] {
            let message = Alphabet::Binary.bytes(1, 0, size);
            let response = client.request(&call("/test.Model/Unary", &message)).await.unwrap();
            assert_eq!((response.status(), response.header("content-type")), (200, Some("application/grpc")));
            assert_eq!(response.body, framed(&message));
            assert_trailers(&response);
            assert_eq!(response.header("grpc-status"), None);
        }
        let seen = scene.endpoint.seen();
        assert_eq!((seen[0].header("te"), seen[0].header("grpc-timeout")), (Some("trailers"), Some("10S")));
        eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 3).await;
    }
}

#[tokio::test]
async fn server_stream_keeps_messages_and_trailers() {
    let scene = scene(Front::Http2).await;
    let response = scene.request(&call("/test.Model/Stream", &[50])).await;
    assert_eq!(response.body.len(), 50 * (5 + MESSAGE));
    for (number, message) in (0..).zip(response.body.chunks(5 + MESSAGE)) {
        assert_eq!(message, framed(&streamed(number)), "message {number}");
    }
    assert_trailers(&response);
    // A response without messages is valid too.
    let response = scene.request(&call("/test.Model/Stream", &[0])).await;
    assert_eq!(response.body, b"");
    assert_trailers(&response);
}

/// A Trailers-Only response must stay one: an added empty body would make it a different error.
#[tokio::test]
async fn trailers_only_errors_are_forwarded() {
    let scene = scene(Front::Http2).await;
    let response = scene.request(&call("/test.Model/Fail", b"x")).await;
    let fields = ["grpc-status", "grpc-message", "content-length"].map(|name| response.header(name));
    assert_eq!((response.status(), fields), (200, [Some("5"), Some("no such model: %C3%A4"), None]));
    assert_eq!((response.read.len, response.read.trailers.len()), (0, 0));

    let mut frames = Http2Frames::connect(scene.agent.addr).await.unwrap();
    let head = [(":method", "POST"), (":scheme", "http"), (":path", "/test.Model/Fail"), (":authority", "x")];
    let head = [&head[..], &[("content-type", "application/grpc"), ("te", "trailers")]].concat();
    frames.send(&Frame::headers(1, false, &head)).await.unwrap();
    frames.send(&Frame::new(kind::DATA, END_STREAM, 1, framed(b"x"))).await.unwrap();
    let head = frames.find(|frame| frame.kind == kind::HEADERS).await.unwrap().unwrap();
    assert_eq!((head.status(), head.flags & END_STREAM), (Some(200), END_STREAM));
}

/// `content-type: application/grpc`, HTTP 200, and the error in the fields of the head.
fn assert_failed(response: &Response, code: Code, says: &str) {
    assert_eq!((response.status(), response.header("content-type")), (200, Some("application/grpc")), "{response:?}");
    assert_eq!(response.header("grpc-status"), Some((code as i32).to_string().as_str()), "{response:?}");
    let message = response.header("grpc-message").unwrap();
    assert!(message.contains(says), "{message}");
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, 0));
}

#[tokio::test]
async fn agent_errors_have_grpc_status() {
    let route = Route { path: Some(PathPattern::Prefix("/test.Model".to_owned())), ..Route::to("default") };
    let mut scene = Scene::with(Front::Http2, Back::Http2, first, |config| {
        config.routes = vec![route];
        config.limits.body_bytes = 10_000;
    })
    .await;
    let mut client = scene.client().await;
    let response = client.request(&call("/other.Model/Unary", b"x")).await.unwrap();
    assert_failed(&response, Code::Unimplemented, "no route");
    let response = client.request(&call("/test.Model/Unary", &[0; 20_000])).await.unwrap();
    assert_failed(&response, Code::Unknown, "larger than 10000 bytes");
    scene.epp.stop();
    let proto = call("/test.Model/Unary", b"x").header("accept", "application/json");
    let response = client.request(&proto).await.unwrap();
    assert_failed(&response, Code::Unavailable, "endpoint picker");
    assert_eq!(response.header("x-penstock-reason"), Some("picker_failed"));
    assert_eq!(scene.endpoint.requests(), 0);
    // Clients without gRPC get an ordinary error.
    let response = client.request(&Request::post("/test.Model/Unary", "x")).await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
}

#[tokio::test]
async fn unreachable_endpoint_returns_unavailable() {
    let dead = Refusing::new().unwrap();
    let pool = Pool { app_protocol: AppProtocol::H2c, ..builtin_pool(&[dead.addr]) };
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    for kind in ["application/grpc", "application/grpc+proto", "application/grpc;x=y"] {
        let request = Request::new("POST", "/test.Model/Unary").header("content-type", kind).chunked("", 1);
        assert_failed(&client.request(&request).await.unwrap(), Code::Unavailable, "refused");
    }
    let other = Request::new("POST", "/test.Model/Unary").header("content-type", "application/grpc-web").chunked("", 1);
    assert_eq!(client.request(&other).await.unwrap().status(), 502);
}

#[tokio::test]
async fn immediate_reply_becomes_grpc_status() {
    let refusing = |_: &[_]| Answering::new(|_| vec![reply::immediate(429, &[("x-why", "queue full")], "later")]);
    let scene = Scene::with(Front::Http2, Back::Http2, refusing, |_| {}).await;
    let response = scene.request(&call("/test.Model/Unary", b"x")).await;
    assert_failed(&response, Code::Unavailable, "later");
    assert_eq!(response.header("x-why"), Some("queue full"));
}

#[tokio::test]
async fn immediate_reply_may_name_its_grpc_status() {
    let refusing = |_: &[_]| {
        Answering::new(|_| {
            let mut message = reply::immediate(429, &[], "over quota");
            if let Some(Reply::ImmediateResponse(immediate)) = &mut message.response {
                immediate.grpc_status = Some(GrpcStatus { status: Code::ResourceExhausted as u32 });
            }
            vec![message]
        })
    };
    let scene = Scene::with(Front::Http2, Back::Http2, refusing, |_| {}).await;
    assert_failed(&scene.request(&call("/test.Model/Unary", b"x")).await, Code::ResourceExhausted, "over quota");
    // Clients without gRPC get the HTTP status.
    let mut client = scene.client().await;
    assert_eq!(client.request(&Request::post("/test.Model/Unary", "x")).await.unwrap().status(), 429);
}

#[tokio::test]
async fn immediate_reply_may_name_its_grpc_status_in_fields() {
    let fields = [("grpc-status", "12"), ("grpc-message", "not here")];
    let refusing = move |_: &[_]| Answering::new(move |_| vec![reply::immediate(200, &fields, "other")]);
    let scene = Scene::with(Front::Http2, Back::Http2, refusing, |_| {}).await;
    assert_failed(&scene.request(&call("/test.Model/Unary", b"x")).await, Code::Unimplemented, "not here");
}

/// The gRPC library of the client refuses fields that are too long.
#[tokio::test]
async fn long_immediate_reply_has_a_bounded_grpc_message() {
    let refusing = |_: &[_]| Answering::new(|_| vec![reply::immediate(429, &[], &"\u{20ac}".repeat(7000))]);
    let scene = Scene::with(Front::Http2, Back::Http2, refusing, |_| {}).await;
    let response = scene.request(&call("/test.Model/Unary", b"x")).await;
    assert_eq!(response.header("grpc-status"), Some("14"));
    let message = response.header("grpc-message").unwrap();
    assert!(message.starts_with("%E2%82%AC") && message.len() < 4096, "{} bytes", message.len());
}

/// An agent in front of a picker as its endpoint: a gRPC server based on tonic.
async fn before_a_picker() -> (TestAgent, ScriptedEpp, Channel) {
    let server = ScriptedEpp::start(LlmdRouter::new(&[([192, 0, 2, 1], 80).into()])).await.unwrap();
    let pool = Pool { app_protocol: AppProtocol::H2c, ..builtin_pool(&[server.addr]) };
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    let channel = Channel::from_shared(format!("http://{}", agent.addr)).unwrap().connect().await.unwrap();
    (agent, server, channel)
}

#[tokio::test]
async fn tonic_unary_call_succeeds() {
    let (_agent, _server, channel) = before_a_picker().await;
    let mut client = HealthClient::new(channel);
    for _ in 0..10 {
        let request = HealthCheckRequest { service: "envoy.service.ext_proc.v3.ExternalProcessor".to_owned() };
        let status = client.check(request).await.unwrap().into_inner().status;
        assert_eq!(status, ServingStatus::Serving as i32);
    }
}

#[tokio::test]
async fn tonic_stream_succeeds() {
    let (_agent, server, channel) = before_a_picker().await;
    let mut client = ExternalProcessorClient::new(channel);
    let end = penstock_proto::ext_proc::HttpHeaders { end_of_stream: true, ..Default::default() };
    let head = ProcessingRequest {
        request: Some(processing_request::Request::RequestHeaders(end.clone())),
        ..ProcessingRequest::default()
    };
    let response = ProcessingRequest {
        request: Some(processing_request::Request::ResponseHeaders(end)),
        ..ProcessingRequest::default()
    };
    let asked = tokio_stream::iter([head, response]);
    let mut answers = client.process(asked).await.unwrap().into_inner();
    for _ in 0..2 {
        assert!(answers.message().await.unwrap().unwrap().response.is_some());
    }
    assert!(answers.message().await.unwrap().is_none());
    assert_eq!(server.streams()[0].kinds(), ["request_headers", "response_headers"]);
}

/// tonic's client decodes them as statuses.
#[tokio::test]
async fn tonic_reads_errors_as_statuses() {
    // The endpoint's own error: no such method.
    let other = scene(Front::Http2).await;
    let channel = Channel::from_shared(format!("http://{}", other.agent.addr)).unwrap().connect().await.unwrap();
    let status = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unimplemented, "unknown method"));
    // The agent's error.
    let (agent, mut server, channel) = before_a_picker().await;
    server.stop();
    let status = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains("endpoint"), "{status:?}");
    let epp = Refusing::new().unwrap();
    let pool = Pool { app_protocol: AppProtocol::H2c, ..epp_pool(&[server.addr], epp.addr, FailureMode::Closed) };
    drop(agent);
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    let channel = Channel::from_shared(format!("http://{}", agent.addr)).unwrap().connect().await.unwrap();
    let status = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains("picker"), "{status:?}");
}
