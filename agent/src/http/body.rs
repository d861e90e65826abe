//! Request bodies: off the wire in pieces, and kept so that they can be sent again.
//!
//! [`BodyReader`] is pure: wire bytes in, payload out, the limit on size enforced. [`ReplayBody`] holds the payload until the
//! endpoint has answered, because an endpoint that cannot be reached is replaced by the next of the list and the body goes
//! out anew: first in memory, then in an unlinked temporary file that only threads made for blocking touch.

use std::{borrow::Borrow, fs::File, io, os::unix::fs::FileExt, sync::Arc};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use penstock_common::framing::Framing;

use super::{head::shown, request::RequestBody, trailers};

/// Largest piece that a replay yields, and the unit in which the file is written.
pub const PIECE: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the body is larger than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("found \"{found}\" in a chunked body, expected a chunk as RFC 9112 §7.1 has it")]
    Chunk { found: String },
    #[error("chunk sizes, extensions and trailers take {found} bytes for {payload} bytes of payload")]
    Overhead { found: u64, payload: u64 },
    #[error("the body could not be kept in a temporary file: {0}")]
    File(#[from] io::Error),
}

impl BodyError {
    pub fn status(&self) -> StatusCode {
        match self {
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Chunk { .. } | Self::Overhead { .. } => StatusCode::BAD_REQUEST,
            Self::File(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "body_too_large",
            Self::Chunk { .. } => "chunk",
            Self::Overhead { .. } => "chunk_overhead",
            Self::File(_) => "body_file",
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Payload, never empty.
    Piece(Bytes),
    /// The buffer is used up and the body goes on.
    Incomplete,
    /// The body is complete; what is left in the buffer belongs to the next request.
    Done,
}

/// Takes a request body off the wire. After an error it must not be used again.
#[derive(Debug)]
pub struct BodyReader {
    framing: Framing,
    limit: u64,
    payload: u64,
    overhead: u64,
    /// As they came, behind the last chunk.
    trailers: BytesMut,
}

impl BodyReader {
    /// Fails at once when the declared length is above `limit`.
    pub fn new(body: RequestBody, limit: u64) -> Result<Self, BodyError> {
        let framing = match body {
            RequestBody::None => Framing::none(),
            RequestBody::Length(bytes) | RequestBody::Frames(Some(bytes)) if bytes > limit => {
                return Err(BodyError::TooLarge { limit });
            }
            RequestBody::Length(bytes) => Framing::length(bytes),
            RequestBody::Chunked => Framing::chunked(),
            RequestBody::Frames(_) => Framing::until_close(),
        };
        Ok(Self { framing, limit, payload: 0, overhead: 0, trailers: BytesMut::new() })
    }

    pub fn is_done(&self) -> bool {
        self.framing.is_done()
    }

    /// The trailers of a complete body. A section that cannot be read has none: they are optional (RFC 9110 §6.5.1).
    pub fn trailers(&self) -> HeaderMap {
        trailers::parse(&self.trailers).unwrap_or_default()
    }

    /// Books a frame of `bytes`.
    pub fn frame(&mut self, bytes: usize) -> Result<(), BodyError> {
        self.payload += bytes as u64;
        if self.payload > self.limit { Err(BodyError::TooLarge { limit: self.limit }) } else { Ok(()) }
    }

    /// The last frame has come.
    pub fn end(&mut self) {
        self.framing = Framing::none();
    }

    /// Takes the next piece from the front of `buf`, without copying it. Never takes a byte beyond the body.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Decoded, BodyError> {
        while !self.framing.is_done() && !buf.is_empty() {
            let begin = self.framing;
            let (taken, payload) = self.framing.next(buf);
            let is_payload = payload.is_some();
            if self.framing.is_invalid() {
                return Err(BodyError::Chunk { found: shown(&buf[..taken]) });
            }
            if is_payload {
                self.payload += taken as u64;
                if self.payload > self.limit {
                    return Err(BodyError::TooLarge { limit: self.limit });
                }
                return Ok(Decoded::Piece(buf.split_to(taken).freeze()));
            }
            trailers::keep(begin, &buf[..taken], &mut self.trailers);
            buf.advance(taken);
            self.overhead += taken as u64;
            // Chunks of one byte are a waste but legal; extensions that outweigh the payload are an attack.
            if self.overhead > PIECE as u64 + 16 * self.payload {
                return Err(BodyError::Overhead { found: self.overhead, payload: self.payload });
            }
        }
        Ok(if self.framing.is_done() { Decoded::Done } else { Decoded::Incomplete })
    }
}

/// A request body that can be read any number of times.
///
/// The order is blocks in memory, then the file, then the tail. Pieces are copied into blocks: held as they came, a body of
/// one-byte chunks would keep every read buffer alive. Memory used is at most `memory` and one block.
#[derive(Debug)]
pub struct ReplayBody {
    memory: u64,
    limit: u64,
    blocks: Vec<Bytes>,
    file: Option<Arc<File>>,
    /// Bytes in the file.
    filed: u64,
    /// Begins small and grows; shorter than [`PIECE`] between calls.
    tail: BytesMut,
    length: u64,
}

impl ReplayBody {
    /// Keeps about `memory` bytes in memory and at most `limit` bytes in all.
    pub fn new(memory: usize, limit: u64) -> Self {
        let (blocks, tail) = (Vec::new(), BytesMut::new());
        Self { memory: memory as u64, limit, blocks, file: None, filed: 0, tail, length: 0 }
    }

    pub fn len(&self) -> u64 {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes of it that lie in the temporary file.
    pub fn filed(&self) -> u64 {
        self.filed
    }

    /// Adds `piece` at the end. Not cancel-safe: a body whose `append` was dropped or failed has to be dropped too.
    pub async fn append(&mut self, mut piece: Bytes) -> Result<(), BodyError> {
        let length = self.length + piece.len() as u64;
        if length > self.limit {
            return Err(BodyError::TooLarge { limit: self.limit });
        }
        while !piece.is_empty() {
            let part = piece.split_to(piece.len().min(PIECE - self.tail.len()));
            self.tail.extend_from_slice(&part);
            if self.tail.len() == PIECE {
                let block = self.tail.split().freeze();
                self.store(block).await?;
            }
        }
        self.length = length;
        Ok(())
    }

    async fn store(&mut self, block: Bytes) -> Result<(), BodyError> {
        let held = (self.blocks.len() + 1) * PIECE;
        if self.file.is_none() && held as u64 <= self.memory {
            self.blocks.push(block);
            return Ok(());
        }
        let (file, offset, bytes) = (self.file.clone(), self.filed, block.len() as u64);
        let write = move || {
            let file = match file {
                Some(file) => file,
                None => Arc::new(tempfile::tempfile()?),
            };
            file.write_all_at(&block, offset)?;
            Ok::<_, io::Error>(file)
        };
        self.file = Some(blocking(write).await?);
        self.filed += bytes;
        Ok(())
    }

    /// Reads the body from its beginning.
    pub fn pieces(&self) -> Pieces<&Self> {
        Pieces::of(self)
    }
}

impl Drop for ReplayBody {
    /// Closing the last descriptor of an unlinked file frees its blocks, which may wait for the disk.
    fn drop(&mut self) {
        if let (Some(file), Ok(runtime)) = (self.file.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn_blocking(move || drop(file));
        }
    }
}

/// One reading of a [`ReplayBody`].
#[derive(Debug)]
pub struct Pieces<B> {
    body: B,
    at: u64,
}

impl<B: Borrow<ReplayBody>> Pieces<B> {
    /// From the beginning of `body`.
    pub fn of(body: B) -> Self {
        Self { body, at: 0 }
    }

    /// The next piece, 1 to [`PIECE`] bytes; `None` at the end. Cancel-safe: a dropped call yields the same piece again.
    pub async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        let body = self.body.borrow();
        let in_memory = (body.blocks.len() * PIECE) as u64;
        let piece = if self.at < in_memory {
            // Every block is full, so the position is always at the beginning of one.
            body.blocks[(self.at / PIECE as u64) as usize].clone()
        } else if let (Some(file), true) = (&body.file, self.at < in_memory + body.filed) {
            let (file, offset) = (Arc::clone(file), self.at - in_memory);
            let read = move || {
                let mut block = vec![0; PIECE];
                file.read_exact_at(&mut block, offset)?;
                Ok::<_, io::Error>(Bytes::from(block))
            };
            blocking(read).await?
        } else if self.at < body.length {
            Bytes::copy_from_slice(&body.tail)
        } else {
            return Ok(None);
        };
        self.at += piece.len() as u64;
        Ok(Some(piece))
    }
}

/// Runs `work` on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests;
