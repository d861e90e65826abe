//! A request head from a client, and the head that an endpoint gets for it.
//!
//! Every parser must read an accepted head the same way: hyper and llhttp, given the same bytes followed by a body and a second
//! request, must find the same two requests or refuse. All three must accept the head that the agent writes for the endpoint, and
//! read it the same way. hyper may accept a head that the agent refuses only for the reasons in [`STRICTER`].

use std::sync::LazyLock;

use bytes::BytesMut;
use http::Version;
use penstock_agent::{
    config::{Config, Headers},
    parts::{
        AfterResponse, Arrival, FieldPolicy, HeadLimits, RequestBody, RequestFraming, RequestHead, RequestParser,
        parse_request, prepare_request, trace_context, write_request,
    },
};

use crate::{
    input,
    peers::{self, Message, llhttp::Kind},
};

pub(crate) const LIMITS: HeadLimits = HeadLimits { bytes: 2048, headers: 32 };
/// The request after the first one. A parser that finds another request here ended the first one at the wrong byte.
const SECOND: &[u8] = b"GET /second HTTP/1.1\r\nhost: second\r\n\r\n";
/// Bodies up to this length are sent in full; of a request with a longer body only the head is tested.
const MOST_BODY: u64 = 4096;

/// What the default configuration lets pass.
pub(crate) static POLICY: LazyLock<FieldPolicy> = LazyLock::new(|| FieldPolicy::new(&Config::default()));

/// Reasons for which the agent may refuse what hyper accepts. The agent must accept everything else that hyper accepts.
const STRICTER: [&str; 22] = [
    "head_too_long",
    "too_many_fields",
    "bare_lf",
    "bare_cr",
    "control_character",
    "content_length",
    "content_length_repeated",
    "length_and_encoding",
    "transfer_encoding",
    "transfer_coding",
    "blank_lines",
    "request_line",
    "request_line_too_long",
    "method",
    "target",
    "asterisk_target",
    "host_missing",
    "host_repeated",
    "host",
    "host_mismatch",
    "expectation",
    "field_line",
];

pub fn run(data: &[u8]) {
    let (mut choices, wire) = input::split(data, 3);
    let lengths = [choices.byte(), choices.byte(), choices.byte()];
    let whole = parse_request(wire, &LIMITS);

    // The result must not depend on how the bytes were cut into reads.
    let (mut parser, mut arrived) = (RequestParser::default(), 0);
    for piece in input::pieces(wire, lengths) {
        arrived += piece.len();
        let part = parser.parse(&wire[..arrived], &LIMITS);
        let ends = !matches!(part, Ok(None));
        match (part, &whole) {
            (Ok(None), _) => {}
            (Ok(Some((_, length))), Ok(Some((_, same)))) => assert_eq!(length, *same, "the head has another length"),
            (Err(error), Err(same)) => assert_eq!(error.reason(), same.reason(), "the error depends on the cut"),
            (part, whole) => panic!("{arrived} bytes are {part:?}, all are {whole:?}"),
        }
        if ends {
            break;
        }
    }

    match whole {
        Ok(None) => {}
        Ok(Some((head, length))) => check_accepted(head, &wire[..length]),
        Err(error) => {
            assert!((400..600).contains(&error.status().as_u16()));
            assert!(!error.to_string().contains(['\r', '\n']), "an error with a line break: {error}");
            if !STRICTER.contains(&error.reason()) {
                let found = peers::hyper::requests(wire);
                assert!(found.is_empty(), "refused as {}, accepted by hyper: {found:?}", error.reason());
            }
        }
    }
}

