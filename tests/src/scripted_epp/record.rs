//! The messages that a picker received, recorded for the test.

use std::time::Instant;

use penstock_proto::core::{HeaderMap, Metadata};
use penstock_proto::ext_proc::processing_request::Request;
use penstock_proto::ext_proc::{ProcessingRequest, ProtocolConfiguration};
use penstock_proto::prost_types::{Value, value::Kind};

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The peer half-closed it.
    HalfClosed,
    /// The peer reset it, or its connection ended.
    Cancelled,
    /// The script ended it.
    Script,
    /// The picker was stopped first.
    Killed,
}

#[derive(Clone, Debug)]
pub struct StreamRecord {
    /// The number of its connection, from 1.
    pub connection: u64,
    pub messages: Vec<ProcessingRequest>,
    /// When each message was read.
    pub taken: Vec<Instant>,
    /// `None` while it is open.
    pub end: Option<StreamEnd>,
}

impl StreamRecord {
    pub(super) fn new(connection: u64) -> Self {
        Self { connection, messages: Vec::new(), taken: Vec::new(), end: None }
    }

    pub(super) fn took(&mut self, message: ProcessingRequest, at: Instant) {
        self.messages.push(message);
        self.taken.push(at);
    }

    fn requests(&self) -> impl Iterator<Item = &Request> {
        self.messages.iter().filter_map(|message| message.request.as_ref())
    }

    /// The kinds of the messages: `request_headers`, `response_body` and so on.
    #[must_use]
    pub fn kinds(&self) -> Vec<&'static str> {
        let kind = |request: &Request| match request {
            Request::RequestHeaders(_) => "request_headers",
            Request::RequestBody(_) => "request_body",
            Request::RequestTrailers(_) => "request_trailers",
            Request::ResponseHeaders(_) => "response_headers",
            Request::ResponseBody(_) => "response_body",
            Request::ResponseTrailers(_) => "response_trailers",
        };
        self.requests().map(kind).collect()
    }

    #[must_use]
    pub fn request_headers(&self) -> Vec<(String, String)> {
        let found = self.requests().find_map(|request| match request {
            Request::RequestHeaders(headers) => Some(pairs(headers.headers.as_ref())),
            _ => None,
        });
        found.unwrap_or_default()
    }

    #[must_use]
    pub fn response_headers(&self) -> Vec<(String, String)> {
        let found = self.requests().find_map(|request| match request {
            Request::ResponseHeaders(headers) => Some(pairs(headers.headers.as_ref())),
            _ => None,
        });
        found.unwrap_or_default()
    }

    /// The request body so far, and the number of messages that ended it.
    #[must_use]
    pub fn request_body(&self) -> (Vec<u8>, usize) {
        self.body(|request| if let Request::RequestBody(body) = request { Some(body) } else { None })
    }

    /// The same for the response body.
    #[must_use]
    pub fn response_body(&self) -> (Vec<u8>, usize) {
        self.body(|request| if let Request::ResponseBody(body) = request { Some(body) } else { None })
    }

    fn body<'a>(
        &'a self,
        pick: impl Fn(&'a Request) -> Option<&'a penstock_proto::ext_proc::HttpBody>,
    ) -> (Vec<u8>, usize) {
        let pieces: Vec<_> = self.requests().filter_map(pick).collect();
        let body = pieces.iter().flat_map(|piece| piece.body.iter().copied()).collect();
        (body, pieces.iter().filter(|piece| piece.end_of_stream).count())
    }

    /// The first message's protocol configuration.
    #[must_use]
    pub fn protocol_config(&self) -> Option<ProtocolConfiguration> {
        self.messages.first().and_then(|message| message.protocol_config)
    }

    /// The subset in the first message.
    #[must_use]
    pub fn subset(&self) -> Option<Vec<String>> {
        subset(self.messages.first()?.metadata_context.as_ref())
    }

    /// The served endpoint of the response.
    #[must_use]
    pub fn served(&self) -> Option<String> {
        let response = |message: &&ProcessingRequest| matches!(message.request, Some(Request::ResponseHeaders(_)));
        served(self.messages.iter().find(response)?.metadata_context.as_ref())
    }
}

/// The first header of that name.
#[must_use]
pub fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

/// The entries of a header map, with values from either of their two fields.
pub(super) fn pairs(headers: Option<&HeaderMap>) -> Vec<(String, String)> {
    let Some(headers) = headers else { return Vec::new() };
    let text = |header: &penstock_proto::core::HeaderValue| {
        let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        (header.key.clone(), String::from_utf8_lossy(value).into_owned())
    };
    headers.headers.iter().map(text).collect()
}

fn entry<'a>(metadata: Option<&'a Metadata>, namespace: &str, key: &str) -> Option<&'a Kind> {
    metadata?.filter_metadata.get(namespace)?.fields.get(key)?.kind.as_ref()
}

/// A list of `ip:port`, or one string with commas.
pub(super) fn subset(metadata: Option<&Metadata>) -> Option<Vec<String>> {
    let text = |value: &Value| if let Some(Kind::StringValue(text)) = &value.kind { Some(text.clone()) } else { None };
    match entry(metadata, "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")? {
        Kind::ListValue(list) => Some(list.values.iter().filter_map(text).collect()),
        Kind::StringValue(list) => {
            Some(list.split(',').map(|one| one.trim().to_owned()).filter(|one| !one.is_empty()).collect())
        }
        _ => None,
    }
}

pub(super) fn served(metadata: Option<&Metadata>) -> Option<String> {
    match entry(metadata, "envoy.lb", "x-gateway-destination-endpoint-served")? {
        Kind::StringValue(served) => Some(served.clone()),
        _ => None,
    }
}
