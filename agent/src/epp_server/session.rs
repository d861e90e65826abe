//! One exchange from the picker's side: messages in, replies out; no socket and no clock.
//!
//! Headers that end the request are answered at once. Else there is silence until the body has ended, and then the header reply
//! and the whole body follow, in this order. The request is counted at its endpoint from the pick to the end of the response,
//! or of the stream if that comes first.

use std::{collections::VecDeque, net::SocketAddr, sync::Arc, time::Instant};

use http::HeaderName;
use penstock_proto::{
    core::{HeaderMap, Metadata},
    ext_proc::{
        BodySendMode, HttpBody, HttpHeaders, ProcessingRequest, ProcessingResponse, ProtocolConfiguration,
        processing_request::Request,
    },
};
use tonic::Status;

use super::{bounds::Part, refusal::Refusal, reply, subset, upload::Upload};
use crate::{
    endpoint::in_flight::InFlight,
    picker::{
        builtin::{BuiltinPicker, Pick, PromptHash, SessionHash},
        message,
    },
};

type Replies = VecDeque<ProcessingResponse>;

pub(super) struct Session {
    picker: Arc<BuiltinPicker>,
    max_body: usize,
    session_headers: Arc<[HeaderName]>,
    /// For the body that is kept.
    held: Part,
    phase: Phase,
    headers: Option<HeaderMap>,
    subset: Option<Vec<SocketAddr>>,
    /// The proxy sends no request body, whatever its headers say.
    bodiless: bool,
    /// The proxy gives response bodies out of its hands, and gets them back.
    full_duplex_response: bool,
    pick: Option<Pick>,
    /// None before the pick, and when the response has ended.
    in_flight: Option<InFlight>,
}

enum Phase {
    Headers,
    Body(Upload),
    /// The request is complete; with a body or not, and ended by trailers or not.
    Deciding {
        body: Option<Upload>,
        trailers: bool,
    },
    Decided,
    Over,
}

/// What is next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Read,
    /// Call [`Session::decide`].
    Decide,
}

impl Session {
    pub(super) fn new(
        picker: Arc<BuiltinPicker>,
        max_body: usize,
        session_headers: Arc<[HeaderName]>,
        held: Part,
    ) -> Self {
        Self {
            picker,
            max_body,
            session_headers,
            held,
            phase: Phase::Headers,
            headers: None,
            subset: None,
            bodiless: false,
            full_duplex_response: true,
            pick: None,
            in_flight: None,
        }
    }

