//! The protocol on one EPP stream, as a state machine without sockets, clock or tasks.
//!
//! Takes the request's head and body, the EPP's messages and the end of its stream; returns messages to send (`next_message`) and
//! events (`next_event`). Sends exactly one end of stream per direction. There is at most one decision or failure, and after a
//! decision nothing from the EPP is an error. The EPP's replies may come in any order.

mod response;

use std::{collections::VecDeque, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::HeaderName;
use penstock_proto::{
    core::HeaderValueOption,
    ext_proc::{
        BodyResponse, CommonResponse, HeaderMutation, ImmediateResponse, ProcessingRequest, ProcessingResponse,
        body_mutation::Mutation, common_response::ResponseStatus, processing_request::Request,
        processing_response::Response,
    },
};

use prost::Message as _;

use self::response::ResponseState;
use super::{
    allowance::Allowance,
    error::PickError,
    message, metadata,
    mutation::{self, Field},
    names::{EndpointNames, InvalidEntries},
    replacement::Replacement,
    returned::Answer,
};
pub use super::{allowance::ExchangeLimits, immediate::ImmediateReply, replacement::Body};
use crate::{config::EppLimits, endpoint::set::EndpointSet};

/// Bytes of a replaced body for which the EPP may send one more message.
const BYTES_PER_MESSAGE: usize = 256;

/// The EPP's pick and its mutations of the request.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// At least one endpoint, without duplicates, in the order in which to try them.
    pub endpoints: Vec<SocketAddr>,
    /// The invalid entries of the EPP's list.
    pub invalid: InvalidEntries,
    /// The mutation of the request's head, without the pick.
    pub mutation: HeaderMutation,
    /// What the endpoint gets as the body.
    pub body: Body,
}

/// The EPP's answer about a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Forward the request.
    Picked(Decision),
    /// Answer the client with the EPP's own response (ext_proc's ImmediateResponse).
    Immediate(ImmediateReply),
}

/// An event from the EPP.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The EPP has decided, or evicts a request that it has picked for.
    Outcome(Outcome),
    /// The EPP's reply to the head of the response.
    ResponseHead(HeaderMutation),
    /// The EPP's reply to the head of the response exceeds the limits and is not applied.
    Excessive,
    /// The EPP's reply to the head says that it wants nothing of the body and leaves it unchanged, if its answers are wanted.
    ResponseDeclined,
    /// The EPP's answer about the response's body, if it is wanted.
    ResponseBody(Answer),
    /// The EPP's reply to the trailers of the response, if it is wanted. `None` if it exceeds the limits and is not applied.
    ResponseTrailers(Option<HeaderMutation>),
}

/// The state of one EPP stream.
#[derive(Debug)]
pub struct Exchange {
    /// The name of the header that carries the pick.
    header: HeaderName,
    limits: ExchangeLimits,
    /// The pool's endpoints, if known.
    members: Option<Arc<EndpointSet>>,
    subset: Option<Vec<SocketAddr>>,
    served: Option<SocketAddr>,
    outbox: VecDeque<ProcessingRequest>,
    /// Body messages so far.
    pieces_sent: usize,
    /// Whether the last body message, or the head, had the end of stream.
    request_ended: bool,
    response: ResponseState,
    /// Whether the EPP has replied to the head of the request.
    head_answered: bool,
    by_metadata: Option<String>,
    by_header: Option<String>,
    mutation: HeaderMutation,
    /// How much the EPP may still change in the request's head.
    request_allowance: Allowance,
    /// Messages from the EPP so far.
    messages: usize,
    replacement: Replacement,
    /// Takes the dynamic metadata of every reply.
    metadata: Option<metadata::SharedMetadata>,
    /// Whether a decision, an immediate reply or a failure was returned.
    finished: bool,
    events: VecDeque<Result<Event, PickError>>,
}

impl Exchange {
    /// Queues the first message.
    pub fn new(
        header: HeaderName,
        request: &http::request::Parts,
        has_body: bool,
        subset: Option<&[SocketAddr]>,
        limits: ExchangeLimits,
    ) -> Self {
        let mut exchange = Self {
            header,
            members: None,
            subset: subset.map(<[_]>::to_vec),
            served: None,
            outbox: VecDeque::new(),
            pieces_sent: 0,
            request_ended: !has_body,
            response: ResponseState::new(&limits.epp),
            head_answered: false,
            by_metadata: None,
            by_header: None,
            mutation: HeaderMutation::default(),
            request_allowance: Allowance::of(&request.headers, &limits.epp),
            messages: 0,
            replacement: Replacement::new(limits.replaced_body, Arc::clone(&limits.memory)),
            limits,
            metadata: None,
            finished: false,
            events: VecDeque::new(),
        };
        exchange.queue(message::request_head(request, !has_body));
        exchange.outbox[0].protocol_config = Some(message::protocol_config());
        exchange
    }

