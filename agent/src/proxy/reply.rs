//! Replies that do not come from an endpoint: the agent's errors, its answer to `Max-Forwards: 0`, and the EPP's immediate replies.

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};

use super::request::{AfterRequest, Request};
use crate::{
    client::Client,
    error::{Error, Manner},
    http::{
        headers,
        reply::{GRPC_STATUS, Reply},
        request::RequestBody,
    },
    picker::{exchange::ImmediateReply, mutation},
    upload::Upload,
    worker::Worker,
};

/// Sends an error response. Returns whether the client took it.
pub(super) async fn send_error(
    client: &mut Client,
    method: &Method,
    manner: &Manner<'_>,
    error: &Error,
    keep_alive: bool,
) -> bool {
    !matches!(error, Error::ClientGone) && client.reply(method, &error.reply(manner), keep_alive).await.is_ok()
}

/// Answers a request with `Max-Forwards: 0` (RFC 9110 §7.6.2).
pub(super) async fn answer_last_forward(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &Upload,
) -> Result<AfterRequest, Error> {
    let keep_alive = request.keeps_alive(worker) && upload.is_done();
    let mut reply = Reply { status: StatusCode::OK, headers: http::HeaderMap::new(), body: Bytes::new() };
    request.manner(&worker.shared.config).mark(&mut reply.headers);
    client.reply(&request.parts.method, &reply, keep_alive).await.map_err(|_| Error::ClientGone)?;
    request.record.status(reply.status, "max_forwards");
    Ok(if keep_alive { AfterRequest::Next } else { AfterRequest::Close })
}

/// Answers a CORS preflight, which is not routed. A body of the request is not read.
pub(super) async fn answer_preflight(
    worker: &Worker,
    client: &mut Client,
    mut request: Request,
    reply: &Reply,
    body: RequestBody,
) -> AfterRequest {
    let is_whole = body.is_empty();
    let keep_alive = is_whole && request.keeps_alive(worker);
    let mut reply = reply.clone();
    headers::add_request_id(&mut request.parts.headers);
    if let Some(id) = headers::request_id(&request.parts.headers, &worker.shared.config.headers) {
        reply.headers.insert(headers::X_REQUEST_ID, id.clone());
    }
    client.set_unread(!is_whole);
    let sent = client.reply(&request.parts.method, &reply, keep_alive).await.is_ok();
    request.record.finish_preflight(worker, reply.status);
    match (sent, keep_alive) {
        (false, _) => AfterRequest::Abort,
        (true, true) => AfterRequest::Next,
        (true, false) => AfterRequest::Close,
    }
}

/// Sends the EPP's immediate reply to the client. `reason` is that of the access log.
pub(super) async fn send_immediate(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    reply: &ImmediateReply,
    reason: &'static str,
    keep_alive: bool,
) -> Result<AfterRequest, Error> {
    request.record.immediate(reply);
    let mut headers = http::HeaderMap::new();
    mutation::apply(&reply.headers, &mut headers);
    // 205 has no content (RFC 9110 §15.3.6).
    let body = if reply.status == StatusCode::RESET_CONTENT { Bytes::new() } else { reply.body.clone() };
    if !body.is_empty() {
        headers.entry(http::header::CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
    }
    let manner = request.manner(&worker.shared.config);
    manner.mark(&mut headers);
    let mut sent = Reply { status: reply.status, headers, body };
    if manner.grpc {
        let message = String::from_utf8_lossy(&reply.body).into_owned();
        sent = sent.grpc(&message);
        if let Some(code) = reply.grpc_status {
            sent.headers.insert(GRPC_STATUS, HeaderValue::from(code));
        }
    }
    client.reply(&request.parts.method, &sent, keep_alive).await.map_err(|_| Error::ClientGone)?;
    request.record.status(reply.status, reason);
    Ok(if keep_alive { AfterRequest::Next } else { AfterRequest::Close })
}

/// Answers a request that the EPP evicted before its response began.
pub(super) async fn evict(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    reply: &ImmediateReply,
) -> Result<AfterRequest, Error> {
    worker.shared.metrics.pool(request.pool).evicted();
    let keep_alive = request.keeps_alive(worker);
    send_immediate(worker, client, request, reply, "evicted", keep_alive).await
}
