//! A scripted EPP for the tests of the client. It runs a script for each stream.
//!
//! Like servers in Go, it sends its HTTP/2 headers only with its first reply.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    future::{BoxFuture, FutureExt},
    stream::BoxStream,
};
use penstock_proto::{
    core::{HeaderValue, HeaderValueOption},
    ext_proc::{
        BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, ImmediateResponse,
        ProcessingRequest, ProcessingResponse, StreamedBodyResponse,
        body_mutation::Mutation,
        external_processor_server::{ExternalProcessor, ExternalProcessorServer},
        processing_request::Request,
        processing_response::Response,
    },
    http_type::HttpStatus,
};
use prost_types::{Struct, Value, value::Kind};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Status, Streaming, transport::Server};

type ProcessingReply = Result<ProcessingResponse, Status>;

/// The EPP's side of one stream.
pub(super) struct Call {
    requests: Streaming<ProcessingRequest>,
    replies: mpsc::Sender<ProcessingReply>,
}

impl Call {
    /// Returns `None` at the agent's half-close, and an error if it cancelled.
    pub(super) async fn message(&mut self) -> Result<Option<ProcessingRequest>, Status> {
        self.requests.message().await
    }

    pub(super) async fn next(&mut self) -> Request {
        self.message().await.expect("a stream").expect("a message").request.expect("a request")
    }

    /// Reads the whole request body.
    pub(super) async fn body(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            match self.next().await {
                Request::RequestHeaders(_) => {}
                Request::RequestBody(piece) => {
                    body.extend_from_slice(&piece.body);
                    if piece.end_of_stream {
                        return body;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub(super) async fn send(&self, response: Response) {
        self.reply(Ok(ProcessingResponse { response: Some(response), ..Default::default() })).await;
    }

    pub(super) async fn reply(&self, reply: ProcessingReply) {
        // Fails if the agent has left, which scripts notice in their requests.
        let _ = self.replies.send(reply).await;
    }

    /// Picks by header.
    pub(super) async fn pick(&self, list: &str) {
        self.send(Response::RequestHeaders(head(&[(crate::picker::message::DESTINATION, list)]))).await;
    }

    /// Picks by metadata alone.
    pub(super) async fn pick_by_metadata(&self, list: &str) {
        let one = |key: &str, kind| Struct { fields: [(key.to_owned(), Value { kind: Some(kind) })].into() };
        let pick = one(crate::picker::message::DESTINATION, Kind::StringValue(list.to_owned()));
        let response = Some(Response::RequestHeaders(HeadersResponse::default()));
        let dynamic_metadata = Some(one("envoy.lb", Kind::StructValue(pick)));
        self.reply(Ok(ProcessingResponse { response, dynamic_metadata, ..Default::default() })).await;
    }

    pub(super) async fn keep_piece(&self) {
        self.send(Response::RequestBody(BodyResponse::default())).await;
    }

    pub(super) async fn stream_body(&self, body: Bytes, end_of_stream: bool) {
        let mutation = Some(Mutation::StreamedResponse(StreamedBodyResponse { body, end_of_stream }));
        let body_mutation = Some(BodyMutation { mutation });
        let response = Some(CommonResponse { body_mutation, ..Default::default() });
        self.send(Response::RequestBody(BodyResponse { response })).await;
    }

    pub(super) async fn immediate(&self, code: i32) {
        let status = Some(HttpStatus { code });
        self.send(Response::ImmediateResponse(ImmediateResponse { status, ..Default::default() })).await;
    }
}

/// A reply to a head that sets these headers.
pub(super) fn head(headers: &[(&str, &str)]) -> HeadersResponse {
    let option = |(name, value): &(&str, &str)| HeaderValueOption {
        header: Some(HeaderValue { key: (*name).into(), value: String::new(), raw_value: (*value).to_owned().into() }),
        ..Default::default()
    };
    let set_headers = headers.iter().map(option).collect();
    let header_mutation = Some(HeaderMutation { set_headers, remove_headers: vec![] });
    HeadersResponse { response: Some(CommonResponse { header_mutation, ..Default::default() }) }
}

type Script = Arc<dyn Fn(Call) -> BoxFuture<'static, ()> + Send + Sync>;

struct Scripted(Script);

#[tonic::async_trait]
impl ExternalProcessor for Scripted {
    type ProcessStream = BoxStream<'static, ProcessingReply>;

    async fn process(
        &self,
        request: tonic::Request<Streaming<ProcessingRequest>>,
    ) -> Result<tonic::Response<Self::ProcessStream>, Status> {
        let (replies, mut sent) = mpsc::channel(1);
        tokio::spawn((self.0)(Call { requests: request.into_inner(), replies }));
        let first = sent.recv().await.transpose()?;
        let replies = futures_util::stream::iter(first.map(Ok)).chain(ReceiverStream::new(sent));
        Ok(tonic::Response::new(replies.boxed()))
    }
}

/// Serves on a free port until the test ends.
pub(super) async fn serve<F>(server: Server, script: impl Fn(Call) -> F + Send + Sync + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    serve_on(listener, server, script);
    address
}

pub(super) fn serve_on<F>(listener: TcpListener, mut server: Server, script: impl Fn(Call) -> F + Send + Sync + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    let script: Script = Arc::new(move |call| script(call).boxed());
    let service = server.add_service(ExternalProcessorServer::new(Scripted(script)));
    tokio::spawn(service.serve_with_incoming(TcpListenerStream::new(listener)));
}
