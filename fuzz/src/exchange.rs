//! An exchange with an EPP that sends any messages in any order.
//!
//! There must be at most one decision or failure, each direction must end once, the agent must send the bytes that it was given,
//! and a decision must be valid: its mutation, applied to the request, leaves one request with the framing that the agent gave it.

use arbitrary::Unstructured;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use penstock_agent::{
    config::EppLimits,
    parts::{
        AfterResponse, Body, Budget, DESTINATION, Decision, Event, Exchange, ExchangeLimits, HeadLimits, Outcome,
        PickError, RequestBody, RequestFraming, mutation, parse_request, write_request,
    },
};
use penstock_proto::{
    core::{HeaderValue as ProtoValue, HeaderValueOption},
    ext_proc::{
        BodyMutation, BodyResponse, CommonResponse, GrpcStatus, HeaderMutation, HeadersResponse, ImmediateResponse,
        ProcessingRequest, ProcessingResponse, StreamedBodyResponse, TrailersResponse, body_mutation::Mutation,
        processing_request, processing_response::Response,
    },
    http_type::HttpStatus,
};
use prost::Message as _;
use prost_types::{ListValue, Struct, Value, value::Kind};

const REPLACED_BODY: usize = 4096;
const STEPS: usize = 64;
const NAMES: [&str; 16] = [
    DESTINATION,
    "host",
    ":path",
    ":authority",
    "content-length",
    "transfer-encoding",
    "connection",
    "upgrade",
    "te",
    "trailer",
    "expect",
    "keep-alive",
    "content_length",
    "x-a",
    "X-Request-Id",
    "",
];
const PICKS: [&str; 10] = [
    "10.0.0.1:8000",
    "10.0.0.1:8000,10.0.0.2:8000",
    "[::1]:80",
    "10.0.0.1:8000, 10.0.0.1:8000",
    "",
    " ",
    ",",
    "pod:80",
    "10.0.0.1:99999",
    "1.2.3.4",
];

#[derive(Default)]
struct Seen {
    sent: Vec<u8>,
    first: bool,
    request_ends: usize,
    response_ends: usize,
    verdicts: usize,
    /// Answers about the response's body and trailers are wanted.
    obeyed: bool,
}

pub fn run(data: &[u8]) {
    let _ = walk(&mut Unstructured::new(data));
}

fn walk(data: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let (parts, ()) =
        Request::post("/v1/chat/completions").header("host", "a").body(()).expect("a request").into_parts();
    let has_body = data.arbitrary()?;
    let header = HeaderName::from_static(DESTINATION);
    let subset = ["10.0.0.1:8000".parse().expect("an address")];
    let subset = if data.arbitrary()? { Some(&subset[..]) } else { None };
    let limits =
        ExchangeLimits { replaced_body: REPLACED_BODY, memory: Budget::unlimited(), epp: EppLimits::default() };
    let mut exchange = Exchange::new(header, &parts, has_body, subset, limits);
    let (mut given, mut ended, mut seen) = (Vec::new(), !has_body, Seen::default());
    for _ in 0..STEPS {
        if data.is_empty() {
            break;
        }
        match data.int_in_range(0..=11)? {
            0 | 1 => {
                let (piece, end) = (bytes(data, 64)?, data.arbitrary()?);
                if !ended {
                    given.extend_from_slice(piece);
                    ended = end;
                }
                exchange.request_body(Bytes::copy_from_slice(piece), end);
            }
            2 => exchange.closed(),
            3 => exchange.deadline(),
            4 => exchange.failed(PickError::NoDestination),
            5 => exchange.response_headers(
                StatusCode::OK,
                &HeaderMap::new(),
                "10.0.0.1:8000".parse().expect("an address"),
                data.arbitrary()?,
            ),
            6 => exchange.response_body(Bytes::copy_from_slice(bytes(data, 64)?), data.arbitrary()?),
            10 => exchange.response_trailers(&parts.headers),
            11 => {
                exchange.obey();
                seen.obeyed = true;
            }
            7 => {
                let wire = bytes(data, 256)?;
                if let Ok(reply) = ProcessingResponse::decode(wire) {
                    exchange.receive(reply);
                }
            }
            _ => exchange.receive(reply(data)?),
        }
        check_messages(&mut exchange, &mut seen, &parts.headers, ended.then_some(&given[..]));
    }
    assert!(given.starts_with(&seen.sent), "the bytes sent differ from those given");
    Ok(())
}

