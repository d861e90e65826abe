//! A response body as payload pieces in order, followed by the trailers, over HTTP/1.1 or HTTP/2.
//!
//! Used if the endpoint's bytes cannot be passed on unchanged, because one side speaks HTTP/2.

use std::io;

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use http::HeaderMap;
use penstock_common::framing::Framing;

use super::{
    connection::EndpointConnection,
    http2::{self, Http2Stream},
    sending::{CutReason, Sending, Unfinished},
};
use crate::http::trailers;

/// Size of the read buffer, and so of the largest piece.
const READ: usize = 64 * 1024;

/// A response body that has not been delivered.
pub enum ResponseBody {
    Http1 {
        connection: EndpointConnection,
        /// The state of the framing at the first byte of `pending`.
        framing: Framing,
        /// Bytes that were read and not yet used.
        pending: BytesMut,
    },
    Http2 {
        /// `None` if the response has no body, whatever the endpoint sends.
        body: Option<RecvStream>,
        /// Kept as long as the body.
        stream: Http2Stream,
        /// The request, which may still be sent.
        sending: Sending,
        /// Tells the request's body why it is cut; `None` if the request has no body.
        cut: Option<CutReason>,
        /// The sending side of a request that could not be sent whole. Dropping it resets the stream.
        _unfinished: Unfinished,
    },
}

/// A piece of a response body.
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
    /// The request, if it has not been sent completely.
    pub fn sending(&self) -> Option<Sending> {
        let sending = match self {
            Self::Http1 { connection, .. } => connection.sending(),
            Self::Http2 { sending, .. } => Some(sending),
        };
        sending.filter(|sending| !sending.is_sent()).cloned()
    }

    /// Whether the body has ended.
    pub fn is_done(&self) -> bool {
        match self {
            Self::Http1 { framing, .. } => framing.is_done(),
            Self::Http2 { body, .. } => body.as_ref().is_none_or(RecvStream::is_end_stream),
        }
    }

    /// Whether the endpoint's connection may take another request after the end.
    pub fn is_reusable(&self) -> bool {
        match self {
            Self::Http1 { framing, pending, .. } => framing.is_done() && pending.is_empty(),
            Self::Http2 { .. } => false,
        }
    }

    /// Returns the next piece. Fails if the endpoint closes inside the message or sends invalid framing. Must not be called after
    /// the end. `section` holds the trailers read so far; the caller keeps it between calls. Cancel-safe.
    pub async fn next(&mut self, section: &mut BytesMut) -> io::Result<Piece> {
        match self {
            Self::Http1 { connection, framing, pending } => loop {
                while !pending.is_empty() && !framing.is_done() {
                    let begin = *framing;
                    let (taken, payload) = framing.next(pending);
                    let is_payload = payload.is_some();
                    if framing.is_invalid() {
                        return Err(broken("the endpoint sent malformed chunks"));
                    }
                    let taken = pending.split_to(taken);
                    if is_payload {
                        return Ok(Piece::Data(taken.freeze()));
                    }
                    trailers::keep(begin, &taken, section);
                }
                if framing.is_done() {
                    return trailers::parse(section).map(Piece::End).map_err(io::Error::other);
                }
                pending.reserve(READ);
                if connection.read(pending).await? == 0 {
                    // The close ends a body that is framed by it, and cuts any other.
                    let whole = framing.may_close();
                    *framing = Framing::none();
                    return if whole {
                        Ok(Piece::End(HeaderMap::new()))
                    } else {
                        Err(broken("the endpoint closed before the end of the body"))
                    };
                }
            },
            Self::Http2 { body, stream, cut, .. } => {
                let piece = match body {
                    Some(body) => next_frame(body, stream).await?,
                    None => Piece::End(HeaderMap::new()),
                };
                if let (Piece::End(_), Some(cut)) = (&piece, cut) {
                    cut.set_answered();
                }
                Ok(piece)
            }
        }
    }
}

async fn next_frame(body: &mut RecvStream, stream: &Http2Stream) -> io::Result<Piece> {
    while let Some(data) = http2::data(body).await.map_err(io::Error::other)? {
        if !data.is_empty() {
            return Ok(Piece::Data(data));
        }
    }
    stream.trailers(body).await.map(Piece::End)
}
