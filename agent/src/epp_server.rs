//! `penstock epp`: the built-in picker as an Endpoint Picker on the wire, for Envoy or for another Penstock to ask.
//!
//! Serves `ext_proc` (one stream is one HTTP request; the exchange is in [`session`]) and gRPC health, in the order and form
//! that production pickers answer in. Differs from them in this: response bodies go back piece by piece, never held to the
//! end, and request trailers end a body, too. Without an open stream there is no state but the picker's.

mod bounds;
mod health;
mod refusal;
mod reply;
mod session;
mod subset;
#[cfg(test)]
mod tests;
mod tls;
mod upload;

use std::{
    collections::VecDeque,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt as _, stream};
use http::HeaderName;
use penstock_proto::{
    ext_proc::{
        ProcessingRequest, ProcessingResponse,
        external_processor_server::{ExternalProcessor, ExternalProcessorServer},
        processing_request::Request as Told,
    },
    health::health_server::HealthServer,
};
use tokio::{net::TcpListener, sync::oneshot, time::timeout};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

use crate::{config::Ejection, endpoint::set::EndpointSet, picker::builtin::BuiltinPicker};
pub use bounds::EppServerLimits;

use bounds::{Budget, Counted, Part};
use health::Health;
use session::{Session, Step};

/// How long open streams may take to end after the shutdown.
const DRAIN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
pub struct EppServerConfig {
    /// Default `0.0.0.0:9002`.
    pub listen: SocketAddr,
    /// What to pick from.
    pub endpoints: Vec<SocketAddr>,
    pub tls: EppServerTls,
    /// Requests in flight at an endpoint; with all at the limit, requests are refused with 429. Default: no limit.
    pub max_inflight: Option<usize>,
    /// Time to let pass before each answer, to see what a slow picker does to its clients. Default: none.
    pub delay: Option<Duration>,
    /// Request body, bytes; more is 413. Default 10485760 (10 MiB).
    pub max_body: usize,
    /// Requests with the same value of the first of these that they have go to the same endpoint. Default: none.
    pub session_headers: Vec<HeaderName>,
    /// With TLS: PEM of the CAs one of which must have signed the client's certificate. Default: nobody has to show one.
    pub client_ca: Option<Vec<u8>>,
    pub limits: EppServerLimits,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EppServerTls {
    /// Plain HTTP/2.
    Off,
    /// TLS with a certificate made at the start, without names.
    SelfSigned,
}

/// Serves until `shutdown` resolves; then refuses new streams (GOAWAY) and returns when the open ones have ended, or after 30 s.
pub async fn serve(
    config: EppServerConfig,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    // What a proxy had to pass over is avoided at once: it says so only after the request has gone elsewhere.
    let rules = Ejection {
        failures: 1,
        base: Duration::from_secs(1),
        max: Duration::from_secs(30),
        max_percent: 100,
        server_errors: false,
    };
    let mut picker = BuiltinPicker::new(Arc::new(EndpointSet::of(config.endpoints, rules)));
    if let Some(limit) = config.max_inflight {
        picker = picker.with_max_in_flight(limit);
    }
    let limits = config.limits;
    let processor = Processor {
        limits,
        streams: Budget::new(limits.streams),
        held: Budget::new(limits.held_bytes),
        picker: Arc::new(picker),
        max_body: config.max_body,
        session_headers: config.session_headers.into(),
        delay: config.delay,
    };

    let mut server = Server::builder()
        // A stream is a request. All connections together have the limit.
        .max_concurrent_streams(u32::try_from(limits.streams).unwrap_or(u32::MAX))
        // Envoy ends its streams with RST_STREAM; a burst of those is its everyday and not an attack.
        .http2_max_pending_accept_reset_streams(Some(65_536))
        .http2_max_local_error_reset_streams(None)
        // Prompts are long: a window below their length costs a round trip each time it fills.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(16 << 20)
        // A proxy that vanished must not keep its requests counted.
        .http2_keepalive_interval(Some(Duration::from_secs(30)));
    if config.tls == EppServerTls::SelfSigned {
        server = server.tls_config(tls::self_signed(config.client_ca.as_deref())?)?;
    }

    let (stopping, stopped) = oneshot::channel();
    let shutdown = async move {
        shutdown.await;
        // The receiver is gone only when the server is.
        let _ = stopping.send(());
    };
    let served = server
        .add_service(ExternalProcessorServer::new(processor))
        .add_service(HealthServer::new(Health))
        .serve_with_incoming_shutdown(incoming(listener, limits.connections), shutdown);
    let drained = async {
        if stopped.await.is_ok() {
            tokio::time::sleep(DRAIN).await;
        }
    };
    tokio::select! {
        biased;
        result = served => result?,
        () = drained => tracing::warn!("streams still open {DRAIN:?} after the shutdown are broken off"),
    }
    Ok(())
}

/// Connections as they are accepted; those beyond the limit are closed.
fn incoming(listener: TcpListener, connections: usize) -> impl Stream<Item = std::io::Result<Counted>> {
    let budget = Budget::new(connections);
    TcpIncoming::from(listener).with_nodelay(Some(true)).filter_map(move |accepted| {
        let counted = match accepted {
            Ok(stream) => budget.one().map(|one| Ok(Counted::new(stream, one))),
            Err(error) => Some(Err(error)),
        };
        std::future::ready(counted)
    })
}

struct Processor {
    limits: EppServerLimits,
    streams: Arc<Budget>,
    held: Arc<Budget>,
    picker: Arc<BuiltinPicker>,
    max_body: usize,
    session_headers: Arc<[HeaderName]>,
    delay: Option<Duration>,
}

#[tonic::async_trait]
impl ExternalProcessor for Processor {
    type ProcessStream = Pin<Box<dyn Stream<Item = Result<ProcessingResponse, Status>> + Send>>;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Self::ProcessStream>, Status> {
        let Some(stream) = self.streams.one() else {
            return Err(Status::resource_exhausted("too many streams are open"));
        };
        let (picker, held) = (Arc::clone(&self.picker), self.held.part());
        let exchange = Exchange {
            _stream: stream,
            limits: self.limits,
            messages: 0,
            inbound: request.into_inner(),
            session: Session::new(picker, self.max_body, Arc::clone(&self.session_headers), held),
            replies: VecDeque::new(),
            delay: self.delay,
        };
        Ok(Response::new(Box::pin(stream::try_unfold(exchange, Exchange::next))))
    }
}

/// One stream. There is no task behind it: when the client is gone tonic drops this, and the request is no longer counted.
struct Exchange {
    _stream: Part,
    limits: EppServerLimits,
    messages: usize,
    inbound: Streaming<ProcessingRequest>,
    session: Session,
    replies: VecDeque<ProcessingResponse>,
    delay: Option<Duration>,
}

impl Exchange {
    fn check(&mut self, message: &ProcessingRequest) -> Result<(), Status> {
        self.messages += 1;
        if !self.session.is_decided() && self.messages > self.limits.messages {
            return Err(Status::resource_exhausted(format!(
                "more than {} messages of one request",
                self.limits.messages
            )));
        }
        let fields = match &message.request {
            Some(Told::RequestHeaders(head) | Told::ResponseHeaders(head)) => head.headers.as_ref(),
            Some(Told::RequestTrailers(tail) | Told::ResponseTrailers(tail)) => tail.trailers.as_ref(),
            _ => None,
        };
        let fields = fields.map_or(&[][..], |fields| &fields.headers);
        let bytes: usize = fields.iter().map(|field| field.key.len() + field.value.len() + field.raw_value.len()).sum();
        if fields.len() > self.limits.fields || bytes > self.limits.field_bytes {
            return Err(Status::resource_exhausted(format!("{} fields of {bytes} bytes in a head", fields.len())));
        }
        Ok(())
    }

    async fn next(mut self) -> Result<Option<(ProcessingResponse, Self)>, Status> {
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return Ok(Some((reply, self)));
            }
            if self.session.is_over() {
                return Ok(None);
            }
            // What was held has been sent.
            if self.session.is_decided() {
                self.session.release();
            }
            let wait = if self.session.is_decided() { self.limits.response_idle } else { self.limits.idle };
            let message = match timeout(wait, self.inbound.message()).await {
                Ok(message) => message?,
                Err(_) => return Err(Status::deadline_exceeded(format!("nothing came for {wait:?}"))),
            };
            let Some(message) = message else { return Ok(None) };
            self.check(&message)?;
            match self.session.receive(message, Instant::now(), &mut self.replies)? {
                Step::Read => {}
                Step::Decide => {
                    if let Some(delay) = self.delay {
                        tokio::time::sleep(delay).await;
                    }
                    self.session.decide(Instant::now(), &mut self.replies);
                }
            }
        }
    }
}
