//! The scripted pickers against a gRPC client.

use std::time::Duration;

use bytes::Bytes;
use penstock_proto::core::{HeaderMap, HeaderValue, Metadata};
use penstock_proto::ext_proc::external_processor_client::ExternalProcessorClient;
use penstock_proto::ext_proc::processing_request::Request;
use penstock_proto::ext_proc::processing_response::Response;
use penstock_proto::ext_proc::{
    BodySendMode, ProcessingRequest, ProcessingResponse, ProtocolConfiguration, body_mutation::Mutation,
};
use penstock_proto::health::HealthCheckRequest;
use penstock_proto::health::health_client::HealthClient;
use penstock_proto::prost_types::{ListValue, Struct, Value, value::Kind};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use super::*;
use crate::eventually;

const SOON: Duration = Duration::from_secs(10);

async fn channel(epp: &ScriptedEpp) -> Channel {
    Channel::from_shared(format!("http://{}", epp.addr)).unwrap().connect().await.unwrap()
}

/// A stream opened directly, without an agent.
struct Peer {
    out: Option<mpsc::Sender<ProcessingRequest>>,
    answers: tokio::task::JoinHandle<Result<Streaming<ProcessingResponse>, Status>>,
}

impl Peer {
    async fn open(channel: Channel) -> Self {
        let (out, messages) = mpsc::channel(64);
        let call = async move {
            let mut client = ExternalProcessorClient::new(channel);
            client.process(ReceiverStream::new(messages)).await.map(tonic::Response::into_inner)
        };
        Self { out: Some(out), answers: tokio::spawn(call) }
    }

    async fn send(&self, request: Request, metadata: Option<Metadata>) {
        let duplex = BodySendMode::FullDuplexStreamed.into();
        let config = ProtocolConfiguration {
            request_body_mode: duplex,
            response_body_mode: duplex,
            send_body_without_waiting_for_header_response: true,
        };
        let first = matches!(request, Request::RequestHeaders(_));
        let message = ProcessingRequest {
            request: Some(request),
            metadata_context: metadata,
            protocol_config: first.then_some(config),
        };
        let _ = self.out.as_ref().unwrap().send(message).await;
    }

    async fn head(&self, headers: &[(&str, &str)], end_of_stream: bool, subset: Option<Metadata>) {
        self.send(Request::RequestHeaders(HttpHeaders { headers: Some(map(headers)), end_of_stream }), subset).await;
    }

    async fn body(&self, body: &[u8], end_of_stream: bool) {
        let body = HttpBody { body: Bytes::copy_from_slice(body), end_of_stream };
        self.send(Request::RequestBody(body), None).await;
    }

    /// Half-closes and returns all messages of the picker.
    async fn finish(mut self) -> (Vec<ProcessingResponse>, Result<(), Code>) {
        self.out = None;
        self.rest().await
    }

    async fn rest(self) -> (Vec<ProcessingResponse>, Result<(), Code>) {
        let mut all = Vec::new();
        let mut answers = match self.answers.await.unwrap() {
            Ok(answers) => answers,
            Err(status) => return (all, Err(status.code())),
        };
        loop {
            match answers.message().await {
                Ok(Some(message)) => all.push(message),
                Ok(None) => return (all, Ok(())),
                Err(status) => return (all, Err(status.code())),
            }
        }
    }
}

