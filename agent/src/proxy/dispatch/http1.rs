//! One request over HTTP/1.1, up to the head of its response.

use std::{cell::Cell, net::SocketAddr};

use bytes::BytesMut;
use http::HeaderValue;
use tokio::net::TcpStream;

use super::{
    Failed, Written,
    body::{Pieces, length},
    within,
};
use crate::{
    deliver::Target,
    endpoint::{
        body::ResponseBody,
        connection::{EndpointConnection, Reader},
    },
    error::Error,
    http::{
        head::HeadLimits,
        response::{ResponseError, ResponseHead, parse_response, write_request},
    },
    kernel::socket::write_all,
    metrics::Connection,
    picker::exchange::Body,
    proxy::Request,
    steer::choice::choose_head,
    upload::Upload,
    worker::Worker,
};

/// Room for a response head and what comes with it.
const READ: usize = 16 * 1024;
/// After so many heads in a row that the kernel has left alone, it is not asked on a connection any more: they will be alike.
const HEADS_REFUSED: u32 = 4;
/// A request up to this size leaves in one write.
const ONE_WRITE: usize = 64 * 1024;

/// On a kept connection while nothing of the request has been `sent` anywhere, and on a fresh one if there is none, or the
/// endpoint had closed it. So the race that every kept connection is in is run once a request, and a request that brings
/// down its endpoints does not go on for nothing.
pub(super) async fn turn(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    address: SocketAddr,
    sent: &mut bool,
) -> Result<(ResponseHead, ResponseBody), Failed> {
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

/// One request on one connection, up to the head of its response.
async fn attempt(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    endpoint: EndpointConnection,
) -> Result<(ResponseHead, ResponseBody), Failed> {
    endpoint.announce(request.target);
    let short = length(upload, body).is_none_or(|bytes| bytes <= ONE_WRITE as u64);
    match head_target(worker, request, &endpoint).filter(|_| short) {
        Some(target) => open(worker, request, upload, body, endpoint, target).await,
        None => exchange(worker, request, upload, body, endpoint).await,
    }
}

/// Reads the head. An endpoint may answer before it has taken the whole body, so both directions go at once.
async fn exchange(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    mut endpoint: EndpointConnection,
) -> Result<(ResponseHead, ResponseBody), Failed> {
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
    let buf = BytesMut::with_capacity(READ);
    let (mut head, pending) = tokio::select! {
        biased;
        head = within(limit, read_head(worker, reader, buf, address, request)) => {
            head.ok_or(Error::FirstByte(address))??
        }
        error = send => return Err(Error::from(error).into()),
    };
    // What is left of the request would be taken for the next one.
    head.keep_alive &= sent.get();
    let body = ResponseBody::Http1 { framing: head.framing, connection: endpoint, pending, begun: None };
    Ok((head, body))
}

/// Leaves the response to the kernel, and reads the head where that has not taken it.
async fn open(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    mut endpoint: EndpointConnection,
    target: Target,
) -> Result<(ResponseHead, ResponseBody), Failed> {
    let address = endpoint.address;
    let limit = worker.shared.config.timeouts.first_byte;
    let late = || Failed::from(Error::FirstByte(address));
    let (_, writer) = endpoint.split().map_err(|_| Failed::Early)?;
    let sent = match within(limit, send(writer, request, upload, body)).await.ok_or_else(late)? {
        Ok(()) => true,
        Err(Written::Endpoint) => false,
        Err(Written::Body(error)) => return Err(Error::from(error).into()),
    };
    let mut pending = BytesMut::with_capacity(READ);
    request.opening.begin(endpoint, target);
    let waited = within(limit, request.opening.wait(&mut pending)).await;
    let Some((mut endpoint, begun)) = request.opening.cease().await else { return Err(Failed::Early) };
    if let Some(begun) = begun {
        let head = ResponseHead::passed(begun.framing, sent);
        let body = ResponseBody::Http1 { framing: begun.framing, connection: endpoint, pending, begun: Some(begun) };
        return Ok((head, body));
    }
    if waited.ok_or_else(late)?.is_err() {
        return Err(Failed::Early);
    }
    let (reader, _) = endpoint.split().map_err(|_| Failed::Early)?;
    let head = within(limit, read_head(worker, reader, pending, address, request)).await;
    let (mut head, pending) = head.ok_or_else(late)??;
    head.keep_alive &= sent;
    let body = ResponseBody::Http1 { framing: head.framing, connection: endpoint, pending, begun: None };
    Ok((head, body))
}

/// Who in the kernel may carry the response from its first byte on.
fn head_target(worker: &Worker, request: &Request, endpoint: &EndpointConnection) -> Option<Target> {
    let source = endpoint.source().filter(|_| request.passes_head && endpoint.heads_refused < HEADS_REFUSED)?;
    let key = request.target?;
    let config = &worker.shared.config.steering;
    let lane = choose_head(config, source.is_local_to(key))?;
    Some(Target { key, send_buffer: config.client_send_buffer, lane })
}

async fn send(endpoint: &TcpStream, request: &Request, upload: &Upload, body: &Body) -> Result<(), Written> {
    let mut out = BytesMut::with_capacity(1024);
    write_request(&request.parts, length(upload, body), request.upgrade.as_ref(), &mut out);
    let mut pieces = Pieces::new(upload, body);
    while let Some(piece) = pieces.next().await.map_err(Written::Body)? {
        if out.len() + piece.len() > ONE_WRITE {
            write_all(endpoint, &out).await.map_err(|_| Written::Endpoint)?;
            out.clear();
        }
        out.extend_from_slice(&piece);
    }
    write_all(endpoint, &out).await.map_err(|_| Written::Endpoint)
}

/// Reads the head of the final response; `buf` is what has come of it. Interim ones are dropped: `100 Continue` has been dealt with, and the others
/// are advice.
async fn read_head(
    worker: &Worker,
    mut endpoint: Reader<'_>,
    mut buf: BytesMut,
    address: SocketAddr,
    request: &Request,
) -> Result<(ResponseHead, BytesMut), Failed> {
    let limits = &worker.shared.config.limits;
    let limits = HeadLimits { bytes: limits.head_bytes, headers: limits.headers };
    let mut answered = !buf.is_empty();
    loop {
        let bad = |error| Error::Response { address, error };
        while let Some((head, length)) = parse_response(&buf, &limits, &request.parts.method).map_err(bad)? {
            let _ = buf.split_to(length);
            if !is_wanted(head.upgrade.as_ref(), request.upgrade.as_ref()) {
                return Err(bad(ResponseError::SwitchingProtocols).into());
            }
            if !head.interim {
                return Ok((head, buf));
            }
        }
        if buf.capacity() - buf.len() < READ / 4 {
            buf.reserve(READ);
        }
        match endpoint.read(&mut buf).await {
            Ok(0) | Err(_) if !answered => return Err(Failed::Early),
            Ok(0) | Err(_) => return Err(Error::EndpointClosed(address).into()),
            Ok(_) => answered = true,
        }
    }
}

/// Whether an endpoint that goes on with `protocol` may: the client has asked for it (RFC 9110 §7.8).
fn is_wanted(protocol: Option<&HeaderValue>, asked: Option<&HeaderValue>) -> bool {
    protocol
        .is_none_or(|protocol| asked.is_some_and(|asked| asked.as_bytes().eq_ignore_ascii_case(protocol.as_bytes())))
}
