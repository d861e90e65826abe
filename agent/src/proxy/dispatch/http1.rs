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
    endpoint::{
        body::ResponseBody,
        connection::{EndpointConnection, Reader},
    },
    error::Error,
    http::{
        head::HeadLimits,
        response::{RequestFraming, ResponseError, ResponseHead, ResponseParser, write_request},
    },
    kernel::socket::write_all,
    metrics::Connection,
    picker::exchange::Body,
    proxy::Request,
    upload::Upload,
    worker::Worker,
};

/// Room for a response head and what comes with it.
const READ: usize = 16 * 1024;
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

/// One request on one connection, up to the head of its response. An endpoint may answer before
/// it has taken the whole body, so both directions go at once.
async fn attempt(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    mut endpoint: EndpointConnection,
) -> Result<(ResponseHead, ResponseBody), Failed> {
    let address = endpoint.address;
    endpoint.announce(request.target);
    let limit = request.times.first_byte;
    let (reader, writer) = endpoint.split().map_err(|_| Failed::Early)?;
    let sent = Cell::new(false);
    let send = async {
        match send(writer, address, request, upload, body).await {
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
    let body = ResponseBody::Http1 { framing: head.framing, connection: endpoint, pending };
    Ok((head, body))
}

async fn send(
    endpoint: &TcpStream,
    address: SocketAddr,
    request: &Request,
    upload: &Upload,
    body: &Body,
) -> Result<(), Written> {
    let mut out = BytesMut::with_capacity(1024);
    let framing = length(upload, body).map_or(RequestFraming::None, RequestFraming::Length);
    write_request(&request.parts, address, framing, request.upgrade.as_ref(), &mut out);
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
    let mut parser = ResponseParser::default();
    loop {
        match endpoint.read(&mut buf).await {
            Ok(0) | Err(_) if !answered => return Err(Failed::Early),
            Ok(0) | Err(_) => return Err(Error::EndpointClosed(address).into()),
            Ok(_) => answered = true,
        }
        let bad = |error| Error::Response { address, error };
        while let Some((head, length)) = parser.parse(&buf, &limits, &request.parts.method).map_err(bad)? {
            let _ = buf.split_to(length);
            parser = ResponseParser::default();
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
    }
}

/// Whether an endpoint that goes on with `protocol` may: the client has asked for it (RFC 9110 §7.8).
fn is_wanted(protocol: Option<&HeaderValue>, asked: Option<&HeaderValue>) -> bool {
    protocol
        .is_none_or(|protocol| asked.is_some_and(|asked| asked.as_bytes().eq_ignore_ascii_case(protocol.as_bytes())))
}
