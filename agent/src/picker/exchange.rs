//! What is said on one picker stream: a state machine without sockets, clock or tasks.
//!
//! Given the request's head, pieces of its body, the EPP's messages and the end of its stream, it gives the messages to send
//! (`next_message`) and events (`next_event`): the decision, an immediate response, the mutation of the response's head.
//! Exactly one end of stream goes out per direction. There is at most one decision or failure; after the decision nothing that
//! the EPP does is an error. The EPP's replies may come in any order.

use std::{collections::VecDeque, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use penstock_proto::ext_proc::{
    BodyResponse, CommonResponse, HeaderMutation, ImmediateResponse, ProcessingRequest, ProcessingResponse,
    body_mutation::Mutation, common_response::ResponseStatus, processing_request::Request,
    processing_response::Response,
};

use prost::Message as _;

use super::{
    error::PickError,
    message,
    names::{Bad, Names},
    replacement::Replacement,
};
use crate::{budget::Budget, config::EppLimits, endpoint::set::Snapshot};

/// Bytes of a replaced body for which the EPP may send one more message.
const BYTES_PER_MESSAGE: usize = 256;

#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a body that the EPP puts in place of the client's, or answers the client with.
    pub replaced_body: usize,
    /// What those bytes count against.
    pub memory: Arc<Budget>,
    pub said: EppLimits,
}

/// Where the request goes and what becomes of it on the way.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// In the order to try them; at least one, no duplicates.
    pub endpoints: Vec<SocketAddr>,
    /// What the EPP named besides.
    pub bad: Bad,
    /// For the request's head; the pick itself is taken out.
    pub mutation: HeaderMutation,
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// As the client sent it.
    Original,
    /// These pieces instead, in order.
    Replaced(Vec<Bytes>),
    /// Others instead, for which there was no room: their SHA-256. Only if they turn out to be the client's can the request go on.
    Unheld(Box<[u8]>),
}

/// The EPP's answer to the client. After a decision it means: break off the request.
#[derive(Debug, Clone, PartialEq)]
pub struct ImmediateReply {
    pub status: http::StatusCode,
    pub headers: HeaderMutation,
    pub body: Bytes,
    /// For the log.
    pub details: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Picked(Decision),
    Immediate(ImmediateReply),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Outcome(Outcome),
    /// The EPP's reply to the head of the response.
    ResponseHead(HeaderMutation),
    /// That reply was over the limits, and is not applied.
    Excessive,
}

#[derive(Debug)]
pub struct Exchange {
    /// Header that carries the pick.
    header: HeaderName,
    limits: Limits,
    /// Where the pool's endpoints are known.
    members: Option<Arc<Snapshot>>,
    subset: Option<Vec<SocketAddr>>,
    served: Option<SocketAddr>,
    outbox: VecDeque<ProcessingRequest>,
    /// Body messages so far, and whether the last of them (or the head) had the end of stream.
    pieces_sent: usize,
    request_ended: bool,
    response: ResponsePhase,
    /// The EPP has replied to the head of the request.
    head_answered: bool,
    by_metadata: Option<String>,
    by_header: Option<String>,
    mutation: HeaderMutation,
    /// What the EPP may still say of the request's head, and of the response's.
    request_room: Room,
    response_room: Room,
    /// Messages of the EPP so far.
    messages: usize,
    replacement: Replacement,
    /// A decision, an immediate response or a failure has been given.
    settled: bool,
    events: VecDeque<Result<Event, PickError>>,
}

/// How much a mutation of a head may still say: what it takes to echo the head, and the configured limits besides.
#[derive(Debug, Clone, Copy)]
struct Room {
    fields: usize,
    bytes: usize,
}

impl Room {
    /// Pseudo-headers that a head is told with.
    const PSEUDO: usize = 4;

    fn of(head: &HeaderMap, limits: &EppLimits) -> Self {
        let bytes: usize = head.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        Self { fields: head.len() + Self::PSEUDO + limits.fields, bytes: bytes + limits.bytes }
    }

    /// False if the mutation does not fit.
    fn take(&mut self, mutation: &HeaderMutation) -> bool {
        let set = mutation.set_headers.iter().filter_map(|set| set.header.as_ref());
        let set: usize = set.map(|header| header.key.len() + message::value(header).len()).sum();
        let removed: usize = mutation.remove_headers.iter().map(String::len).sum();
        let fields = mutation.set_headers.len() + mutation.remove_headers.len();
        let fits = fields <= self.fields && set + removed <= self.bytes;
        if fits {
            self.fields -= fields;
            self.bytes -= set + removed;
        }
        fits
    }
}

#[derive(Debug, PartialEq)]
enum ResponsePhase {
    Before,
    Body,
    Ended,
}