fn check_messages(exchange: &mut Exchange, seen: &mut Seen, headers: &HeaderMap, body: Option<&[u8]>) {
    while let Some(ProcessingRequest { request, protocol_config, .. }) = exchange.next_message() {
        let request = request.expect("a message with a part");
        let is_head = matches!(request, processing_request::Request::RequestHeaders(_));
        assert_eq!(
            (is_head, protocol_config.is_some()),
            (!seen.first, !seen.first),
            "the head must be the first message, once"
        );
        seen.first = true;
        match request {
            processing_request::Request::RequestHeaders(head) => seen.request_ends += usize::from(head.end_of_stream),
            processing_request::Request::RequestBody(piece) => {
                assert_eq!(seen.request_ends, 0, "a piece of the body after its end");
                seen.sent.extend_from_slice(&piece.body);
                seen.request_ends += usize::from(piece.end_of_stream);
            }
            processing_request::Request::ResponseHeaders(head) => {
                assert_eq!(seen.response_ends, 0);
                seen.response_ends += usize::from(head.end_of_stream);
            }
            processing_request::Request::ResponseBody(piece) => {
                assert_eq!(seen.response_ends, 0, "a piece of the response after its end");
                seen.response_ends += usize::from(piece.end_of_stream);
            }
            processing_request::Request::ResponseTrailers(_) => {
                assert_eq!(seen.response_ends, 0, "trailers after the end of the response");
                seen.response_ends += 1;
            }
            other @ processing_request::Request::RequestTrailers(_) => panic!("{other:?} was sent"),
        }
    }
    while let Some(event) = exchange.next_event() {
        match event {
            Ok(Event::Outcome(Outcome::Picked(decision))) => {
                seen.verdicts += 1;
                check_decision(&decision, headers, body);
            }
            Err(error) => {
                seen.verdicts += 1;
                assert!(!error.reason().is_empty());
            }
            Ok(Event::Outcome(Outcome::Immediate(reply))) => assert!(reply.status.as_u16() >= 200),
            Ok(Event::Excessive) => {}
            Ok(Event::ResponseBody(_) | Event::ResponseTrailers(_) | Event::ResponseDeclined) => {
                assert!(seen.obeyed, "an answer that nobody wants");
            }
            Ok(Event::ResponseHead(mutation)) => {
                let mut status = StatusCode::OK;
                mutation::apply_to_response(&mutation, &mut status, &mut HeaderMap::new());
                assert!((200..600).contains(&status.as_u16()));
            }
        }
        assert!(seen.verdicts <= 1, "a second decision");
    }
}

fn check_decision(decision: &Decision, headers: &HeaderMap, body: Option<&[u8]>) {
    let Decision { endpoints, mutation, body: fate, .. } = decision;
    assert!(!endpoints.is_empty(), "a decision without endpoints");
    assert!(endpoints.iter().enumerate().all(|(at, endpoint)| !endpoints[..at].contains(endpoint)), "{endpoints:?}");
    let length = match fate {
        Body::Original | Body::Renamed(_) | Body::DigestOnly(_) => body.map_or(0, <[u8]>::len),
        Body::Replaced(pieces) => pieces.iter().map(Bytes::len).sum(),
    };
    assert!(matches!(fate, Body::Original) || length <= REPLACED_BODY, "a replacement of {length} bytes");

    let (mut parts, ()) = Request::post("/v1/chat/completions").body(()).expect("a request").into_parts();
    parts.headers = headers.clone();
    mutation::apply_to_request(mutation, &mut parts);
    assert_eq!(parts.headers.get_all("host").iter().collect::<Vec<_>>(), [HeaderValue::from_static("a")]);
    let mut out = BytesMut::new();
    let endpoint = endpoints[0];
    write_request(&parts, endpoint, RequestFraming::Length(length as u64), AfterResponse::Keep, &mut out);
    let limits = HeadLimits { bytes: usize::MAX, headers: 4096 };
    match parse_request(&out, &limits) {
        Ok(Some((head, taken))) => {
            assert_eq!((taken, head.body), (out.len(), RequestBody::Length(length as u64)), "{}", out.escape_ascii());
            assert!(head.upgrade.is_none() && head.keep_alive && !head.expect_continue, "{}", out.escape_ascii());
        }
        other => panic!("the mutation makes the request invalid: {other:?}, {}", out.escape_ascii()),
    }
}

