//! Reads request bodies from the wire and keeps them for replay.
//!
//! [`BodyReader`] is pure: it takes wire bytes, returns payload and enforces the size limit. [`ReplayBody`] keeps the
//! payload until an endpoint has answered, because a retry sends the whole body to the next endpoint. It spills from
//! memory to an unlinked temporary file, which only blocking threads access. Both count against the budgets of all
//! bodies ([`Bodies`]).

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use penstock_common::framing::{Framing, MAX_TRAILERS};
use ring::digest;

use super::{
    head::shown,
    request::RequestBody,
    trailers::{self, TRAILERS, TrailerError},
};
use crate::budget::{Bodies, Share};

/// Largest piece that a replay returns, and the unit of file writes while memory is available, in bytes.
pub const PIECE: usize = 64 * 1024;
/// Largest piece, in bytes, that is read back uncounted if the budget is exhausted.
const UNCOUNTED: usize = 16 * 1024;
/// Smallest memory allocation of a non-empty body, in bytes.
const LEAST: usize = 1024;

/// Why a request body was not taken.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// More payload than allowed, or a declared length above that.
    #[error("the body is larger than {limit} bytes")]
    TooLarge {
        /// `limits.body_bytes`.
        limit: u64,
    },
    /// Chunked syntax that is invalid.
    #[error("found \"{found}\" in a chunked body, expected a chunk (RFC 9112 §7.1)")]
    Chunk {
        /// The invalid bytes, escaped and cut.
        found: String,
    },
    /// A trailer section that is too large.
    #[error("found more than {TRAILERS} trailers, or more than {MAX_TRAILERS} bytes of them")]
    Trailers,
    /// A trailer of HTTP/2 that is malformed.
    #[error("found a trailer with white space around its value (RFC 9113 §8.2.1)")]
    Trailer,
    /// Chunk extensions or trailers that outweigh the payload.
    #[error("chunk sizes, extensions and trailers take {found} bytes for {payload} bytes of payload")]
    Overhead {
        /// Bytes of chunked syntax.
        found: u64,
        /// Bytes of payload so far.
        payload: u64,
    },
    /// The temporary file failed.
    #[error("could not store the body in a temporary file: {0}")]
    File(#[from] io::Error),
    /// The bodies of all requests take as much as they may.
    #[error("no space left for request bodies {at}")]
    Full {
        /// Which budget is exhausted, as the end of the message.
        at: &'static str,
    },
}

impl BodyError {
    /// The status that the client gets.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Trailers => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Chunk { .. } | Self::Trailer | Self::Overhead { .. } => StatusCode::BAD_REQUEST,
            Self::File(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Full { .. } => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "body_too_large",
            Self::Chunk { .. } => "chunk",
            Self::Trailers => "too_many_trailers",
            Self::Trailer => "trailer",
            Self::Overhead { .. } => "chunk_overhead",
            Self::File(_) => "body_file",
            Self::Full { .. } => "bodies_full",
        }
    }
}

/// What a call of [`BodyReader::decode`] has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Payload; never empty.
    Piece(Bytes),
    /// The buffer is empty and the body continues.
    Incomplete,
    /// The body is complete; the rest of the buffer belongs to the next request.
    Done,
}

/// Reads a request body from the wire. Must not be used after an error.
#[derive(Debug)]
pub struct BodyReader {
    framing: Framing,
    limit: u64,
    payload: u64,
    overhead: u64,
    /// The raw trailer section after the last chunk, and its fields once it is complete.
    section: BytesMut,
    trailers: HeaderMap,
}

impl BodyReader {
    /// Fails immediately if the declared length exceeds `limit`.
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
        Ok(Self { framing, limit, payload: 0, overhead: 0, section: BytesMut::new(), trailers: HeaderMap::new() })
    }

    /// Whether the body is complete. Also true from the start without a body.
    pub fn is_done(&self) -> bool {
        self.framing.is_done()
    }

    /// The trailers of a complete body.
    pub fn trailers(&self) -> HeaderMap {
        self.trailers.clone()
    }

    /// Counts a frame of `bytes` against the limit.
    pub fn frame(&mut self, bytes: usize) -> Result<(), BodyError> {
        self.payload += bytes as u64;
        if self.payload > self.limit { Err(BodyError::TooLarge { limit: self.limit }) } else { Ok(()) }
    }

    /// Marks the body complete after its last frame.
    pub fn end(&mut self) {
        self.framing = Framing::none();
    }

    /// Takes the next piece from the front of `buf` without copying it. Never takes a byte beyond the body.
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
            trailers::keep(begin, &buf[..taken], &mut self.section);
            buf.advance(taken);
            self.overhead += taken as u64;
            // One-byte chunks are wasteful but legal; extensions that outweigh the payload are an attack.
            if self.overhead > PIECE as u64 + 16 * self.payload {
                return Err(BodyError::Overhead { found: self.overhead, payload: self.payload });
            }
        }
        if !self.framing.is_done() {
            return Ok(Decoded::Incomplete);
        }
        if !self.section.is_empty() {
            self.trailers = match trailers::parse(&self.section) {
                Ok(trailers) => trailers,
                Err(error) => {
                    // What follows the body of such a client is not to be trusted: the body never ends.
                    self.framing = Framing::until_close();
                    return Err(match error {
                        TrailerError::Malformed => BodyError::Chunk { found: shown(&self.section) },
                        TrailerError::TooMany => BodyError::Trailers,
                    });
                }
            };
            self.section.clear();
        }
        Ok(Decoded::Done)
    }
}

