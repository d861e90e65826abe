//! One request, phase by phase: receive the body, route, pick, dispatch, respond. Each later phase has its own file.
//!
//! The client gets exactly one response: the endpoint's, the EPP's or an error of the agent. If a response fails after it has
//! begun, its connection is aborted. Dropping the future cancels everything that the request holds.

mod request;
mod receive;
mod picked;
mod pick;
mod dispatch;
mod repick;
mod respond;
mod reply;
mod record;
mod last;
mod access_log;
mod renamed;
mod lease;
mod models;
mod pinned;
mod guarded;
mod adopted;

use http::{HeaderMap, HeaderValue, Method};
use tokio::time::Instant;

pub use self::{
    adopted::Keeper, guarded::Panicked, lease::Lease, pinned::pinned, record::Origin, request::AfterRequest,
};
use self::{
    guarded::ReplyGuard,
    models::answer_models,
    picked::PickOutcome,
    receive::receive,
    record::Record,
    repick::Dispatched,
    reply::{answer_last_forward, answer_preflight, evict, send_error, send_immediate},
    request::Request,
};
use crate::{
    client::Client,
    error::{Error, Manner},
    http::{
        cors::{Grant, is_preflight},
        head::elements,
        headers,
        request::{RequestBody, RequestHead},
    },
    upload::Upload,
    worker::Worker,
};

/// As much of a head as was read before it was refused.
#[derive(Default)]
pub struct RefusedHead {
    pub method: Method,
    pub path: String,
    pub headers: HeaderMap,
}

/// Answers a request whose head was refused.
pub async fn refuse(worker: &Worker, client: &mut Client, error: &Error, mut refused: RefusedHead, origin: Origin) {
    let (record, config) = (Record::new(origin), &worker.shared.config);
    client.set_idle(config.timeouts.idle);
    client.set_unread(true);
    headers::add_request_id(&mut refused.headers);
    let cors = config.listen.cors.as_ref();
    let grant = cors.map(|cors| Grant::of(cors, &refused.headers));
    let manner = Manner::of(&refused.headers, config).at(&refused.path).to(cors, grant.as_ref());
    let _ = send_error(client, &refused.method, &manner, error, false).await;
    record.finish_unrouted(worker, error);
}

/// As `run`, but catches a panic. The panic hook has already logged and counted it.
pub async fn guarded(
    worker: &Worker,
    client: &mut Client,
    head: RequestHead,
    origin: Origin,
    lease: &mut Option<Lease>,
) -> Result<AfterRequest, Panicked> {
    let guard = ReplyGuard::new(worker, &head, origin.clone());
    client.begin_answer(head.parts.version);
    if let Some(after) = guard.run(Box::pin(run(worker, client, head, origin, lease))).await {
        return Ok(after);
    }
    *lease = None;
    Err(guard.answer(worker, client).await)
}

/// The protocols of this list that the agent allows, in the client's order (RFC 9110 §7.8). `None` without one.
fn allowed_of(wanted: &HeaderValue, allowed: &[String]) -> Option<HeaderValue> {
    let is_allowed = |name: &&[u8]| allowed.iter().any(|allowed| name.eq_ignore_ascii_case(allowed.as_bytes()));
    let kept: Vec<&[u8]> = elements(wanted.as_bytes()).filter(is_allowed).collect();
    (!kept.is_empty()).then(|| HeaderValue::from_bytes(&kept.join(&b", "[..])).ok()).flatten()
}

