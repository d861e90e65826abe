//! One request, phase by phase: receive the body, route, pick, dispatch, respond. Each later phase has its own file.
//!
//! The client gets exactly one response: the endpoint's, the EPP's or an error of the agent. If a response fails after it has
//! begun, its connection is aborted. Dropping the future cancels everything that the request holds.

mod ask;
mod dispatch;
mod guarded;
mod lease;
mod pick;
mod pinned;
mod record;
mod respond;

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, request, uri::Scheme};
use tokio::time::{Instant, timeout_at};

pub use self::{
    guarded::{Panicked, guarded},
    lease::Lease,
    pinned::{Pin, pinned},
};
use self::{
    pick::{PickOutcome, Picked},
    record::Record,
};
use crate::{
    bbr::Naming,
    client::Client,
    error::{Error, Manner},
    http::{
        digest,
        headers::{self, Arrival},
        reply::Reply,
        request::{RequestBody, RequestHead},
        trailers,
    },
    picker::{
        exchange::{Body, ImmediateReply},
        mutation,
    },
    probe::Point,
    route::RequestTimeouts,
    upload::Upload,
    worker::Worker,
};

/// Bytes of a JSON body that are read to find the model. After that the EPP is asked without it.
const MODEL_WINDOW: u64 = 64 * 1024;

/// What happens to the client's connection after a request.
pub enum After {
    /// Read the next request.
    Next,
    /// Relay to this endpoint from now on.
    Pinned(Box<Pin>),
    /// Orderly close.
    Close,
    /// Close in the middle of a message.
    Abort,
}

/// A request in progress, passed from phase to phase.
struct Request {
    parts: request::Parts,
    keep_alive: bool,
    /// The protocol that the client wants to switch to.
    upgrade: Option<HeaderValue>,
    pool: usize,
    record: Record,
    /// The client socket's key in the kernel's map, if path `local` is possible.
    target: Option<u64>,
    /// When its first byte arrived.
    begun: Instant,
    timeouts: RequestTimeouts,
    /// When the request, including its response, has to be complete.
    deadline: Option<Instant>,
}

impl Request {
    /// Applies these timeouts from now on.
    fn set_timeouts(&mut self, timeouts: RequestTimeouts) {
        self.timeouts = timeouts;
        self.deadline = timeouts.request.map(|limit| self.begun + limit);
    }
}

impl Request {
    /// Whether the connection stays open after a response whose head is written now.
    fn keeps_alive(&self, worker: &Worker) -> bool {
        self.keep_alive && !worker.shared.leaving.is_cancelled()
    }
}

/// Answers a request whose head could not be read. `path` is as much of the path as was read.
pub async fn refuse(worker: &Worker, client: &mut Client, error: &Error, path: &str) {
    let record = Record::new(Instant::now());
    client.set_idle(worker.shared.config.timeouts.idle);
    client.set_unread(true);
    // The method is unknown. A response body is right for every method but HEAD, and the connection closes anyway.
    let _ = send_error(client, &Method::GET, &Manner::unknown(&worker.shared.config).at(path), error, false).await;
    record.finish_unrouted(worker, error);
}

/// Takes one request through all phases. Its first byte arrived at `begun`. `lease` is read and replaced: it carries a pick from
/// one request of the connection to the next.
pub async fn run(
    worker: &Worker,
    client: &mut Client,
    head: RequestHead,
    begun: Instant,
    peer: SocketAddr,
    lease: &mut Option<Lease>,
) -> After {
    let record = Record::new(begun);
    let config = &worker.shared.config;
    client.set_idle(config.timeouts.idle);
    client.set_leaving(config.listen.half_close, config.timeouts.client_unreachable);
    let allowed = &config.listen.upgrades;
    let upgrade = head
        .upgrade
        .filter(|wanted| allowed.iter().any(|allowed| wanted.as_bytes().eq_ignore_ascii_case(allowed.as_bytes())));
    let mut request = Request {
        parts: head.parts,
        keep_alive: head.keep_alive,
        upgrade,
        pool: 0,
        record,
        target: None,
        begun,
        timeouts: RequestTimeouts::from(&config.timeouts),
        deadline: None,
    };
    let received = receive(worker, client, &mut request, head.body, head.expect_continue, peer).await;
    client.set_idle(request.timeouts.idle);
    let mut upload = match received {
        Ok(upload) => upload,
        Err(error) => {
            let manner = Manner::of(&request.parts.headers, config).at(request.parts.uri.path());
            client.set_unread(true);
            let answered = send_error(client, &request.parts.method, &manner, &error, false).await;
            request.record.finish_unrouted(worker, &error);
            return close_after(answered);
        }
    };
    let active = worker.shared.metrics.pool(request.pool).active_request();
    let result = pick_and_respond(worker, client, &mut request, &mut upload, lease).await;
    drop(active);
    client.set_unread(!upload.is_done());
    let after = match result {
        Ok(after) => {
            request.record.finish(worker, request.pool, &request.parts, None);
            return after;
        }
        Err(ref error) => {
            // If part of the body is unread, the start of the next request is unknown.
            let keep_alive = upload.is_done() && request.keeps_alive(worker) && !matches!(error, Error::ClientGone);
            let manner = Manner::of(&request.parts.headers, config).at(request.parts.uri.path());
            let answered = send_error(client, &request.parts.method, &manner, error, keep_alive).await;
            if keep_alive && answered { After::Next } else { close_after(answered) }
        }
    };
    request.record.finish(worker, request.pool, &request.parts, result.as_ref().err());
    after
}

