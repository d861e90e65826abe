//! The response: its head goes to the picker and, as the picker changed it, to the client; its body goes the way that was
//! chosen; then both connections are free for what comes next.

use std::cell::RefCell;

use bytes::{Bytes, BytesMut};
use http::header;

use super::{After, Request, immediate, pick::Picked};
use crate::{
    client::{Client, ClientSocket},
    config,
    deliver::{Delivery, End, Target},
    endpoint::{connection::EndpointConnection, in_flight::InFlight},
    error::Error,
    http::{
        headers,
        response::{BodyKind, ResponseHead},
    },
    picker::{
        client::{PickStream, ResponseReply},
        exchange::ImmediateReply,
        mutation,
    },
    steer::{
        Source,
        choice::{Path, Response, choose},
    },
    tee::Tee,
    worker::Worker,
};

const EVENT_STREAM: &[u8] = b"text/event-stream";

/// What an endpoint has answered so far.
pub(super) struct Answer {
    pub(super) endpoint: EndpointConnection,
    pub(super) head: ResponseHead,
    /// Read behind the head.
    pub(super) pending: BytesMut,
    pub(super) in_flight: InFlight,
}

/// Resolves when the picker evicts the request; never without a stream.
pub(super) async fn evicted(stream: &mut Option<PickStream>) -> ImmediateReply {
    match stream {
        Some(stream) => stream.evicted().await,
        None => std::future::pending().await,
    }
}

pub(super) async fn respond(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    mut picked: Picked,
    answer: Answer,
) -> Result<After, Error> {
    let Answer { mut endpoint, mut head, pending, in_flight } = answer;
    request.record.served(endpoint.address);
    headers::remove_hop_by_hop(&mut head.headers);
    headers::add_via(&mut head.headers, head.version);
    let settings = match &worker.shared.config.pools[request.pool].picker {
        config::Picker::Epp(epp) => Some(epp),
        config::Picker::Builtin => None,
    };
    let mut tee = None;
    if let (Some(stream), Some(settings)) = (&mut picked.stream, settings) {
        let wait = settings.response_timeout;
        let ended = head.framing.is_done();
        tee = tee_of(settings, &head);
        let reply = stream.response_headers(head.status, &head.headers, endpoint.address, ended, wait).await;
        if let Some(reply) = stream.head_reply() {
            worker.shared.metrics.pool(request.pool).epp_head_reply(reply.label());
        }
        match reply {
            ResponseReply::Mutation(Some(change)) => drop(mutation::apply(&change, &mut head.headers)),
            ResponseReply::Mutation(None) => {}
            ResponseReply::Evicted(reply) => {
                worker.shared.metrics.pool(request.pool).evicted();
                drop(endpoint);
                immediate(client, &request.parts.method, &reply, request.keep_alive).await?;
                request.record.status(reply.status, "evicted");
                return Ok(if request.keep_alive { After::Next } else { After::Close });
            }
        }
    }
    request.record.status(head.status, "ok");
    let Client::Http1(client) = client;
    let wish = request.keep_alive && !worker.shared.draining.is_cancelled();
    let mut lead = BytesMut::with_capacity(1024);
    let keep_alive = head.write_head(&mut lead, wish, request.parts.version);
    let ends_by_close = head.body == BodyKind::UntilClose || head.needs_dechunk(request.parts.version);
    if ends_by_close {
        client.reset_on_close();
    }
    let told = tee.as_ref().map(|tee| tee.borrow().wants_all());
    let (target, path, reason) = path(worker, client, request, &head, &endpoint, &pending, told);

    let mut delivery = Delivery::new(client, &mut endpoint, head.framing, pending, worker.shared.config.timeouts.idle);
    delivery.lead = lead;
    delivery.target = target;
    delivery.tee = tee.as_ref();
    delivery.decode = head.needs_dechunk(request.parts.version);
    let end = tokio::select! {
        biased;
        end = delivery.run() => Some(end),
        _ = evicted_telling(&mut picked.stream, tee.as_ref()) => None,
    };
    if end.is_none() {
        delivery.abandon();
    }
    let account = std::mem::take(&mut delivery.account);
    drop(delivery);
    drop(in_flight);
    request.record.delivered(worker, request.pool, path, reason, account);
    let rest = tee.map_or_else(Vec::new, |tee| account_for(worker, request.pool, tee.into_inner()));
    match end {
        Some(End::Complete { reusable }) => {
            picked.finish(rest);
            endpoint.set_resting(true);
            if reusable && head.keep_alive {
                worker.endpoints.put(endpoint);
            }
            Ok(if keep_alive { After::Next } else { After::Close })
        }
        Some(other) => {
            request.record.broken(match other {
                End::ClientGone => "client_gone",
                End::Idle => "idle_timeout",
                _ => "endpoint_broke",
            });
            // Dropping the stream tells the EPP that the request is over and was not completed.
            Ok(After::Abort)
        }
        None => {
            worker.shared.metrics.pool(request.pool).evicted();
            request.record.broken("evicted");
            Ok(After::Abort)
        }
    }
}