fn reply(data: &mut Unstructured<'_>) -> arbitrary::Result<ProcessingResponse> {
    let response = match data.int_in_range(0..=7)? {
        0 | 1 => Response::RequestHeaders(HeadersResponse { response: Some(common(data)?) }),
        2 | 3 => Response::RequestBody(BodyResponse { response: Some(common(data)?) }),
        4 => Response::ResponseHeaders(HeadersResponse { response: Some(common(data)?) }),
        5 => Response::ResponseBody(BodyResponse { response: Some(common(data)?) }),
        6 => Response::RequestTrailers(TrailersResponse { header_mutation: Some(mutation(data)?) }),
        _ => Response::ImmediateResponse(ImmediateResponse {
            status: data.arbitrary::<bool>()?.then_some(HttpStatus { code: data.arbitrary()? }),
            headers: Some(mutation(data)?),
            body: Bytes::copy_from_slice(bytes(data, 64)?),
            details: String::new(),
            grpc_status: data.arbitrary::<bool>()?.then_some(GrpcStatus { status: data.arbitrary()? }),
        }),
    };
    let dynamic_metadata = if data.arbitrary()? { Some(metadata(data)?) } else { None };
    Ok(ProcessingResponse { response: Some(response), dynamic_metadata, ..Default::default() })
}

fn common(data: &mut Unstructured<'_>) -> arbitrary::Result<CommonResponse> {
    let header_mutation = if data.arbitrary()? { Some(mutation(data)?) } else { None };
    let body_mutation = match data.int_in_range(0..=4)? {
        0 => None,
        1 => Some(Mutation::Body(body(data)?)),
        2 => Some(Mutation::ClearBody(data.arbitrary()?)),
        _ => Some(Mutation::StreamedResponse(StreamedBodyResponse {
            body: body(data)?,
            end_of_stream: data.arbitrary()?,
        })),
    };
    Ok(CommonResponse {
        status: i32::from(data.int_in_range(0..=2u8)?),
        header_mutation,
        body_mutation: body_mutation.map(|mutation| BodyMutation { mutation: Some(mutation) }),
        clear_route_cache: false,
    })
}

/// Usually short, sometimes about as long as the limit.
fn body(data: &mut Unstructured<'_>) -> arbitrary::Result<Bytes> {
    let times = if data.ratio(1, 16)? { REPLACED_BODY / 2 } else { 1 };
    Ok(bytes(data, 8)?.repeat(times).into())
}

fn mutation(data: &mut Unstructured<'_>) -> arbitrary::Result<HeaderMutation> {
    let mut mutation = HeaderMutation::default();
    for _ in 0..data.int_in_range(0..=4)? {
        let key = name(data)?;
        let picks = key.eq_ignore_ascii_case(DESTINATION);
        let raw = if picks { data.choose(&PICKS)?.as_bytes() } else { bytes(data, 24)? };
        let header = ProtoValue { key, value: String::new(), raw_value: Bytes::copy_from_slice(raw) };
        mutation.set_headers.push(HeaderValueOption {
            header: data.ratio(15, 16)?.then_some(header),
            append: data.arbitrary()?,
            append_action: i32::from(data.int_in_range(0..=4u8)?),
        });
    }
    for _ in 0..data.int_in_range(0..=2)? {
        mutation.remove_headers.push(name(data)?);
    }
    Ok(mutation)
}

fn name(data: &mut Unstructured<'_>) -> arbitrary::Result<String> {
    if data.ratio(3, 4)? {
        return Ok((*data.choose(&NAMES)?).to_owned());
    }
    Ok(String::from_utf8_lossy(bytes(data, 16)?).into_owned())
}

fn metadata(data: &mut Unstructured<'_>) -> arbitrary::Result<Struct> {
    let text = |pick: &str| Value { kind: Some(Kind::StringValue(pick.to_owned())) };
    let pick = match data.int_in_range(0..=2)? {
        0 => text(data.choose(&PICKS)?),
        1 => Value { kind: Some(Kind::ListValue(ListValue { values: vec![text(data.choose(&PICKS)?); 2] })) },
        _ => Value { kind: Some(Kind::NumberValue(1.0)) },
    };
    let lb = Struct { fields: [(DESTINATION.to_owned(), pick)].into() };
    Ok(Struct { fields: [("envoy.lb".to_owned(), Value { kind: Some(Kind::StructValue(lb)) })].into() })
}

fn bytes<'d>(data: &mut Unstructured<'d>, most: usize) -> arbitrary::Result<&'d [u8]> {
    let length = data.int_in_range(0..=most)?;
    data.bytes(length.min(data.len()))
}