    /// The request has been refused: nothing more is said.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    pub(super) fn is_decided(&self) -> bool {
        matches!(self.phase, Phase::Decided | Phase::Over)
    }

    /// The body has gone back.
    pub(super) fn release(&mut self) {
        self.held.release();
    }

    pub(super) fn receive(
        &mut self,
        message: ProcessingRequest,
        now: Instant,
        replies: &mut Replies,
    ) -> Result<Step, Status> {
        if let Some(config) = message.protocol_config {
            self.configure(config)?;
        }
        let metadata = message.metadata_context.as_ref();
        // Proxies differ in the message that carries it; the last one before the pick counts.
        if self.pick.is_none()
            && let Some(metadata) = metadata
            && let Some(subset) = subset::subset(metadata, &self.picker.endpoints().snapshot())
        {
            self.subset = Some(subset);
        }
        match message.request {
            Some(Request::RequestHeaders(headers)) => return Ok(self.request_headers(headers)),
            Some(Request::RequestBody(piece)) => return self.request_body(&piece, replies),
            Some(Request::RequestTrailers(_)) => return Ok(self.request_trailers(replies)),
            Some(Request::ResponseHeaders(headers)) => self.response_headers(&headers, metadata, now, replies),
            Some(Request::ResponseBody(piece)) => self.response_body(piece, replies),
            Some(Request::ResponseTrailers(_)) => {
                replies.push_back(reply::response_trailers());
                self.in_flight = None;
            }
            None => {
                return Err(Status::invalid_argument("a message without a request in it, or with one unknown here"));
            }
        }
        Ok(Step::Read)
    }

    fn configure(&mut self, config: ProtocolConfiguration) -> Result<(), Status> {
        match config.request_body_mode() {
            BodySendMode::FullDuplexStreamed => {}
            BodySendMode::None => self.bodiless = true,
            other => {
                let name = other.as_str_name();
                return Err(Status::failed_precondition(format!(
                    "request_body_mode is {name}, expected FULL_DUPLEX_STREAMED"
                )));
            }
        }
        self.full_duplex_response = config.response_body_mode() == BodySendMode::FullDuplexStreamed;
        Ok(())
    }

    fn request_headers(&mut self, headers: HttpHeaders) -> Step {
        if !matches!(self.phase, Phase::Headers) {
            return Step::Read;
        }
        self.headers = headers.headers;
        if headers.end_of_stream || self.bodiless {
            self.phase = Phase::Deciding { body: None, trailers: false };
            return Step::Decide;
        }
        self.phase = Phase::Body(Upload::new(self.max_body));
        Step::Read
    }

    fn request_body(&mut self, piece: &HttpBody, replies: &mut Replies) -> Result<Step, Status> {
        let upload = match &mut self.phase {
            Phase::Body(upload) => upload,
            Phase::Headers => return Err(Status::invalid_argument("request_body before request_headers")),
            // There are proxies that end a long body twice.
            Phase::Deciding { .. } | Phase::Decided | Phase::Over => return Ok(Step::Read),
        };
        let room = if self.held.grow(piece.body.len()) { Ok(()) } else { Err(Refusal::Full) };
        if let Err(refusal) = room.and_then(|()| upload.push(&piece.body)) {
            self.refuse(&refusal, replies);
            return Ok(Step::Read);
        }
        if !piece.end_of_stream {
            return Ok(Step::Read);
        }
        Ok(self.end_of_body(false))
    }

    fn request_trailers(&mut self, replies: &mut Replies) -> Step {
        if matches!(self.phase, Phase::Body(_)) {
            return self.end_of_body(true);
        }
        replies.push_back(reply::request_trailers());
        Step::Read
    }

    fn end_of_body(&mut self, trailers: bool) -> Step {
        if let Phase::Body(upload) = std::mem::replace(&mut self.phase, Phase::Decided) {
            self.phase = Phase::Deciding { body: Some(upload), trailers };
        }
        Step::Decide
    }

    /// Answers the request. To be called once, when [`receive`](Self::receive) says so.
    pub(super) fn decide(&mut self, now: Instant, replies: &mut Replies) {
        let Phase::Deciding { body, trailers } = std::mem::replace(&mut self.phase, Phase::Decided) else { return };
        let decided = body.map(Upload::finish).transpose().and_then(|upload| {
            let (prompt, body) = upload.map_or((PromptHash::none(), None), |(prompt, body)| (prompt, Some(body)));
            let prompt = prompt.of(self.session());
            let picked = self.picker.pick_and_begin(&prompt, self.subset.as_deref(), now)?;
            Ok((picked, body))
        });
        match decided {
            Ok(((pick, in_flight), body)) => {
                let length = body.as_ref().map(bytes::Bytes::len);
                replies.push_back(reply::picked(&pick, self.headers.take().as_ref(), length));
                replies.extend(body.into_iter().flat_map(reply::request_body));
                if trailers {
                    replies.push_back(reply::request_trailers());
                }
                (self.pick, self.in_flight) = (Some(pick), Some(in_flight));
            }
            Err(refusal) => self.refuse(&refusal, replies),
        }
    }

    /// Of the request, by the first of the headers for it that says something.
    fn session(&self) -> Option<SessionHash> {
        let headers = &self.headers.as_ref()?.headers;
        let named = |name: &HeaderName| headers.iter().find(|header| header.key.eq_ignore_ascii_case(name.as_str()));
        let name = self.session_headers.iter().filter_map(named).map(message::value).find(|name| !name.is_empty())?;
        Some(SessionHash::new(name))
    }

    fn refuse(&mut self, refusal: &Refusal, replies: &mut Replies) {
        tracing::debug!(%refusal, "refused");
        self.phase = Phase::Over;
        replies.push_back(reply::refused(refusal));
    }

    fn response_headers(
        &mut self,
        headers: &HttpHeaders,
        metadata: Option<&Metadata>,
        now: Instant,
        replies: &mut Replies,
    ) {
        if let Some(served) = metadata.and_then(subset::served) {
            self.served_by(served, now);
        }
        replies.push_back(reply::response_headers(headers));
        if headers.end_of_stream {
            self.in_flight = None;
        }
    }

    /// Counts the request where it went. The endpoints before that one in the list did not answer the connect.
    fn served_by(&mut self, served: SocketAddr, now: Instant) {
        self.picker.endpoints().succeeded(served);
        let Some(pick) = &self.pick else { return };
        let Some(at) = pick.endpoints.iter().position(|&endpoint| endpoint == served) else { return };
        if at > 0 && self.in_flight.is_some() {
            self.in_flight = Some(self.picker.endpoints().begin(served, now));
            for &endpoint in &pick.endpoints[..at] {
                self.picker.endpoints().failed(endpoint, now);
            }
        }
    }

    fn response_body(&mut self, piece: HttpBody, replies: &mut Replies) {
        let end = piece.end_of_stream;
        replies.push_back(if self.full_duplex_response {
            reply::response_body(piece.body, end)
        } else {
            reply::response_body_unchanged()
        });
        if end {
            self.in_flight = None;
        }
    }
}
