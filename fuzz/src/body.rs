//! A request body from the wire, cut anywhere. The framing parser, the reader on top of it, and a decoder that reads whole lines
//! must agree about the payload and about the byte at which the body ends.

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use penstock_agent::{
    config::Limits,
    parts::{Bodies, BodyError, BodyReader, Decoded, Metrics, ReplayBody, RequestBody},
};
use penstock_common::framing::{Framing, MAX_CHUNK_LINE, MAX_TRAILERS};

use crate::input;

/// More than an input can hold, so that no body is spilled to a file.
const MEMORY: usize = 1 << 20;

/// How the bytes end the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The body ends after this many bytes.
    Complete(usize),
    Incomplete,
    Invalid,
}

pub fn run(data: &[u8]) {
    let (mut choices, wire) = input::split(data, 6);
    let kind = choices.byte();
    let lengths = [choices.byte(), choices.byte(), choices.byte()];
    let limit = u64::from(choices.byte()) << (kind >> 4);
    let length = u64::from(choices.byte());
    let (body, framing) = match kind & 1 {
        0 => (RequestBody::Chunked, Framing::chunked()),
        _ => (RequestBody::Length(length), Framing::length(length)),
    };

    let (payload, end) = framed(framing, std::iter::once(wire));
    assert_eq!(framed(framing, input::pieces(wire, lengths)), (payload.clone(), end), "cut into {lengths:?}");
    let mut trailers: &[u8] = &[];
    if body == RequestBody::Chunked {
        let (of_lines, ends, at) = by_lines(wire);
        assert_eq!((of_lines, ends), (payload.clone(), end), "read in lines");
        if let End::Complete(length) = end {
            trailers = &wire[at..length];
        }
    }
    read(body, limit, input::pieces(wire, lengths), wire.len(), &payload, (end, are_fields(trailers)));
}

/// Reads the pieces with [`Framing`].
fn framed<'d>(mut framing: Framing, pieces: impl Iterator<Item = &'d [u8]>) -> (Vec<u8>, End) {
    let (mut payload, mut taken) = (Vec::new(), 0);
    for mut piece in pieces {
        while !piece.is_empty() && !framing.is_done() && !framing.is_invalid() {
            let (length, data) = framing.next(piece);
            assert!(length > 0, "no progress after {taken} bytes");
            payload.extend_from_slice(data.unwrap_or_default());
            taken += length;
            piece = &piece[length..];
        }
    }
    let end = match framing {
        framing if framing.is_invalid() => End::Invalid,
        framing if framing.is_done() => End::Complete(taken),
        _ => End::Incomplete,
    };
    (payload, end)
}

/// Reads a chunked body in whole lines (RFC 9112 §7.1). Written independently of the parser.
/// Also returns where the trailer section begins.
fn by_lines(wire: &[u8]) -> (Vec<u8>, End, usize) {
    let (mut payload, mut at) = (Vec::new(), 0);
    loop {
        let (size, next) = match size_line(&wire[at..]) {
            Ok((size, length)) => (size, at + length),
            Err(end) => return (payload, end, at),
        };
        at = next;
        if size == 0 {
            let end = trailers(&wire[at..]).map_or_else(|end| end, |length| End::Complete(at + length));
            return (payload, end, at);
        }
        let data = &wire[at..];
        let here = usize::try_from(size).unwrap_or(usize::MAX).min(data.len());
        payload.extend_from_slice(&data[..here]);
        at += here;
        match &wire[at..] {
            _ if (here as u64) < size => return (payload, End::Incomplete, at),
            [] | [b'\r'] => return (payload, End::Incomplete, at),
            [b'\r', b'\n', ..] => at += 2,
            _ => return (payload, End::Invalid, at),
        }
    }
}

/// The size of a chunk, and the length of its line in bytes.
fn size_line(wire: &[u8]) -> Result<(u64, usize), End> {
    let digits = wire.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let rest = &wire[digits..];
    let blanks = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    let rest = &rest[blanks..];
    let significant = wire[..digits].iter().skip_while(|byte| **byte == b'0').count();
    let limit = MAX_CHUNK_LINE as usize;
    let extension = match rest.first() {
        _ if significant > 16 || (digits == 0 && !wire.is_empty()) => return Err(End::Invalid),
        None => return Err(if wire.len() > limit { End::Invalid } else { End::Incomplete }),
        Some(b'\r') => 0,
        Some(b';') => rest.iter().position(|byte| matches!(byte, b'\r' | b'\n' | 0)).unwrap_or(rest.len()),
        Some(_) => return Err(End::Invalid),
    };
    let length = digits + blanks + extension + 2;
    match &rest[extension..] {
        _ if length > limit && wire.len() > limit => Err(End::Invalid),
        [] | [b'\r'] => Err(End::Incomplete),
        [b'\r', b'\n', ..] => {
            let text = String::from_utf8_lossy(&wire[..digits]);
            Ok((u64::from_str_radix(&text, 16).map_err(|_| End::Invalid)?, length))
        }
        _ => Err(End::Invalid),
    }
}

