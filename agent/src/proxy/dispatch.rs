//! Dispatch: the endpoints of the list have their turns until one answers, and the head of its response comes back.
//!
//! A kept connection that dies before a byte of the response is replaced by a fresh one to the same endpoint. A connect that
//! fails moves on to the next endpoint, since nothing was sent. So does an endpoint that took the request and closes before a
//! byte of the response, whatever the method, but not more often than the pool's attempts and budget allow. An endpoint that is
//! silent for too long is the end of it: it may be at work.

mod body;
mod http1;
mod http2;

use std::{io, net::SocketAddr, time::Duration};

use tokio::time::Instant;

use super::{
    Request,
    pick::Picked,
    respond::{Answer, evicted},
};
use crate::{
    client::Client,
    config::AppProtocol,
    endpoint::body::ResponseBody,
    error::Error,
    http::{body::BodyError, response::ResponseHead},
    picker::{builtin::NoEndpoint, exchange::Body},
    upload::Upload,
    worker::Worker,
};

/// The list belongs to the request's pool, and so does everything that is tried here: no other pool is asked.
pub(super) async fn dispatch(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &Upload,
    picked: &mut Picked,
) -> Result<Answer, Error> {
    let list = std::mem::take(&mut picked.endpoints);
    tokio::select! {
        biased;
        answer = walk(worker, request, upload, &picked.body, list) => answer,
        reply = evicted(&mut picked.stream) => Err(Error::Evicted(Box::new(reply))),
        () = client.gone() => Err(Error::ClientGone),
    }
}

async fn walk(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    list: Vec<SocketAddr>,
) -> Result<Answer, Error> {
    let (shared, pool) = (&worker.shared, request.pool);
    let metrics = shared.metrics.pool(pool);
    shared.retries[pool].request(now());
    let mut last = Error::NoEndpoint(NoEndpoint::NoneEligible);
    let (mut sent, mut retries) = (false, 0);
    let mut list = list.into_iter().enumerate().peekable();
    while let Some((index, address)) = list.next() {
        metrics.fallback_attempt(index);
        let in_flight = shared.endpoints[pool].begin(address, now());
        let failed = match turn(worker, request, upload, body, address, &mut sent).await {
            Ok((head, body)) => {
                shared.endpoint_answered(pool, address, head.status);
                return Ok(Answer { address, head, body, in_flight });
            }
            Err(failed) => failed,
        };
        if failed.is_the_endpoints() {
            shared.endpoint_failed(pool, address);
        }
        let reason = match failed {
            Failed::Final(error) => return Err(error),
            Failed::Connect(error) => {
                tracing::info!(%address, %error, "endpoint cannot be reached");
                last = Error::Connect { address, error };
                "connect"
            }
            Failed::Early => {
                last = Error::EndpointClosed(address);
                if list.peek().is_some() {
                    retries += 1;
                    if let Err(refused) = may_retry(worker, pool, retries) {
                        metrics.retry_refused(refused);
                        break;
                    }
                }
                "closed_before_response"
            }
        };
        if list.peek().is_some() {
            shared.metrics.endpoint_retried(reason);
        }
    }
    Err(last)
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Whether a request may be sent again for the `retries`th time; if not, why.
fn may_retry(worker: &Worker, pool: usize, retries: u32) -> Result<(), &'static str> {
    if retries > worker.shared.config.pools[pool].retry.attempts {
        Err("attempts")
    } else if !worker.shared.retries[pool].retry(now()) {
        Err("budget")
    } else {
        Ok(())
    }
}

/// One endpoint's turn, by what it speaks. `sent`: something of the request has been sent somewhere.
async fn turn(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    address: SocketAddr,
    sent: &mut bool,
) -> Result<(ResponseHead, ResponseBody), Failed> {
    match worker.shared.config.pools[request.pool].app_protocol {
        AppProtocol::Http1 => http1::turn(worker, request, upload, body, address, sent).await,
        AppProtocol::H2c => http2::turn(worker, request, upload, body, address, sent).await,
    }
}

enum Failed {
    /// Nothing was sent.
    Connect(io::Error),
    /// The connection ended before a byte of a response: the request may go out again.
    Early,
    Final(Error),
}

impl Failed {
    /// Whether it speaks against the endpoint.
    fn is_the_endpoints(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Early | Self::Final(Error::FirstByte(_)))
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

async fn within<T>(limit: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, work).await.ok(),
        None => Some(work.await),
    }
}

/// Why a request's body did not leave.
enum Written {
    /// The kept body could not be read back.
    Body(BodyError),
    /// The endpoint does not take any more.
    Endpoint,
}
