//! One request, phase by phase: take the body, find the pool, pick, dispatch, respond. Each phase is a file below.
//!
//! Whatever happens, the client gets one answer: the endpoint's, the picker's, or an error of ours; or, once an answer has
//! begun, a connection that is visibly broken off. Dropping the future breaks everything off that the request holds.

mod ask;
mod dispatch;
mod pick;
mod record;
mod respond;

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, request};

use self::{
    pick::{Picked, Verdict},
    record::Record,
};
use crate::{
    client::Client,
    error::Error,
    http::{
        headers,
        reply::Reply,
        request::{RequestBody, RequestHead},
    },
    picker::{
        exchange::{Body, ImmediateReply},
        mutation,
    },
    upload::Upload,
    worker::Worker,
};

/// Bytes of a JSON body that are read before an EPP is asked without knowing the model.
const MODEL_WINDOW: u64 = 64 * 1024;

/// What becomes of the client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    Next,
    /// Close in order.
    Close,
    /// Close in the middle of a message.
    Abort,
}

/// A request on its way: what the phases hand on.
struct Request {
    parts: request::Parts,
    keep_alive: bool,
    pool: usize,
    record: Record,
}

/// Answers a request whose head could not be read.
pub async fn refuse(worker: &Worker, client: &mut Client, error: &Error) {
    let record = Record::new();
    // Which method it would have been is not known; a body is right for all but HEAD, and the connection closes.
    answer(client, &Method::GET, error, false).await;
    record.finish_unrouted(worker, error);
}

/// Carries one request through all phases.
pub async fn run(worker: &Worker, client: &mut Client, head: RequestHead, peer: SocketAddr) -> After {
    let record = Record::new();
    let mut request = Request { parts: head.parts, keep_alive: head.keep_alive, pool: 0, record };
    let mut upload = match take(worker, client, &mut request, head.body, head.expect_continue, peer).await {
        Ok(upload) => upload,
        Err(error) => {
            answer(client, &request.parts.method, &error, false).await;
            request.record.finish_unrouted(worker, &error);
            return close_after(&error);
        }
    };
    let active = worker.shared.metrics.pool(request.pool).active_request();
    let result = answered(worker, client, &mut request, &mut upload).await;
    drop(active);
    let after = match &result {
        Ok(after) => *after,
        Err(error) => {
            // With the rest of the body unread, the next request cannot be found.
            let keep_alive = upload.is_done() && request.keep_alive && !matches!(error, Error::ClientGone);
            answer(client, &request.parts.method, error, keep_alive).await;
            if keep_alive { After::Next } else { close_after(error) }
        }
    };
    request.record.finish(worker, request.pool, &request.parts, result.as_ref().err());
    after
}

fn close_after(error: &Error) -> After {
    if matches!(error, Error::ClientGone) { After::Abort } else { After::Close }
}

async fn answer(client: &mut Client, method: &Method, error: &Error, keep_alive: bool) {
    if matches!(error, Error::ClientGone) {
        return;
    }
    // A client that does not take its answer is found by the next read.
    let _ = client.reply(method, &error.reply(), keep_alive).await;
}

/// Prepares the head, and reads as much of the body as it takes to know the pool.
async fn take(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    body: RequestBody,
    expect_continue: bool,
    peer: SocketAddr,
) -> Result<Upload, Error> {
    let config = &worker.shared.config;
    let mut upload = Upload::new(body, &request.parts.headers, &config.limits, &config.bbr, config.timeouts.body)?;
    let (headers, version) = (&mut request.parts.headers, request.parts.version);
    for pick in &worker.shared.pick_headers {
        // A client's copy is removed whichever pool the request goes to.
        headers::remove_control(headers, pick, &config.bbr.header);
    }
    headers::prepare_request(headers, version, peer.ip(), &config.bbr.header);
    if expect_continue
        && upload.has_body()
        && let Client::Http1(socket) = client
        && socket.buf.is_empty()
    {
        socket.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.map_err(|_| Error::ClientGone)?;
    }
    let needs_model = worker.shared.router.needs_model();
    while !upload.is_done() && !upload.model_settled() && (needs_model || upload.kept.len() < MODEL_WINDOW) {
        match upload.read(client).await? {
            Some(piece) => upload.keep(&piece).await?,
            None => upload.end()?,
        }
    }
    set_model(&mut request.parts, &config.bbr.header, upload.model().or(config.bbr.default_model.as_deref()));
    let host = request.parts.headers.get(http::header::HOST).and_then(|host| host.to_str().ok());
    let model = request.parts.headers.get(&config.bbr.header).and_then(|model| model.to_str().ok());
    request.pool = worker.shared.router.route(host, request.parts.uri.path(), model).map_err(|_| Error::NoRoute)?;
    Ok(upload)
}

fn set_model(parts: &mut request::Parts, header: &HeaderName, model: Option<&str>) {
    if let Some(value) = model.and_then(|model| HeaderValue::from_str(model).ok()) {
        parts.headers.insert(header, value);
    }
}

/// The phases that need a pool.
async fn answered(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
) -> Result<After, Error> {
    let mut picked = match pick::pick(worker, client, request, upload).await? {
        Verdict::Forward(picked) => picked,
        Verdict::Reply(reply) => {
            let keep_alive = request.keep_alive && upload.is_done();
            immediate(client, &request.parts.method, &reply, keep_alive).await?;
            request.record.status(reply.status, "picker_reply");
            return Ok(if keep_alive { After::Next } else { After::Close });
        }
    };
    // The body named its model late: the endpoint gets the header all the same.
    let bbr = &worker.shared.config.bbr;
    set_model(&mut request.parts, &bbr.header, upload.model().or(bbr.default_model.as_deref()));
    mutation::apply(&picked.mutation, &mut request.parts.headers);
    let answer = match dispatch::dispatch(worker, client, request, upload, &mut picked).await {
        Err(Error::Evicted(reply)) => {
            worker.shared.metrics.pool(request.pool).evicted();
            immediate(client, &request.parts.method, &reply, request.keep_alive).await?;
            request.record.status(reply.status, "evicted");
            return Ok(if request.keep_alive { After::Next } else { After::Close });
        }
        answer => answer?,
    };
    // An endpoint has answered, so the request will not go out again.
    upload.forget();
    picked.body = Body::Original;
    respond::respond(worker, client, request, *picked, answer).await
}

/// Sends the picker's own answer to the client.
async fn immediate(
    client: &mut Client,
    method: &Method,
    reply: &ImmediateReply,
    keep_alive: bool,
) -> Result<(), Error> {
    let mut headers = http::HeaderMap::new();
    mutation::apply(&reply.headers, &mut headers);
    if !reply.body.is_empty() {
        headers.entry(http::header::CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
    }
    let reply = Reply { status: reply.status, headers, body: reply.body.clone() };
    client.reply(method, &reply, keep_alive).await.map_err(|_| Error::ClientGone)
}

impl Picked {
    /// Ends the picker's stream in order, when there is one; `rest` of the body is told before the end.
    fn finish(&mut self, rest: Vec<Bytes>) {
        if let Some(stream) = self.stream.take() {
            stream.finish(rest);
        }
    }
}