fn check_accepted(mut head: RequestHead, wire: &[u8]) {
    let _ = trace_context::received(&mut head.parts.headers.clone());
    let Some((body, coded)) = body_of(head.body) else { return };
    let ours = message(&head, &body);
    let wire = &peers::as_http11(wire, Kind::Request)[..];
    check_one_reading(&[wire, &coded, SECOND].concat(), &ours, &head);

    // The head that the endpoint gets.
    let version = head.parts.version;
    let arrival = Arrival { client: [127, 0, 0, 1].into(), version, tls: false };
    prepare_request(&mut head.parts.headers, &arrival, &POLICY, &Headers::default());
    let mut out = BytesMut::new();
    let framing = match head.body {
        RequestBody::None => RequestFraming::None,
        _ => RequestFraming::Length(body.len() as u64),
    };
    let endpoint = ([10, 0, 0, 1], 8000).into();
    let after = head.upgrade.as_ref().map_or(AfterResponse::Keep, AfterResponse::Upgrade);
    write_request(&head.parts, endpoint, framing, after, &mut out);
    let limits = HeadLimits { bytes: usize::MAX, headers: 128 };
    let (again, taken) =
        parse_request(&out, &limits).expect("the forwarded head is valid").expect("the forwarded head is complete");
    assert_eq!(taken, out.len(), "more than one head was forwarded");
    assert_eq!((&again.parts.method, &again.parts.uri), (&head.parts.method, &head.parts.uri));
    let declared = match again.body {
        RequestBody::Length(bytes) => bytes,
        RequestBody::None => 0,
        other => panic!("forwarded with {other:?}"),
    };
    assert_eq!(declared, body.len() as u64, "the forwarded head declares another body");
    let forwarded = message(&again, &body);
    check_one_reading(&[&out, &body[..], SECOND].concat(), &forwarded, &again);
}

/// A body that fits the head, as payload and as wire bytes; `None` if it would be too long.
fn body_of(declared: RequestBody) -> Option<(Vec<u8>, Vec<u8>)> {
    match declared {
        RequestBody::None | RequestBody::Frames(_) => Some((Vec::new(), Vec::new())),
        RequestBody::Length(bytes) if bytes <= MOST_BODY => {
            let body: Vec<u8> =
                b"GET /smuggled HTTP/1.1\r\n\r\n".iter().copied().cycle().take(bytes as usize).collect();
            Some((body.clone(), body))
        }
        RequestBody::Length(_) => None,
        RequestBody::Chunked => Some((b"0\r\n\r\n".to_vec(), b"5\r\n0\r\n\r\n\r\n0\r\n\r\n".to_vec())),
    }
}

fn message(head: &RequestHead, body: &[u8]) -> Message {
    Message {
        start: head.parts.method.to_string(),
        target: head.parts.uri.to_string(),
        fields: peers::fields(&head.parts.headers),
        body: body.to_vec(),
    }
}

/// hyper and llhttp may find `ours` at the start of `wire` and then [`SECOND`], or fewer messages, but no others.
fn check_one_reading(wire: &[u8], ours: &Message, head: &RequestHead) {
    let hyper = peers::hyper::requests(wire);
    assert_same("hyper", &hyper, ours);
    // After HTTP/1.0, Upgrade or a close, hyper may not read the second request.
    if head.keep_alive && head.upgrade.is_none() && head.parts.version == Version::HTTP_11 {
        assert_eq!(hyper.len(), 2, "hyper finds {hyper:?} in {}", wire.escape_ascii());
    }
    let llhttp = peers::llhttp::read(Kind::Request, wire);
    // An incomplete message has no end to compare.
    assert_same("llhttp", &llhttp.messages[..llhttp.complete], ours);
    if llhttp.complete == 0 {
        assert!(REFUSED_BY_LLHTTP.contains(&llhttp.error.as_str()), "llhttp refuses: {llhttp:?}");
    }
}

/// Errors of llhttp for requests that the agent accepts: it has a list of methods, and stops at CONNECT and Upgrade.
const REFUSED_BY_LLHTTP: [&str; 2] = ["HPE_INVALID_METHOD", "UPGRADE"];

fn assert_same(reader: &str, found: &[Message], ours: &Message) {
    let mut found = found.iter();
    let Some(first) = found.next() else { return };
    assert_eq!(first.start, ours.start, "{reader}");
    assert_eq!(first.body, ours.body, "{reader}");
    // Where the wire has no Host, or an empty one, the agent takes the host from the target (RFC 9112 §3.2).
    let names_host = first.fields.iter().any(|(name, value)| name == "host" && !value.is_empty());
    let sorted = |message: &Message| {
        let mut fields = message.fields.clone();
        fields.retain(|(name, _)| names_host || name != "host");
        fields.sort();
        fields
    };
    assert_eq!(sorted(first), sorted(ours), "{reader}");
    for second in found {
        assert_eq!(
            (second.start.as_str(), second.target.as_str()),
            ("GET", "/second"),
            "{reader} found the second request elsewhere"
        );
    }
}
