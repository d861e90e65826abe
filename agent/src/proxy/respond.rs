//! The response: its head goes to the picker and, as the picker changed it, to the client; its body goes the way that was
//! chosen; then both connections are free for what comes next.

use std::{cell::RefCell, net::SocketAddr, rc::Rc};

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::{After, Pin, Request, immediate, pick::Picked};
use crate::{
    client::{Client, ClientSocket},
    config::{self, SteeringMode},
    deliver::{Account, Coding, Delivery, End, Frames, Target, Tunnel, Up},
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
        Source,
        choice::{Path, Response, choose},
    },
    tee::Tee,
    worker::Worker,
};

/// Why a response was broken off by its picker: a label.
const EVICTED: &str = "evicted";

/// What an endpoint has answered so far.
pub(super) struct Answer {
    pub(super) address: SocketAddr,
    pub(super) head: ResponseHead,
    pub(super) body: ResponseBody,
    pub(super) in_flight: InFlight,
}

/// A body that has been carried, as far as it went.
struct Carried {
    /// Err: it was broken off, for this reason.
    end: Result<End, &'static str>,
    account: Account,
    path: Path,
    reason: &'static str,
    /// The client's connection stays open.
    keep_alive: bool,
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
    let Answer { address, mut head, mut body, in_flight } = answer;
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
                    "EPP's mutation of a response is over the limits, not applied"
                );
            }
            ResponseReply::Evicted(reply) => {
                worker.shared.metrics.pool(request.pool).evicted();
                drop(body);
                let keep_alive = request.keeps_alive(worker);
                immediate(worker, client, &request.parts, &reply, keep_alive).await?;
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
                // A response that ends first ends its request: what is left would be taken for the next one.
                let kept = reusable && head.keep_alive && connection.is_sent() && connection.dismiss();
                let pins = worker.shared.config.pools[request.pool].pick_per == config::PickPer::Connection;
                if kept && pins && picked.holds && carried.keep_alive && matches!(client, Client::Http1(_)) {
                    let pin = Pin {
                        endpoint: connection,
                        pool: request.pool,
                        target: request.target,
                        idle: request.times.idle,
                    };
                    return Ok(After::Pinned(Box::new(pin)));
                }
                if kept {
                    worker.endpoints.put(connection);
                }
            }
            Ok(if carried.keep_alive { After::Next } else { After::Close })
        }
        // Dropping the stream tells the EPP that the request is over and was not completed.
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

/// Carries the body as the endpoint's bytes, in the kernel where that was chosen.
#[expect(clippy::too_many_arguments, reason = "the parts of one response, each borrowed for itself")]
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
    let told = tee.map(|tee| tee.borrow().wants_all());
    let (target, path, reason) = path(worker, client, request, head, endpoint, pending, told);

    let idle = request.times.idle;
    let mut delivery = Delivery::new(client, endpoint, head.framing, std::mem::take(pending), idle);
    delivery.lead = lead;
    delivery.target = target;
    delivery.tee = tee;
    delivery.decode = decode;
    let end = tokio::select! {
        biased;
        end = delivery.run() => Ok(end),
        reason = broken_off(request.deadline, &mut picked.stream, tee) => Err(reason),
    };
    if end.is_err() {
        delivery.abandon();
    }
    Carried { end, account: std::mem::take(&mut delivery.account), path, reason, keep_alive }
}

/// Carries what follows a switch of protocols.
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
    // Only the ends of both directions are an end in order.
    client.reset_on_close();
    endpoint.reset_on_close();
    let idle = request.times.idle;
    let pending = std::mem::take(pending);
    let (down, up, path) = lanes(worker, client, request.target, endpoint);
    let mut tunnel = Tunnel { client, endpoint, lead, pending, idle, down, up, account: Account::default() };
    let end = tokio::select! {
        biased;
        end = tunnel.run(std::future::pending()) => Ok(end),
        // Switching protocols is the whole response: the time for the request ends with it.
        reason = broken_off(None, &mut picked.stream, None) => Err(reason),
    };
    Carried { end, account: tunnel.account, path, reason: "upgrade", keep_alive: false }
}