impl Exchange {
    /// Queues the first message.
    pub fn new(
        header: HeaderName,
        request: &http::request::Parts,
        has_body: bool,
        subset: Option<&[SocketAddr]>,
        limits: Limits,
    ) -> Self {
        let mut exchange = Self {
            header,
            members: None,
            subset: subset.map(<[_]>::to_vec),
            served: None,
            outbox: VecDeque::new(),
            pieces_sent: 0,
            request_ended: !has_body,
            response: ResponsePhase::Before,
            head_answered: false,
            by_metadata: None,
            by_header: None,
            mutation: HeaderMutation::default(),
            request_room: Room::of(&request.headers, &limits.said),
            response_room: Room { fields: limits.said.fields, bytes: limits.said.bytes },
            messages: 0,
            replacement: Replacement::new(limits.replaced_body, Arc::clone(&limits.memory)),
            limits,
            settled: false,
            events: VecDeque::new(),
        };
        exchange.queue(message::request_head(request, !has_body));
        exchange.outbox[0].protocol_config = Some(message::protocol_config());
        exchange
    }

    /// With the endpoints that the pool has.
    #[must_use]
    pub fn among(self, members: Arc<Snapshot>) -> Self {
        Self { members: Some(members), ..self }
    }

    /// A piece of the request's body, of any size. What comes after the end is not sent.
    pub fn request_body(&mut self, piece: Bytes, end: bool) {
        if self.request_ended {
            return;
        }
        self.request_ended = end;
        for request in message::request_body(piece, end) {
            self.pieces_sent += 1;
            self.queue(request);
        }
        self.settle();
    }

    /// The head of the response that `served` gave.
    pub fn response_headers(
        &mut self,
        status: http::StatusCode,
        headers: &HeaderMap,
        served: SocketAddr,
        end_of_stream: bool,
    ) {
        if self.response != ResponsePhase::Before {
            return;
        }
        self.served = Some(served);
        self.response_room = Room::of(headers, &self.limits.said);
        self.response = if end_of_stream { ResponsePhase::Ended } else { ResponsePhase::Body };
        self.queue(message::response_head(status, headers, end_of_stream));
    }

    /// A piece of the response's body, of any size. What comes before the head or after the end is not sent.
    pub fn response_body(&mut self, piece: Bytes, end: bool) {
        if self.response != ResponsePhase::Body {
            return;
        }
        if end {
            self.response = ResponsePhase::Ended;
        }
        for request in message::response_body(piece, end) {
            self.queue(request);
        }
    }

    /// The response is over.
    pub fn response_end(&mut self) {
        self.response_body(Bytes::new(), true);
    }

    pub fn next_message(&mut self) -> Option<ProcessingRequest> {
        self.outbox.pop_front()
    }

    pub fn has_message(&self) -> bool {
        !self.outbox.is_empty()
    }

    pub fn next_event(&mut self) -> Option<Result<Event, PickError>> {
        self.events.pop_front()
    }

    /// Whether the EPP has said anything about the request. That a piece of the body stays as it is says nothing.
    pub fn answered(&self) -> bool {
        self.head_answered || self.by_metadata.is_some() || !self.replacement.is_untouched()
    }

    /// A message from the EPP.
    pub fn receive(&mut self, reply: ProcessingResponse) {
        self.messages += 1;
        if let Err(error) = self.check(&reply) {
            return self.finish(Err(error));
        }
        if !self.settled
            && let Some(list) = reply.dynamic_metadata.as_ref().and_then(message::metadata_destination)
        {
            self.by_metadata = Some(list);
        }
        match reply.response {
            Some(Response::ImmediateResponse(immediate)) => self.immediate(immediate),
            Some(Response::ResponseHeaders(head)) => {
                let mutation = head.response.and_then(|common| common.header_mutation).unwrap_or_default();
                let fits = self.response_room.take(&mutation);
                self.events.push_back(Ok(if fits { Event::ResponseHead(mutation) } else { Event::Excessive }));
            }
            Some(Response::RequestHeaders(head)) if !self.settled => {
                self.request_head(head.response.unwrap_or_default());
            }
            Some(Response::RequestBody(body)) if !self.settled => self.body_reply(body),
            // Replies about the response's body and about trailers change nothing; what is late about the request neither.
            _ => {}
        }
        self.settle();
    }

    /// The EPP has ended the stream with status OK: carry on without it.
    pub fn closed(&mut self) {
        if self.settled {
            return;
        }
        let verdict = if !self.has_destination() {
            Err(PickError::ClosedWithoutPick)
        } else if self.replacement.is_untouched() || self.replacement.is_whole(self.pieces_sent, self.request_ended) {
            self.decide()
        } else {
            Err(PickError::BodyPartial)
        };
        self.finish(verdict);
    }

    /// The stream is lost, or the EPP has ended it with an error.
    pub fn failed(&mut self, error: PickError) {
        if !self.settled {
            self.finish(Err(error));
        }
    }

    /// The time for the decision is over. Some EPPs pick by the header reply alone and are silent about the body: then the
    /// body is the client's. A replacement that has begun and not ended is a failure: part of each would be nobody's request.
    pub fn deadline(&mut self) {
        if self.settled {
            return;
        }
        let verdict = if !(self.head_answered && self.request_ended && self.has_destination()) {
            Err(PickError::Deadline)
        } else if self.replacement.is_untouched() {
            self.decide()
        } else {
            Err(PickError::BodyPartial)
        };
        self.finish(verdict);
    }

