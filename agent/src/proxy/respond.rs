//! Responds: sends the response's head to the EPP and, with the EPP's mutation, to the client. Delivers the body over the chosen
//! path. Then both connections are reused, pinned or closed.

use std::{cell::RefCell, convert::Infallible, future::poll_fn, net::SocketAddr, task::Poll};

use bytes::{Bytes, BytesMut};
use penstock_common::{framing::Framing, path::Path};
use tokio::time::Instant;

use super::{After, Pin, Request, pick::Picked, send_immediate};
use crate::{
    client::{Client, ClientSocket},
    config,
    deliver::{Coding, Delivery, End, Frames, Tunnel},
    endpoint::{body::ResponseBody, connection::EndpointConnection, in_flight::InFlight},
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
    probe::Point,
    steer::{
        account::Account,
        eligibility::{Eligibility, Response, ToPicker, Upstream},
        reason::SteerReason,
        session::Session,
    },
    tee::Tee,
    worker::Worker,
};

/// The reason label of a response that the EPP aborted.
const EVICTED: &str = "evicted";

/// An endpoint's response of which the head has been read.
pub(super) struct EndpointResponse {
    pub(super) address: SocketAddr,
    pub(super) head: ResponseHead,
    pub(super) body: ResponseBody,
    pub(super) in_flight: InFlight,
}

/// The result of delivering a body.
struct Carried {
    /// The error is the reason for which the agent aborted the body.
    end: Result<End, &'static str>,
    account: Account,
    path: Path,
    reason: SteerReason,
    /// Whether the client's connection stays open.
    keep_alive: bool,
}

/// Resolves when the EPP evicts the request. Never resolves without a stream.
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
    response: EndpointResponse,
) -> Result<After, Error> {
    let EndpointResponse { address, mut head, mut body, in_flight } = response;
    request.record.served(address);
    let config = &worker.shared.config;
    headers::prepare_response(&mut head.headers, head.version, &request.parts.headers, &config.headers);
    let settings = match &worker.shared.config.pools[request.pool].picker {
        config::Picker::Epp(epp) => Some(epp),
        config::Picker::Builtin => None,
    };
    let mut tee = None;
    if let (Some(stream), Some(settings)) = (&mut picked.stream, settings) {
        let wait = settings.response_timeout;
        let ended = body.is_done() && head.upgrade.is_none();
        tee = tee_of(settings, &head, ended);
        let reply = tokio::select! {
            biased;
            reply = stream.response_headers(head.status, &head.headers, address, ended, wait) => reply,
            () = client.gone() => return Err(Error::ClientGone),
        };
        if let Some(reply) = stream.head_reply() {
            worker.shared.metrics.pool(request.pool).epp_head_reply(reply.label());
        }
        match reply {
            ResponseReply::Mutation(Some(change)) => drop(mutation::apply(&change, &mut head.headers)),
            ResponseReply::Mutation(None) => {}
            ResponseReply::Excessive => {
                worker.shared.metrics.pool(request.pool).epp_failed("mutation_too_large");
                tracing::warn!(
                    pool = worker.shared.config.pools[request.pool].name,
                    "EPP's response mutation exceeds the limits, not applied"
                );
            }
            ResponseReply::Evicted(reply) => {
                worker.shared.metrics.pool(request.pool).evicted();
                if let Some(sending) = body.sending() {
                    sending.stop();
                }
                drop(body);
                let keep_alive = request.keeps_alive(worker);
                send_immediate(worker, client, &request.parts, &reply, keep_alive).await?;
                request.record.status(reply.status, "evicted");
                return Ok(if keep_alive { After::Next } else { After::Close });
            }
        }
    }
    request.record.status(head.status, "ok");
    request.record.event_stream(head.is_event_stream());
    worker.shared.probe.at(Point::Response(&request.parts));
    let carried = match (&mut *client, &mut body) {
        (Client::Http1(socket), ResponseBody::Http1 { connection, pending, .. }) if head.upgrade.is_some() => {
            tunnel(worker, socket, request, &head, connection, pending, &mut picked).await
        }
        (Client::Http1(socket), ResponseBody::Http1 { connection, framing: _, pending }) => {
            bytes(worker, socket, request, &head, connection, pending, &mut picked, tee.as_ref()).await
        }
        _ => frames(worker, client, request, &head, &mut body, &mut picked, tee.as_ref()).await,
    };
    drop(in_flight);
    request.record.delivered(worker, request.pool, carried.path, carried.reason, carried.account);
    let rest = tee.map_or_else(Vec::new, |tee| account_for(worker, request.pool, tee.into_inner()));
    match carried.end {
        Ok(End::Complete { reusable }) => {
            picked.finish(rest);
            if let ResponseBody::Http1 { mut connection, .. } = body {
                connection.set_resting(true);
                // If the response ends before the request is sent, the connection is closed: the endpoint would take the rest
                // of the request for the next one.
                let kept = reusable && head.keep_alive && connection.is_sent() && connection.dismiss();
                let pins = worker.shared.config.pools[request.pool].pick_per == config::PickPer::Connection;
                if kept && pins && picked.reusable && carried.keep_alive && matches!(client, Client::Http1(_)) {
                    let pin = Pin {
                        endpoint: connection,
                        pool: request.pool,
                        target: request.target,
                        idle: request.timeouts.idle,
                    };
                    return Ok(After::Pinned(Box::new(pin)));
                }
                if kept {
                    worker.endpoints.put(connection);
                }
            }
            Ok(if carried.keep_alive { After::Next } else { After::Close })
        }
        // Dropping the stream tells the EPP that the request was aborted.
        end => {
            let reason = end.map_or_else(|reason| reason, End::reason);
            if reason == EVICTED {
                worker.shared.metrics.pool(request.pool).evicted();
            }
            request.record.broken(reason);
            Ok(After::Abort)
        }
    }
}

