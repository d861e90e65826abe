//! A response head from an endpoint, and the head that the client gets for it.
//!
//! Every parser must read an accepted head the same way: hyper and llhttp, given the same bytes followed by a body, must find the
//! same response or refuse. The head that the client gets must have the endpoint's framing.

use bytes::BytesMut;
use http::{Method, Version};
use penstock_agent::parts::{BodyKind, HeadLimits, ResponseHead, ResponseParser, parse_response};

use crate::{
    input,
    peers::{self, Message, llhttp::Kind},
    request_head::LIMITS,
};

/// The response after the first one.
const SECOND: &[u8] = b"HTTP/1.1 299 second\r\ncontent-length: 0\r\n\r\n";
const MOST_BODY: u64 = 4096;

pub fn run(data: &[u8]) {
    let (mut choices, wire) = input::split(data, 4);
    let flags = choices.byte();
    let lengths = [choices.byte(), choices.byte(), choices.byte()];
    let method = if flags & 1 == 0 { Method::GET } else { Method::HEAD };
    let client = if flags & 2 == 0 { Version::HTTP_11 } else { Version::HTTP_10 };
    let whole = parse_response(wire, &LIMITS, &method);

    let (mut parser, mut arrived) = (ResponseParser::default(), 0);
    for piece in input::pieces(wire, lengths) {
        arrived += piece.len();
        let part = parser.parse(&wire[..arrived], &LIMITS, &method);
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
        Ok(Some((head, length))) => check_accepted(&head, &wire[..length], &method, client),
        Err(error) => assert!(!error.to_string().contains(['\r', '\n']), "an error with a line break: {error}"),
    }
}

fn check_accepted(head: &ResponseHead, wire: &[u8], method: &Method, client: Version) {
    let Some((body, coded)) = body_of(head.body) else { return };
    if !head.interim && head.upgrade.is_none() {
        check_one_reading(head, wire, &body, &coded, method);
    }
    check_forwarded(head, method, client);
}

fn check_one_reading(head: &ResponseHead, wire: &[u8], body: &[u8], coded: &[u8], method: &Method) {
    let ours = Message {
        start: head.status.as_str().to_owned(),
        target: String::new(),
        fields: peers::fields(&head.headers),
        body: body.to_vec(),
    };
    let wire = &peers::as_http11(wire, Kind::Response)[..];
    let found = peers::hyper::response(method, &[wire, coded].concat());
    assert_same("hyper", found.as_ref(), &ours);

    let kind = if *method == Method::HEAD { Kind::ResponseToHead } else { Kind::Response };
    let second = if head.keep_alive { SECOND } else { b"" };
    let llhttp = peers::llhttp::read(kind, &[wire, coded, second].concat());
    let complete = &llhttp.messages[..llhttp.complete];
    assert_same("llhttp", complete.first(), &ours);
    for second in complete.iter().skip(1) {
        assert_eq!(second.start, "299", "llhttp found the second response elsewhere: {llhttp:?}");
    }
}

/// The head for the client must have the endpoint's framing.
fn check_forwarded(head: &ResponseHead, method: &Method, client: Version) {
    let mut out = BytesMut::new();
    let kept = head.write_head(&mut out, true, client);
    if head.interim && client == Version::HTTP_10 {
        return assert!(out.is_empty(), "an interim head for an HTTP/1.0 client");
    }
    let limits = HeadLimits { bytes: usize::MAX, headers: 128 };
    let (again, taken) = parse_response(&out, &limits, method)
        .expect("the forwarded head is valid")
        .expect("the forwarded head is complete");
    assert_eq!(taken, out.len(), "more than one head was forwarded");
    assert_eq!((again.status, again.interim), (head.status, head.interim));
    let body = if head.needs_dechunk(client) { BodyKind::UntilClose } else { head.body };
    assert_eq!(again.body, body, "the client sees another framing");
    let switches = head.upgrade.is_some();
    assert!(
        !kept || again.keep_alive || head.interim || switches,
        "the connection stays open although the head announces a close"
    );
}

/// A body that fits the head, as payload and as wire bytes; `None` if it would be too long.
fn body_of(declared: BodyKind) -> Option<(Vec<u8>, Vec<u8>)> {
    const STRAY: &[u8] = b"HTTP/1.1 200 smuggled\r\n\r\n";
    match declared {
        BodyKind::None => Some((Vec::new(), Vec::new())),
        BodyKind::Length(bytes) if bytes <= MOST_BODY => {
            let body: Vec<u8> = STRAY.iter().copied().cycle().take(bytes as usize).collect();
            Some((body.clone(), body))
        }
        BodyKind::Length(_) => None,
        BodyKind::Chunked => Some((b"0\r\n\r\n".to_vec(), b"5\r\n0\r\n\r\n\r\n0\r\n\r\n".to_vec())),
        BodyKind::UntilClose => Some((STRAY.to_vec(), STRAY.to_vec())),
    }
}

fn assert_same(reader: &str, found: Option<&Message>, ours: &Message) {
    let Some(found) = found else { return };
    assert_eq!((&found.start, &found.body), (&ours.start, &ours.body), "{reader}");
    // The agent makes the framing fields consistent, so they may differ; the body shows the framing.
    let framing = ["content-length", "transfer-encoding"];
    let sorted = |message: &Message| {
        let mut fields = message.fields.clone();
        fields.retain(|(name, _)| !framing.contains(&name.as_str()));
        fields.sort();
        fields
    };
    assert_eq!(sorted(found), sorted(ours), "{reader}");
}