fn map(headers: &[(&str, &str)]) -> HeaderMap {
    let header = |(name, value): &(&str, &str)| HeaderValue {
        key: (*name).to_owned(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
        ..HeaderValue::default()
    };
    HeaderMap { headers: headers.iter().map(header).collect() }
}

fn metadata(namespace: &str, key: &str, kind: Kind) -> Metadata {
    let fields = Struct { fields: [(key.to_owned(), Value { kind: Some(kind) })].into() };
    Metadata { filter_metadata: [(namespace.to_owned(), fields)].into() }
}

fn subset_of(endpoints: &[&str]) -> Metadata {
    let value = |one: &&str| Value { kind: Some(Kind::StringValue((*one).to_owned())) };
    let list = Kind::ListValue(ListValue { values: endpoints.iter().map(value).collect() });
    metadata("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset", list)
}

fn endpoints() -> Vec<SocketAddr> {
    ["127.0.0.1:7001", "127.0.0.1:7002", "127.0.0.1:7003"].map(|one| one.parse().unwrap()).to_vec()
}

/// The destination set by a reply to the request head.
fn picked(message: &ProcessingResponse) -> Option<String> {
    let Some(Response::RequestHeaders(reply)) = &message.response else { return None };
    let mutation = reply.response.as_ref()?.header_mutation.as_ref()?;
    let header = |option: &penstock_proto::core::HeaderValueOption| {
        let header = option.header.clone()?;
        (header.key == reply::DESTINATION).then(|| String::from_utf8(header.raw_value.to_vec()).unwrap())
    };
    mutation.set_headers.iter().find_map(header)
}

fn streamed(message: &ProcessingResponse) -> Option<(Bytes, bool)> {
    let (Some(Response::RequestBody(reply)) | Some(Response::ResponseBody(reply))) = &message.response else {
        return None;
    };
    match reply.response.as_ref()?.body_mutation.as_ref()?.mutation.as_ref()? {
        Mutation::StreamedResponse(piece) => Some((piece.body.clone(), piece.end_of_stream)),
        _ => None,
    }
}

#[tokio::test]
async fn gie_answers_headers_then_whole_body() {
    let script = Production::over(Endpoints::new(&endpoints()).offering(2)).rewriting("other");
    let epp = ScriptedEpp::start(script).await.unwrap();
    let peer = Peer::open(channel(&epp).await).await;
    peer.head(&[(":path", "/v1/completions"), ("x-a", "1"), ("x-a", "2")], false, None).await;
    let long = "x".repeat(100_000);
    let body = format!(r#"{{"model":"m","prompt":"{long}"}}"#);
    peer.body(&body.as_bytes()[..50_000], false).await;
    peer.body(&body.as_bytes()[50_000..], true).await;
    peer.send(
        Request::ResponseHeaders(HttpHeaders { headers: Some(map(&[(":status", "200")])), end_of_stream: false }),
        Some(metadata(
            "envoy.lb",
            "x-gateway-destination-endpoint-served",
            Kind::StringValue("127.0.0.1:7001".to_owned()),
        )),
    )
    .await;
    peer.send(Request::ResponseBody(HttpBody { body: Bytes::from_static(b"ab"), end_of_stream: false }), None).await;
    peer.send(Request::ResponseBody(HttpBody { body: Bytes::from_static(b"cd"), end_of_stream: true }), None).await;
    let (replies, end) = peer.finish().await;
    assert_eq!(end, Ok(()));
    assert_eq!(picked(&replies[0]).as_deref(), Some("127.0.0.1:7001,127.0.0.1:7002"));
    let pieces: Vec<_> = replies[1..3].iter().map(|reply| streamed(reply).unwrap()).collect();
    assert_eq!((pieces[0].0.len(), pieces[0].1, pieces[1].1), (62_000, false, true));
    assert!(pieces[1].0.len() + 62_000 == body.len() + 4, "the new model name is four letters longer");
    assert!(matches!(replies[3].response, Some(Response::ResponseHeaders(_))));
    assert_eq!(streamed(&replies[4]), Some((Bytes::from_static(b"abcd"), true)));
    assert_eq!(replies.len(), 5);

    let record = &epp.streams()[0];
    assert_eq!(record.end, Some(StreamEnd::HalfClosed));
    assert_eq!(record.kinds()[..3], ["request_headers", "request_body", "request_body"]);
    assert_eq!(record.request_body(), (body.into_bytes(), 1));
    assert_eq!(record.response_body(), (b"abcd".to_vec(), 1));
    assert_eq!(header(&record.request_headers(), "x-a"), Some("1"));
    assert_eq!(record.served().as_deref(), Some("127.0.0.1:7001"));
    assert!(record.protocol_config().unwrap().send_body_without_waiting_for_header_response);
    assert_eq!((record.connection, epp.connections_accepted(), epp.streams_open()), (1, 1, 0));
}

#[tokio::test]
async fn gie_refuses_with_immediate_response() {
    let epp = ScriptedEpp::start(Production::new(&endpoints())).await.unwrap();
    let channel = channel(&epp).await;
    for (body, subset, status) in [
        ("no json", None, 400),
        ("{}", None, 400),
        (r#"{"model":"m"}"#, Some(subset_of(&["127.0.0.1:1"])), 503),
        (r#"{"model":"m"}"#, Some(subset_of(&[])), 503),
    ] {
        let peer = Peer::open(channel.clone()).await;
        peer.head(&[], false, subset.clone()).await;
        let piece = HttpBody { body: Bytes::from_static(body.as_bytes()), end_of_stream: true };
        peer.send(Request::RequestBody(piece), subset).await;
        let (replies, end) = peer.rest().await;
        let Some(Response::ImmediateResponse(reply)) = &replies[0].response else { panic!("{replies:?}") };
        assert_eq!((reply.status.as_ref().unwrap().code, end), (status, Ok(())));
    }
    let peer = Peer::open(channel).await;
    peer.head(&[], true, Some(subset_of(&["127.0.0.1:7003"]))).await;
    let (replies, _) = peer.finish().await;
    assert_eq!(picked(&replies[0]).as_deref(), Some("127.0.0.1:7003"));
    assert_eq!(epp.streams_ended(StreamEnd::Script), 4);
    assert_eq!(epp.streams()[4].subset(), Some(vec!["127.0.0.1:7003".to_owned()]));
}

#[tokio::test]
async fn lwepp_answers_pieces_first_and_follows_selection() {
    let epp = ScriptedEpp::start(Lwepp::new(&endpoints())).await.unwrap();
    let channel = channel(&epp).await;
    let peer = Peer::open(channel.clone()).await;
    peer.head(&[("test-epp-endpoint-selection", "127.0.0.1:7002, 10.0.0.1")], false, None).await;
    peer.body(b"a", false).await;
    peer.body(b"", true).await;
    let (replies, _) = peer.finish().await;
    let empty = |reply: &ProcessingResponse| {
        matches!(&reply.response, Some(Response::RequestBody(_))) && streamed(reply).is_none()
    };
    assert!(empty(&replies[0]) && empty(&replies[1]));
    assert_eq!(picked(&replies[2]).as_deref(), Some("127.0.0.1:7002"));
    assert_eq!(replies.len(), 3);
    // An address alone names all its ports.
    let mut all = Vec::new();
    for _ in endpoints() {
        let peer = Peer::open(channel.clone()).await;
        peer.head(&[("test-epp-endpoint-selection", "127.0.0.1")], true, None).await;
        all.extend(picked(&peer.finish().await.0[0]));
    }
    all.sort();
    assert_eq!(all, endpoints().iter().map(ToString::to_string).collect::<Vec<_>>());
    let peer = Peer::open(channel).await;
    peer.head(&[("test-epp-endpoint-selection", "127.0.0.2")], true, None).await;
    assert_eq!(peer.rest().await.1, Err(Code::Internal));
}

#[tokio::test]
async fn dynamo_requires_body_and_rewrites_it() {
    let epp = ScriptedEpp::start(Dynamo::new(&endpoints())).await.unwrap();
    let channel = channel(&epp).await;
    let peer = Peer::open(channel.clone()).await;
    peer.head(&[], false, None).await;
    peer.body(br#"{"model":"m"}"#, true).await;
    let (replies, _) = peer.finish().await;
    assert!(picked(&replies[0]).is_some());
    let (body, _) = streamed(&replies[1]).unwrap();
    assert!(String::from_utf8_lossy(&body).contains("token_data"));

    let peer = Peer::open(channel).await;
    let message = ProcessingRequest {
        request: Some(Request::RequestHeaders(HttpHeaders::default())),
        protocol_config: Some(ProtocolConfiguration::default()),
        ..ProcessingRequest::default()
    };
    peer.out.as_ref().unwrap().send(message).await.unwrap();
    assert_eq!(peer.rest().await.1, Err(Code::FailedPrecondition));
}

/// How a stream with a body ends under a fault: what was picked before it, and the status.
async fn under(fault: Fault) -> (Option<String>, Vec<ProcessingResponse>, Result<(), Code>, ScriptedEpp) {
    let epp = ScriptedEpp::start(Faulty::new(Production::new(&endpoints()), fault)).await.unwrap();
    let peer = Peer::open(channel(&epp).await).await;
    peer.head(&[], false, None).await;
    peer.body(br#"{"model":"#, false).await;
    peer.body(br#""m"}"#, true).await;
    peer.send(Request::ResponseHeaders(HttpHeaders::default()), None).await;
    let (replies, end) = peer.finish().await;
    (replies.first().and_then(picked), replies, end, epp)
}

#[tokio::test]
async fn faults_strike_at_scripted_moment() {
    for moment in [Moment::RequestHeaders, Moment::RequestBody(0), Moment::RequestBody(5), Moment::RequestBody(999)] {
        let (picked, _, end, _) = under(Fault::At(moment, Harm::Status(Code::Internal))).await;
        assert_eq!((picked, end), (None, Err(Code::Internal)), "{moment:?}");
    }
    let (_, replies, end, epp) = under(Fault::At(Moment::RequestHeaders, Harm::Close)).await;
    assert_eq!((replies.len(), end), (0, Ok(())));
    assert_eq!(epp.streams()[0].kinds(), ["request_headers"]);

    let (picked, replies, end, _) = under(Fault::At(Moment::HeaderReply, Harm::Status(Code::Unavailable))).await;
    assert_eq!((picked.is_some(), replies.len(), end), (true, 1, Err(Code::Unavailable)));

    let (picked, replies, end, _) = under(Fault::At(Moment::ResponseHeaders, Harm::Immediate(429))).await;
    assert!(matches!(&replies[2].response, Some(Response::ImmediateResponse(_))), "{replies:?}");
    assert_eq!((picked.is_some(), replies.len(), end), (true, 3, Ok(())));

    let (picked, replies, end, _) = under(Fault::At(Moment::RequestBody(1), Harm::Delay(SOON / 500))).await;
    assert_eq!((picked.is_some(), replies.len(), end), (true, 3, Ok(())));
}

#[tokio::test]
async fn scripted_fault_cuts_connections() {
    let (_, _, end, epp) = under(Fault::At(Moment::RequestBody(5), Harm::ResetConnection)).await;
    assert!(end.is_err());
    eventually(SOON, || epp.connections_open() == 0).await;
    // The port is still open.
    channel(&epp).await;

    let (_, _, end, mut epp) = under(Fault::At(Moment::HeaderReply, Harm::Die)).await;
    assert!(end.is_err());
    eventually(SOON, || epp.connections_open() == 0).await;
    assert!(tokio::net::TcpStream::connect(epp.addr).await.is_err());
    epp.restart().await.unwrap();
    channel(&epp).await;

    let epp =
        ScriptedEpp::start(Faulty::new(Production::new(&endpoints()), Fault::ResetAtAccept).times(1)).await.unwrap();
    // A slow client sees the reset instead of the accepted connection.
    match crate::Client::connect(epp.addr).await {
        Ok(mut first) => assert_eq!(first.until_end().await.unwrap(), crate::client::ConnectionEnd::Reset),
        Err(error) => {
            let error = error.downcast::<std::io::Error>().unwrap();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
    channel(&epp).await;

    let epp = ScriptedEpp::start(Faulty::new(Production::new(&endpoints()), Fault::Deaf)).await.unwrap();
    let mut peer = crate::Client::connect(epp.addr).await.unwrap();
    peer.patience = Duration::from_millis(50);
    peer.send_raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    assert!(peer.until_end().await.unwrap_err().to_string().contains("timed out"));
    assert_eq!((epp.connections_accepted(), epp.connections_open()), (1, 1));
}

#[tokio::test]
async fn cancelled_and_finished_streams_are_distinguished() {
    let silent = Fault::At(Moment::RequestHeaders, Harm::Silence);
    let mut epp = ScriptedEpp::start(Faulty::new(Production::new(&endpoints()), silent)).await.unwrap();
    let channel = channel(&epp).await;
    let peer = Peer::open(channel.clone()).await;
    peer.head(&[], false, None).await;
    eventually(SOON, || epp.streams_open() == 1).await;
    peer.answers.abort();
    drop(peer);
    eventually(SOON, || epp.streams_ended(StreamEnd::Cancelled) == 1).await;

    let peer = Peer::open(channel).await;
    peer.head(&[], false, None).await;
    eventually(SOON, || epp.streams_open() == 1).await;
    epp.stop();
    assert!(peer.rest().await.1.is_err());
    assert_eq!((epp.streams_ended(StreamEnd::Killed), epp.connections_open()), (1, 0));
    assert!(tokio::net::TcpStream::connect(epp.addr).await.is_err());
}

#[tokio::test]
async fn health_answer_follows_script() {
    struct Unhealthy;
    impl Script for Unhealthy {
        fn health(&self, service: &str) -> Result<ServingStatus, tonic::Status> {
            Ok(if service == "liveness" { ServingStatus::Serving } else { ServingStatus::NotServing })
        }
    }
    let epp = ScriptedEpp::start(Unhealthy).await.unwrap();
    let mut client = HealthClient::new(channel(&epp).await);
    for (service, status) in [("liveness", ServingStatus::Serving), ("readiness", ServingStatus::NotServing)] {
        let asked = HealthCheckRequest { service: service.to_owned() };
        assert_eq!(client.check(asked).await.unwrap().into_inner().status(), status);
    }
}

#[tokio::test]
async fn goaway_lets_streams_finish_and_accepts_new_connections() {
    let epp = ScriptedEpp::start(Production::new(&endpoints())).await.unwrap();
    let begun = Peer::open(channel(&epp).await).await;
    begun.head(&[], false, None).await;
    eventually(SOON, || epp.streams_open() == 1).await;
    epp.go_away();
    let other = Peer::open(channel(&epp).await).await;
    other.head(&[], true, None).await;
    assert!(!other.finish().await.0.is_empty());
    assert_eq!(epp.connections_accepted(), 2);
    begun.body(br#"{"model":"m"}"#, true).await;
    assert!(!begun.finish().await.0.is_empty());
    eventually(SOON, || epp.connections_open() == 0).await;
}

#[tokio::test]
async fn only_elected_leader_serves() {
    let election = Election::default();
    let replica = |replica| Elected {
        inner: Production::new(&endpoints()),
        replica,
        election: election.clone(),
        follower: Follower::Refuses,
    };
    let (one, two) = (ScriptedEpp::start(replica(0)).await.unwrap(), ScriptedEpp::start(replica(1)).await.unwrap());
    for leader in [0, 1] {
        election.leads(leader);
        for (number, epp) in [&one, &two].into_iter().enumerate() {
            let asked = HealthCheckRequest { service: "readiness".to_owned() };
            let health = HealthClient::new(channel(epp).await).check(asked).await.unwrap().into_inner().status();
            let peer = Peer::open(channel(epp).await).await;
            peer.head(&[], true, None).await;
            assert_eq!(health == ServingStatus::Serving, number == leader);
            assert_eq!(!peer.finish().await.0.is_empty(), number == leader);
        }
    }
    assert_eq!(one.health_checks(), ["readiness", "readiness"]);
}