/// Delivers the body as the endpoint's bytes (HTTP/1.1 on both sides), through the kernel if a kernel path was chosen.
#[expect(clippy::too_many_arguments, reason = "the parts of one response, each borrowed separately")]
async fn bytes(
    worker: &Worker,
    client: &mut ClientSocket,
    request: &Request,
    head: &ResponseHead,
    endpoint: &mut EndpointConnection,
    pending: &mut BytesMut,
    picked: &mut Picked,
    tee: Option<&RefCell<Tee>>,
) -> Carried {
    let wish = request.keeps_alive(worker);
    let mut lead = BytesMut::with_capacity(1024);
    let keep_alive = head.write_head(&mut lead, wish, request.parts.version);
    let decode = head.needs_dechunk(request.parts.version);
    if head.body == BodyKind::UntilClose || decode {
        client.reset_on_close();
    }
    let (session, reason) = open(worker, client, request, head, endpoint, pending, tee);
    let path = session.path;

    let mut delivery = Delivery::new(client, endpoint, session, std::mem::take(pending));
    delivery.lead = lead;
    delivery.decode = decode;
    let end = tokio::select! {
        biased;
        end = delivery.run() => Ok(end),
        reason = aborted(worker, request, request.deadline, &mut picked.stream, tee) => Err(reason),
    };
    if end.is_err() {
        delivery.abandon();
    }
    Carried { end, account: delivery.session.account, path, reason, keep_alive }
}

/// Relays the connection after `101 Switching Protocols`.
async fn tunnel(
    worker: &Worker,
    client: &mut ClientSocket,
    request: &Request,
    head: &ResponseHead,
    endpoint: &mut EndpointConnection,
    pending: &mut BytesMut,
    picked: &mut Picked,
) -> Carried {
    let mut lead = BytesMut::with_capacity(1024);
    head.write_head(&mut lead, true, request.parts.version);
    // Only an orderly close in both directions is passed on as one.
    client.reset_on_close();
    endpoint.reset_on_close();
    let idle = request.timeouts.idle;
    let pending = std::mem::take(pending);
    let (down, up) = open_tunnel(worker, client, request.target, endpoint);
    let path = down.path;
    let mut tunnel = Tunnel { client, endpoint, lead, pending, idle, down, up };
    let end = tokio::select! {
        biased;
        end = tunnel.run(std::future::pending()) => Ok(end),
        // The 101 is the whole response, so the request's deadline no longer applies.
        reason = aborted(worker, request, None, &mut picked.stream, None) => Err(reason),
    };
    Carried { end, account: tunnel.down.account, path, reason: SteerReason::Upgrade, keep_alive: false }
}

/// What carries either direction of a tunnel.
pub(super) fn open_tunnel(
    worker: &Worker,
    client: &mut ClientSocket,
    announced: Option<u64>,
    endpoint: &EndpointConnection,
) -> (Session<'static>, Option<Upstream>) {
    if client.is_tls() {
        return (Session::relayed(Framing::until_close()), None);
    }
    let eligibility = eligibility(worker, endpoint, announced);
    eligibility.tunnel(|steering, send_buffer| client.make_target(steering, send_buffer))
}

fn eligibility<'a>(worker: &'a Worker, endpoint: &'a EndpointConnection, announced: Option<u64>) -> Eligibility<'a> {
    Eligibility {
        config: &worker.shared.config.steering,
        steering: worker.endpoints.steering(),
        source: endpoint.source(),
        is_sent: endpoint.is_sent(),
        announced,
    }
}

