//! The scripted picker's server: connections in generations that end together, and the gRPC services.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use penstock_proto::ext_proc::external_processor_server::{ExternalProcessor, ExternalProcessorServer};
use penstock_proto::ext_proc::processing_request::Request;
use penstock_proto::ext_proc::{ProcessingRequest, ProcessingResponse};
use penstock_proto::health::health_server::{Health, HealthServer};
use penstock_proto::health::{HealthCheckRequest, HealthCheckResponse};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::transport::{Cut, Cutter, Incoming};
use super::{Accept, Answer, End, Exchange, Record, Script, Setup, StreamEnd, StreamRecord, record};

/// Replies queued for the peer, above which a script waits.
const REPLIES: usize = 64;
/// A stream's initial HTTP/2 window, as in Go's server.
const WINDOW: u32 = 65_535;
/// The connection window is larger: unlike Go's server, h2 closes a connection with too many small buffered frames, and allows
/// fewer of them if this is smaller. A burst of requests must not close the connection.
const CONNECTION_WINDOW: u32 = 16 << 20;

#[derive(Clone)]
pub(super) struct Server {
    setup: Setup,
    script: Arc<dyn Script>,
    record: Arc<Record>,
    die: Arc<Notify>,
}

/// Connections that get GOAWAY together.
struct Generation {
    connections: mpsc::Sender<Incoming>,
    /// Closed on drop.
    _stay: oneshot::Sender<()>,
}

impl Generation {
    fn begin(server: &Server) -> Result<Self> {
        let (connections, incoming) = mpsc::channel(16);
        let (stay, gone) = oneshot::channel::<()>();
        let mut grpc = tonic::transport::Server::builder()
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(server.setup.max_streams);
        if let Some(tls) = &server.setup.tls {
            grpc = grpc.tls_config(tls.clone()).context("invalid TLS settings of the picker")?;
        }
        let grpc = grpc
            .add_service(ExternalProcessorServer::new(server.clone()))
            .add_service(HealthServer::new(server.clone()));
        let incoming = ReceiverStream::new(incoming).map(Ok::<_, std::io::Error>);
        tokio::spawn(async move {
            let going = async {
                let _ = gone.await;
            };
            grpc.serve_with_incoming_shutdown(incoming, going).await
        });
        Ok(Self { connections, _stay: stay })
    }
}

#[tonic::async_trait]
impl ExternalProcessor for Server {
    type ProcessStream = BoxStream<'static, Result<ProcessingResponse, Status>>;

    async fn process(
        &self,
        request: tonic::Request<Streaming<ProcessingRequest>>,
    ) -> Result<tonic::Response<Self::ProcessStream>, Status> {
        let connection = request.extensions().get::<Cutter>().cloned();
        let connection = connection.ok_or_else(|| Status::internal("stream without a connection"))?;
        let index = self.setup.records.then(|| {
            let mut streams = self.record.streams.lock();
            streams.push(StreamRecord::new(connection.number));
            streams.len() - 1
        });
        let (replies, mut replied) = mpsc::channel(REPLIES);
        tokio::spawn(self.clone().stream(request.into_inner(), Exchange::new(replies), index, connection));
        // HTTP/2 headers are sent with the first message; a failure without one sends only trailers.
        match replied.recv().await {
            Some(Ok(first)) => {
                let all = futures_util::stream::iter([Ok(first)]).chain(ReceiverStream::new(replied));
                Ok(tonic::Response::new(all.boxed()))
            }
            Some(Err(status)) => Err(status),
            None => Ok(tonic::Response::new(futures_util::stream::empty().boxed())),
        }
    }
}

impl Server {
    pub(super) fn new(setup: Setup, script: Arc<dyn Script>, record: Arc<Record>) -> Self {
        Self { setup, script, record, die: Arc::default() }
    }

    /// Opens the port and serves it; returns the address.
    pub(super) async fn listen(self, go_away: Arc<Notify>) -> Result<SocketAddr> {
        let address = self.setup.address;
        let listener = TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
        let address = listener.local_addr()?;
        let generation = Generation::begin(&self)?;
        tokio::spawn(self.accept(listener, generation, go_away));
        Ok(address)
    }

