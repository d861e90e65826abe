//! Dispatch tries the pick's endpoints in turn until one responds. Returns the head of the final response.
//!
//! A request may have been executed once the endpoint's kernel acknowledged a byte of it (over HTTP/2: unless the endpoint refused
//! the stream). Before that, any method is retried without limit. After that, it is retried only if its method allows it and within
//! the pool's attempts and budget. A response timeout is final, because the endpoint may still be working on the request.

mod content;
mod http1;
mod http2;
mod prepare;

use std::{
    cell::Cell, collections::VecDeque, future::poll_fn, io, net::SocketAddr, pin::pin, task::Poll, time::Duration,
};

use bytes::BytesMut;
use http::{StatusCode, Version};
use tokio::{sync::mpsc, time::Instant};

use self::content::Content;
pub(super) use self::prepare::prepare;
use super::{
    picked::{Picked, evicted},
    request::Request,
};
use crate::{
    client::Client,
    config::AppProtocol,
    endpoint::{
        body::ResponseBody,
        in_flight::InFlight,
        local_fault::local_fault,
        sending::{SendError, Sending},
        tls::is_handshake_error,
    },
    error::Error,
    http::{
        head::HeadLimits,
        headers,
        response::{ResponseError, ResponseHead},
    },
    picker::{builtin::NoEndpoint, client::PickStream},
    shared::Shared,
    upload::CompleteBody,
    worker::Worker,
};

/// An endpoint's response of which the head has been read.
pub(super) struct EndpointResponse {
    pub(super) address: SocketAddr,
    pub(super) head: ResponseHead,
    pub(super) body: ResponseBody,
    pub(super) in_flight: InFlight,
}

/// Dispatches a request to the endpoints of the pick; no other pool is tried. The body is freed as soon as it has been sent.
pub(super) async fn dispatch(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    picked: &mut Picked,
    body: CompleteBody,
) -> Result<EndpointResponse, Failed> {
    let mut list = std::mem::take(&mut picked.endpoints);
    // Never dial the agent itself, whichever picker named the address.
    if let Some(own) = list.iter().copied().find(|&address| worker.shared.own.accept(address)) {
        list.retain(|&address| !worker.shared.own.accept(address));
        tracing::warn!(address = %own, "endpoint is one of the agent's own listeners, skipping it");
        if list.is_empty() {
            return Err(Error::OwnListener(own).into());
        }
    }
    let content = Content::new(body, &mut picked.body);
    let (heads, interim) = mpsc::channel(1);
    let interim_heads = takes_interim(client, request).then_some(heads);
    let job = Job { worker, request, content, interim_heads };
    let result = attempts(&job, client, interim, &mut picked.stream, list).await;
    result.map_err(|AttemptsFailed { error, dead }| {
        let untaken = dead.and_then(|dead| Some(Untaken { dead, body: job.content.give_back()? }));
        Failed { error, untaken }
    })
}

/// Tries the endpoints, and forwards interim responses meanwhile, until there is a response, an eviction, or the client has left.
async fn attempts(
    job: &Job<'_>,
    client: &mut Client,
    mut interim: mpsc::Receiver<ResponseHead>,
    stream: &mut Option<PickStream>,
    list: Vec<SocketAddr>,
) -> Result<EndpointResponse, AttemptsFailed> {
    // Runs during the attempts, so that a slow client does not keep them from reading what the endpoint sends.
    let is_writing = Cell::new(false);
    let mut to_client = pin!(async {
        loop {
            tokio::select! {
                biased;
                Some(head) = interim.recv() => {
                    is_writing.set(true);
                    forward_interim(client, job, head).await?;
                    is_writing.set(false);
                }
                () = client.gone() => return Err(Error::ClientGone),
            }
        }
    });
    let response = tokio::select! {
        biased;
        // First: until the response has begun, an eviction is the response.
        reply = evicted(stream) => Err(Error::Evicted(Box::new(reply)).into()),
        response = try_in_turn(job, list) => response,
        gone = &mut to_client => return gone.map_err(AttemptsFailed::from),
    };
    // A head is written whole, also the last one, which may have arrived together with the response.
    poll_fn(|cx| match to_client.as_mut().poll(cx) {
        Poll::Ready(gone) => Poll::Ready(gone.map(drop)),
        Poll::Pending if is_writing.get() => Poll::Pending,
        Poll::Pending => Poll::Ready(Ok(())),
    })
    .await?;
    response
}

