//! The payload of a request body, received over HTTP/1.1 or HTTP/2.

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::Frame;

use crate::{
    client::Client,
    error::Error,
    http::{
        body::{BodyError, BodyReader, Decoded},
        trailers::{self, TrailerError},
    },
};

/// Size of the first read of a body, in bytes; most bodies are small.
const READ: usize = 16 * 1024;

pub(super) struct BodySource {
    reader: BodyReader,
    received: u64,
    /// The trailers after the body.
    pub(super) trailers: HeaderMap,
}

impl BodySource {
    pub(super) fn new(reader: BodyReader) -> Self {
        Self { reader, received: 0, trailers: HeaderMap::new() }
    }

    pub(super) fn is_done(&self) -> bool {
        self.reader.is_done()
    }

    /// Returns the next piece; `None` at the end. Cancel-safe.
    pub(super) async fn next(&mut self, client: &mut Client) -> Result<Option<Bytes>, Error> {
        let piece = match client {
            Client::Http1(socket) => loop {
                match self.reader.decode(&mut socket.buf)? {
                    Decoded::Piece(piece) => break Some(piece),
                    Decoded::Done => {
                        self.trailers = self.reader.trailers();
                        break None;
                    }
                    Decoded::Incomplete => {}
                }
                match socket.read(READ).await {
                    Ok(0) => return Err(Error::BodyCut { found: self.received }),
                    Ok(_) => {}
                    Err(_) => return Err(Error::ClientGone),
                }
            },
            Client::Http2(stream) => loop {
                if self.reader.is_done() {
                    break None;
                }
                let frame = stream.frame().await.transpose().map_err(|_| Error::ClientGone)?;
                if frame.is_none() || stream.is_read() {
                    self.reader.end();
                }
                match frame.map(Frame::into_data) {
                    Some(Ok(data)) if !data.is_empty() => {
                        self.reader.frame(data.len())?;
                        break Some(data);
                    }
                    Some(Err(trailers)) => {
                        let trailers = trailers.into_trailers().unwrap_or_default();
                        trailers::check(&trailers, stream.lacks_trailers()).map_err(|error| match error {
                            TrailerError::TooMany => BodyError::Trailers,
                            TrailerError::Malformed => BodyError::Trailer,
                        })?;
                        self.trailers = trailers;
                    }
                    Some(Ok(_)) | None => {}
                }
            },
        };
        self.received += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Ok(piece)
    }
}
