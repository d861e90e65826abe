//! Responds: sends the response's head to the EPP and, with the EPP's mutation, to the client. Delivers the body over the chosen
//! path. Then both connections are reused, pinned or closed.

mod by_picker;
mod carry;
mod head;

use std::net::SocketAddr;

pub(super) use self::carry::open_tunnel;
use self::{
    carry::{Aborted, account_for, carry},
    head::{Applied, apply_epp, rename},
};
use super::{
    dispatch::EndpointResponse,
    picked::Picked,
    reply::evict,
    request::{AfterRequest, Pin, Request},
};
use crate::{
    client::Client,
    config,
    deliver::End,
    endpoint::{body::ResponseBody, connection::EndpointConnection},
    error::Error,
    http::{headers, response::ResponseHead},
    picker::{error::PickError, exchange::ImmediateReply},
    probe::Point,
    tee::Rest,
    worker::Worker,
};

pub(super) async fn respond(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    mut picked: Picked,
    response: EndpointResponse,
) -> Result<AfterRequest, Error> {
    let EndpointResponse { address, mut head, mut body, in_flight } = response;
    request.record.served(address);
    let config = &worker.shared.config;
    headers::prepare_response(&mut head.headers, head.version, &request.parts.headers, &config.headers);
    let ended = body.is_done() && head.upgrade.is_none();
    let tee = match apply_epp(worker, client, request, &mut picked, address, &mut head, ended).await? {
        Applied::Respond(tee) => tee,
        Applied::Evicted(reply) => return evict_response(worker, client, request, body, &reply).await,
    };
    let rename = rename(request, &head);
    request.apply_grant(config, &mut head.headers);
    note_head(request, &head);
    worker.shared.probe.at(Point::Response(&request.parts));
    let carried = carry(worker, client, request, &mut head, &mut body, &mut picked, tee.as_ref(), rename).await;
    drop(in_flight);
    // The EPP may have changed the head while it was held.
    note_head(request, &head);
    if !carried.begun {
        // Nothing of the endpoint's response was sent.
        return match carried.end {
            Err(Aborted::Evicted(reply)) => evict_response(worker, client, request, body, &reply).await,
            end => Err(not_begun(request, address, &end)),
        };
    }
    request.record.delivered(worker, request.pool, carried.path, carried.reason, carried.account);
    let rest = tee.map_or_else(Rest::default, |tee| account_for(worker, request.pool, tee.into_inner()));
    match carried.end {
        Ok(End::Complete { reusable }) => {
            request.record.ending(picked.finish(rest));
            let pins = config.pools[request.pool].pick_per == config::PickPer::Connection;
            // What a pin relays is not parsed, so the route could not change it.
            let holds = picked.reusable && !request.is_changed();
            let may_pin = pins && holds && carried.keep_alive && matches!(client, Client::Http1(_));
            if let ResponseBody::Http1 { mut connection, .. } = body {
                connection.set_resting(true);
                if reusable
                    && head.keep_alive
                    && let Some(pin) = keep(worker, request, connection, may_pin)
                {
                    return Ok(AfterRequest::Pinned(Box::new(pin)));
                }
            }
            Ok(if carried.keep_alive { AfterRequest::Next } else { AfterRequest::Close })
        }
        // Dropping the stream tells the EPP that the request was aborted.
        end => {
            let reason = match end {
                Ok(end) => end.reason(),
                Err(Aborted::Deadline) => "request_timeout",
                Err(Aborted::Stopped) => Error::Stopped.reason(),
                Err(Aborted::PickerFailed) => "picker_failed",
                Err(Aborted::Evicted(reply)) => {
                    worker.shared.metrics.pool(request.pool).evicted();
                    request.record.immediate(&reply);
                    "evicted"
                }
            };
            request.record.broken(reason);
            Ok(AfterRequest::Abort)
        }
    }
}

fn note_head(request: &mut Request, head: &ResponseHead) {
    request.record.status(head.status, "ok");
    request.record.event_stream(head.is_event_stream());
}

/// Why nothing of the endpoint's response was sent.
fn not_begun(request: &Request, address: SocketAddr, end: &Result<End, Aborted>) -> Error {
    match end {
        Err(Aborted::Evicted(_) | Aborted::PickerFailed) => Error::Picker(PickError::ResponseUnanswered),
        Err(Aborted::Deadline) => Error::RequestTimeout(request.deadline.limit),
        Err(Aborted::Stopped) => Error::Stopped,
        Ok(End::ClientGone) => Error::ClientGone,
        Ok(End::Idle) => Error::FirstByte(address),
        Ok(End::Broken | End::Over | End::Left | End::Stopped(_) | End::Complete { .. }) => {
            Error::EndpointClosed(address)
        }
    }
}

/// Keeps the endpoint's connection for a later request: of this client (`may_pin`), or of any.
fn keep(worker: &Worker, request: &Request, connection: EndpointConnection, may_pin: bool) -> Option<Pin> {
    // If the response ends before the request is sent, the connection is closed: the endpoint would take the rest of the request
    // for the next one.
    if !connection.is_sent() || !connection.dismiss() {
        return None;
    }
    if may_pin {
        let (shared, target, idle) = (&worker.shared, request.target, request.timeouts.idle);
        let config::Pool { name, pin, .. } = &shared.config.pools[request.pool];
        let metrics = shared.metrics.pool_handle(request.pool);
        return Some(Pin { endpoint: connection, pool: name.clone(), metrics, age: pin.age, target, idle });
    }
    worker.endpoints.put(connection);
    None
}

/// Ends the endpoint's request and answers with the EPP's reply.
async fn evict_response(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    body: ResponseBody,
    reply: &ImmediateReply,
) -> Result<AfterRequest, Error> {
    if let Some(sending) = body.sending() {
        sending.stop();
    }
    drop(body);
    evict(worker, client, request, reply).await
}
