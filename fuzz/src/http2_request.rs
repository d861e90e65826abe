//! An HTTP/2 request that is forwarded over HTTP/1.1: no field, path or method may turn it into two requests.
//!
//! The input is a request that `http` and h2 accept. The agent's own parser and hyper's must read what the agent writes as exactly
//! that request.

use arbitrary::Unstructured;
use bytes::BytesMut;
use http::{HeaderName, HeaderValue, Method, Request, Uri, Version, request};
use penstock_agent::{
    config::Headers,
    parts::{
        AfterResponse, Arrival, HeadLimits, RequestBody, RequestFraming, from_http2, parse_request, prepare_request,
        write_request,
    },
};

use crate::{
    peers,
    request_head::{LIMITS, POLICY},
};

const MOST_BODY: usize = 64;
/// Fields about framing, the connection or the host, and variants of their names.
const NAMES: [&str; 22] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "te",
    "upgrade",
    "keep-alive",
    "proxy-connection",
    "http2-settings",
    "expect",
    "trailer",
    "cookie",
    "content_length",
    "transfer_encoding",
    "x-request-id",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "forwarded",
    "traceparent",
    "x-gateway-destination-endpoint",
    "x-gateway-model-name",
];

pub fn run(data: &[u8]) {
    let mut data = Unstructured::new(data);
    let Ok(Some((mut parts, body))) = request(&mut data) else { return };
    let ended = body.is_empty();
    let Ok(mut head) = from_http2(&mut parts, ended, &LIMITS) else { return };
    assert!(matches!(head.body, RequestBody::None | RequestBody::Frames(_)));

    let arrival = Arrival { client: [127, 0, 0, 1].into(), version: Version::HTTP_2, tls: true };
    prepare_request(&mut head.parts.headers, &arrival, &POLICY, &Headers::default());
    let mut out = BytesMut::new();
    let framing = if ended { RequestFraming::None } else { RequestFraming::Length(body.len() as u64) };
    let endpoint = ([10, 0, 0, 1], 8000).into();
    let after = head.upgrade.as_ref().map_or(AfterResponse::Keep, AfterResponse::Upgrade);
    write_request(&head.parts, endpoint, framing, after, &mut out);

    let limits = HeadLimits { bytes: usize::MAX, headers: 128 };
    let shown = out.escape_ascii().to_string();
    let (again, taken) = match parse_request(&out, &limits) {
        Ok(Some(read)) => read,
        other => panic!("forwarded as an invalid request: {other:?}, {shown}"),
    };
    assert_eq!(taken, out.len(), "more than one head in {shown}");
    assert_eq!(again.parts.method, head.parts.method, "{shown}");
    let target = |uri: &Uri| uri.path_and_query().map_or("/".to_owned(), ToString::to_string);
    assert_eq!(target(&again.parts.uri), target(&head.parts.uri), "{shown}");
    match again.body {
        RequestBody::None => assert!(body.is_empty(), "the body is not declared: {shown}"),
        RequestBody::Length(declared) => assert_eq!(declared, body.len() as u64, "{shown}"),
        other => panic!("forwarded with {other:?}: {shown}"),
    }
    assert!(
        again.upgrade.is_none() && again.keep_alive,
        "a field of the HTTP/2 request controls the HTTP/1.1 connection: {shown}"
    );

    let found = peers::hyper::requests(&[&out, &body[..], b"GET /second HTTP/1.1\r\nhost: second\r\n\r\n"].concat());
    let starts: Vec<_> = found.iter().map(|message| message.target.as_str()).collect();
    assert_eq!(starts, [target(&head.parts.uri).as_str(), "/second"], "hyper reads {shown}");
    assert_eq!(found[0].body, body, "{shown}");
}

/// `None` if `http` rejects it.
fn request(data: &mut Unstructured<'_>) -> arbitrary::Result<Option<(request::Parts, Vec<u8>)>> {
    let method = match data.int_in_range(0..=4)? {
        0 => Ok(Method::GET),
        1 => Ok(Method::POST),
        2 => Ok(Method::OPTIONS),
        3 => Ok(Method::HEAD),
        _ => Method::from_bytes(bytes(data, 16)?),
    };
    let path = bytes(data, 48)?;
    let mut uri = Uri::builder();
    if data.arbitrary()? {
        uri = uri.scheme(if data.arbitrary()? { "https" } else { "http" }).authority(bytes(data, 32)?);
    }
    let (Ok(method), Ok(uri)) = (method, uri.path_and_query(path).build()) else { return Ok(None) };
    let (mut parts, ()) = Request::new(()).into_parts();
    (parts.method, parts.uri, parts.version) = (method, uri, Version::HTTP_2);
    if data.arbitrary()? {
        parts.headers.insert(http::header::HOST, HeaderValue::from_static("a"));
    }
    for _ in 0..data.int_in_range(0..=8)? {
        let name = if data.arbitrary()? {
            HeaderName::from_bytes(data.choose(&NAMES)?.as_bytes())
        } else {
            HeaderName::from_bytes(bytes(data, 16)?)
        };
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(bytes(data, 32)?)) {
            parts.headers.append(name, value);
        }
    }
    let body = vec![b'b'; data.int_in_range(0..=MOST_BODY)?];
    Ok(Some((parts, body)))
}

fn bytes<'d>(data: &mut Unstructured<'d>, most: usize) -> arbitrary::Result<&'d [u8]> {
    let length = data.int_in_range(0..=most)?;
    data.bytes(length.min(data.len()))
}