/// As [`evicted`], and tells the picker what the tee has for it. It is polled after the delivery and in the same task, so
/// whatever the delivery puts into the tee is taken out of it at once.
async fn evicted_telling(stream: &mut Option<PickStream>, tee: Option<&RefCell<Tee>>) -> ImmediateReply {
    match (stream, tee) {
        (Some(stream), Some(tee)) => stream.evicted_telling(|| tee.borrow_mut().next_piece()).await,
        (stream, _) => evicted(stream).await,
    }
}

/// What the picker wants of this response's body, if there is one.
fn tee_of(settings: &config::Epp, head: &ResponseHead) -> Option<RefCell<Tee>> {
    let length = if let BodyKind::Length(length) = head.body { Some(length) } else { None };
    let tee = Tee::new(settings.response_to_picker, &head.headers, length, settings.response_queue_bytes);
    tee.filter(|_| !head.framing.is_done()).map(RefCell::new)
}

/// The end of the tee: enters it into the metrics, and gives what the picker is still to be told.
fn account_for(worker: &Worker, pool: usize, mut tee: Tee) -> Vec<Bytes> {
    let metrics = worker.shared.metrics.pool(pool);
    if tee.given_up() {
        metrics.epp_body_given_up();
    }
    if let Some(usage) = tee.usage() {
        metrics.tokens(&usage.model, usage.input_tokens, usage.output_tokens);
    }
    tee.rest()
}

/// Chooses the path and, for the kernel's, makes the client a target. `told`: the picker wants to know of the body, and all
/// of it or its end.
fn path(
    worker: &Worker,
    client: &mut ClientSocket,
    request: &Request,
    head: &ResponseHead,
    endpoint: &EndpointConnection,
    pending: &BytesMut,
    told: Option<bool>,
) -> (Option<Target>, Path, &'static str) {
    let config = &worker.shared.config.steering;
    let mut framing = head.framing;
    framing.feed(pending);
    let event_stream = head
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.as_bytes().get(..EVENT_STREAM.len()))
        .is_some_and(|kind| kind.eq_ignore_ascii_case(EVENT_STREAM));
    let response = Response {
        registered: endpoint.source().is_some(),
        framing,
        event_stream,
        local_endpoint: endpoint.local,
        decode: head.needs_dechunk(request.parts.version),
        told: told == Some(true),
    };
    let (path, reason) = choose(config, &response);
    let (Path::Ingress, Some(steering)) = (path, worker.endpoints.steering()) else { return (None, path, reason) };
    if told.is_some()
        && let Some(Err(error)) = endpoint.source().map(Source::make_ring)
    {
        tracing::debug!(%error, "the end of the response could not be kept by the kernel");
        return (None, Path::Relay, "response_to_picker");
    }
    match client.make_target(steering, config.client_send_buffer) {
        Ok(key) => (Some(Target { key, send_buffer: config.client_send_buffer }), path, reason),
        Err(error) => {
            tracing::debug!(%error, "client connection cannot be a target");
            (None, Path::Relay, "target_refused")
        }
    }
}
