//! Carries the body of a response to the client: as the endpoint's bytes, as a tunnel or as frames.

use std::{cell::RefCell, convert::Infallible, future::poll_fn, io, rc::Rc, task::Poll};

use bytes::BytesMut;
use penstock_common::{framing::Framing, path::Path};
use tokio::time::Instant;

use super::by_picker;
use crate::{
    client::{Client, ClientSocket},
    config::{self, ResponseToPicker, SteeringMode},
    deadline,
    deliver::{Delivery, End, FrameCoding, Frames, Sink, SseKeepalive, Tunnel},
    endpoint::{body::ResponseBody, connection::EndpointConnection},
    http::response::{BodyKind, ResponseHead},
    kernel::wire::Watched,
    picker::{client::PickStream, exchange::ImmediateReply},
    probe::Point,
    proxy::{
        picked::{Picked, evicted},
        request::Request,
    },
    rename::Rename,
    steer::{
        account::Account,
        eligibility::{BothEnds, Eligibility, ResponseFacts, Upstream},
        reason::SteerReason,
        session::Session,
        wire::may_begin,
    },
    tee::{Rest, Tee},
    worker::Worker,
};

/// Why the agent aborted a response.
pub(super) enum Aborted {
    Evicted(ImmediateReply),
    Deadline,
    /// The agent stops.
    Stopped,
    /// The EPP failed while it was to answer for the body.
    PickerFailed,
}

/// The result of delivering a body.
pub(super) struct Carried {
    pub(super) end: Result<End, Aborted>,
    pub(super) account: Account,
    pub(super) path: Path,
    pub(super) reason: SteerReason,
    /// Whether the client's connection stays open.
    pub(super) keep_alive: bool,
    /// Whether the response's head was sent.
    pub(super) begun: bool,
}