/// What in the kernel is to carry either direction of a tunnel, and the path of what the client gets.
pub(super) fn lanes(
    worker: &Worker,
    client: &mut ClientSocket,
    target: Option<u64>,
    endpoint: &EndpointConnection,
) -> (Option<Target>, Option<Up>, Path) {
    let config = &worker.shared.config.steering;
    let none = (None, None, Path::Relay);
    let (Some(steering), Some(source)) = (worker.endpoints.steering(), endpoint.source()) else { return none };
    if client.is_tls() || config.mode == SteeringMode::Off {
        return none;
    }
    let send_buffer = config.client_send_buffer;
    let Ok(key) = client.make_target(steering, send_buffer) else { return none };
    // Here the client sends while the endpoint's socket is in the map.
    let transparent = config.mode == SteeringMode::Local || !steering.is_endpoint_visible();
    let is_local = transparent && target == Some(key) && source.is_local_to(key) && endpoint.admit();
    let path = match config.mode {
        SteeringMode::Auto | SteeringMode::Local if is_local => Path::Local,
        SteeringMode::Auto | SteeringMode::Ingress => Path::Ingress,
        SteeringMode::Local | SteeringMode::Off => Path::Relay,
    };
    let down = path.lane().map(|lane| Target { key, send_buffer, lane });
    // The mode `local` is for what the endpoint's own `sendmsg` can carry.
    let up = (config.mode != SteeringMode::Local).then(|| Up { steering: Rc::clone(steering), send_buffer });
    (down, up, path)
}

/// Carries the body where HTTP/2 is spoken on one side or both.
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
            // What gRPC calls trailers only has to end with its head.
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
    let idle = request.times.idle;
    let mut delivery = Frames { client, body, lead, coding, tee, idle, account: Account::default() };
    let end = match begun {
        Err(_) => Ok(End::ClientGone),
        Ok(()) => tokio::select! {
            biased;
            end = delivery.run() => Ok(end),
            reason = broken_off(request.deadline, &mut picked.stream, tee) => Err(reason),
        },
    };
    Carried { end, account: delivery.account, path: Path::Relay, reason: "http2", keep_alive }
}

/// Resolves when a response has to be broken off that nobody but the agent or the picker minds: at its deadline, or by
/// eviction. As [`evicted_telling`], it is polled after the delivery.
async fn broken_off(
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
    tokio::select! {
        biased;
        _ = evicted_telling(stream, tee) => EVICTED,
        () = late => "request_timeout",
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
fn tee_of(settings: &config::Epp, head: &ResponseHead, ended: bool) -> Option<RefCell<Tee>> {
    let length = if let BodyKind::Length(length) = head.body { Some(length) } else { None };
    let tee = Tee::new(settings.response_to_picker, &head.headers, length, settings.response_queue_bytes);
    tee.filter(|_| !ended).map(RefCell::new)
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

/// Why only user space can carry a body, if so.
fn barrier(decode: bool, told: bool, tls: bool, half_closed: bool) -> Option<&'static str> {
    match () {
        () if tls => Some("tls"),
        () if half_closed => Some("half_close"),
        () if decode => Some("http10"),
        () if told => Some("response_to_picker"),
        () => None,
    }
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
    let response = Response {
        registered: endpoint.source().is_some(),
        framing,
        event_stream: head.is_event_stream(),
        local_endpoint: endpoint.local,
        // The end of a response is kept on the ingress path alone.
        local_socket: told.is_none()
            && request.target.is_some_and(|key| endpoint.source().is_some_and(|source| source.is_local_to(key))),
        barrier: barrier(
            head.needs_dechunk(request.parts.version),
            told == Some(true),
            client.is_tls(),
            client.is_half_closed(),
        ),
    };
    let (mut path, mut reason) = choose(config, &response);
    if path == Path::Local && !endpoint.admit() {
        (path, reason) = choose(config, &Response { local_socket: false, ..response });
    }
    let (lane, Some(steering)) = (path.lane(), worker.endpoints.steering()) else { return (None, path, reason) };
    let Some(lane) = lane else { return (None, path, reason) };
    if told.is_some()
        && let Some(Err(error)) = endpoint.source().map(Source::make_ring)
    {
        tracing::debug!(%error, "the end of the response could not be kept by the kernel");
        return (None, Path::Relay, "response_to_picker");
    }
    match client.make_target(steering, config.client_send_buffer) {
        Ok(key) => (Some(Target { key, send_buffer: config.client_send_buffer, lane }), path, reason),
        Err(error) => {
            tracing::debug!(%error, "client connection cannot be a target");
            (None, Path::Relay, "target_refused")
        }
    }
}
