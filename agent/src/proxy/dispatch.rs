//! Dispatch: the endpoints of the list have their turns until one answers, and the head of its response comes back.
//!
//! A request may have been executed once the endpoint's kernel has acknowledged a byte of it; over HTTP/2 unless the endpoint says
//! that it has not looked at it. Before that it goes to another connection or the next endpoint, whatever the method: it costs
//! nothing. After that it goes on only if its method allows, and not more often than the pool's attempts and budget. An endpoint
//! that is silent for too long is the end of it: it may be at work.

mod content;
mod http1;
mod http2;

use std::{collections::VecDeque, io, net::SocketAddr, pin::pin, time::Duration};

use bytes::BytesMut;
use http::{StatusCode, Version};
use tokio::{sync::mpsc, time::Instant};

use self::content::Content;
use super::{
    Request,
    pick::Picked,
    respond::{Answer, evicted},
};
use crate::{
    client::Client,
    config::AppProtocol,
    endpoint::{
        body::ResponseBody,
        local_fault::local_fault,
        sending::{Sending, Unsent},
    },
    error::Error,
    http::{head::HeadLimits, headers, response::ResponseHead},
    picker::builtin::NoEndpoint,
    upload::Upload,
    worker::Worker,
};

/// The list belongs to the request's pool, and so does everything that is tried here: no other pool is asked. The body leaves the
/// upload: it is held as long as it is being sent.
pub(super) async fn dispatch(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    picked: &mut Picked,
) -> Result<Answer, Error> {
    let mut list = std::mem::take(&mut picked.endpoints);
    // Wherever they come from.
    if let Some(own) = list.iter().copied().find(|&address| worker.shared.own.accept(address)) {
        list.retain(|&address| !worker.shared.own.accept(address));
        tracing::warn!(address = %own, "endpoint is one of the agent's own listeners, passed over");
        if list.is_empty() {
            return Err(Error::OwnListener(own));
        }
    }
    let content = Content::new(upload, &mut picked.body);
    let (heads, mut interim) = mpsc::channel(1);
    let interim_heads = takes_interim(client, request).then_some(heads);
    let job = Job { worker, request, content, interim_heads };
    let mut walk = pin!(walk(&job, list));
    let answer = loop {
        tokio::select! {
            biased;
            Some(head) = interim.recv() => pass_on(client, &job, head).await?,
            answer = &mut walk => break answer,
            reply = evicted(&mut picked.stream) => return Err(Error::Evicted(Box::new(reply))),
            () = client.gone() => return Err(Error::ClientGone),
        }
    };
    // The last one may have come with the response.
    if let Ok(head) = interim.try_recv() {
        pass_on(client, &job, head).await?;
    }
    answer
}

/// RFC 9110 §15.2: not for HTTP/1.0. Clients of HTTP/2 are sent none (docs/limits.md).
fn takes_interim(client: &Client, request: &Request) -> bool {
    matches!(client, Client::Http1(_)) && request.parts.version == Version::HTTP_11
}

/// Sends an interim head to the client.
async fn pass_on(client: &mut Client, job: &Job<'_>, mut head: ResponseHead) -> Result<(), Error> {
    let Client::Http1(socket) = client else { return Ok(()) };
    headers::prepare_interim(&mut head.headers, head.version, &job.worker.shared.config.headers);
    let mut out = BytesMut::new();
    head.write_head(&mut out, true, job.request.parts.version);
    match within(job.idle(), socket.write_all(&out)).await {
        Some(Ok(())) => Ok(()),
        _ => Err(Error::ClientGone),
    }
}

/// A request that is to be answered by an endpoint.
struct Job<'a> {
    worker: &'a Worker,
    request: &'a Request,
    content: Content,
    /// Where interim heads go, if the client takes them.
    interim_heads: Option<mpsc::Sender<ResponseHead>>,
}