/// Whether interim responses are forwarded: not to HTTP/1.0 clients (RFC 9110 §15.2).
fn takes_interim(client: &Client, request: &Request) -> bool {
    matches!(client, Client::Http2(_)) || request.parts.version == Version::HTTP_11
}

/// Sends an interim head to the client. The client may take as long as it makes progress within `timeouts.idle`.
async fn forward_interim(client: &mut Client, job: &Job<'_>, mut head: ResponseHead) -> Result<(), Error> {
    headers::prepare_interim(&mut head.headers, head.version, &job.worker.shared.config.headers);
    let sent = match client {
        Client::Http1(socket) => {
            let mut out = BytesMut::new();
            head.write_head(&mut out, true, job.request.parts.version);
            socket.interim(&out).await
        }
        Client::Http2(stream) => stream.interim(head.interim_frames()).await,
    };
    sent.map_err(|_| Error::ClientGone)
}

/// A request in dispatch.
struct Job<'a> {
    worker: &'a Worker,
    request: &'a Request,
    content: Content,
    /// Forwards interim heads to the client; `None` if the client takes none.
    interim_heads: Option<mpsc::Sender<ResponseHead>>,
}

impl Job<'_> {
    fn idle(&self) -> Option<Duration> {
        self.request.timeouts.idle
    }

    fn head_limits(&self) -> HeadLimits {
        HeadLimits::of(&self.worker.shared.config.limits)
    }

    /// Queues an interim head for the client. `100 Continue` is dropped, because the whole body has been received.
    async fn queue_interim(&self, head: ResponseHead) {
        if let Some(to) = &self.interim_heads
            && head.status != StatusCode::CONTINUE
        {
            // Fails only if the request has ended.
            let _ = to.send(head).await;
        }
    }

    /// Whether the method allows more than one execution.
    fn may_be_repeated(&self) -> bool {
        self.worker.shared.config.pools[self.request.pool].retry.methods.contains(&self.request.parts.method)
    }

    /// Whether a request that may have been executed `executions` times may be sent again. The error is the metric's label.
    fn may_repeat(&self, executions: u32) -> Result<(), &'static str> {
        let (shared, pool) = (&self.worker.shared, self.request.pool);
        let rules = &shared.config.pools[pool].retry;
        if !self.may_be_repeated() {
            Err("method")
        } else if executions > rules.attempts {
            Err("attempts")
        } else if !shared.retries[pool].retry(now()) {
            Err("budget")
        } else {
            Ok(())
        }
    }
}

/// An attempt with one endpoint of the list.
struct Turn {
    index: usize,
    address: SocketAddr,
    /// A second attempt, on a new connection.
    fresh: bool,
}

/// Why a request got no response.
pub(super) struct Failed {
    pub(super) error: Error,
    /// Set if none of the endpoints can have processed the request.
    pub(super) untaken: Option<Untaken>,
}

/// A request that no endpoint took, so that it may be picked anew.
pub(super) struct Untaken {
    /// The endpoints that were tried.
    pub(super) dead: Vec<SocketAddr>,
    pub(super) body: CompleteBody,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, untaken: None }
    }
}

/// Why the attempts with the endpoints of one pick failed.
struct AttemptsFailed {
    error: Error,
    /// The endpoints that were tried, if none of them can have processed the request.
    dead: Option<Vec<SocketAddr>>,
}

impl From<Error> for AttemptsFailed {
    fn from(error: Error) -> Self {
        Self { error, dead: None }
    }
}

