//! Collects an EPP's replies to the request's body and decides whether the client's or the EPP's body is sent.
//!
//! EPPs reply in two ways: with a stream of pieces and an end (GIE, llm-d), or with one reply per message, empty if the piece is
//! unchanged (lwepp). Invariant: the result is never a mixture of both bodies.

use std::sync::Arc;

use bytes::Bytes;
use penstock_proto::ext_proc::body_mutation::Mutation;
use ring::digest;

use super::error::PickError;
use crate::{abridge::Renamed, budget::Budget};

/// The body to send to the endpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// The client's body.
    Original,
    /// These pieces, in order.
    Replaced(Vec<Bytes>),
    /// The client's body under another model name.
    Renamed(Box<Renamed>),
    /// The SHA-256 of a replacement for which there was no memory. The request can be sent only if it equals the client's body.
    DigestOnly(Box<[u8]>),
}

/// The EPP's replies to one request body.
pub struct Replacement {
    limit: usize,
    memory: Arc<Budget>,
    pieces: Vec<Bytes>,
    /// The digest of all pieces, once there was no memory to keep a piece.
    digest: Option<digest::Context>,
    bytes: usize,
    /// Replies that keep their piece unchanged.
    kept: usize,
    /// Replies that replace or drop their piece.
    replaced: usize,
    streamed: bool,
    ended: bool,
}

impl Replacement {
    /// Collects up to `limit` bytes, which count against `memory` until the last piece is dropped. If `memory` is exhausted, only
    /// the digest is kept, which still tells whether the body equals the client's.
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

    /// Takes the reply to one body message. Fails with `BodyTooLarge` if the body exceeds the limit.
    pub fn reply(&mut self, mutation: Option<Mutation>) -> Result<(), PickError> {
        // Envoy repeats the end of a large body, and EPPs may do the same.
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

    /// Takes the mutation in a reply to the head after which no replies to the body come. Without a body in it, the client's body is
    /// used; if earlier replies have replaced a part, the other parts still need theirs.
    pub fn with_head(&mut self, mutation: Option<Mutation>) -> Result<(), PickError> {
        match mutation {
            None | Some(Mutation::ClearBody(false)) => {
                self.ended |= self.is_untouched();
                Ok(())
            }
            Some(Mutation::ClearBody(true)) => self.whole(Bytes::new()),
            Some(Mutation::Body(body)) => self.whole(body),
            Some(Mutation::StreamedResponse(piece)) if piece.end_of_stream => self.whole(piece.body),
            // More pieces follow.
            Some(piece @ Mutation::StreamedResponse(_)) => self.reply(Some(piece)),
        }
    }

    fn whole(&mut self, body: Bytes) -> Result<(), PickError> {
        // A second body after pieces of a first one.
        self.replaced += usize::from(self.streamed);
        self.streamed = true;
        self.ended = true;
        self.push(body)
    }

    /// Bytes of the EPP's body so far.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the EPP has left the client's body unchanged so far.
    pub fn is_untouched(&self) -> bool {
        !self.streamed && self.replaced == 0
    }

    /// Whether the EPP's replies are complete. `sent` is the number of body messages so far; `all` is true if there are no more.
    pub fn is_whole(&self, sent: usize, all: bool) -> bool {
        self.ended || (all && !self.streamed && self.kept + self.replaced >= sent)
    }

    /// Returns the body. Fails with `BodyPartial` if the EPP replaced only part of it.
    pub fn take(&mut self) -> Result<Body, PickError> {
        if self.is_untouched() {
            return Ok(Body::Original);
        }
        // Streamed pieces are the whole body, even after empty replies. Replies per message have to replace every piece.
        let mixed = if self.streamed { self.replaced > 0 } else { self.kept > 0 };
        if mixed {
            return Err(PickError::BodyPartial);
        }
        Ok(match self.digest.take() {
            Some(digest) => Body::DigestOnly(digest.finish().as_ref().into()),
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