/// Takes one request through all phases. `lease` is read and replaced: it carries a pick from
/// one request of the connection to the next.
async fn run(
    worker: &Worker,
    client: &mut Client,
    head: RequestHead,
    origin: Origin,
    lease: &mut Option<Lease>,
) -> AfterRequest {
    let config = &worker.shared.config;
    client.set_idle(config.timeouts.idle);
    client.set_leaving(config.listen.half_close, config.timeouts.client_unreachable);
    let upgrade = head.upgrade.and_then(|wanted| allowed_of(&wanted, &config.listen.upgrades));
    let mut request = Request::new(config, head.parts, head.keep_alive, origin);
    request.upgrade = upgrade;
    if let (Some(cors), Some(grant)) = (&config.listen.cors, &request.grant)
        && is_preflight(&request.parts)
    {
        let reply = grant.preflight(cors, &request.parts.headers);
        return answer_preflight(worker, client, request, &reply, head.body).await;
    }
    let has_body = !matches!(head.body, RequestBody::None);
    let received = {
        let receive = receive(worker, client, &mut request, head.body, head.expect_continue);
        unless_stopped(worker, Box::pin(receive)).await
    };
    client.set_idle(request.timeouts.idle);
    let mut upload = match received {
        Ok(upload) => upload,
        Err(error) => {
            request.restore_sent_target();
            let manner = request.manner(config);
            let redirected = matches!(error, Error::Redirected { .. });
            let keep_alive = redirected && !has_body && request.keeps_alive(worker);
            client.set_unread(!keep_alive);
            let answered = send_error(client, &request.parts.method, &manner, &error, keep_alive).await;
            request.record.finish_unrouted(worker, &error);
            return if keep_alive && answered { AfterRequest::Next } else { close_after(answered) };
        }
    };
    let active = worker.shared.metrics.pool(request.pool).active_request();
    let result = pick_and_respond(worker, client, &mut request, &mut upload, lease).await;
    drop(active);
    request.restore_sent_target();
    client.set_unread(!upload.is_done());
    let after = match result {
        Ok(after) => {
            request.record.finish(worker, request.pool, request.parts, None);
            return after;
        }
        Err(ref error) => {
            // If part of the body is unread, the start of the next request is unknown.
            let keep_alive = upload.is_done() && request.keeps_alive(worker) && !matches!(error, Error::ClientGone);
            let manner = request.manner(config);
            let answered = send_error(client, &request.parts.method, &manner, error, keep_alive).await;
            if keep_alive && answered { AfterRequest::Next } else { close_after(answered) }
        }
    };
    request.record.finish(worker, request.pool, request.parts, result.as_ref().err());
    after
}

/// An orderly close if the client took the response, otherwise an abort.
fn close_after(answered: bool) -> AfterRequest {
    if answered { AfterRequest::Close } else { AfterRequest::Abort }
}

/// Runs a phase before the response, until the agent stops.
async fn unless_stopped<T>(worker: &Worker, phase: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::select! {
        biased;
        result = phase => result,
        () = worker.shared.force.cancelled() => Err(Error::Stopped),
    }
}

/// The phases after routing: pick, dispatch and respond.
async fn pick_and_respond(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    lease: &mut Option<Lease>,
) -> Result<AfterRequest, Error> {
    if headers::is_last_forward(&request.parts.method, &mut request.parts.headers) {
        return answer_last_forward(worker, client, request, upload).await;
    }
    if request.lists_models {
        return unless_stopped(worker, Box::pin(answer_models(worker, client, request, upload))).await;
    }
    let mut picking = true;
    let phases = pick_and_dispatch(worker, client, request, upload, lease, &mut picking);
    let dispatched = unless_stopped(worker, Box::pin(phases)).await;
    let keep_alive = request.keeps_alive(worker) && upload.is_done();
    let (response, picked) = match dispatched {
        Ok(Dispatched::Response(response, picked)) => (*response, picked),
        Ok(Dispatched::Reply(reply)) => {
            return send_immediate(worker, client, request, &reply, "picker_reply", keep_alive).await;
        }
        // Evicted while the client still uploads.
        Err(Error::Evicted(reply)) if picking => {
            worker.shared.metrics.pool(request.pool).evicted();
            return send_immediate(worker, client, request, &reply, "evicted", keep_alive).await;
        }
        Err(Error::Evicted(reply)) => return evict(worker, client, request, &reply).await,
        Err(error) => return Err(error),
    };
    // The rest of the request is sent while the response is delivered.
    let sending = response.body.sending();
    let respond = respond::respond(worker, client, request, *picked, response);
    match sending {
        Some(sending) => sending.run_during(respond).await,
        None => respond.await,
    }
}

/// The phases before the response. `picking` becomes false when the picker has decided.
async fn pick_and_dispatch(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    lease: &mut Option<Lease>,
    picking: &mut bool,
) -> Result<Dispatched, Error> {
    let deadline = request.deadline;
    let asked = Instant::now();
    let outcome = deadline.limit(pick::pick(worker, client, request, upload, lease)).await;
    request.record.pick(worker, request.pool, asked, &outcome);
    let picked = match outcome? {
        PickOutcome::Forward(picked, body) => (picked, body),
        PickOutcome::Reply(reply) => return Ok(Dispatched::Reply(reply)),
    };
    *picking = false;
    request.begin_dispatch();
    let deadline = request.deadline;
    repick::dispatch(worker, client, request, upload, picked, lease, deadline).await
}
