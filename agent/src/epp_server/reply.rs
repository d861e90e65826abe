//! Builds the EPP's replies. Header names are in lower case and values in `raw_value`.
//!
//! Like production EPPs, it echoes the headers of a message as mutations. Omits repeated names, because setting them again would
//! leave one value and lose a cookie, and pseudo-headers and hop-by-hop fields.

use std::collections::HashMap;

use bytes::Bytes;
use penstock_proto::{
    core::{HeaderMap, HeaderValue, HeaderValueOption},
    ext_proc::{
        BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, HttpHeaders, ImmediateResponse,
        ProcessingResponse, StreamedBodyResponse, TrailersResponse, body_mutation::Mutation,
        processing_response::Response,
    },
    http_type::HttpStatus,
};
use prost_types::{Struct, Value, value::Kind};

use super::refusal::Refusal;
use crate::picker::{
    builtin::Pick,
    message::{DESTINATION, PIECE, value},
};

const DROPPED: &str = "x-llm-d-request-dropped-reason";
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The pick, for a request with these headers and, if it has a body, of this length.
pub(super) fn picked(pick: &Pick, headers: Option<&HeaderMap>, body: Option<usize>) -> ProcessingResponse {
    let list: Vec<String> = pick.endpoints.iter().map(ToString::to_string).collect();
    let list = list.join(",");
    let mut set = vec![header(DESTINATION, list.clone())];
    set.extend(body.map(|length| header("content-length", length.to_string())));
    set.extend(echo(headers).filter(|option| {
        let name = option.header.as_ref().map_or("", |header| header.key.as_str());
        name != "content-length" && !name.starts_with(DESTINATION)
    }));
    let response = CommonResponse { header_mutation: mutation(set), clear_route_cache: true, ..Default::default() };
    let text = Value { kind: Some(Kind::StringValue(list)) };
    let lb = Struct { fields: [(DESTINATION.to_owned(), text)].into() };
    let lb = Value { kind: Some(Kind::StructValue(lb)) };
    ProcessingResponse {
        response: Some(Response::RequestHeaders(HeadersResponse { response: Some(response) })),
        dynamic_metadata: Some(Struct { fields: [("envoy.lb".to_owned(), lb)].into() }),
        ..Default::default()
    }
}

/// The whole request body, unchanged, in pieces; the last one ends the request, unless trailers do. An empty body is one empty piece.
pub(super) fn request_body(mut body: Bytes, trailers: bool) -> impl Iterator<Item = ProcessingResponse> {
    let mut ended = false;
    std::iter::from_fn(move || {
        let piece = (!ended).then(|| body.split_to(body.len().min(PIECE)))?;
        ended = body.is_empty();
        Some(message(Response::RequestBody(streamed(piece, ended && !trailers))))
    })
}

pub(super) fn request_trailers() -> ProcessingResponse {
    message(Response::RequestTrailers(TrailersResponse::default()))
}

pub(super) fn response_headers(headers: &HttpHeaders) -> ProcessingResponse {
    let set = echo(headers.headers.as_ref()).chain([header("x-went-into-resp-headers", "true")]);
    let response = CommonResponse { header_mutation: mutation(set.collect()), ..Default::default() };
    message(Response::ResponseHeaders(HeadersResponse { response: Some(response) }))
}

/// One piece of a response body, unchanged.
pub(super) fn response_body(piece: Bytes, end_of_stream: bool) -> ProcessingResponse {
    message(Response::ResponseBody(streamed(piece, end_of_stream)))
}

/// Lets a proxy send its piece unchanged, in the body modes in which the proxy keeps the piece.
pub(super) fn response_body_unchanged() -> ProcessingResponse {
    message(Response::ResponseBody(BodyResponse { response: Some(CommonResponse::default()) }))
}

pub(super) fn response_trailers() -> ProcessingResponse {
    message(Response::ResponseTrailers(TrailersResponse::default()))
}

pub(super) fn refused(refusal: &Refusal) -> ProcessingResponse {
    let (code, name, dropped) = refusal.terms();
    message(Response::ImmediateResponse(ImmediateResponse {
        status: Some(HttpStatus { code }),
        headers: dropped.and_then(|reason| mutation(vec![header(DROPPED, reason)])),
        body: format!("inference error: {name} - {refusal}").into(),
        ..Default::default()
    }))
}

fn message(response: Response) -> ProcessingResponse {
    ProcessingResponse { response: Some(response), ..Default::default() }
}

fn streamed(body: Bytes, end_of_stream: bool) -> BodyResponse {
    let mutation = Mutation::StreamedResponse(StreamedBodyResponse { body, end_of_stream });
    let body_mutation = Some(BodyMutation { mutation: Some(mutation) });
    BodyResponse { response: Some(CommonResponse { body_mutation, ..Default::default() }) }
}

fn mutation(set_headers: Vec<HeaderValueOption>) -> Option<HeaderMutation> {
    Some(HeaderMutation { set_headers, remove_headers: Vec::new() })
}

fn echo(headers: Option<&HeaderMap>) -> impl Iterator<Item = HeaderValueOption> {
    let headers = headers.map_or(&[][..], |map| &map.headers);
    let mut times: HashMap<&str, usize> = HashMap::new();
    for header in headers {
        *times.entry(&header.key).or_default() += 1;
    }
    headers
        .iter()
        .filter(move |header| times.get(header.key.as_str()) == Some(&1))
        .filter(|header| !header.key.starts_with(':') && !HOP_BY_HOP.contains(&header.key.as_str()))
        .map(|from| header(&from.key, Bytes::copy_from_slice(value(from))))
}

/// Sets neither `append` nor an action, so the value overwrites.
fn header(key: &str, value: impl Into<Bytes>) -> HeaderValueOption {
    let header = HeaderValue { key: key.to_owned(), value: String::new(), raw_value: value.into() };
    HeaderValueOption { header: Some(header), ..Default::default() }
}