    fn queue(&mut self, request: Request) {
        let metadata_context = message::metadata(self.subset.as_deref(), self.served);
        self.outbox.push_back(ProcessingRequest { request: Some(request), metadata_context, protocol_config: None });
    }

    /// What an EPP says before its decision has limits.
    fn check(&self, reply: &ProcessingResponse) -> Result<(), PickError> {
        if self.settled {
            return Ok(());
        }
        let EppLimits { messages, metadata_bytes, .. } = self.limits.said;
        // It may answer each message, twice, and send a body in small pieces.
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

    fn immediate(&mut self, mut reply: ImmediateResponse) {
        let mut room = Room { fields: self.limits.said.fields, bytes: self.limits.said.bytes };
        let fits = reply.headers.as_ref().is_none_or(|headers| room.take(headers));
        if !fits || reply.body.len() > self.limits.replaced_body {
            if !self.settled {
                return self.finish(Err(PickError::ReplyTooLarge));
            }
            // It evicts the request all the same.
            reply = ImmediateResponse { details: reply.details, ..ImmediateResponse::default() };
        }
        self.settled = true;
        let code = reply.status.and_then(|status| u16::try_from(status.code).ok());
        // A final status only: without one, as with one that is none, Envoy answers 200 or worse.
        let status = code
            .and_then(|code| http::StatusCode::from_u16(code).ok())
            .filter(|status| (200..600).contains(&status.as_u16()));
        self.events.push_back(Ok(Event::Outcome(Outcome::Immediate(ImmediateReply {
            status: status.unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR),
            headers: reply.headers.unwrap_or_default(),
            body: reply.body,
            details: reply.details,
        }))));
    }

    fn request_head(&mut self, mut reply: CommonResponse) {
        self.head_answered = true;
        self.mutate(reply.header_mutation.take());
        if reply.status() == ResponseStatus::ContinueAndReplace {
            let body = match reply.body_mutation.and_then(|mutation| mutation.mutation) {
                Some(Mutation::Body(body)) => body,
                _ => Bytes::new(),
            };
            self.replace(|replacement| replacement.whole(body));
        }
    }

    fn body_reply(&mut self, reply: BodyResponse) {
        let mut reply = reply.response.unwrap_or_default();
        self.mutate(reply.header_mutation.take());
        self.replace(|replacement| replacement.reply(reply.body_mutation.and_then(|mutation| mutation.mutation)));
    }

    fn replace(&mut self, step: impl FnOnce(&mut Replacement) -> Result<(), PickError>) {
        if let Err(error) = step(&mut self.replacement) {
            self.finish(Err(error));
        }
    }

    fn mutate(&mut self, mutation: Option<HeaderMutation>) {
        if mutation.as_ref().is_some_and(|mutation| !self.request_room.take(mutation)) {
            return self.finish(Err(PickError::MutationTooLarge { limits: self.limits.said }));
        }
        for set in mutation.iter().flat_map(|mutation| &mutation.set_headers) {
            match &set.header {
                Some(header) if header.key.eq_ignore_ascii_case(self.header.as_str()) => {
                    // The first counts: production EPPs set the pick and then echo the request's own headers.
                    let pick = || String::from_utf8_lossy(message::value(header)).into_owned();
                    self.by_header.get_or_insert_with(pick);
                }
                _ => self.mutation.set_headers.push(set.clone()),
            }
        }
        self.mutation.remove_headers.extend(mutation.into_iter().flat_map(|mutation| mutation.remove_headers));
    }

    /// Decides as soon as everything is there.
    fn settle(&mut self) {
        let whole = self.replacement.is_whole(self.pieces_sent, self.request_ended);
        if !self.settled && self.head_answered && whole {
            let verdict = self.decide();
            self.finish(verdict);
        }
    }

    /// The first counts.
    fn finish(&mut self, verdict: Result<Decision, PickError>) {
        if self.settled {
            return;
        }
        self.settled = true;
        self.events.push_back(verdict.map(|decision| Event::Outcome(Outcome::Picked(decision))));
    }

    fn decide(&mut self) -> Result<Decision, PickError> {
        let Names { endpoints, bad } = self.named()?;
        let body = self.replacement.take()?;
        Ok(Decision { endpoints, bad, mutation: std::mem::take(&mut self.mutation), body })
    }

    /// Metadata first: a client cannot have set it.
    fn named(&self) -> Result<Names, PickError> {
        let is_member = |address| self.members.as_ref().is_some_and(|members| members.get(address).is_some());
        let mut bad = Bad::default();
        for list in [&self.by_metadata, &self.by_header].into_iter().flatten() {
            let names = Names::parse(list, is_member);
            if !names.endpoints.is_empty() {
                return Ok(names);
            }
            if bad.count == 0 {
                bad = names.bad;
            }
        }
        Err(if bad.count == 0 { PickError::NoDestination } else { PickError::BadDestination(bad.shown) })
    }

    fn has_destination(&self) -> bool {
        [&self.by_metadata, &self.by_header].into_iter().flatten().any(|list| !list.trim().is_empty())
    }
}

#[cfg(test)]
mod tests;