    /// Sets the pool's endpoints, against which picks are parsed.
    #[must_use]
    pub fn with_members(self, members: Arc<EndpointSet>) -> Self {
        Self { members: Some(members), ..self }
    }

    /// Collects the dynamic metadata of further replies.
    pub fn collect(&mut self, metadata: metadata::SharedMetadata) {
        self.metadata = Some(metadata);
    }

    /// Queues a piece of the request's body, of any size. Pieces after the end are dropped.
    pub fn request_body(&mut self, piece: Bytes, end: bool) {
        if self.request_ended {
            return;
        }
        self.request_ended = end;
        for request in message::request_body(piece, end) {
            self.pieces_sent += 1;
            self.queue(request);
        }
        self.decide_if_complete();
    }

    /// Returns the next message to send.
    pub fn next_message(&mut self) -> Option<ProcessingRequest> {
        self.outbox.pop_front()
    }

    /// Whether there are messages to send.
    pub fn has_message(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Returns the next event.
    pub fn next_event(&mut self) -> Option<Result<Event, PickError>> {
        self.events.pop_front()
    }

    /// Returns this event next: nothing has been done about it.
    pub fn put_back(&mut self, event: Event) {
        self.events.push_front(Ok(event));
    }

    /// Whether the EPP has said anything about the request. A reply that keeps a piece of the body unchanged does not count.
    pub fn answered(&self) -> bool {
        self.head_answered || self.by_metadata.is_some() || !self.replacement.is_untouched()
    }

    /// Takes a message from the EPP.
    pub fn receive(&mut self, reply: ProcessingResponse) {
        self.messages += 1;
        if let Err(error) = self.check(&reply) {
            return self.finish(Err(error));
        }
        self.collect_from(&reply);
        if !self.finished
            && let Some(list) = reply.dynamic_metadata.as_ref().and_then(message::metadata_destination)
        {
            self.by_metadata = Some(list);
        }
        let is_notice = message::is_notice(&reply);
        match reply.response {
            Some(Response::ImmediateResponse(immediate)) => self.immediate(immediate),
            Some(Response::ResponseHeaders(head)) => self.response_head_reply(head.response.unwrap_or_default()),
            Some(Response::RequestHeaders(head)) if !self.finished => {
                self.request_head(head.response.unwrap_or_default());
            }
            Some(Response::RequestBody(body)) if !self.finished => self.body_reply(body),
            Some(Response::ResponseBody(body)) => self.response_body_reply(body),
            Some(Response::ResponseTrailers(trailers)) => self.response_trailers_reply(trailers),
            None if is_notice => {}
            None => self.finish(Err(PickError::UnknownReply)),
            // Other replies to bodies and trailers, and late replies to the request, change nothing.
            _ => {}
        }
        self.decide_if_complete();
    }

    /// The EPP ended the stream with status OK. Decides with what it has sent.
    pub fn closed(&mut self) {
        if self.finished {
            return;
        }
        let result = if !self.has_destination() {
            Err(PickError::ClosedWithoutPick)
        } else if self.replacement.is_untouched() || self.replacement.is_whole(self.pieces_sent, self.request_ended) {
            self.decide()
        } else {
            Err(PickError::BodyPartial)
        };
        self.finish(result);
    }

    /// The stream was lost, or the EPP ended it with an error.
    pub fn failed(&mut self, error: PickError) {
        if !self.finished {
            self.finish(Err(error));
        }
    }

    /// The decision timeout has passed. Some EPPs reply only to the head: then the client's body is used. An incomplete
    /// replacement is a failure, because a mixture of both bodies is never sent.
    pub fn deadline(&mut self) {
        if self.finished {
            return;
        }
        let result = if !(self.head_answered && self.request_ended && self.has_destination()) {
            Err(PickError::Deadline)
        } else if self.replacement.is_untouched() {
            self.decide()
        } else {
            Err(PickError::BodyPartial)
        };
        self.finish(result);
    }

    fn queue(&mut self, request: Request) {
        let metadata_context = message::metadata(self.subset.as_deref(), self.served);
        self.outbox.push_back(ProcessingRequest { request: Some(request), metadata_context, protocol_config: None });
    }

    /// Checks the limits on messages before the decision.
    fn check(&self, reply: &ProcessingResponse) -> Result<(), PickError> {
        if self.finished {
            return Ok(());
        }
        let EppLimits { messages, metadata_bytes, .. } = self.limits.epp;
        // An EPP may reply to each message twice and send a body in small pieces.
        let allowed = messages + 2 * self.pieces_sent + self.replacement.bytes() / BYTES_PER_MESSAGE;
        if self.messages > allowed {
            return Err(PickError::TooManyMessages { limit: allowed });
        }
        match &reply.dynamic_metadata {
            Some(metadata) if metadata.encoded_len() > metadata_bytes => {
                Err(PickError::MetadataTooLarge { limit: metadata_bytes })
            }
            _ => Ok(()),
        }
    }

    fn collect_from(&self, reply: &ProcessingResponse) {
        let (Some(metadata), Some(collected)) = (&reply.dynamic_metadata, &self.metadata) else { return };
        if metadata.encoded_len() > self.limits.epp.metadata_bytes {
            // Before the decision the exchange has failed.
            return collected.lock().refused();
        }
        collected.lock().take(metadata);
    }

    fn immediate(&mut self, mut reply: ImmediateResponse) {
        let mut allowance = Allowance::plain(&self.limits.epp);
        let fits = reply.headers.as_ref().is_none_or(|headers| allowance.take(headers));
        if !fits || reply.body.len() > self.limits.replaced_body {
            if !self.finished {
                return self.finish(Err(PickError::ReplyTooLarge));
            }
            // After a decision it still evicts the request, without its fields and body.
            reply = ImmediateResponse { details: reply.details, ..ImmediateResponse::default() };
        }
        self.finished = true;
        self.events.push_back(Ok(Event::Outcome(Outcome::Immediate(reply.into()))));
    }

    fn request_head(&mut self, mut reply: CommonResponse) {
        self.head_answered = true;
        self.mutate(reply.header_mutation.take());
        if reply.status() == ResponseStatus::ContinueAndReplace {
            self.replace(|replacement| replacement.with_head(body_mutation(reply)));
        }
    }

    fn body_reply(&mut self, reply: BodyResponse) {
        let mut reply = reply.response.unwrap_or_default();
        self.mutate(reply.header_mutation.take());
        self.replace(|replacement| replacement.reply(body_mutation(reply)));
    }

    fn replace(&mut self, step: impl FnOnce(&mut Replacement) -> Result<(), PickError>) {
        if let Err(error) = step(&mut self.replacement) {
            self.finish(Err(error));
        }
    }

    fn mutate(&mut self, mutation: Option<HeaderMutation>) {
        let Some(mutation) = mutation else { return };
        if !self.request_allowance.take(&mutation) {
            return self.finish(Err(PickError::MutationTooLarge { limits: self.limits.epp }));
        }
        let HeaderMutation { set_headers, remove_headers } = mutation;
        for name in remove_headers.iter().filter(|name| matches!(mutation::classify(name), Field::Header(_))) {
            // Removals are applied before what earlier messages set, so that must not bring the field back.
            let sets = |set: &HeaderValueOption| set.header.as_ref().is_some_and(|h| h.key.eq_ignore_ascii_case(name));
            self.mutation.set_headers.retain(|set| !sets(set));
        }
        for set in set_headers {
            match &set.header {
                Some(header) if header.key.eq_ignore_ascii_case(self.header.as_str()) => {
                    // The first one wins: production EPPs set the pick and then echo the request's own headers.
                    let pick = || String::from_utf8_lossy(message::value(header)).into_owned();
                    self.by_header.get_or_insert_with(pick);
                }
                _ => self.mutation.set_headers.push(set),
            }
        }
        self.mutation.remove_headers.extend(remove_headers);
    }

    /// Decides as soon as all replies have arrived.
    fn decide_if_complete(&mut self) {
        let whole = self.replacement.is_whole(self.pieces_sent, self.request_ended);
        if !self.finished && self.head_answered && whole {
            let result = self.decide();
            self.finish(result);
        }
    }

    /// Returns the outcome as an event. Only the first one counts.
    fn finish(&mut self, result: Result<Decision, PickError>) {
        if self.finished {
            return;
        }
        self.finished = true;
        self.events.push_back(result.map(|decision| Event::Outcome(Outcome::Picked(decision))));
    }

    fn decide(&mut self) -> Result<Decision, PickError> {
        let EndpointNames { endpoints, invalid } = self.named()?;
        let body = self.replacement.take()?;
        Ok(Decision { endpoints, invalid, mutation: std::mem::take(&mut self.mutation), body })
    }

    /// The pick. Metadata takes precedence over the header, because a client cannot set it.
    fn named(&self) -> Result<EndpointNames, PickError> {
        let members = self.members.as_ref().map(|members| members.snapshot());
        let is_member = |address| members.as_ref().is_some_and(|members| members.get(address).is_some());
        let mut invalid = InvalidEntries::default();
        for list in [&self.by_metadata, &self.by_header].into_iter().flatten() {
            let names = EndpointNames::parse(list, is_member);
            if !names.endpoints.is_empty() {
                return Ok(names);
            }
            if invalid.count == 0 {
                invalid = names.invalid;
            }
        }
        Err(if invalid.count == 0 { PickError::NoDestination } else { PickError::BadDestination(invalid.shown) })
    }

    fn has_destination(&self) -> bool {
        [&self.by_metadata, &self.by_header].into_iter().flatten().any(|list| !list.trim().is_empty())
    }
}

fn body_mutation(reply: CommonResponse) -> Option<Mutation> {
    reply.body_mutation.and_then(|mutation| mutation.mutation)
}

#[cfg(test)]
mod tests;
