//! The body of a response as its payload, whatever the endpoint speaks: pieces in order, then the trailers.
//!
//! For deliveries that cannot keep the endpoint's bytes as they are, because HTTP/2 is spoken on one side.

use std::io;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use penstock_common::framing::{Framing, state};

use super::{connection::EndpointConnection, http2::Stream};

/// Largest piece.
const READ: usize = 64 * 1024;
/// Trailers of one message.
const TRAILERS: usize = 64;

pub enum ResponseBody {
    Http1 {
        connection: EndpointConnection,
        /// From the first byte of `pending` on.
        framing: Framing,
        /// Read and not yet used.
        pending: BytesMut,
    },
    Http2 {
        /// `None`: there is none, whatever the endpoint sends.
        body: Option<Incoming>,
        /// Kept as long as the body.
        stream: Stream,
    },
}

pub enum Piece {
    /// Not empty.
    Data(Bytes),
    /// The message is complete.
    End(HeaderMap),
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl ResponseBody {
    /// Nothing follows the head.
    pub fn is_done(&self) -> bool {
        match self {
            Self::Http1 { framing, .. } => framing.is_done(),
            Self::Http2 { body, .. } => body.as_ref().is_none_or(hyper::body::Body::is_end_stream),
        }
    }

    /// The next piece. An error when the endpoint closes inside the message or sends what is none. Not to be called after the
    /// end. `trailers`: what has been read of them, kept by the caller between calls. Cancel-safe.
    pub async fn next(&mut self, trailers: &mut BytesMut) -> io::Result<Piece> {
        match self {
            Self::Http1 { connection, framing, pending } => loop {
                while !pending.is_empty() && !framing.is_done() {
                    let begin = *framing;
                    let (taken, payload) = framing.next(pending);
                    let is_payload = payload.is_some();
                    if framing.is_invalid() {
                        return Err(broken("the endpoint's chunks are malformed"));
                    }
                    let taken = pending.split_to(taken);
                    if is_payload {
                        return Ok(Piece::Data(taken.freeze()));
                    }
                    keep_trailers(begin, &taken, trailers);
                }
                if framing.is_done() {
                    return parse_trailers(trailers).map(Piece::End);
                }
                pending.reserve(READ);
                if connection.read(pending).await? == 0 {
                    // The end of the connection is the end of the message, or it breaks it.
                    let whole = framing.may_close();
                    *framing = Framing::none();
                    return if whole {
                        Ok(Piece::End(HeaderMap::new()))
                    } else {
                        Err(broken("the endpoint closed early"))
                    };
                }
            },
            Self::Http2 { body: None, .. } => Ok(Piece::End(HeaderMap::new())),
            Self::Http2 { body: Some(body), .. } => loop {
                let frame = body.frame().await.transpose().map_err(io::Error::other)?;
                match frame.map(hyper::body::Frame::into_data) {
                    None => return Ok(Piece::End(HeaderMap::new())),
                    Some(Ok(data)) if data.is_empty() => {}
                    Some(Ok(data)) => return Ok(Piece::Data(data)),
                    Some(Err(frame)) => return Ok(Piece::End(frame.into_trailers().unwrap_or_default())),
                }
            },
        }
    }
}

/// Of a run of chunked syntax, the bytes that belong to the trailer section; `framing` stands where the run begins.
fn keep_trailers(mut framing: Framing, syntax: &[u8], trailers: &mut BytesMut) {
    for &byte in syntax {
        if framing.state >= state::TRAILER_FIRST {
            trailers.extend_from_slice(&[byte]);
        }
        framing.step(byte);
    }
}

fn parse_trailers(section: &[u8]) -> io::Result<HeaderMap> {
    let mut fields = [httparse::EMPTY_HEADER; TRAILERS];
    let mut trailers = HeaderMap::new();
    if section.is_empty() {
        return Ok(trailers);
    }
    match httparse::parse_headers(section, &mut fields) {
        Ok(httparse::Status::Complete((_, fields))) => {
            for field in fields {
                let name = HeaderName::from_bytes(field.name.as_bytes());
                if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(field.value)) {
                    trailers.append(name, value);
                }
            }
            Ok(trailers)
        }
        _ => Err(broken("the endpoint's trailers are malformed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailers_are_told_from_chunks_however_the_bytes_are_cut() {
        let wire = b"3\r\nabc\r\n0;x=y\r\nGrpc-Status: 0\r\nx-a: 1\r\nx-a: 2\r\n\r\n";
        for cut in 1..wire.len() {
            let (mut framing, mut trailers, mut data) = (Framing::chunked(), BytesMut::new(), Vec::new());
            for mut piece in [&wire[..cut], &wire[cut..]] {
                while !piece.is_empty() {
                    let begin = framing;
                    let (taken, payload) = framing.next(piece);
                    match payload {
                        Some(payload) => data.extend_from_slice(payload),
                        None => keep_trailers(begin, &piece[..taken], &mut trailers),
                    }
                    piece = &piece[taken..];
                }
            }
            let trailers = parse_trailers(&trailers).unwrap();
            assert!(framing.is_done() && data == b"abc", "{cut}");
            assert_eq!(trailers["grpc-status"], "0", "{cut}");
            assert_eq!(trailers.get_all("x-a").iter().count(), 2, "{cut}");
        }
    }

    #[test]
    fn what_is_no_trailer_section_breaks_the_message() {
        for section in [&b"a b: 1\r\n\r\n"[..], b": 1\r\n\r\n"] {
            assert!(parse_trailers(section).is_err(), "{section:?}");
        }
        assert!(parse_trailers(b"\r\n").unwrap().is_empty());
    }
}
