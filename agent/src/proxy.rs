//! One request, phase by phase: take the body, find the pool, pick, dispatch, respond. Each phase is a file below.
//!
//! Whatever happens, the client gets one answer: the endpoint's, the picker's, or an error of ours; or, once an answer has
//! begun, a connection that is visibly broken off. Dropping the future breaks everything off that the request holds.

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
    pick::{Picked, Verdict},
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
    route::Times,
    upload::Upload,
    worker::Worker,
};

/// Bytes of a JSON body that are read before an EPP is asked without knowing the model.
const MODEL_WINDOW: u64 = 64 * 1024;

/// What becomes of the client's connection.
pub enum After {
    Next,
    /// Stay with this endpoint.
    Pinned(Box<Pin>),
    /// Close in order.
    Close,
    /// Close in the middle of a message.
    Abort,
}

/// A request on its way: what the phases hand on.
struct Request {
    parts: request::Parts,
    keep_alive: bool,
    /// What the connection becomes if the endpoint agrees.
    upgrade: Option<HeaderValue>,
    pool: usize,
    record: Record,
    /// The client's key in the kernel's map, where an endpoint might send to it by itself.
    target: Option<u64>,
    /// Its first byte.
    begun: Instant,
    times: Times,
    /// When the whole of it has to be over.
    deadline: Option<Instant>,
}

impl Request {
    /// It is served under these times from now on.
    fn set_times(&mut self, times: Times) {
        self.times = times;
        self.deadline = times.request.map(|limit| self.begun + limit);
    }
}

impl Request {
    /// Whether the connection is to stay open after an answer that is written now.
    fn keeps_alive(&self, worker: &Worker) -> bool {
        self.keep_alive && !worker.shared.leaving.is_cancelled()
    }
}

/// Answers a request whose head could not be read; `path` as far as it is known.
pub async fn refuse(worker: &Worker, client: &mut Client, error: &Error, path: &str) {
    let record = Record::new(Instant::now());
    client.set_idle(worker.shared.config.timeouts.idle);
    client.set_unread(true);
    // Which method it would have been is not known; a body is right for all but HEAD, and the connection closes.
    let _ = answer(client, &Method::GET, &Manner::unknown(&worker.shared.config).at(path), error, false).await;
    record.finish_unrouted(worker, error);
}

/// Carries one request through all phases. Its first byte came at `begun`. `lease` is what an earlier request of the connection
/// has left, and this one leaves.
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
        times: Times::from(&config.timeouts),
        deadline: None,
    };
    let taken = take(worker, client, &mut request, head.body, head.expect_continue, peer).await;
    client.set_idle(request.times.idle);
    let mut upload = match taken {
        Ok(upload) => upload,
        Err(error) => {
            let manner = Manner::of(&request.parts.headers, config).at(request.parts.uri.path());
            client.set_unread(true);
            let answered = answer(client, &request.parts.method, &manner, &error, false).await;
            request.record.finish_unrouted(worker, &error);
            return close_after(answered);
        }
    };
    let active = worker.shared.metrics.pool(request.pool).active_request();
    let result = answered(worker, client, &mut request, &mut upload, lease).await;
    drop(active);
    client.set_unread(!upload.is_done());
    let after = match result {
        Ok(after) => {
            request.record.finish(worker, request.pool, &request.parts, None);
            return after;
        }
        Err(ref error) => {
            // With the rest of the body unread, the next request cannot be found.
            let keep_alive = upload.is_done() && request.keeps_alive(worker) && !matches!(error, Error::ClientGone);
            let manner = Manner::of(&request.parts.headers, config).at(request.parts.uri.path());
            let answered = answer(client, &request.parts.method, &manner, error, keep_alive).await;
            if keep_alive && answered { After::Next } else { close_after(answered) }
        }
    };
    request.record.finish(worker, request.pool, &request.parts, result.as_ref().err());
    after
}

/// Where nobody has taken the answer there is nobody to close in order for.
fn close_after(answered: bool) -> After {
    if answered { After::Close } else { After::Abort }
}

/// The work of a phase before the response, which has to be done by the deadline of the request, if it has one: with it goes
/// the time that it stands for.
async fn by<T>(
    deadline: Option<(Instant, Duration)>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match deadline {
        Some((deadline, limit)) => timeout_at(deadline, work).await.unwrap_or(Err(Error::RequestTimeout(limit))),
        None => work.await,
    }
}