    /// Accepts until the picker dies: then it closes the port before the connections, so that a peer that sees the end of a
    /// connection finds the port closed.
    async fn accept(self, listener: TcpListener, mut generation: Generation, go_away: Arc<Notify>) {
        let (all, cut) = watch::channel(Cut::None);
        let mut silent = Vec::new();
        loop {
            let stream = tokio::select! {
                // A connection made after the picker went away or died must not join the previous generation.
                biased;
                () = self.die.notified() => {
                    drop(listener);
                    all.send_replace(Cut::Fin);
                    return;
                }
                () = go_away.notified() => {
                    // Dropping the previous generation sends GOAWAY on its connections.
                    let Ok(next) = Generation::begin(&self) else { return };
                    generation = next;
                    continue;
                }
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(_) => continue,
                },
            };
            let number = self.record.accepted.fetch_add(1, Ordering::Relaxed) + 1;
            let connection = Incoming::new(stream, number, &self.record.open, cut.clone());
            match self.script.accept() {
                Accept::Serve => {
                    if generation.connections.send(connection).await.is_err() {
                        return;
                    }
                }
                Accept::Silent => silent.push(connection),
                Accept::Reset => connection.reset(),
            }
        }
    }

    /// Serves one stream from its first message to its end.
    async fn stream(
        self,
        mut messages: Streaming<ProcessingRequest>,
        mut exchange: Exchange,
        index: Option<usize>,
        connection: Cutter,
    ) {
        let replies = exchange.replies();
        let script = self.play(&mut messages, &mut exchange, index);
        let (end, outcome) = tokio::select! {
            biased;
            ended = script => ended,
            () = replies.closed() => (StreamEnd::Cancelled, Ok(())),
        };
        // Recorded first, so that a test that sees the stream's end finds it in the record.
        if let Some(index) = index {
            self.record.streams.lock()[index].end.get_or_insert(end);
        }
        match outcome {
            Ok(()) | Err(End::Close) => {}
            Err(End::Status(status)) => {
                let _ = replies.send(Err(status)).await;
            }
            Err(End::ResetConnection) => {
                connection.cut(Cut::Reset);
                // The stream stays as it is until the connection is gone.
                replies.closed().await;
            }
            Err(End::Die) => {
                self.die.notify_one();
                replies.closed().await;
            }
        }
    }

    async fn play(
        &self,
        messages: &mut Streaming<ProcessingRequest>,
        exchange: &mut Exchange,
        index: Option<usize>,
    ) -> (StreamEnd, Answer) {
        loop {
            let outcome = match messages.message().await {
                Ok(Some(message)) => {
                    if let Some(index) = index {
                        self.record.streams.lock()[index].took(message.clone(), Instant::now());
                    }
                    self.message(exchange, message).await
                }
                Ok(None) => {
                    // tonic reports a reset as an orderly end too. The dropped reply receiver, which distinguishes them, is visible
                    // once the tasks woken together with this one have run.
                    for _ in 0..4 {
                        tokio::task::yield_now().await;
                    }
                    return (StreamEnd::HalfClosed, self.script.half_close(exchange).await);
                }
                Err(_) => return (StreamEnd::Cancelled, Ok(())),
            };
            if outcome.is_err() {
                return (StreamEnd::Script, outcome);
            }
        }
    }

    async fn message(&self, exchange: &mut Exchange, message: ProcessingRequest) -> Answer {
        exchange.metadata = message.metadata_context;
        if message.protocol_config.is_some() {
            exchange.protocol_config = message.protocol_config;
        }
        let script = &self.script;
        match message.request {
            Some(Request::RequestHeaders(headers)) => {
                exchange.request_headers = record::pairs(headers.headers.as_ref());
                script.request_headers(exchange, &headers).await
            }
            Some(Request::RequestBody(body)) => {
                exchange.request_body.extend_from_slice(&body.body);
                script.request_body(exchange, &body).await
            }
            Some(Request::RequestTrailers(trailers)) => script.request_trailers(exchange, &trailers).await,
            Some(Request::ResponseHeaders(headers)) => {
                exchange.response_headers = record::pairs(headers.headers.as_ref());
                script.response_headers(exchange, &headers).await
            }
            Some(Request::ResponseBody(body)) => script.response_body(exchange, &body).await,
            Some(Request::ResponseTrailers(trailers)) => script.response_trailers(exchange, &trailers).await,
            None => Err(End::Status(Status::invalid_argument("message without a kind"))),
        }
    }
}

#[tonic::async_trait]
impl Health for Server {
    async fn check(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        self.record.health.lock().push(service.clone());
        let status = self.script.health(&service)?;
        Ok(tonic::Response::new(HealthCheckResponse { status: status.into() }))
    }
}
