//! Dispatch: the request goes to the first endpoint of the list that can be reached, and the head of its response comes
//! back. A connect that fails moves on to the next; a kept connection that dies before a byte of the response is replaced
//! by a fresh one to the same endpoint, once.

use std::{io, net::SocketAddr, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::{
    Request,
    pick::Picked,
    respond::{Answer, evicted},
};
use crate::{
    client::ClientSocket,
    endpoint::connection::EndpointConnection,
    error::Error,
    http::{
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
    client: &mut ClientSocket,
    request: &mut Request,
    upload: &Upload,
    picked: &mut Picked,
) -> Result<Answer, Error> {
    let mut last = None;
    let picker = &worker.shared.pickers[request.pool];
    for address in picked.endpoints.clone() {
        let in_flight = picker.begin(address);
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
                        picker.report_failure(address, Instant::now().into_std());
                        last = Some(Error::Connect { address, error });
                        break;
                    }
                },
            };
            worker.shared.metrics.endpoint_connection(if reused { Connection::Reused } else { Connection::New });
            match attempt(worker, client, request, upload, picked, &mut endpoint).await {
                Ok((head, pending)) => {
                    picker.report_success(address);
                    return Ok(Answer { endpoint, head, pending, in_flight });
                }
                Err(Failed::Early) if reused => worker.shared.metrics.endpoint_retried("kept_connection_closed"),
                Err(Failed::Early) => return Err(Error::EndpointClosed(address)),
                Err(Failed::Final(error)) => return Err(error),
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

/// One request on one connection, up to the head of its response.
async fn attempt(
    worker: &Worker,
    client: &mut ClientSocket,
    request: &mut Request,
    upload: &Upload,
    picked: &mut Picked,
    endpoint: &mut EndpointConnection,
) -> Result<(ResponseHead, BytesMut), Failed> {
    let address = endpoint.address;
    let limit = worker.shared.config.timeouts.first_byte;
    endpoint.requests += 1;
    tokio::select! {
        biased;
        answer = within(limit, send(endpoint, request, upload, &picked.body)) => {
            if answer.ok_or(Error::FirstByte(address))?.is_err_and(|error| error == Written::Body) {
                return Err(Error::from(crate::http::body::BodyError::File(io::ErrorKind::Other.into())).into());
            }
            // A failed write is not the end: the endpoint may have answered before it read everything.
        }
        () = client.gone() => return Err(Error::ClientGone.into()),
    }
    let stream = &mut picked.stream;
    tokio::select! {
        biased;
        head = within(limit, read_head(worker, endpoint, request)) => {
            head.ok_or(Error::FirstByte(address))?
        }
        reply = evicted(stream) => Err(Error::Evicted(Box::new(reply)).into()),
        () = client.gone() => Err(Error::ClientGone.into()),
    }
}

async fn within<T>(limit: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, work).await.ok(),
        None => Some(work.await),
    }
}

#[derive(PartialEq, Eq)]
enum Written {
    /// The kept body could not be read back.
    Body,
    /// The endpoint does not take any more.
    Endpoint,
}

async fn send(
    endpoint: &mut EndpointConnection,
    request: &Request,
    upload: &Upload,
    body: &Body,
) -> Result<(), Written> {
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
            Body::Original => kept.next().await.map_err(|_| Written::Body)?,
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
    endpoint: &mut EndpointConnection,
    request: &Request,
) -> Result<(ResponseHead, BytesMut), Failed> {
    let limits = &worker.shared.config.limits;
    let limits = HeadLimits { bytes: limits.head_bytes, headers: limits.headers };
    let address: SocketAddr = endpoint.address;
    let mut buf = BytesMut::with_capacity(READ);
    loop {
        match endpoint.read(&mut buf).await {
            Ok(0) | Err(_) if buf.is_empty() => return Err(Failed::Early),
            Ok(0) | Err(_) => return Err(Error::EndpointClosed(address).into()),
            Ok(_) => {}
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