/// An orderly close if the client took the response, otherwise an abort.
fn close_after(answered: bool) -> After {
    if answered { After::Close } else { After::Abort }
}

/// Runs a phase before the response. Returns `RequestTimeout` at the request's deadline, which comes with the configured limit.
async fn with_deadline<T>(
    deadline: Option<(Instant, Duration)>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match deadline {
        Some((deadline, limit)) => timeout_at(deadline, work).await.unwrap_or(Err(Error::RequestTimeout(limit))),
        None => work.await,
    }
}

/// Sends an error response. Returns whether the client took it.
async fn send_error(
    client: &mut Client,
    method: &Method,
    manner: &Manner<'_>,
    error: &Error,
    keep_alive: bool,
) -> bool {
    !matches!(error, Error::ClientGone) && client.reply(method, &error.reply(manner), keep_alive).await.is_ok()
}

/// Prepares the head and reads the body until the pool and the model are known.
async fn receive(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    body: RequestBody,
    expect_continue: bool,
    peer: SocketAddr,
) -> Result<Upload, Error> {
    worker.shared.probe.at(Point::Request(&request.parts));
    let config = &worker.shared.config;
    let naming = |has_body| Naming::new(&config.bbr, &request.parts.headers, has_body, &worker.shared.metrics);
    let mut upload = Upload::new(body, &request.parts.headers, &config.limits, &worker.shared.bodies, naming)?;
    let arrival = Arrival { client: peer.ip(), version: request.parts.version, tls: client.is_tls() };
    if arrival.tls {
        request.parts.extensions.insert(Scheme::HTTPS);
    }
    let headers = &mut request.parts.headers;
    for control in worker.shared.pick_headers.iter().chain([&config.bbr.base_model_header]) {
        // Removed from the client's request whichever pool it goes to.
        headers::remove_control(headers, control, &config.bbr.header);
    }
    if headers::is_marked(headers, &worker.shared.mark) {
        return Err(Error::Loop);
    }
    headers::prepare_request(headers, &arrival, &config.bbr.header, &config.headers);
    request.record.trace(worker, &mut request.parts, &arrival);
    let router = &worker.shared.router;
    let needs_model = router.needs_model(&request.parts);
    let route = |request: &mut Request| {
        let routed = router.route(&request.parts, |below| fastrand::u64(..below)).map_err(|_| Error::NoRoute)?;
        request.pool = routed.pool;
        request.set_timeouts(routed.timeouts);
        Ok::<_, Error>(routed.timeouts.body)
    };
    if needs_model {
        request.set_timeouts(router.body_timeouts(&request.parts).unwrap_or(request.timeouts));
    } else {
        route(request)?;
    }
    upload.begin(needs_model, request.timeouts.body)?;
    let beginning = async {
        if expect_continue
            && upload.has_body()
            && let Client::Http1(socket) = client
            && socket.buf.is_empty()
        {
            socket.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.map_err(|_| Error::ClientGone)?;
            socket.begin_answer();
        }
        while !upload.is_done() && !upload.naming().is_settled() && (needs_model || upload.kept.len() < MODEL_WINDOW) {
            let read = upload.read(client).await?;
            upload.take(read).await?;
        }
        Ok(())
    };
    with_deadline(request.deadline.zip(request.timeouts.request), beginning).await?;
    set_model(worker, &mut request.parts, &upload);
    if needs_model {
        upload.set_timeout(route(request)?);
    }
    Ok(upload)
}

fn set_model(worker: &Worker, parts: &mut request::Parts, upload: &Upload) {
    if let Some(model) = upload.naming().model(&worker.shared.config.bbr) {
        worker.shared.model_headers.set(&mut parts.headers, model);
    }
}