/// A request body that can be read any number of times.
///
/// The order is: blocks in memory, the file, the tail. Pieces are copied into blocks, because a body of one-byte chunks
/// would otherwise keep every read buffer alive. Uses at most `memory` plus one block, within the budget of all bodies;
/// if that budget is exhausted, pieces go to the file as they arrive.
#[derive(Debug)]
pub struct ReplayBody {
    memory: u64,
    limit: u64,
    blocks: Vec<Bytes>,
    file: Option<Arc<File>>,
    /// Bytes in the file.
    filed: u64,
    /// Starts small and grows; shorter than [`PIECE`] between calls.
    tail: BytesMut,
    /// Capacity of the tail in bytes, already counted in `held`.
    room: usize,
    length: u64,
    bodies: Arc<Bodies>,
    /// The share for blocks and tail.
    held: Share,
    spilled: Share,
}

impl ReplayBody {
    /// Keeps about `memory` bytes in memory and at most `limit` bytes in total.
    pub fn new(memory: usize, limit: u64, bodies: &Arc<Bodies>) -> Self {
        Self {
            memory: memory as u64,
            limit,
            blocks: Vec::new(),
            file: None,
            filed: 0,
            tail: BytesMut::new(),
            room: 0,
            length: 0,
            bodies: Arc::clone(bodies),
            held: bodies.memory.share(),
            spilled: bodies.spill.share(),
        }
    }

