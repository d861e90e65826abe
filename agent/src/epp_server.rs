//! `penstock epp`: the built-in picker as an Endpoint Picker on the wire, for Envoy or for another Penstock to ask.
//!
//! Serves `ext_proc` (one stream is one HTTP request; the exchange is in [`session`]) and gRPC health, in the order and form
//! that production pickers answer in. Differs from them in this: response bodies go back piece by piece, never held to the
//! end, and request trailers end a body, too. Without an open stream there is no state but the picker's.

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

use futures_util::{Stream, stream};
use http::HeaderName;
use penstock_proto::{
    ext_proc::{
        ProcessingRequest, ProcessingResponse,
        external_processor_server::{ExternalProcessor, ExternalProcessorServer},
    },
    health::health_server::HealthServer,
};
use tokio::{net::TcpListener, sync::oneshot};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

use crate::{config::Ejection, endpoint::set::EndpointSet, picker::builtin::BuiltinPicker};
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
    let processor = Processor {
        picker: Arc::new(picker),
        max_body: config.max_body,
        session_headers: config.session_headers.into(),
        delay: config.delay,
    };

    let mut server = Server::builder()
        // A stream is a request, and how many of those there may be is for the proxy to say.
        .max_concurrent_streams(u32::MAX)
        // Envoy ends its streams with RST_STREAM; a burst of those is its everyday and not an attack.
        .http2_max_pending_accept_reset_streams(Some(65_536))
        .http2_max_local_error_reset_streams(None)
        // Prompts are long: a window below their length costs a round trip each time it fills.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(16 << 20)
        // A proxy that vanished must not keep its requests counted.
        .http2_keepalive_interval(Some(Duration::from_secs(30)));
    if config.tls == EppServerTls::SelfSigned {
        server = server.tls_config(tls::self_signed()?)?;
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
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), shutdown);
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

struct Processor {
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
        let exchange = Exchange {
            inbound: request.into_inner(),
            session: Session::new(Arc::clone(&self.picker), self.max_body, Arc::clone(&self.session_headers)),
            replies: VecDeque::new(),
            delay: self.delay,
        };
        Ok(Response::new(Box::pin(stream::try_unfold(exchange, Exchange::next))))
    }
}

/// One stream. There is no task behind it: when the client is gone tonic drops this, and the request is no longer counted.
struct Exchange {
    inbound: Streaming<ProcessingRequest>,
    session: Session,
    replies: VecDeque<ProcessingResponse>,
    delay: Option<Duration>,
}

impl Exchange {
    async fn next(mut self) -> Result<Option<(ProcessingResponse, Self)>, Status> {
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return Ok(Some((reply, self)));
            }
            if self.session.is_over() {
                return Ok(None);
            }
            let Some(message) = self.inbound.message().await? else {
                return Ok(None);
            };
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
