//! Sends the head of a response to the EPP and applies the EPP's mutation to it.

use std::{cell::RefCell, net::SocketAddr, sync::Arc};

use http::StatusCode;

use crate::{
    budget::Budget,
    client::Client,
    config::{self, ResponseToPicker},
    error::Error,
    http::response::{BodyKind, ResponseHead},
    picker::{client::ResponseReply, exchange::ImmediateReply, mutation},
    proxy::{picked::Picked, request::Request},
    rename::{BodyFormat, Rename},
    tee::{BodyFacts, Tee},
    worker::Worker,
};

/// What follows from the EPP's reply to a response head.
pub(super) enum Applied {
    /// The response is sent to the client. The tee, if there is one, gets its body.
    Respond(Option<RefCell<Tee>>),
    Evicted(ImmediateReply),
}

/// Sends the head to the EPP, if the EPP picked, and applies its mutation. `ended`: the response has no body.
pub(super) async fn apply_epp(
    worker: &Worker,
    client: &mut Client,
    request: &Request,
    picked: &mut Picked,
    address: SocketAddr,
    head: &mut ResponseHead,
    ended: bool,
) -> Result<Applied, Error> {
    let settings = match &worker.shared.config.pools[request.pool].picker {
        config::Picker::Epp(epp) => Some(epp),
        config::Picker::Builtin => None,
    };
    let mut tee = None;
    if let (Some(stream), Some(settings)) = (&mut picked.stream, settings)
        && settings.response_to_picker != ResponseToPicker::Off
    {
        let wait = settings.response_timeout;
        let wanted = tee_of(settings, head, request.streams, &worker.shared.bodies.memory);
        if settings.response_to_picker == ResponseToPicker::Body && head.upgrade.is_none() {
            stream.obey();
        }
        let reply = tokio::select! {
            biased;
            reply = stream.response_headers(head.status, &head.headers, address, ended, wait) => reply,
            () = client.gone() => return Err(Error::ClientGone),
        };
        if let Some(reply) = stream.head_reply() {
            worker.shared.metrics.pool(request.pool).epp_head_reply(reply.label());
        }
        match reply {
            ResponseReply::Evicted(reply) => return Ok(Applied::Evicted(reply)),
            reply => apply_reply(worker, request, head, &reply),
        }
        // An empty body can be replaced, if the response may have one.
        let replaced = stream.replaces_body() && head.body != BodyKind::None;
        tee = wanted.filter(|_| !ended || replaced).map(RefCell::new);
        if let Some(tee) = &tee
            && stream.wants_no_more()
        {
            // The EPP wants no more of this response.
            tee.borrow_mut().untold();
        }
    }
    Ok(Applied::Respond(tee))
}

/// Applies the EPP's reply to the head.
pub(super) fn apply_reply(worker: &Worker, request: &Request, head: &mut ResponseHead, reply: &ResponseReply) {
    match reply {
        ResponseReply::Mutation(Some(change)) => {
            let status = head.status;
            mutation::apply_to_response(change, &mut head.status, &mut head.headers);
            if head.status != status {
                head.status.canonical_reason().unwrap_or_default().clone_into(&mut head.reason);
            }
        }
        ResponseReply::Excessive => {
            worker.shared.metrics.pool(request.pool).epp_failed("mutation_too_large");
            tracing::warn!(
                pool = worker.shared.config.pools[request.pool].name,
                "EPP's response mutation exceeds the limits, not applied"
            );
        }
        ResponseReply::Mutation(None) | ResponseReply::Evicted(_) => {}
    }
}

/// What restores the client's model name in the body; `None` if the EPP did not change it or the body cannot be read.
pub(super) fn rename(request: &Request, head: &ResponseHead) -> Option<Rename> {
    let names = request.names.as_ref().filter(|_| head.upgrade.is_none())?;
    // A part of a document begins anywhere in it.
    let kind = BodyFormat::of(&head.headers).filter(|_| head.status != StatusCode::PARTIAL_CONTENT)?;
    Some(Rename::new(names, kind))
}

/// The tee for this response's body. Returns `None` if the EPP wants nothing of the body. `streams`: the request asked for a stream.
fn tee_of(settings: &config::Epp, head: &ResponseHead, streams: bool, memory: &Arc<Budget>) -> Option<Tee> {
    let length = if let BodyKind::Length(length) = head.body { Some(length) } else { None };
    let facts = BodyFacts { headers: &head.headers, length, streams };
    Tee::new(settings.response_to_picker, &facts, memory)
}
