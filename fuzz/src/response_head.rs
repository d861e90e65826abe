//! A response head from an endpoint, and the head that the client gets for it.
//!
//! What the agent accepts must have one reading: hyper and llhttp, given the same bytes with a body behind them, find the same
//! response or refuse. The head that goes on to the client must be framed as the endpoint framed it.

use bytes::BytesMut;
use http::{Method, Version};
use penstock_agent::http::{
    head::HeadLimits,
    response::{BodyKind, ResponseHead, ResponseParser, parse_response},
};

use crate::{
    input,
    peers::{self, Message, llhttp::Kind},
    request_head::LIMITS,
};

/// A response behind the first one.
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
            (Ok(Some((_, length))), Ok(Some((_, same)))) => assert_eq!(length, *same, "the head ends elsewhere"),
            (Err(error), Err(same)) => assert_eq!(error.reason(), same.reason(), "another error"),
            (part, whole) => panic!("{arrived} bytes are {part:?}, all are {whole:?}"),
        }
        if ends {
            break;
        }
    }

    match whole {
        Ok(None) => {}
        Ok(Some((head, length))) => accepted(&head, &wire[..length], &method, client),
        Err(error) => assert!(!error.to_string().contains(['\r', '\n']), "an error that breaks the line: {error}"),
    }
}

fn accepted(head: &ResponseHead, wire: &[u8], method: &Method, client: Version) {
    let Some((body, coded)) = body_of(head.body) else { return };
    if !head.interim && head.upgrade.is_none() {
        one_reading(head, wire, &body, &coded, method);
    }
    forwarded(head, method, client);
}

fn one_reading(head: &ResponseHead, wire: &[u8], body: &[u8], coded: &[u8], method: &Method) {
    let ours = Message {
        start: head.status.as_str().to_owned(),
        target: String::new(),
        fields: peers::fields(&head.headers),
        body: body.to_vec(),
    };
    let found = peers::hyper::response(method, &[wire, coded].concat());
    same("hyper", found.as_ref(), &ours);

    let kind = if *method == Method::HEAD { Kind::ResponseToHead } else { Kind::Response };
    let second = if head.keep_alive { SECOND } else { b"" };
    let llhttp = peers::llhttp::read(kind, &[wire, coded, second].concat());
    let complete = &llhttp.messages[..llhttp.complete];
    same("llhttp", complete.first(), &ours);
    for second in complete.iter().skip(1) {
        assert_eq!(second.start, "299", "llhttp lost its place: {llhttp:?}");
    }
}

/// What the client gets is framed as what the endpoint sent, whatever else the head says.
fn forwarded(head: &ResponseHead, method: &Method, client: Version) {
    let mut out = BytesMut::new();
    let kept = head.write_head(&mut out, true, client);
    if head.interim && client == Version::HTTP_10 {
        return assert!(out.is_empty(), "an interim head for a client of HTTP/1.0");
    }
    let limits = HeadLimits { bytes: usize::MAX, headers: 128 };
    let (again, taken) = parse_response(&out, &limits, method).expect("what is forwarded is valid").expect("and whole");
    assert_eq!(taken, out.len(), "more than one head is forwarded");
    assert_eq!((again.status, again.interim), (head.status, head.interim));
    let body = if head.needs_dechunk(client) { BodyKind::UntilClose } else { head.body };
    assert_eq!(again.body, body, "the client is told another end of the body");
    let switches = head.upgrade.is_some();
    assert!(!kept || again.keep_alive || head.interim || switches, "kept open, and the client is told that it closes");
}

/// A body that fits, as payload and as it goes over the wire; `None` where it would be too long to try.
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

fn same(reader: &str, found: Option<&Message>, ours: &Message) {
    let Some(found) = found else { return };
    assert_eq!((&found.start, &found.body), (&ours.start, &ours.body), "{reader}");
    // The agent makes the framing fields agree with each other; the body shows what they mean.
    let framing = ["content-length", "transfer-encoding"];
    let sorted = |message: &Message| {
        let mut fields = message.fields.clone();
        fields.retain(|(name, _)| !framing.contains(&name.as_str()));
        fields.sort();
        fields
    };
    assert_eq!(sorted(found), sorted(ours), "{reader}");
}