/// Delivers the body of the response `head`. `rename` changes what the client gets.
#[expect(clippy::too_many_arguments, reason = "the parts of one response, each borrowed separately")]
pub(super) async fn carry(
    worker: &Worker,
    client: &mut Client,
    request: &Request,
    head: &mut ResponseHead,
    body: &mut ResponseBody,
    picked: &mut Picked,
    tee: Option<&RefCell<Tee>>,
    rename: Option<Rename>,
) -> Carried {
    if let Some(tee) = tee
        && let Some(limit) = answers_for_body(worker, request, head, picked)
    {
        return by_picker::deliver(worker, client, request, head, body, &mut picked.stream, tee, rename, limit).await;
    }
    let keepalive = SseKeepalive::of(worker.shared.config.pools[request.pool].sse_keepalive, head);
    if rename.is_some() || keepalive.is_some() {
        head.change_body();
    }
    let is_changed = rename.is_some() || keepalive.is_some();
    match (&mut *client, &mut *body) {
        (Client::Http1(socket), ResponseBody::Http1 { connection, pending, .. }) if head.upgrade.is_some() => {
            tunnel(worker, socket, request, head, connection, pending, picked).await
        }
        (Client::Http1(socket), ResponseBody::Http1 { connection, framing: _, pending }) if !is_changed => {
            bytes(worker, socket, request, head, connection, pending, picked, tee).await
        }
        _ => frames(worker, client, request, head, body, picked, tee, rename, keepalive).await,
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
    let spliced = spliced(worker, client, request, head, endpoint, pending, tee);
    // The last byte of a flow on path `wire` passes no socket of the agent.
    let wish = request.keeps_alive(worker) && !matches!(spliced, Some(Ok(_)));
    let mut lead = BytesMut::with_capacity(1024);
    let keep_alive = head.write_head(&mut lead, wish, request.parts.version);
    let decode = head.needs_dechunk(request.parts.version);
    if head.body == BodyKind::UntilClose || decode {
        client.reset_on_close();
    }
    let (session, wire, reason) = match spliced {
        None => {
            let (session, reason) = open(worker, client, request, head, endpoint, pending, tee);
            (session, None, reason)
        }
        Some(Ok(watched)) => {
            watched.describe(request.record.started_ns, head.status.as_u16());
            (relayed(request, head, tee), Some(Rc::new(watched)), SteerReason::Forced)
        }
        Some(Err(reason)) => (relayed(request, head, tee), None, reason),
    };
    let path = if wire.is_some() { Path::Wire } else { session.path };

    let mut delivery = Delivery::new(client, endpoint, session, std::mem::take(pending));
    (delivery.lead, delivery.decode, delivery.wire) = (lead, decode, wire);
    let end = tokio::select! {
        biased;
        end = delivery.run() => Ok(end),
        reason = aborted(worker, request, request.deadline.at, &mut picked.stream, tee) => Err(reason),
    };
    if end.is_err() {
        delivery.abandon();
    }
    let (path, reason) = match &delivery.wire {
        Some(watched) if matches!(end, Ok(End::Complete { .. })) && watched.is_unseen() => {
            (Path::Relay, SteerReason::Nat)
        }
        _ => (path, reason),
    };
    let account = std::mem::take(&mut delivery.session.account);
    Carried { end, account, path, reason, keep_alive, begun: true }
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
    let mut why = None;
    let cut = async {
        // The 101 is the whole response, so the request's deadline no longer applies.
        why = Some(aborted(worker, request, None, &mut picked.stream, None).await);
    };
    let end = tunnel.run(std::future::pending(), cut).await;
    let account = tunnel.down.account;
    let end = why.map_or(Ok(end), Err);
    Carried { end, account, path, reason: SteerReason::Upgrade, keep_alive: false, begun: true }
}

/// What carries either direction of a tunnel.
pub(in crate::proxy) fn open_tunnel(
    worker: &Worker,
    client: &mut ClientSocket,
    announced: Option<u64>,
    endpoint: &EndpointConnection,
) -> (Session<'static>, Option<Upstream>) {
    if client.is_tls() || endpoint.is_tls() {
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

/// What an HTTP/1.1 client gets first, the framing of the body, and whether its connection stays open.
pub(super) type Framed = (BytesMut, FrameCoding, bool);

/// Sends the head to a client of HTTP/2, and makes the one for a client of HTTP/1.1. `ends`: the response has no body.
pub(super) fn frame(
    worker: &Worker,
    client: &mut Client,
    request: &Request,
    head: &ResponseHead,
    ends: bool,
) -> io::Result<Framed> {
    let (mut lead, mut coding, mut keep_alive) = (BytesMut::new(), FrameCoding::Plain, true);
    match client {
        Client::Http2(stream) => {
            let head = head.frames();
            // A gRPC trailers-only response has to end with its head.
            if ends { stream.begin_and_end(head)? } else { stream.begin(head)? }
        }
        Client::Http1(socket) => {
            let wish = request.keeps_alive(worker);
            keep_alive = head.write_head(&mut lead, wish, request.parts.version);
            match head.body {
                BodyKind::Chunked if !head.needs_dechunk(request.parts.version) => coding = FrameCoding::Chunked,
                // Only an orderly close ends the body.
                BodyKind::Chunked | BodyKind::UntilClose => socket.reset_on_close(),
                BodyKind::Length(_) | BodyKind::None => {}
            }
        }
    }
    Ok((lead, coding, keep_alive))
}

/// Delivers the body as payload and trailers, if one side or both speak HTTP/2 or the body is changed.
#[expect(clippy::too_many_arguments, reason = "the parts of one response, each borrowed separately")]
async fn frames(
    worker: &Worker,
    client: &mut Client,
    request: &Request,
    head: &ResponseHead,
    body: &mut ResponseBody,
    picked: &mut Picked,
    tee: Option<&RefCell<Tee>>,
    rename: Option<Rename>,
    keepalive: Option<SseKeepalive>,
) -> Carried {
    let is_http1 = matches!((&*client, &*body), (Client::Http1(_), ResponseBody::Http1 { .. }));
    let reason = match () {
        () if rename.is_some() => SteerReason::ModelRenamed,
        () if is_http1 => SteerReason::SseKeepalive,
        () => SteerReason::Http2,
    };
    let (path, begun) = (Path::Relay, true);
    let Ok((lead, coding, keep_alive)) = frame(worker, client, request, head, body.is_done()) else {
        let account = Account::default();
        return Carried { end: Ok(End::ClientGone), account, path, reason, keep_alive: false, begun };
    };
    let (idle, to) = (request.timeouts.idle, Sink { client, lead, coding });
    let mut delivery = Frames { to, body, tee, idle, account: Account::default(), rename, keepalive };
    let end = tokio::select! {
        biased;
        end = delivery.run() => Ok(end),
        reason = aborted(worker, request, request.deadline.at, &mut picked.stream, tee) => Err(reason),
    };
    Carried { end, account: delivery.account, path, reason, keep_alive, begun }
}

/// The bytes of a response that may be kept, if the EPP answers for its body.
fn answers_for_body(worker: &Worker, request: &Request, head: &ResponseHead, picked: &Picked) -> Option<usize> {
    let config::Picker::Epp(settings) = &worker.shared.config.pools[request.pool].picker else { return None };
    let stream = picked.stream.as_ref()?;
    let is_wanted = settings.response_to_picker == ResponseToPicker::Body && head.upgrade.is_none();
    let answers = !stream.wants_no_more() || stream.replaces_body();
    (is_wanted && answers).then_some(settings.response_queue_bytes)
}

/// Resolves when the deadline, an eviction or the end of the agent ends the response. Poll it after the delivery, as
/// [`evicted_while_sending`].
pub(super) async fn aborted(
    worker: &Worker,
    request: &Request,
    deadline: Option<Instant>,
    stream: &mut Option<PickStream>,
    tee: Option<&RefCell<Tee>>,
) -> Aborted {
    let probed = poll_fn(|_| {
        worker.shared.probe.at(Point::Body(&request.parts));
        Poll::<Infallible>::Pending
    });
    tokio::select! {
        biased;
        never = probed => match never {},
        reply = evicted_while_sending(stream, tee) => Aborted::Evicted(reply),
        () = deadline::passed(deadline) => Aborted::Deadline,
        () = worker.shared.force.cancelled() => Aborted::Stopped,
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

/// Adds the tee's result to the metrics. Returns what the EPP has not been sent yet.
pub(super) fn account_for(worker: &Worker, pool: usize, mut tee: Tee) -> Rest {
    let metrics = worker.shared.metrics.pool(pool);
    if tee.given_up() {
        metrics.epp_body_given_up();
    }
    if let Some(usage) = tee.usage() {
        metrics.tokens(&usage.model, usage.input_tokens, usage.output_tokens);
    }
    tee.rest()
}

/// With `steering.mode = "wire"`: the flow that carries the body, or why user space does.
fn spliced(
    worker: &Worker,
    client: &ClientSocket,
    request: &Request,
    head: &ResponseHead,
    endpoint: &mut EndpointConnection,
    pending: &BytesMut,
    tee: Option<&RefCell<Tee>>,
) -> Option<Result<Watched, SteerReason>> {
    let config = &worker.shared.config.steering;
    if config.mode != SteeringMode::Wire {
        return None;
    }
    let watched = endpoint.take_watched().unwrap_or(Err(SteerReason::Unavailable));
    let response = response(client, request, head, endpoint, pending, tee);
    let pipelined = !client.buf.is_empty();
    Some(watched.and_then(|watched| may_begin(&response, config.min_bytes, pipelined).map(|()| watched)))
}

/// The session of a body that takes no path of socket maps.
fn relayed<'a>(request: &Request, head: &ResponseHead, tee: Option<&'a RefCell<Tee>>) -> Session<'a> {
    let mut session = Session::relayed(head.framing);
    (session.tee, session.idle) = (tee, request.timeouts.idle);
    session
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
    let response = response(client, request, head, endpoint, pending, tee);
    let eligibility = eligibility(worker, endpoint, request.target);
    let make_target = |steering: &_, send_buffer| client.make_target(steering, send_buffer);
    let (mut session, reason) = eligibility.response(&response, head.framing, make_target);
    (session.tee, session.idle) = (tee, request.timeouts.idle);
    (session, reason)
}

/// The facts about a response, of whose body `pending` has been read.
fn response(
    client: &ClientSocket,
    request: &Request,
    head: &ResponseHead,
    endpoint: &EndpointConnection,
    pending: &BytesMut,
    tee: Option<&RefCell<Tee>>,
) -> ResponseFacts {
    let both = BothEnds {
        local_endpoint: endpoint.local,
        tls: client.is_tls(),
        endpoint_tls: endpoint.is_tls(),
        half_closed: client.is_half_closed(),
        client: request.parts.version,
    };
    ResponseFacts::new(head, pending, both, tee.map(RefCell::borrow).as_deref())
}
