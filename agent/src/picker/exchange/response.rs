//! The response on an EPP stream: queues what the EPP is sent of it, and turns the EPP's replies into events.
//!
//! A body in the reply to the head belongs to that head: it is an answer only if the head still has to go out and its mutation fits.

use std::net::SocketAddr;

use bytes::Bytes;
use http::HeaderMap;
use penstock_proto::ext_proc::{
    BodyResponse, CommonResponse, TrailersResponse, body_mutation::Mutation, common_response::ResponseStatus,
};

use super::{Event, Exchange, body_mutation};
use crate::{
    config::EppLimits,
    picker::{allowance::Allowance, message, returned::Answer},
};

/// Where the response stands.
#[derive(Debug)]
pub(super) struct ResponseState {
    phase: ResponsePhase,
    /// How much the EPP may still change in the head.
    head_allowance: Allowance,
    /// How much it may change in the trailers.
    trailer_allowance: Allowance,
    /// Whether the EPP's answers about body and trailers are obeyed.
    is_obeyed: bool,
    /// Whether the EPP has replied to the head, or the head has gone out without a reply.
    is_head_settled: bool,
    /// Whether the EPP has replaced the body with its reply to the head.
    replaces_body: bool,
    /// Whether the EPP has declined the body with its reply to the head.
    declines_body: bool,
}

#[derive(Debug, PartialEq)]
enum ResponsePhase {
    Before,
    Body,
    Ended,
}

impl ResponseState {
    pub(super) fn new(limits: &EppLimits) -> Self {
        Self {
            phase: ResponsePhase::Before,
            head_allowance: Allowance::plain(limits),
            trailer_allowance: Allowance::plain(limits),
            is_obeyed: false,
            is_head_settled: false,
            replaces_body: false,
            declines_body: false,
        }
    }
}

impl Exchange {
    /// Returns the EPP's answers about the response's body and trailers from now on.
    pub fn obey(&mut self) {
        self.response.is_obeyed = true;
    }

    /// Queues the head of the response from `served`.
    pub fn response_headers(
        &mut self,
        status: http::StatusCode,
        headers: &HeaderMap,
        served: SocketAddr,
        end_of_stream: bool,
    ) {
        if self.response.phase != ResponsePhase::Before {
            return;
        }
        self.served = Some(served);
        self.response.head_allowance = Allowance::of(headers, &self.limits.epp);
        self.response.phase = if end_of_stream { ResponsePhase::Ended } else { ResponsePhase::Body };
        self.queue(message::response_head(status, headers, end_of_stream));
    }

    /// Queues a piece of the response's body, of any size. Pieces before the head or after the end are dropped.
    pub fn response_body(&mut self, piece: Bytes, end: bool) {
        if self.response.phase != ResponsePhase::Body {
            return;
        }
        if end {
            self.response.phase = ResponsePhase::Ended;
        }
        for request in message::response_body(piece, end) {
            self.queue(request);
        }
    }

    /// Queues the trailers of the response, which end it. Before the head and after the end they are dropped.
    pub fn response_trailers(&mut self, trailers: &HeaderMap) {
        if self.response.phase == ResponsePhase::Body {
            self.response.phase = ResponsePhase::Ended;
            self.response.trailer_allowance = Allowance::of(trailers, &self.limits.epp);
            self.queue(message::response_trailers(trailers));
        }
    }

    /// Queues the end of the response.
    pub fn response_end(&mut self) {
        self.response_body(Bytes::new(), true);
    }

    /// The head of the response goes out: what the EPP still replies to it comes too late.
    pub fn settle_head(&mut self) {
        self.response.is_head_settled = true;
    }

    /// Whether a reply of the EPP to the response's head would still be in time.
    pub fn awaits_head_reply(&self) -> bool {
        self.response.phase != ResponsePhase::Before && !self.response.is_head_settled
    }

    /// Whether the EPP has replaced the response's body with its reply to the head.
    pub fn replaces_body(&self) -> bool {
        self.response.replaces_body
    }

    /// Whether the EPP has said with its reply to the head that it wants nothing of the response's body, and leaves it unchanged.
    pub fn declines_body(&self) -> bool {
        self.response.declines_body
    }

    pub(super) fn response_head_reply(&mut self, mut reply: CommonResponse) {
        let mutation = reply.header_mutation.take().unwrap_or_default();
        let fits = self.response.head_allowance.take(&mutation);
        let is_late = std::mem::replace(&mut self.response.is_head_settled, true);
        self.events.push_back(Ok(if fits { Event::ResponseHead(mutation) } else { Event::Excessive }));
        if reply.status() != ResponseStatus::ContinueAndReplace || !self.response.is_obeyed {
            return;
        }
        // As Envoy does: the EPP is sent nothing more of this response.
        self.response.phase = ResponsePhase::Ended;
        let answer = match body_mutation(reply) {
            Some(Mutation::Body(body)) => Answer::Whole(body),
            Some(Mutation::ClearBody(true)) => Answer::Whole(Bytes::new()),
            Some(Mutation::StreamedResponse(piece)) if piece.end_of_stream => Answer::Whole(piece.body),
            Some(Mutation::StreamedResponse(piece)) => Answer::Streamed(piece.body, false),
            None | Some(Mutation::ClearBody(false)) => {
                self.response.declines_body = true;
                return self.events.push_back(Ok(Event::ResponseDeclined));
            }
        };
        self.response.replaces_body = true;
        let answer = if is_late || !fits { Answer::WithoutHead } else { answer };
        self.events.push_back(Ok(Event::ResponseBody(answer)));
    }

    pub(super) fn response_body_reply(&mut self, reply: BodyResponse) {
        if self.response.is_obeyed {
            self.events.push_back(Ok(Event::ResponseBody(Answer::of(reply))));
        }
    }

    pub(super) fn response_trailers_reply(&mut self, reply: TrailersResponse) {
        if self.response.is_obeyed {
            let mutation = reply.header_mutation.unwrap_or_default();
            let fits = self.response.trailer_allowance.take(&mutation);
            self.events.push_back(Ok(Event::ResponseTrailers(fits.then_some(mutation))));
        }
    }
}