/// Delivers the body as frames, if one side or both speak HTTP/2.
async fn frames(
    worker: &Worker,
    client: &mut Client,
    request: &Request,
    head: &ResponseHead,
    body: &mut ResponseBody,
    picked: &mut Picked,
    tee: Option<&RefCell<Tee>>,
) -> Carried {
    let (mut lead, mut coding, mut keep_alive) = (BytesMut::new(), Coding::Plain, true);
    let begun = match client {
        Client::Http2(stream) => {
            let head = head.frames();
            // A gRPC trailers-only response has to end with its head.
            if body.is_done() { stream.begin_and_end(head) } else { stream.begin(head) }
        }
        Client::Http1(socket) => {
            let wish = request.keeps_alive(worker);
            keep_alive = head.write_head(&mut lead, wish, request.parts.version);
            match head.body {
                BodyKind::Chunked if head.needs_dechunk(request.parts.version) => socket.reset_on_close(),
                BodyKind::Chunked => coding = Coding::Chunked,
                _ => {}
            }
            Ok(())
        }
    };
    let idle = request.timeouts.idle;
    let mut delivery = Frames { client, body, lead, coding, tee, idle, account: Account::default() };
    let end = match begun {
        Err(_) => Ok(End::ClientGone),
        Ok(()) => tokio::select! {
            biased;
            end = delivery.run() => Ok(end),
            reason = aborted(worker, request, request.deadline, &mut picked.stream, tee) => Err(reason),
        },
    };
    Carried { end, account: delivery.account, path: Path::Relay, reason: SteerReason::Http2, keep_alive }
}

/// Resolves with the reason when the deadline or an eviction ends the response. Poll it after the delivery, as
/// [`evicted_while_sending`].
async fn aborted(
    worker: &Worker,
    request: &Request,
    deadline: Option<Instant>,
    stream: &mut Option<PickStream>,
    tee: Option<&RefCell<Tee>>,
) -> &'static str {
    let late = async {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    let probed = poll_fn(|_| {
        worker.shared.probe.at(Point::Body(&request.parts));
        Poll::<Infallible>::Pending
    });
    tokio::select! {
        biased;
        never = probed => match never {},
        _ = evicted_while_sending(stream, tee) => EVICTED,
        () = late => "request_timeout",
    }
}

/// As [`evicted`], but also sends the EPP what is in the tee. Poll it after the delivery in the same task: then everything that the
/// delivery puts into the tee is taken out at once.
async fn evicted_while_sending(stream: &mut Option<PickStream>, tee: Option<&RefCell<Tee>>) -> ImmediateReply {
    match (stream, tee) {
        (Some(stream), Some(tee)) => stream.evicted_while_sending(|| tee.borrow_mut().next_piece()).await,
        (stream, _) => evicted(stream).await,
    }
}

/// The tee for this response's body. Returns `None` if the EPP wants nothing of the body or there is no body.
fn tee_of(settings: &config::Epp, head: &ResponseHead, ended: bool) -> Option<RefCell<Tee>> {
    let length = if let BodyKind::Length(length) = head.body { Some(length) } else { None };
    let tee = Tee::new(settings.response_to_picker, &head.headers, length, settings.response_queue_bytes);
    tee.filter(|_| !ended).map(RefCell::new)
}

/// Adds the tee's result to the metrics. Returns the pieces that the EPP has not been sent yet.
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

/// Opens the session that carries the body, of which `pending` has been read.
fn open<'a>(
    worker: &Worker,
    client: &mut ClientSocket,
    request: &Request,
    head: &ResponseHead,
    endpoint: &EndpointConnection,
    pending: &BytesMut,
    tee: Option<&'a RefCell<Tee>>,
) -> (Session<'a>, SteerReason) {
    let mut framing = head.framing;
    framing.feed(pending);
    let response = Response {
        framing,
        event_stream: head.is_event_stream(),
        local_endpoint: endpoint.local,
        tls: client.is_tls(),
        half_closed: client.is_half_closed(),
        decoded: head.needs_dechunk(request.parts.version),
        to_picker: tee.map(|tee| if tee.borrow().wants_all() { ToPicker::All } else { ToPicker::End }),
    };
    let eligibility = eligibility(worker, endpoint, request.target);
    let make_target = |steering: &_, send_buffer| client.make_target(steering, send_buffer);
    let (mut session, reason) = eligibility.response(&response, head.framing, make_target);
    (session.tee, session.idle) = (tee, request.timeouts.idle);
    (session, reason)
}