async fn try_in_turn(job: &Job<'_>, list: Vec<SocketAddr>) -> Result<EndpointResponse, AttemptsFailed> {
    let (shared, pool) = (&job.worker.shared, job.request.pool);
    let metrics = shared.metrics.pool(pool);
    shared.retries[pool].request(now());
    let mut last = Error::NoEndpoint(NoEndpoint::NoneEligible);
    let mut executions = 0;
    let mut dead = Some(list.clone());
    let turns = list.into_iter().enumerate().map(|(index, address)| Turn { index, address, fresh: false });
    let mut turns: VecDeque<Turn> = turns.collect();
    while let Some(Turn { index, address, fresh }) = turns.pop_front() {
        if !fresh {
            metrics.fallback_attempt(index);
        }
        let in_flight = shared.endpoints[pool].begin(address, now());
        let failed = match turn(job, address, fresh).await {
            Ok((head, body)) => {
                shared.endpoint_answered(pool, address, head.status);
                return Ok(EndpointResponse { address, head, body, in_flight });
            }
            Err(failed) => failed,
        };
        if failed.counts_against_endpoint() {
            shared.endpoint_failed(pool, address);
        }
        let reason = match failed {
            AttemptError::Final(error) => return Err(error.into()),
            AttemptError::Connect(error) => {
                let is_local = local_fault(&error).is_some();
                if is_local {
                    dead = None;
                }
                last = not_connected(shared, address, error);
                if is_local { "local_fault" } else { "connect" }
            }
            AttemptError::ClosedEarly { executed: false, .. } => {
                last = Error::EndpointClosed(address);
                "not_acknowledged"
            }
            AttemptError::ClosedEarly { executed: true, kept } => {
                last = Error::EndpointClosed(address);
                executions += 1;
                dead = None;
                // A kept connection may have been closed for its age. A new connection to the same endpoint shows that.
                if kept {
                    turns.push_front(Turn { index, address, fresh: true });
                }
                if !turns.is_empty()
                    && let Err(refused) = job.may_repeat(executions)
                {
                    metrics.retry_refused(refused);
                    break;
                }
                "closed_before_response"
            }
        };
        if !turns.is_empty() {
            shared.metrics.endpoint_retried(reason);
        }
    }
    Err(AttemptsFailed { error: last, dead })
}

/// Reports a failed connection, and whose fault it is.
fn not_connected(shared: &Shared, address: SocketAddr, error: io::Error) -> Error {
    match local_fault(&error) {
        Some(fault) => {
            tracing::warn!(%address, %error, "connecting to the endpoint failed, local fault");
            shared.metrics.local_fault(fault);
            Error::LocalFault { address, error }
        }
        None if is_handshake_error(&error) => {
            tracing::warn!(%address, %error, "TLS handshake with the endpoint failed");
            Error::EndpointTls { address, error }
        }
        None => {
            tracing::info!(%address, %error, "connecting to the endpoint failed");
            Error::Connect { address, error }
        }
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// One attempt with one endpoint, over the pool's protocol.
async fn turn(job: &Job<'_>, address: SocketAddr, fresh: bool) -> Result<(ResponseHead, ResponseBody), AttemptError> {
    match job.worker.shared.config.pools[job.request.pool].app_protocol {
        AppProtocol::Http1 | AppProtocol::Https => http1::turn(job, address, fresh).await,
        // A closed HTTP/2 connection is never reused, so `fresh` needs no special case.
        AppProtocol::H2c => http2::turn(job, address).await,
    }
}

enum AttemptError {
    /// Connecting failed, so nothing was sent.
    Connect(io::Error),
    /// The connection ended before the first byte of a response. `executed`: the endpoint may have executed the request. `kept`:
    /// the connection had carried requests before.
    ClosedEarly {
        executed: bool,
        kept: bool,
    },
    Final(Error),
}

impl AttemptError {
    fn counts_against_endpoint(&self) -> bool {
        match self {
            Self::Connect(error) => local_fault(error).is_none(),
            Self::ClosedEarly { .. } => true,
            Self::Final(error) => matches!(error, Error::FirstByte(_) | Error::RequestStalled { .. }),
        }
    }
}

impl From<Error> for AttemptError {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Most interim heads before one response.
const INTERIM_HEADS: usize = 1024;
/// Most bytes of them, as a multiple of `limits.head_bytes`.
const INTERIM_BYTES: usize = 16;

/// Counts the interim heads of one response.
#[derive(Default)]
struct Interim {
    heads: usize,
    bytes: usize,
}

impl Interim {
    /// Adds one head. Fails if there are too many heads or bytes.
    fn add(&mut self, bytes: usize, limits: &HeadLimits) -> Result<(), ResponseError> {
        (self.heads, self.bytes) = (self.heads + 1, self.bytes + bytes);
        let most = INTERIM_BYTES * limits.bytes;
        if self.heads > INTERIM_HEADS {
            return Err(ResponseError::Interim { limit: INTERIM_HEADS, what: "heads" });
        }
        if self.bytes > most { Err(ResponseError::Interim { limit: most, what: "bytes" }) } else { Ok(()) }
    }
}

/// Sends the request. Resolves only if sending fails in a way that rules out a response.
async fn send_failure(sending: &Sending, address: SocketAddr) -> Error {
    match sending.run().await {
        Err(SendError::Body(error)) => error.into(),
        Err(SendError::Stalled(limit)) => Error::RequestStalled { address, limit },
        // The endpoint may have responded and closed. Reading the response decides.
        Ok(()) | Err(SendError::Refused) => std::future::pending().await,
    }
}