    /// Bytes kept so far, in memory and in the file.
    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// Moves the body out. The body left behind accepts nothing.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let nothing = Self::new(0, 0, &self.bodies);
        std::mem::replace(self, nothing)
    }

    /// Bytes of the body in the temporary file.
    pub fn filed(&self) -> u64 {
        self.filed
    }

    /// Whether `pieces` contain the same bytes.
    pub async fn is_same(&self, pieces: &[Bytes]) -> Result<bool, BodyError> {
        if pieces.iter().map(|piece| piece.len() as u64).sum::<u64>() != self.length {
            return Ok(false);
        }
        let (mut ours, mut left) = (self.pieces(), Bytes::new());
        for piece in pieces {
            let mut theirs = &piece[..];
            while !theirs.is_empty() {
                if left.is_empty() {
                    left = ours.next().await?.unwrap_or_default();
                }
                let both = theirs.len().min(left.len());
                if both == 0 || theirs[..both] != left[..both] {
                    return Ok(false);
                }
                left.advance(both);
                theirs = &theirs[both..];
            }
        }
        Ok(true)
    }

    /// The SHA-256 of what is kept. Fails if the file cannot be read.
    pub(crate) async fn sha256(&self) -> Result<Box<[u8]>, BodyError> {
        let (mut digest, mut pieces) = (digest::Context::new(&digest::SHA256), self.pieces());
        while let Some(piece) = pieces.next().await? {
            digest.update(&piece);
        }
        Ok(digest.finish().as_ref().into())
    }

    /// Appends `piece`. Not cancel-safe: a body whose `append` was dropped or failed must be dropped too.
    pub async fn append(&mut self, mut piece: Bytes) -> Result<(), BodyError> {
        let length = self.length + piece.len() as u64;
        if length > self.limit {
            return Err(BodyError::TooLarge { limit: self.limit });
        }
        while !piece.is_empty() {
            let part = piece.len().min(PIECE - self.tail.len());
            if !self.make_room(self.tail.len() + part) {
                self.spill_tail("total").await?;
                self.spill(piece, "total").await?;
                break;
            }
            self.tail.extend_from_slice(&piece.split_to(part));
            if self.tail.len() == PIECE {
                self.store().await?;
            }
        }
        self.length = length;
        Ok(())
    }

    /// Grows the tail's capacity to `bytes`. Returns false if the budget is exhausted.
    fn make_room(&mut self, bytes: usize) -> bool {
        if bytes <= self.room {
            return true;
        }
        let room = bytes.next_power_of_two().clamp(LEAST, PIECE);
        if !self.held.grow((room - self.room) as u64) {
            return false;
        }
        // `reserve` may allocate twice as much.
        let mut tail = BytesMut::with_capacity(room);
        tail.extend_from_slice(&self.tail);
        (self.tail, self.room) = (tail, room);
        true
    }

    /// Stores the full tail as a block, or spills it.
    async fn store(&mut self) -> Result<(), BodyError> {
        let held = (self.blocks.len() + 1) * PIECE;
        if self.file.is_none() && held as u64 <= self.memory {
            self.blocks.push(std::mem::take(&mut self.tail).freeze());
            self.room = 0;
            return Ok(());
        }
        self.spill_tail("body").await
    }

    async fn spill_tail(&mut self, why: &'static str) -> Result<(), BodyError> {
        let tail = std::mem::take(&mut self.tail).freeze();
        self.spill(tail, why).await?;
        self.held.shrink(self.room as u64);
        self.room = 0;
        Ok(())
    }

    async fn spill(&mut self, bytes: Bytes, why: &'static str) -> Result<(), BodyError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let length = bytes.len() as u64;
        if !self.spilled.grow(length) {
            return Err(self.refused("files"));
        }
        if self.file.is_none() {
            self.bodies.spilled(why);
        }
        let (file, offset) = (self.file.clone(), self.filed);
        let write = move || {
            let file = match file {
                Some(file) => file,
                None => Arc::new(tempfile::tempfile()?),
            };
            file.write_all_at(&bytes, offset)?;
            Ok::<_, io::Error>(file)
        };
        self.file = match blocking(write).await {
            Err(error) if is_full(&error) => return Err(self.refused("disk")),
            file => Some(file?),
        };
        self.filed += length;
        Ok(())
    }

    fn refused(&self, at: &'static str) -> BodyError {
        self.bodies.refused(at);
        BodyError::Full { at: if at == "disk" { "on the disk" } else { "in memory and in files" } }
    }

    /// Reads the body from the beginning.
    pub fn pieces(&self) -> ReplayPieces<'_> {
        ReplayPieces { body: self, at: 0 }
    }

    /// All of it, counted once more for as long as the pieces live; `None` if the budget has no room for that.
    pub async fn in_memory(&self) -> Result<Option<Vec<Bytes>>, BodyError> {
        let (mut pieces, mut at) = (Vec::new(), 0);
        while let Some(piece) = self.read_at(at, 0).await? {
            at += piece.len() as u64;
            // Blocks count with this body, which may be gone before their clones are.
            let is_block = at <= (self.blocks.len() * PIECE) as u64;
            let counted = if is_block { self.bodies.memory.hold(piece) } else { Ok(piece) };
            match counted {
                Ok(piece) if !piece.is_empty() => pieces.push(piece),
                _ => return Ok(None),
            }
        }
        Ok(Some(pieces))
    }

    /// Returns 1 to [`PIECE`] bytes at this offset; `None` at or beyond the end. A copy counts against the budget while
    /// it lives.
    pub async fn piece_at(&self, at: u64) -> Result<Option<Bytes>, BodyError> {
        self.read_at(at, UNCOUNTED).await
    }

    /// As [`piece_at`](Self::piece_at), with at most `uncounted` bytes if the budget has no room.
    async fn read_at(&self, at: u64, uncounted: usize) -> Result<Option<Bytes>, BodyError> {
        let in_memory = (self.blocks.len() * PIECE) as u64;
        let before_tail = in_memory + self.filed;
        if at >= self.length {
            return Ok(None);
        }
        if at < in_memory {
            let (block, from) = ((at / PIECE as u64) as usize, (at % PIECE as u64) as usize);
            return Ok(Some(self.blocks[block].slice(from..)));
        }
        let end = if at < before_tail { before_tail } else { self.length };
        let mut length = (end - at).min(PIECE as u64) as usize;
        let mut share = self.bodies.memory.share();
        if !share.grow(length as u64) {
            length = length.min(uncounted);
        }
        let copy = match &self.file {
            Some(file) if at < before_tail => {
                let (file, offset) = (Arc::clone(file), at - in_memory);
                let read = move || {
                    let mut piece = vec![0; length];
                    file.read_exact_at(&mut piece, offset)?;
                    Ok::<_, io::Error>(Bytes::from(piece))
                };
                blocking(read).await?
            }
            _ => {
                let from = (at - before_tail) as usize;
                Bytes::copy_from_slice(&self.tail[from..from + length])
            }
        };
        Ok(Some(share.hold(copy)))
    }
}

impl Drop for ReplayBody {
    /// Closing the last descriptor of an unlinked file frees its blocks, which may block on the disk. The spilled bytes
    /// count until then.
    fn drop(&mut self) {
        let spilled = std::mem::replace(&mut self.spilled, self.bodies.spill.share());
        if let (Some(file), Ok(runtime)) = (self.file.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn_blocking(move || {
                drop(file);
                drop(spilled);
            });
        }
    }
}

/// One reading of a [`ReplayBody`].
#[derive(Debug)]
pub struct ReplayPieces<'a> {
    body: &'a ReplayBody,
    at: u64,
}

impl ReplayPieces<'_> {
    /// Returns the next piece of 1 to [`PIECE`] bytes; `None` at the end. Cancel-safe: a dropped call yields the same
    /// piece again.
    pub async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        let piece = self.body.piece_at(self.at).await?;
        self.at += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Ok(piece)
    }
}

/// Whether the disk or a quota is full.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

/// Runs `work` on a blocking thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests;
