//! Trailer sections: extracts them from chunked syntax and parses them. Which trailers pass is in [`fields`](super::fields).

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue};
use penstock_common::framing::{Framing, MAX_TRAILERS, state};

use super::head::{fields_len, padded};

/// Maximum number of trailers per message. [`Framing`] bounds their bytes.
pub const TRAILERS: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TrailerError {
    /// The section is not a valid list of fields.
    #[error("the trailers are malformed")]
    Malformed,
    #[error("there are more than {TRAILERS} trailers, or more than {MAX_TRAILERS} bytes of them")]
    TooMany,
}

/// Checks trailers that came over HTTP/2, from which fields may be missing (`incomplete`) because they were too large.
pub fn check(trailers: &HeaderMap, incomplete: bool) -> Result<(), TrailerError> {
    let is_large = trailers.len() > TRAILERS || fields_len(trailers) > MAX_TRAILERS as usize;
    match () {
        () if is_large || incomplete => Err(TrailerError::TooMany),
        () if padded(trailers).is_some() => Err(TrailerError::Malformed),
        () => Ok(()),
    }
}

/// Appends to `section` the bytes of a run of chunked syntax that belong to the trailer section; `framing` is the state
/// at the start of the run.
pub fn keep(mut framing: Framing, syntax: &[u8], section: &mut BytesMut) {
    for &byte in syntax {
        if framing.state >= state::TRAILER_FIRST {
            section.extend_from_slice(&[byte]);
        }
        framing.step(byte);
    }
}

/// Parses a complete section, which may be empty.
pub fn parse(section: &[u8]) -> Result<HeaderMap, TrailerError> {
    let mut fields = [httparse::EMPTY_HEADER; TRAILERS];
    let mut trailers = HeaderMap::new();
    if section.is_empty() {
        return Ok(trailers);
    }
    let fields = match httparse::parse_headers(section, &mut fields) {
        Ok(httparse::Status::Complete((_, fields))) => fields,
        Err(httparse::Error::TooManyHeaders) => return Err(TrailerError::TooMany),
        Ok(httparse::Status::Partial) | Err(_) => return Err(TrailerError::Malformed),
    };
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(field.value)) {
            trailers.append(name, value);
        }
    }
    Ok(trailers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailers_are_extracted_from_chunks_in_any_cuts() {
        let wire = b"3\r\nabc\r\n0;x=y\r\nGrpc-Status: 0\r\nx-a: 1\r\nx-a: 2\r\n\r\n";
        for cut in 1..wire.len() {
            let (mut framing, mut section, mut data) = (Framing::chunked(), BytesMut::new(), Vec::new());
            for mut piece in [&wire[..cut], &wire[cut..]] {
                while !piece.is_empty() {
                    let begin = framing;
                    let (taken, payload) = framing.next(piece);
                    match payload {
                        Some(payload) => data.extend_from_slice(payload),
                        None => keep(begin, &piece[..taken], &mut section),
                    }
                    piece = &piece[taken..];
                }
            }
            let trailers = parse(&section).unwrap();
            assert!(framing.is_done() && data == b"abc", "{cut}");
            assert_eq!(trailers["grpc-status"], "0", "{cut}");
            assert_eq!(trailers.get_all("x-a").iter().count(), 2, "{cut}");
        }
    }

    #[test]
    fn invalid_trailer_section_is_malformed() {
        for section in [&b"a b: 1\r\n\r\n"[..], b": 1\r\n\r\n", b"a: 1\r\n b\r\n\r\n", b"a : 1\r\n\r\n"] {
            assert_eq!(parse(section), Err(TrailerError::Malformed), "{section:?}");
        }
        assert!(parse(b"\r\n").unwrap().is_empty());
    }

    #[test]
    fn excess_trailers_are_refused() {
        let section = |trailers| format!("{}\r\n", "a: 1\r\n".repeat(trailers));
        assert_eq!(parse(section(TRAILERS).as_bytes()).unwrap().len(), TRAILERS);
        assert_eq!(parse(section(TRAILERS + 1).as_bytes()), Err(TrailerError::TooMany));
    }
}
