//! Request bodies: off the wire in pieces, and kept so that they can be sent again.
//!
//! [`BodyReader`] is pure: wire bytes in, payload out, the limit on size enforced. [`ReplayBody`] holds the payload until the
//! endpoint has answered, because an endpoint that cannot be reached is replaced by the next of the list and the body goes
//! out anew: first in memory, then in an unlinked temporary file that only threads made for blocking touch. Both count against
//! the budgets of all bodies ([`Bodies`]).

use std::{borrow::Borrow, fs::File, io, os::unix::fs::FileExt, sync::Arc};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use penstock_common::framing::Framing;
use ring::digest;

use super::{head::shown, request::RequestBody, trailers};
use crate::budget::{Bodies, Share};

/// Largest piece that a replay yields, and the unit in which the file is written while there is memory to gather it.
pub const PIECE: usize = 64 * 1024;
/// A piece that is read back while there is no room in the budget for it is at most this long, and counts nowhere.
const UNCOUNTED: usize = 16 * 1024;
/// Least memory that a body with a byte takes.
const LEAST: usize = 1024;

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
    #[error("there is no room for more request bodies {at}")]
    Full { at: &'static str },
}

impl BodyError {
    pub fn status(&self) -> StatusCode {
        match self {
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Chunk { .. } | Self::Overhead { .. } => StatusCode::BAD_REQUEST,
            Self::File(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Full { .. } => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "body_too_large",
            Self::Chunk { .. } => "chunk",
            Self::Overhead { .. } => "chunk_overhead",
            Self::File(_) => "body_file",
            Self::Full { .. } => "bodies_full",
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
/// one-byte chunks would keep every read buffer alive. Memory used is at most `memory` and one block, and what the budget of all
/// bodies has; where that has nothing left, each piece goes to the file as it comes.
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
    /// Bytes that the tail has room for; they are held already.
    room: usize,
    length: u64,
    bodies: Arc<Bodies>,
    /// Of blocks and tail.
    held: Share,
    spilled: Share,
}

impl ReplayBody {
    /// Keeps about `memory` bytes in memory and at most `limit` bytes in all.
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

    pub fn len(&self) -> u64 {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// All of it. What is left can take nothing any more.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let nothing = Self::new(0, 0, &self.bodies);
        std::mem::replace(self, nothing)
    }

    /// Bytes of it that lie in the temporary file.
    pub fn filed(&self) -> u64 {
        self.filed
    }

    /// Whether these pieces are the same bytes.
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

    pub async fn sha256(&self) -> Result<Box<[u8]>, BodyError> {
        let (mut digest, mut pieces) = (digest::Context::new(&digest::SHA256), self.pieces());
        while let Some(piece) = pieces.next().await? {
            digest.update(&piece);
        }
        Ok(digest.finish().as_ref().into())
    }

    /// Adds `piece` at the end. Not cancel-safe: a body whose `append` was dropped or failed has to be dropped too.
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

    /// Whether the tail can be so long.
    fn make_room(&mut self, bytes: usize) -> bool {
        if bytes <= self.room {
            return true;
        }
        let room = bytes.next_power_of_two().clamp(LEAST, PIECE);
        if !self.held.grow((room - self.room) as u64) {
            return false;
        }
        // Not `reserve`, which may take twice as much.
        let mut tail = BytesMut::with_capacity(room);
        tail.extend_from_slice(&self.tail);
        (self.tail, self.room) = (tail, room);
        true
    }

    /// The tail is a whole block.
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

    /// Reads the body from its beginning.
    pub fn pieces(&self) -> Pieces<&Self> {
        Pieces::of(self)
    }

    /// What is at this offset, 1 to [`PIECE`] bytes; `None` behind what there is. A copy counts while it lives.
    pub async fn piece_at(&self, at: u64) -> Result<Option<Bytes>, BodyError> {
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
            length = length.min(UNCOUNTED);
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
    /// Closing the last descriptor of an unlinked file frees its blocks, which may wait for the disk. Until then they count.
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
        let piece = self.body.borrow().piece_at(self.at).await?;
        self.at += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Ok(piece)
    }
}

/// Whether it is the disk, or a quota of it, that has no room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

/// Runs `work` on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests;
