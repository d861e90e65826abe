//! `penstock epp`: serves the built-in picker as an EPP, for Envoy or for another Penstock.
//!
//! Serves `ext_proc` (one stream per HTTP request, see `session`) and gRPC health, and replies as production EPPs do, with two
//! differences: response bodies are returned piece by piece and never held, and request trailers also end a body. Keeps no state
//! besides the picker's and that of open streams.

mod accept;
mod bounds;
mod health;
mod refusal;
mod refusals;
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

use futures_util::{Stream, stream};
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
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::{
    config::Ejection, endpoint::set::EndpointSet, http::frame_heads::MAX_FRAME_ERRORS, picker::builtin::BuiltinPicker,
    reserve,
};
pub use bounds::EppServerLimits;
pub use tls::client_ca;

use bounds::{Quota, Reservation};
use health::HealthService;
use refusals::Refusals;
use session::{ExchangeSession, Step};

/// How long open streams may take to end after a shutdown.
const DRAIN: Duration = Duration::from_secs(30);

/// The settings of `penstock epp`.
#[derive(Debug, Clone)]
pub struct EppServerConfig {
    /// The address to listen on. Default `0.0.0.0:9002`.
    pub listen: SocketAddr,
    /// The endpoints to pick from.
    pub endpoints: Vec<SocketAddr>,
    /// Whether clients connect by TLS. Default: self-signed.
    pub tls: EppServerTls,
    /// Most requests in flight per endpoint. If all endpoints are at the limit, requests are refused with 429. Default: no limit.
    pub max_inflight: Option<usize>,
    /// Delay before each pick, to test clients with a slow EPP. Default: none.
    pub delay: Option<Duration>,
    /// Most bytes of a request body. Larger ones are refused with 413. Default 10485760 (10 MiB).
    pub max_body: usize,
    /// Headers that name a session. The first of them that a request has counts. Default: none.
    pub session_headers: Vec<HeaderName>,
    /// With TLS: PEM of the CAs that may sign client certificates. Default: no client certificate is required.
    pub client_ca: Option<Vec<u8>>,
    /// Bounds of what clients may hold.
    pub limits: EppServerLimits,
}

/// TLS of `penstock epp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EppServerTls {
    /// Plain HTTP/2.
    Off,
    /// TLS with a self-signed certificate that is made at start and has no names.
    SelfSigned,
}

/// Serves until `shutdown` resolves. Then it refuses new streams (GOAWAY) and returns when the open ones have ended, or after 30 s.
/// Fails if the TLS certificate cannot be made or the listener fails.
pub async fn serve(
    config: EppServerConfig,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    reserve::raise_limit();
    let (limits, refusals) = (config.limits, Arc::<Refusals>::default());
    let tls = match config.tls {
        EppServerTls::Off => None,
        EppServerTls::SelfSigned => Some(tls::self_signed(config.client_ca.as_deref())?),
    };
    let processor = processor(config, Arc::clone(&refusals));

    let (stopping, stopped) = oneshot::channel();
    let shutdown = async move {
        shutdown.await;
        // Fails only if the server has ended.
        let _ = stopping.send(());
    };
    let served = server(&limits)
        .add_service(ExternalProcessorServer::new(processor))
        .add_service(HealthServer::new(HealthService))
        .serve_with_incoming_shutdown(accept::incoming(listener, tls, &limits, refusals), shutdown);
    let drained = async {
        if stopped.await.is_ok() {
            tokio::time::sleep(DRAIN).await;
        }
    };
    tokio::select! {
        biased;
        result = served => result?,
        () = drained => tracing::warn!("drain timed out after {DRAIN:?}, resetting open streams"),
    }
    Ok(())
}

/// What answers the streams.
fn processor(config: EppServerConfig, refusals: Arc<Refusals>) -> Processor {
    // Eject after one failure, because a proxy reports a failed endpoint only through the endpoint that served the request.
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
    Processor {
        limits,
        refusals,
        streams: Quota::new(limits.streams),
        held: Quota::new(limits.held_bytes),
        picker: Arc::new(picker),
        max_body: config.max_body,
        session_headers: config.session_headers.into(),
        delay: config.delay,
    }
}

fn server(limits: &EppServerLimits) -> Server {
    Server::builder()
        // One stream per request. `streams` also limits all connections together.
        .max_concurrent_streams(u32::try_from(limits.streams).unwrap_or(u32::MAX))
        // Envoy ends its streams with RST_STREAM, so bursts of those are normal and not an attack.
        .http2_max_pending_accept_reset_streams(Some(65_536))
        .http2_max_local_error_reset_streams(Some(MAX_FRAME_ERRORS))
        // Prompts are long, and each time that the window is full costs a round trip.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(16 << 20)
        // Detects unreachable proxies, whose requests must not stay counted.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
}

struct Processor {
    limits: EppServerLimits,
    refusals: Arc<Refusals>,
    streams: Arc<Quota>,
    held: Arc<Quota>,
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
            self.refusals.add("streams");
            return Err(Status::resource_exhausted("too many streams are open"));
        };
        let (picker, held, refusals) = (Arc::clone(&self.picker), self.held.reservation(), Arc::clone(&self.refusals));
        let exchange = ExchangeStream {
            _stream: stream,
            limits: self.limits,
            refusals: Arc::clone(&refusals),
            messages: 0,
            inbound: request.into_inner(),
            session: ExchangeSession::new(picker, self.max_body, Arc::clone(&self.session_headers), held, refusals),
            replies: VecDeque::new(),
            delay: self.delay,
        };
        Ok(Response::new(Box::pin(stream::try_unfold(exchange, ExchangeStream::next))))
    }
}

/// One stream, without a task of its own. When the client leaves, tonic drops it, which ends the count of the request.
struct ExchangeStream {
    _stream: Reservation,
    limits: EppServerLimits,
    refusals: Arc<Refusals>,
    messages: usize,
    inbound: Streaming<ProcessingRequest>,
    session: ExchangeSession,
    replies: VecDeque<ProcessingResponse>,
    delay: Option<Duration>,
}

impl ExchangeStream {
    fn check(&mut self, message: &ProcessingRequest) -> Result<(), Status> {
        self.messages += 1;
        if !self.session.is_decided() && self.messages > self.limits.messages {
            self.refusals.add("messages");
            return Err(Status::resource_exhausted(format!(
                "more than {} messages for one request",
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
            self.refusals.add("fields");
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
            // The body has been sent back.
            if self.session.is_decided() {
                self.session.release();
            }
            let wait = if self.session.is_decided() { self.limits.response_idle } else { self.limits.idle };
            let message = match timeout(wait, self.inbound.message()).await {
                Ok(message) => message?,
                Err(_) => {
                    self.refusals.add("silent");
                    return Err(Status::deadline_exceeded(format!("no message for {wait:?}")));
                }
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
