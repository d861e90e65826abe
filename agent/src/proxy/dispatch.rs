//! Dispatch: the request goes to the first endpoint of the list that can be reached, and the head of its response comes
//! back. A connect that fails moves on to the next; a kept connection that dies before a byte of the response is replaced
//! by a fresh one to the same endpoint, once.

use std::{cell::Cell, net::SocketAddr, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{io::AsyncWriteExt as _, net::tcp::WriteHalf, time::Instant};

use super::{
    Request,
    pick::Picked,
    respond::{Answer, evicted},
};
use crate::{
    client::Client,
    endpoint::connection::{EndpointConnection, Reader},
    error::Error,
    http::{
        body::BodyError,
        head::HeadLimits,
        response::{ResponseHead, parse_response, write_request},
    },
    metrics::Connection,
    picker::exchange::Body,
    upload::Upload,
    worker::Worker,
};

/// Room for a response head and what comes with it.
const READ: usize = 16 * 1024;
/// A request up to this size leaves in one write.
const ONE_WRITE: usize = 64 * 1024;

pub(super) async fn dispatch(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &Upload,
    picked: &mut Picked,
) -> Result<Answer, Error> {
    let mut last = None;
    let (shared, pool) = (&worker.shared, request.pool);
    for address in std::mem::take(&mut picked.endpoints) {
        let in_flight = shared.endpoints[pool].begin(address, Instant::now().into_std());
        let mut kept = worker.endpoints.reuse(address);
        loop {
            let reused = kept.is_some();
            let mut endpoint = match kept.take() {
                Some(connection) => connection,
                None => match worker.endpoints.connect(address).await {
                    Ok(connection) => connection,
                    Err(error) => {
                        tracing::info!(%address, %error, "endpoint cannot be reached");
                        worker.shared.metrics.endpoint_connection(Connection::Failed);
                        shared.endpoint_failed(pool, address);
                        last = Some(Error::Connect { address, error });
                        break;
                    }
                },
            };
            worker.shared.metrics.endpoint_connection(if reused { Connection::Reused } else { Connection::New });
            match attempt(worker, client, request, upload, picked, &mut endpoint).await {
                Ok((mut head, pending, sent)) => {
                    shared.endpoint_answered(pool, address, head.status);
                    // What is left of the request would be taken for the next one.
                    head.keep_alive &= sent;
                    return Ok(Answer { endpoint, head, pending, in_flight });
                }
                Err(Failed::Early) if reused => worker.shared.metrics.endpoint_retried("kept_connection_closed"),
                Err(Failed::Early) => {
                    shared.endpoint_failed(pool, address);
                    return Err(Error::EndpointClosed(address));
                }
                Err(Failed::Final(error)) => {
                    if matches!(error, Error::FirstByte(_)) {
                        shared.endpoint_failed(pool, address);
                    }
                    return Err(error);
                }
            }
        }
    }
    Err(last.unwrap_or(Error::NoEndpoint(crate::picker::builtin::NoEndpoint::NoneEligible)))
}

enum Failed {
    /// The connection ended before a byte of a response: the request may go out again.
    Early,
    Final(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// A response head, what was read behind it, and whether the whole request had been sent by then.
type Read = (ResponseHead, BytesMut, bool);

/// One request on one connection, up to the head of its response. An endpoint may answer before it has taken the whole
/// body, so both directions go at once.
async fn attempt(
    worker: &Worker,
    client: &mut Client,
    request: &Request,
    upload: &Upload,
    picked: &mut Picked,
    endpoint: &mut EndpointConnection,
) -> Result<Read, Failed> {
    let address = endpoint.address;
    let limit = worker.shared.config.timeouts.first_byte;
    let (reader, writer) = endpoint.split().map_err(|_| Failed::Early)?;
    let sent = Cell::new(false);
    let send = async {
        match send(writer, request, upload, &picked.body).await {
            Ok(()) => sent.set(true),
            // Not the end: the endpoint may have answered and closed. What it sent tells.
            Err(Written::Endpoint) => {}
            Err(Written::Body(error)) => return error,
        }
        std::future::pending().await
    };
    tokio::select! {
        biased;
        head = within(limit, read_head(worker, reader, address, request)) => {
            let (head, pending) = head.ok_or(Error::FirstByte(address))??;
            Ok((head, pending, sent.get()))
        }
        error = send => Err(Error::from(error).into()),
        reply = evicted(&mut picked.stream) => Err(Error::Evicted(Box::new(reply)).into()),
        () = client.gone() => Err(Error::ClientGone.into()),
    }
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