/// The phases after routing: pick, dispatch and respond.
async fn pick_and_respond(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    lease: &mut Option<Lease>,
) -> Result<After, Error> {
    if headers::is_last_forward(&request.parts.method, &mut request.parts.headers) {
        return answer_last_forward(worker, client, request, upload).await;
    }
    let (deadline, asked) = (request.deadline.zip(request.timeouts.request), Instant::now());
    let outcome = with_deadline(deadline, pick::pick(worker, client, request, upload, lease)).await;
    request.record.pick(worker, request.pool, asked, &outcome);
    let mut picked = match outcome? {
        PickOutcome::Forward(picked) => picked,
        PickOutcome::Reply(reply) => {
            let keep_alive = request.keeps_alive(worker) && upload.is_done();
            send_immediate(worker, client, &request.parts, &reply, keep_alive).await?;
            request.record.status(reply.status, "picker_reply");
            return Ok(if keep_alive { After::Next } else { After::Close });
        }
    };
    // The model may have been found only after the pick. The endpoint gets the header in any case.
    set_model(worker, &mut request.parts, upload);
    let client_headers = matches!(picked.body, Body::Replaced(_)).then(|| request.parts.headers.clone());
    mutation::apply(&picked.mutation, &mut request.parts.headers);
    if let (Some(client_headers), Body::Replaced(pieces)) = (client_headers, &picked.body) {
        digest::remove_stale(&mut request.parts.headers, &client_headers, pieces);
    }
    let _ = request.parts.headers.try_append(headers::X_PENSTOCK_HOP, worker.shared.mark.clone());
    for pick in &worker.shared.pick_headers {
        headers::remove_pick(&mut request.parts.headers, pick);
    }
    request.target = local_target(worker, client);
    prepare_trailers(worker, upload);
    let response = with_deadline(deadline, dispatch::dispatch(worker, client, request, upload, &mut picked)).await;
    let response = match response {
        Err(Error::Evicted(reply)) => {
            worker.shared.metrics.pool(request.pool).evicted();
            let keep_alive = request.keeps_alive(worker);
            send_immediate(worker, client, &request.parts, &reply, keep_alive).await?;
            request.record.status(reply.status, "evicted");
            return Ok(if keep_alive { After::Next } else { After::Close });
        }
        response => response?,
    };
    // The rest of the request is sent while the response is delivered.
    let sending = response.body.sending();
    let respond = respond::respond(worker, client, request, *picked, response);
    match sending {
        Some(sending) => sending.run_during(respond).await,
        None => respond.await,
    }
}

/// Filters the client's trailers by the same rules as its head: it may not set fields that belong to the agent or the EPP.
fn prepare_trailers(worker: &Worker, upload: &mut Upload) {
    let config = &worker.shared.config;
    trailers::filter(upload.trailers_mut());
    for control in worker.shared.pick_headers.iter().chain([&config.bbr.base_model_header]) {
        headers::remove_control(upload.trailers_mut(), control, &config.bbr.header);
    }
}

/// Answers a request with `Max-Forwards: 0` (RFC 9110 §7.6.2).
async fn answer_last_forward(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &Upload,
) -> Result<After, Error> {
    let keep_alive = request.keeps_alive(worker) && upload.is_done();
    let mut reply = Reply { status: StatusCode::OK, headers: http::HeaderMap::new(), body: Bytes::new() };
    Manner::of(&request.parts.headers, &worker.shared.config).mark(&mut reply.headers);
    client.reply(&request.parts.method, &reply, keep_alive).await.map_err(|_| Error::ClientGone)?;
    request.record.status(reply.status, "max_forwards");
    Ok(if keep_alive { After::Next } else { After::Close })
}

/// The client socket's key for path `local`, which has to be known before the endpoint responds.
fn local_target(worker: &Worker, client: &mut Client) -> Option<u64> {
    let steering = worker.endpoints.steering().filter(|steering| steering.has_local())?;
    let Client::Http1(socket) = client else { return None };
    if socket.is_tls() {
        return None;
    }
    socket.make_target(steering, worker.shared.config.steering.client_send_buffer).ok()
}

/// Sends the EPP's immediate reply to the client.
async fn send_immediate(
    worker: &Worker,
    client: &mut Client,
    request: &request::Parts,
    reply: &ImmediateReply,
    keep_alive: bool,
) -> Result<(), Error> {
    let mut headers = http::HeaderMap::new();
    mutation::apply(&reply.headers, &mut headers);
    if !reply.body.is_empty() {
        headers.entry(http::header::CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
    }
    let manner = Manner::of(&request.headers, &worker.shared.config).at(request.uri.path());
    manner.mark(&mut headers);
    let mut reply = Reply { status: reply.status, headers, body: reply.body.clone() };
    if manner.grpc {
        let message = String::from_utf8_lossy(&reply.body).into_owned();
        reply = reply.grpc(&message);
    }
    client.reply(&request.method, &reply, keep_alive).await.map_err(|_| Error::ClientGone)
}

impl Picked {
    /// Ends the EPP's stream, if there is one, after sending it the `rest` of the response body.
    fn finish(&mut self, rest: Vec<Bytes>) {
        if let Some(stream) = self.stream.take() {
            stream.finish(rest);
        }
    }
}