impl Job<'_> {
    fn idle(&self) -> Option<Duration> {
        self.request.times.idle
    }

    fn head_limits(&self) -> HeadLimits {
        let limits = &self.worker.shared.config.limits;
        HeadLimits { bytes: limits.head_bytes, headers: limits.headers }
    }

    /// Hands an interim head over for the client. `100 Continue` is not for it: by now the whole of its body is here.
    async fn pass_on(&self, head: ResponseHead) {
        if let Some(to) = &self.interim_heads
            && head.status != StatusCode::CONTINUE
        {
            // Nobody takes it any more when the request is over.
            let _ = to.send(head).await;
        }
    }

    /// The method allows more than one execution.
    fn may_be_repeated(&self) -> bool {
        self.worker.shared.config.pools[self.request.pool].retry.methods.contains(&self.request.parts.method)
    }

    /// Whether a request that may have been executed `executions` times may be executed once more; if not, why.
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

/// An endpoint's place in the list.
struct Turn {
    index: usize,
    address: SocketAddr,
    /// Once more, on a connection that has carried nothing.
    fresh: bool,
}

async fn walk(job: &Job<'_>, list: Vec<SocketAddr>) -> Result<Answer, Error> {
    let (shared, pool) = (&job.worker.shared, job.request.pool);
    let metrics = shared.metrics.pool(pool);
    shared.retries[pool].request(now());
    let mut last = Error::NoEndpoint(NoEndpoint::NoneEligible);
    let mut executions = 0;
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
                return Ok(Answer { address, head, body, in_flight });
            }
            Err(failed) => failed,
        };
        if failed.counts_against_endpoint() {
            shared.endpoint_failed(pool, address);
        }
        let reason = match failed {
            Failed::Final(error) => return Err(error),
            Failed::Connect(error) => match local_fault(&error) {
                Some(fault) => {
                    tracing::warn!(%address, %error, "endpoint not connected to, local fault");
                    shared.metrics.local_fault(fault);
                    last = Error::LocalFault { address, error };
                    "local_fault"
                }
                None => {
                    tracing::info!(%address, %error, "endpoint cannot be reached");
                    last = Error::Connect { address, error };
                    "connect"
                }
            },
            Failed::Early { executed: false, .. } => {
                last = Error::EndpointClosed(address);
                "not_acknowledged"
            }
            Failed::Early { executed: true, kept } => {
                last = Error::EndpointClosed(address);
                executions += 1;
                // It may have been closed for its age. A connection that has carried nothing tells.
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
    Err(last)
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// One endpoint's turn, by what it speaks.
async fn turn(job: &Job<'_>, address: SocketAddr, fresh: bool) -> Result<(ResponseHead, ResponseBody), Failed> {
    match job.worker.shared.config.pools[job.request.pool].app_protocol {
        AppProtocol::Http1 => http1::turn(job, address, fresh).await,
        // A connection that has ended is not used again.
        AppProtocol::H2c => http2::turn(job, address).await,
    }
}

enum Failed {
    /// Nothing was sent.
    Connect(io::Error),
    /// The connection ended before a byte of a response. `executed`: the endpoint may have executed the request. `kept`: the
    /// connection had carried requests before.
    Early {
        executed: bool,
        kept: bool,
    },
    Final(Error),
}

impl Failed {
    fn counts_against_endpoint(&self) -> bool {
        match self {
            Self::Connect(error) => local_fault(error).is_none(),
            Self::Early { .. } => true,
            Self::Final(error) => matches!(error, Error::FirstByte(_) | Error::RequestStalled { .. }),
        }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Sends, and resolves when that fails for a reason that a response does not make good.
async fn fails(sending: &Sending, address: SocketAddr) -> Error {
    match sending.run().await {
        Err(Unsent::Body(error)) => error.into(),
        Err(Unsent::Stalled(limit)) => Error::RequestStalled { address, limit },
        // Not the end: the endpoint may have answered and closed. What it sent tells.
        Ok(()) | Err(Unsent::Refused) => std::future::pending().await,
    }
}

async fn within<T>(limit: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, work).await.ok(),
        None => Some(work.await),
    }
}