/// Whether the client has taken the answer.
async fn answer(client: &mut Client, method: &Method, manner: &Manner<'_>, error: &Error, keep_alive: bool) -> bool {
    !matches!(error, Error::ClientGone) && client.reply(method, &error.reply(manner), keep_alive).await.is_ok()
}

/// Prepares the head, and reads as much of the body as it takes to know the pool and the model.
async fn take(
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
        // A client's copy is removed whichever pool the request goes to.
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
        let way = router.route(&request.parts, |below| fastrand::u64(..below)).map_err(|_| Error::NoRoute)?;
        request.pool = way.pool;
        request.set_times(way.times);
        Ok::<_, Error>(way.times.body)
    };
    if needs_model {
        request.set_times(router.times_of_body(&request.parts).unwrap_or(request.times));
    } else {
        route(request)?;
    }
    upload.begin(needs_model, request.times.body)?;
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
    by(request.deadline.zip(request.times.request), beginning).await?;
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

/// The phases that need a pool.
async fn answered(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    lease: &mut Option<Lease>,
) -> Result<After, Error> {
    if headers::is_last_forward(&request.parts.method, &mut request.parts.headers) {
        return last_forward(worker, client, request, upload).await;
    }
    let (deadline, asked) = (request.deadline.zip(request.times.request), Instant::now());
    let verdict = by(deadline, pick::pick(worker, client, request, upload, lease)).await;
    request.record.pick(worker, request.pool, asked, &verdict);
    let mut picked = match verdict? {
        Verdict::Forward(picked) => picked,
        Verdict::Reply(reply) => {
            let keep_alive = request.keeps_alive(worker) && upload.is_done();
            immediate(worker, client, &request.parts, &reply, keep_alive).await?;
            request.record.status(reply.status, "picker_reply");
            return Ok(if keep_alive { After::Next } else { After::Close });
        }
    };
    // The body named its model late: the endpoint gets the header all the same.
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
    request.target = target(worker, client);
    prepare_trailers(worker, upload);
    let answer = by(deadline, dispatch::dispatch(worker, client, request, upload, &mut picked)).await;
    let answer = match answer {
        Err(Error::Evicted(reply)) => {
            worker.shared.metrics.pool(request.pool).evicted();
            let keep_alive = request.keeps_alive(worker);
            immediate(worker, client, &request.parts, &reply, keep_alive).await?;
            request.record.status(reply.status, "evicted");
            return Ok(if keep_alive { After::Next } else { After::Close });
        }
        answer => answer?,
    };
    // The rest of the request goes with the response.
    let sending = answer.body.sending();
    let respond = respond::respond(worker, client, request, *picked, answer);
    match sending {
        Some(sending) => sending.beside(respond).await,
        None => respond.await,
    }
}

/// Makes the client's trailers fit to travel: as in the head, it may not pose as the gateway or the picker.
fn prepare_trailers(worker: &Worker, upload: &mut Upload) {
    let config = &worker.shared.config;
    trailers::filter(upload.trailers_mut());
    for control in worker.shared.pick_headers.iter().chain([&config.bbr.base_model_header]) {
        headers::remove_control(upload.trailers_mut(), control, &config.bbr.header);
    }
}

/// Answers a request that must go no further (RFC 9110 §7.6.2).
async fn last_forward(
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

/// The client's key, where an endpoint on this machine could send to it: that has to know before it answers.
fn target(worker: &Worker, client: &mut Client) -> Option<u64> {
    let steering = worker.endpoints.steering().filter(|steering| steering.has_local())?;
    let Client::Http1(socket) = client else { return None };
    if socket.is_tls() {
        return None;
    }
    socket.make_target(steering, worker.shared.config.steering.client_send_buffer).ok()
}

/// Sends the picker's own answer to the client.
async fn immediate(
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
    /// Ends the picker's stream in order, when there is one; `rest` of the body is told before the end.
    fn finish(&mut self, rest: Vec<Bytes>) {
        if let Some(stream) = self.stream.take() {
            stream.finish(rest);
        }
    }
}