/// Whether a trailer section consists of field lines (RFC 9112 §5).
fn are_fields(section: &[u8]) -> bool {
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let is_text = |byte: &u8| matches!(byte, b'\t' | 0x20..=0x7e | 0x80..);
    section.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line)).all(|line| {
        let colon = line.iter().position(|&byte| byte == b':');
        line.is_empty()
            || colon.is_some_and(|colon| {
                colon > 0 && line[..colon].iter().all(is_token) && line[colon + 1..].iter().all(is_text)
            })
    })
}

/// The length of the trailer section in bytes, including the empty line that ends it.
fn trailers(wire: &[u8]) -> Result<usize, End> {
    let limit = MAX_TRAILERS as usize;
    let mut at = 0;
    loop {
        let line = wire[at..].iter().position(|byte| matches!(byte, b'\r' | b'\n' | 0));
        let end = at + line.unwrap_or(wire.len() - at);
        match &wire[end..] {
            _ if end + 1 > limit && wire.len() > limit => return Err(End::Invalid),
            [] | [b'\r'] => return Err(End::Incomplete),
            [b'\r', b'\n', ..] if end + 2 > limit => return Err(End::Invalid),
            [b'\r', b'\n', ..] if end == at => return Ok(end + 2),
            [b'\r', b'\n', ..] => at = end + 2,
            _ => return Err(End::Invalid),
        }
    }
}

/// [`BodyReader`] and [`ReplayBody`] must return the same payload, not take the bytes after the body, and respect the limit.
fn read<'d>(
    body: RequestBody,
    limit: u64,
    pieces: impl Iterator<Item = &'d [u8]>,
    sent: usize,
    payload: &[u8],
    (end, with_fields): (End, bool),
) {
    let mut reader = match BodyReader::new(body, limit) {
        Ok(reader) => reader,
        Err(BodyError::TooLarge { .. }) => {
            return assert!(matches!(body, RequestBody::Length(declared) if declared > limit));
        }
        Err(error) => panic!("{error}"),
    };
    let bodies = Bodies::new(&Limits::default(), &Metrics::new(&[]));
    let (mut buf, mut got, mut kept) = (BytesMut::new(), Vec::new(), ReplayBody::new(MEMORY, limit, &bodies));
    for piece in pieces {
        buf.extend_from_slice(piece);
        loop {
            match reader.decode(&mut buf) {
                Ok(Decoded::Piece(piece)) => {
                    assert!(!piece.is_empty());
                    got.extend_from_slice(&piece);
                    kept.append(piece).now_or_never().expect("memory does not wait").expect("within the limit");
                }
                Ok(Decoded::Incomplete | Decoded::Done) => break,
                Err(BodyError::TooLarge { .. }) => {
                    return assert!(payload.len() as u64 > limit, "the limit applied too early");
                }
                Err(BodyError::Chunk { .. }) => return assert!(end == End::Invalid || !with_fields),
                Err(BodyError::Trailers) => return assert!(sent > 128 * b"a:\r\n".len()),
                Err(BodyError::Overhead { .. }) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(payload.len() as u64 <= limit, "{} bytes passed a limit of {limit}", payload.len());
    assert_eq!(got, payload);
    match end {
        End::Complete(length) => {
            assert!(reader.is_done());
            assert!(with_fields, "malformed trailers were accepted");
            assert_eq!(buf.len(), sent - length, "the body has another length");
        }
        End::Incomplete => assert!(!reader.is_done()),
        End::Invalid => panic!("an invalid body was accepted"),
    }
    let mut pieces = kept.pieces();
    let mut again = Vec::new();
    while let Some(piece) = pieces.next().now_or_never().expect("memory does not wait").expect("memory does not fail") {
        again.extend_from_slice(&Bytes::clone(&piece));
    }
    assert_eq!(again, payload, "the replayed body differs");
}
