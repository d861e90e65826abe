//! Dispatch: the endpoints of the list have their turns until one answers, and the head of its response comes back.
//!
//! A kept connection that dies before a byte of the response is replaced by a fresh one to the same endpoint. A connect that
//! fails moves on to the next endpoint, since nothing was sent. So does an endpoint that took the request and closes before a
//! byte of the response, whatever the method, but not more often than the pool's attempts and budget allow. An endpoint that is
//! silent for too long is the end of it: it may be at work.

use std::{cell::Cell, io, net::SocketAddr, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{io::AsyncWriteExt as _, net::tcp::WriteHalf, time::Instant};

use super::{
    Request,
    pick::Picked,
    respond::{Answer, evicted},
};
use crate::{
    client::ClientSocket,
    endpoint::connection::{EndpointConnection, Reader},
    error::Error,
    http::{
        body::BodyError,
        head::HeadLimits,
        response::{ResponseHead, parse_response, write_request},
    },
    metrics::Connection,
    picker::{builtin::NoEndpoint, exchange::Body},
    upload::Upload,
    worker::Worker,
};

/// Room for a response head and what comes with it.
const READ: usize = 16 * 1024;
/// A request up to this size leaves in one write.
const ONE_WRITE: usize = 64 * 1024;

/// The list belongs to the request's pool, and so does everything that is tried here: no other pool is asked.
pub(super) async fn dispatch(
    worker: &Worker,
    client: &mut ClientSocket,
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
            Ok((endpoint, head, pending)) => {
                shared.endpoint_answered(pool, address, head.status);
                return Ok(Answer { endpoint, head, pending, in_flight });
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
                retries += 1;
                "closed_before_response"
            }
        };
        if list.peek().is_none() {
            break;
        }
        if reason != "connect"
            && let Err(refused) = may_retry(worker, pool, retries)
        {
            metrics.retry_refused(refused);
            break;
        }
        shared.metrics.endpoint_retried(reason);
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

/// One endpoint's turn: on a kept connection while nothing of the request has been `sent` anywhere, and on a fresh one if there
/// is none, or the endpoint had closed it. So the race that every kept connection is in is run once a request, and a request
/// that brings down its endpoints does not go on for nothing.
async fn turn(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    address: SocketAddr,
    sent: &mut bool,
) -> Result<(EndpointConnection, ResponseHead, BytesMut), Failed> {
    let metrics = &worker.shared.metrics;
    let kept = if *sent { None } else { worker.endpoints.reuse(address) };
    if let Some(endpoint) = kept {
        metrics.endpoint_connection(Connection::Reused);
        *sent = true;
        match attempt(worker, request, upload, body, endpoint).await {
            Err(Failed::Early) => metrics.endpoint_retried("kept_connection_closed"),
            outcome => return outcome,
        }
    }
    let endpoint = worker.endpoints.connect(address).await.map_err(|error| {
        metrics.endpoint_connection(Connection::Failed);
        Failed::Connect(error)
    })?;
    metrics.endpoint_connection(Connection::New);
    *sent = true;
    attempt(worker, request, upload, body, endpoint).await
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

/// One request on one connection, up to the head of its response and what was read behind it. An endpoint may answer before
/// it has taken the whole body, so both directions go at once.
async fn attempt(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    mut endpoint: EndpointConnection,
) -> Result<(EndpointConnection, ResponseHead, BytesMut), Failed> {
    let address = endpoint.address;
    let limit = worker.shared.config.timeouts.first_byte;
    let (reader, writer) = endpoint.split().map_err(|_| Failed::Early)?;
    let sent = Cell::new(false);
    let send = async {
        match send(writer, request, upload, body).await {
            Ok(()) => sent.set(true),
            // Not the end: the endpoint may have answered and closed. What it sent tells.
            Err(Written::Endpoint) => {}
            Err(Written::Body(error)) => return error,
        }
        std::future::pending().await
    };
    let (mut head, pending) = tokio::select! {
        biased;
        head = within(limit, read_head(worker, reader, address, request)) => head.ok_or(Error::FirstByte(address))??,
        error = send => return Err(Error::from(error).into()),
    };
    // What is left of the request would be taken for the next one.
    head.keep_alive &= sent.get();
    Ok((endpoint, head, pending))
}

async fn within<T>(limit: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, work).await.ok(),
        None => Some(work.await),
    }
}

enum Written {
    /// The kept body could not be read back.
    Body(BodyError),
    /// The endpoint does not take any more.
    Endpoint,
}

async fn send(mut endpoint: WriteHalf<'_>, request: &Request, upload: &Upload, body: &Body) -> Result<(), Written> {
    let length = match body {
        Body::Original if upload.has_body() => Some(upload.kept.len()),
        Body::Original => None,
        Body::Replaced(pieces) => Some(pieces.iter().map(|piece| piece.len() as u64).sum()),
    };
    let mut out = BytesMut::with_capacity(1024);
    write_request(&request.parts, length, &mut out);
    let mut kept = upload.kept.pieces();
    let mut replaced = if let Body::Replaced(pieces) = body { pieces.iter() } else { [].iter() };
    loop {
        let piece: Option<Bytes> = match body {
            Body::Original => kept.next().await.map_err(Written::Body)?,
            Body::Replaced(_) => replaced.next().cloned(),
        };
        let Some(piece) = piece else { break };
        if out.len() + piece.len() > ONE_WRITE {
            endpoint.write_all(&out).await.map_err(|_| Written::Endpoint)?;
            out.clear();
        }
        out.extend_from_slice(&piece);
    }
    endpoint.write_all(&out).await.map_err(|_| Written::Endpoint)
}

/// Reads the head of the final response. Interim ones are dropped: `100 Continue` has been dealt with, and the others
/// are advice.
async fn read_head(
    worker: &Worker,
    mut endpoint: Reader<'_>,
    address: SocketAddr,
    request: &Request,
) -> Result<(ResponseHead, BytesMut), Failed> {
    let limits = &worker.shared.config.limits;
    let limits = HeadLimits { bytes: limits.head_bytes, headers: limits.headers };
    let mut buf = BytesMut::with_capacity(READ);
    let mut answered = false;
    loop {
        match endpoint.read(&mut buf).await {
            Ok(0) | Err(_) if !answered => return Err(Failed::Early),
            Ok(0) | Err(_) => return Err(Error::EndpointClosed(address).into()),
            Ok(_) => answered = true,
        }
        let bad = |error| Error::Response { address, error };
        while let Some((head, length)) = parse_response(&buf, &limits, &request.parts.method).map_err(bad)? {
            let _ = buf.split_to(length);
            if !head.interim {
                return Ok((head, buf));
            }
        }
        if buf.capacity() - buf.len() < READ / 4 {
            buf.reserve(READ);
        }
    }
}
