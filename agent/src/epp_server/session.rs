//! The EPP's side of one exchange: takes messages, returns replies, without socket or clock.
//!
//! A head that ends the request is answered at once. Otherwise the head and the whole body are answered, in this order, when the
//! body has ended. The request is counted at its endpoint from the pick to the end of the response or of the stream.

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

use super::{bounds::Reservation, refusal::Refusal, refusals::Refusals, reply, subset, upload::ExchangeUpload};
use crate::{
    endpoint::in_flight::InFlight,
    picker::{
        builtin::{BuiltinPicker, Pick, PromptHash, SessionHash},
        message,
    },
};

type Replies = VecDeque<ProcessingResponse>;

pub(super) struct ExchangeSession {
    refusals: Arc<Refusals>,
    picker: Arc<BuiltinPicker>,
    max_body: usize,
    session_headers: Arc<[HeaderName]>,
    /// The reservation for the held body.
    held: Reservation,
    phase: Phase,
    headers: Option<HeaderMap>,
    subset: Option<Vec<SocketAddr>>,
    /// Whether the proxy sends no request bodies, whatever the headers say.
    bodiless: bool,
    /// Whether the proxy expects response bodies back.
    full_duplex_response: bool,
    pick: Option<Pick>,
    /// `None` before the pick and after the end of the response.
    in_flight: Option<InFlight>,
}

enum Phase {
    Headers,
    Body(ExchangeUpload),
    /// The request is complete. `trailers`: trailers ended it.
    Deciding {
        body: Option<ExchangeUpload>,
        trailers: bool,
    },
    Decided,
    Over,
}

/// What the caller has to do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Read the next message.
    Read,
    /// Call [`ExchangeSession::decide`].
    Decide,
}

impl ExchangeSession {
    pub(super) fn new(
        picker: Arc<BuiltinPicker>,
        max_body: usize,
        session_headers: Arc<[HeaderName]>,
        held: Reservation,
        refusals: Arc<Refusals>,
    ) -> Self {
        Self {
            refusals,
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

    /// Whether the request was refused, so that no reply follows.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    pub(super) fn is_decided(&self) -> bool {
        matches!(self.phase, Phase::Decided | Phase::Over)
    }

    /// Releases the reservation for the body, which has been sent back.
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
        // Proxies send the hint with different messages. The last one before the pick counts.
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
                return Err(Status::invalid_argument("message without a known request"));
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
        self.phase = Phase::Body(ExchangeUpload::new(self.max_body));
        Step::Read
    }

    fn request_body(&mut self, piece: &HttpBody, replies: &mut Replies) -> Result<Step, Status> {
        let upload = match &mut self.phase {
            Phase::Body(upload) => upload,
            Phase::Headers => return Err(Status::invalid_argument("request_body before request_headers")),
            // Some proxies end a long body twice.
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

    /// Answers the request. Call it once, when [`receive`](Self::receive) returns [`Step::Decide`].
    pub(super) fn decide(&mut self, now: Instant, replies: &mut Replies) {
        let Phase::Deciding { body, trailers } = std::mem::replace(&mut self.phase, Phase::Decided) else { return };
        let decided = body.map(ExchangeUpload::finish).transpose().and_then(|upload| {
            let (prompt, body) = upload.map_or((PromptHash::none(), None), |(prompt, body)| (prompt, Some(body)));
            let prompt = prompt.with_session(self.session());
            let picked = self.picker.pick_and_begin(&prompt, self.subset.as_deref(), now)?;
            Ok((picked, body))
        });
        match decided {
            Ok(((pick, in_flight), body)) => {
                let length = body.as_ref().map(bytes::Bytes::len);
                replies.push_back(reply::picked(&pick, self.headers.take().as_ref(), length));
                replies.extend(body.into_iter().flat_map(|body| reply::request_body(body, trailers)));
                if trailers {
                    replies.push_back(reply::request_trailers());
                }
                (self.pick, self.in_flight) = (Some(pick), Some(in_flight));
            }
            Err(refusal) => self.refuse(&refusal, replies),
        }
    }

    /// The session's hash, from the first session header that is present and not empty.
    fn session(&self) -> Option<SessionHash> {
        let headers = &self.headers.as_ref()?.headers;
        let named = |name: &HeaderName| headers.iter().find(|header| header.key.eq_ignore_ascii_case(name.as_str()));
        let name = self.session_headers.iter().filter_map(named).map(message::value).find(|name| !name.is_empty())?;
        Some(SessionHash::new(name))
    }

    fn refuse(&mut self, refusal: &Refusal, replies: &mut Replies) {
        tracing::debug!(%refusal, "request refused");
        self.refusals.add(refusal.label());
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

    /// Counts the request at the endpoint that served it. The earlier endpoints of the pick have failed.
    fn served_by(&mut self, served: SocketAddr, now: Instant) {
        self.picker.endpoints().succeeded(served, now);
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
