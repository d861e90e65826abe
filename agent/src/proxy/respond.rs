//! The response: its head goes to the picker and, as the picker changed it, to the client; its body goes the way that was
//! chosen; then both connections are free for what comes next.

use bytes::BytesMut;
use http::header;

use super::{After, Request, immediate, pick::Picked};
use crate::{
    client::ClientSocket,
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
    steer::choice::{Path, Response, choose},
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
    client: &mut ClientSocket,
    request: &mut Request,
    mut picked: Picked,
    answer: Answer,
) -> Result<After, Error> {
    let Answer { mut endpoint, mut head, pending, in_flight } = answer;
    request.record.served(endpoint.address);
    headers::remove_hop_by_hop(&mut head.headers);
    headers::add_via(&mut head.headers, head.version);
    if let Some(stream) = &mut picked.stream {
        let wait = match &worker.shared.config.pools[request.pool].picker {
            config::Picker::Epp(epp) => epp.response_timeout,
            config::Picker::Builtin => None,
        };
        let ended = head.framing.is_done();
        match stream.response_headers(head.status, &head.headers, endpoint.address, ended, wait).await {
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
    let wish = request.keep_alive && !worker.shared.draining.is_cancelled();
    let mut lead = BytesMut::with_capacity(1024);
    let keep_alive = head.write_head(&mut lead, wish, request.parts.version);
    let ends_by_close = head.body == BodyKind::UntilClose || head.needs_dechunk(request.parts.version);
    if ends_by_close {
        client.reset_on_close();
    }
    let (target, path, reason) = path(worker, client, request, &head, &endpoint, &pending);

    let mut delivery = Delivery::new(client, &mut endpoint, head.framing, pending, worker.shared.config.timeouts.idle);
    delivery.lead = lead;
    delivery.target = target;
    delivery.decode = head.needs_dechunk(request.parts.version);
    let end = tokio::select! {
        biased;
        end = delivery.run() => Some(end),
        _ = evicted(&mut picked.stream) => None,
    };
    if end.is_none() {
        delivery.abandon();
    }
    let account = std::mem::take(&mut delivery.account);
    drop(delivery);
    drop(in_flight);
    request.record.delivered(worker, request.pool, path, reason, account);
    match end {
        Some(End::Complete { reusable }) => {
            picked.finish();
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

/// Chooses the path and, for the kernel's, makes the client a target.
fn path(
    worker: &Worker,
    client: &mut ClientSocket,
    request: &Request,
    head: &ResponseHead,
    endpoint: &EndpointConnection,
    pending: &BytesMut,
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
    };
    let (path, reason) = choose(config, &response);
    let (Path::Ingress, Some(steering)) = (path, worker.endpoints.steering()) else { return (None, path, reason) };
    match client.make_target(steering, config.client_send_buffer) {
        Ok(key) => (Some(Target { key, send_buffer: config.client_send_buffer }), path, reason),
        Err(error) => {
            tracing::debug!(%error, "client connection cannot be a target");
            (None, Path::Relay, "target_refused")
        }
    }
}
