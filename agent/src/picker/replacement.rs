//! What the EPP makes of the request's body: its replies to the body messages, counted and collected.
//!
//! Given each reply in turn, it says when the body is known and then whether it is the client's or the EPP's. EPPs reply in two
//! ways: with a stream of pieces of its own that has an end (GIE, llm-d), or with one reply per message, empty where the piece
//! stays (lwepp). Never gives a body that is partly the one and partly the other.

use std::sync::Arc;

use bytes::Bytes;
use penstock_proto::ext_proc::body_mutation::Mutation;
use ring::digest;

use super::{error::PickError, exchange::Body};
use crate::budget::Budget;

pub struct Replacement {
    limit: usize,
    memory: Arc<Budget>,
    pieces: Vec<Bytes>,
    /// Once there was no room for a piece: of all of them.
    digest: Option<digest::Context>,
    bytes: usize,
    /// Replies that leave their piece as it is, and replies that replace or drop it.
    kept: usize,
    replaced: usize,
    streamed: bool,
    ended: bool,
}

impl Replacement {
    /// Up to `limit` bytes, which count against `memory` until the last of their pieces is dropped. Where that has no room for
    /// them, nothing is held but their digest, which still tells whether they are the client's.
    pub fn new(limit: usize, memory: Arc<Budget>) -> Self {
        Self {
            limit,
            memory,
            pieces: Vec::new(),
            digest: None,
            bytes: 0,
            kept: 0,
            replaced: 0,
            streamed: false,
            ended: false,
        }
    }

    pub fn reply(&mut self, mutation: Option<Mutation>) -> Result<(), PickError> {
        // Envoy repeats the end of a large body, and so may what copies it.
        if self.ended {
            return Ok(());
        }
        match mutation {
            None | Some(Mutation::ClearBody(false)) => self.kept += 1,
            Some(Mutation::ClearBody(true)) => self.replaced += 1,
            Some(Mutation::Body(body)) => {
                self.replaced += 1;
                self.push(body)?;
            }
            Some(Mutation::StreamedResponse(piece)) => {
                self.streamed = true;
                self.ended = piece.end_of_stream;
                self.push(piece.body)?;
            }
        }
        Ok(())
    }

    /// A body that came with the reply to the head.
    pub fn whole(&mut self, body: Bytes) -> Result<(), PickError> {
        self.streamed = true;
        self.ended = true;
        self.push(body)
    }

    /// Bytes of the EPP's body so far.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Nothing but the client's body so far.
    pub fn is_untouched(&self) -> bool {
        !self.streamed && self.replaced == 0
    }

    /// The fate of the body is known; `sent` messages of it have gone out, and `all` says that there are no more.
    pub fn is_whole(&self, sent: usize, all: bool) -> bool {
        self.ended || (all && !self.streamed && self.kept + self.replaced >= sent)
    }

    pub fn take(&mut self) -> Result<Body, PickError> {
        if self.is_untouched() {
            return Ok(Body::Original);
        }
        // Streamed pieces are the whole body whatever empty replies came before them; replies per message must all replace.
        let mixed = if self.streamed { self.replaced > 0 } else { self.kept > 0 };
        if mixed {
            return Err(PickError::BodyPartial);
        }
        Ok(match self.digest.take() {
            Some(digest) => Body::Unheld(digest.finish().as_ref().into()),
            None => Body::Replaced(std::mem::take(&mut self.pieces)),
        })
    }

    fn push(&mut self, piece: Bytes) -> Result<(), PickError> {
        self.bytes += piece.len();
        if self.bytes > self.limit {
            return Err(PickError::BodyTooLarge { limit: self.limit });
        }
        if piece.is_empty() {
            return Ok(());
        }
        let unheld = if self.digest.is_some() { Err(piece) } else { self.memory.hold(piece) };
        let piece = match unheld {
            Ok(held) => {
                self.pieces.push(held);
                return Ok(());
            }
            Err(piece) => piece,
        };
        let digest = self.digest.get_or_insert_with(|| digest::Context::new(&digest::SHA256));
        for held in self.pieces.drain(..) {
            digest.update(&held);
        }
        digest.update(&piece);
        Ok(())
    }
}

impl std::fmt::Debug for Replacement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replacement").field("bytes", &self.bytes).field("ended", &self.ended).finish_non_exhaustive()
    }
}
