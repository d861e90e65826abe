//! Builds the messages that the agent sends on an EPP stream, and finds the pick in received metadata. Stateless.
//!
//! Takes HTTP heads, pieces of bodies and addresses; returns the parts of `ProcessingRequest`. Names are in lower case and values
//! in `raw_value`, as EPPs expect.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, uri::Scheme};
use penstock_proto::{
    core::{self, HeaderValue, Metadata},
    ext_proc::{
        BodySendMode, HttpBody, HttpHeaders, HttpTrailers, ProcessingResponse, ProtocolConfiguration,
        processing_request::Request,
    },
};
use prost_types::{ListValue, Struct, Value, value::Kind};

use crate::http::head::trimmed;

/// Largest piece of a response body, and of a body in the replies of `penstock epp`, in bytes. EPPs cut their own replies to the same
/// size.
pub const PIECE: usize = 62_000;
/// Largest piece of a request body in bytes: an abridged body is one message with the default limit. gRPC servers take 4 MiB.
pub const REQUEST_PIECE: usize = 256 * 1024;

/// The header and the metadata key of the pick.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";
const SERVED: &str = "x-gateway-destination-endpoint-served";
const SUBSET: &str = "x-gateway-destination-endpoint-subset";
pub const LB: &str = "envoy.lb";
const LB_SUBSET: &str = "envoy.lb.subset_hint";

/// The head of a request. `:authority` replaces `host`, as in HTTP/2. `:scheme` comes from the extensions and defaults to `http`.
pub fn request_head(request: &http::request::Parts, end_of_stream: bool) -> Request {
    let uri = &request.uri;
    let host = request.headers.get(http::header::HOST);
    let authority = uri
        .authority()
        .map(|a| Bytes::copy_from_slice(a.as_str().as_bytes()))
        .or_else(|| host.map(|value| Bytes::copy_from_slice(value.as_bytes())));
    let scheme = request.extensions.get().unwrap_or(&Scheme::HTTP);
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let mut headers = vec![
        header(":method", Bytes::copy_from_slice(request.method.as_str().as_bytes())),
        header(":path", Bytes::copy_from_slice(path.as_bytes())),
        header(":scheme", Bytes::copy_from_slice(scheme.as_str().as_bytes())),
    ];
    headers.extend(authority.map(|authority| header(":authority", authority)));
    headers.extend(fields(&request.headers).filter(|field| field.key != "host"));
    Request::RequestHeaders(HttpHeaders { headers: Some(core::HeaderMap { headers }), end_of_stream })
}

/// The head of a response.
pub fn response_head(status: http::StatusCode, headers: &HeaderMap, end_of_stream: bool) -> Request {
    let mut all = vec![header(":status", Bytes::copy_from_slice(status.as_str().as_bytes()))];
    all.extend(fields(headers));
    Request::ResponseHeaders(HttpHeaders { headers: Some(core::HeaderMap { headers: all }), end_of_stream })
}

/// The trailers of a response.
pub fn response_trailers(trailers: &HeaderMap) -> Request {
    let headers = fields(trailers).collect();
    Request::ResponseTrailers(HttpTrailers { trailers: Some(core::HeaderMap { headers }) })
}

/// The messages for a piece of a request body.
pub fn request_body(body: Bytes, end: bool) -> impl Iterator<Item = Request> {
    pieces(body, end, REQUEST_PIECE).map(Request::RequestBody)
}

/// The messages for a piece of a response body.
pub fn response_body(body: Bytes, end: bool) -> impl Iterator<Item = Request> {
    pieces(body, end, PIECE).map(Request::ResponseBody)
}

/// One message per piece of `body`, of at most `most` bytes. A message is empty only if it carries just the end.
fn pieces(mut body: Bytes, end: bool, most: usize) -> impl Iterator<Item = HttpBody> {
    let mut done = body.is_empty() && !end;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        let piece = body.split_to(body.len().min(most));
        done = body.is_empty();
        Some(HttpBody { body: piece, end_of_stream: end && done })
    })
}

/// Both bodies in full-duplex mode, sent without waiting. Some EPPs refuse anything else.
pub fn protocol_config() -> ProtocolConfiguration {
    ProtocolConfiguration {
        request_body_mode: BodySendMode::FullDuplexStreamed.into(),
        response_body_mode: BodySendMode::FullDuplexStreamed.into(),
        send_body_without_waiting_for_header_response: true,
    }
}

/// The metadata of every message: the subset hint and, once there is a response, the endpoint that served it.
pub fn metadata(subset: Option<&[SocketAddr]>, served: Option<SocketAddr>) -> Option<Metadata> {
    let text = |address: &SocketAddr| Value { kind: Some(Kind::StringValue(address.to_string())) };
    let one = |key: &str, kind| Struct { fields: [(key.to_owned(), Value { kind: Some(kind) })].into() };
    let subset = subset.map(|list| {
        let values = list.iter().map(text).collect();
        (LB_SUBSET.to_owned(), one(SUBSET, Kind::ListValue(ListValue { values })))
    });
    let served = served.map(|address| (LB.to_owned(), one(SERVED, Kind::StringValue(address.to_string()))));
    let filter_metadata: std::collections::HashMap<_, _> = subset.into_iter().chain(served).collect();
    (!filter_metadata.is_empty()).then_some(Metadata { filter_metadata })
}

/// Whether a message without a reply tells something else: more time is needed, another body mode is wanted, no more of a body is
/// wanted, or metadata. The reply is still to come, and the deadline stays.
pub fn is_notice(message: &ProcessingResponse) -> bool {
    let drains = message.request_drain || message.request_drain_requests || message.request_drain_responses;
    let wishes = message.override_message_timeout.is_some() || message.mode_override.is_some();
    message.response.is_none() && (drains || wishes || message.dynamic_metadata.is_some())
}

/// The pick in an EPP's dynamic metadata: a string or, from some EPPs, a list of strings.
pub fn metadata_destination(metadata: &Struct) -> Option<String> {
    let Kind::StructValue(lb) = metadata.fields.get(LB)?.kind.as_ref()? else { return None };
    match lb.fields.get(DESTINATION)?.kind.as_ref()? {
        Kind::StringValue(list) => Some(list.clone()),
        Kind::ListValue(list) => {
            let text = |value: &Value| match &value.kind {
                Some(Kind::StringValue(text)) => Some(text.clone()),
                _ => None,
            };
            Some(list.values.iter().filter_map(text).collect::<Vec<_>>().join(","))
        }
        _ => None,
    }
}

/// The bytes of a header value, without white space around them (RFC 9110 §5.5). EPPs use either field.
pub fn value(header: &HeaderValue) -> &[u8] {
    trimmed(if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value })
}

fn fields(headers: &HeaderMap) -> impl Iterator<Item = HeaderValue> {
    headers.iter().map(|(name, value)| header(name.as_str(), Bytes::copy_from_slice(value.as_bytes())))
}

fn header(key: &str, raw_value: Bytes) -> HeaderValue {
    HeaderValue { key: key.to_owned(), value: String::new(), raw_value }
}
