//! Receives a request body: keeps it, because it is sent back, scans it for the model, and hashes it for affinity.

use bytes::{Bytes, BytesMut};

use super::refusal::Refusal;
use crate::{
    bbr::{JsonError, Model, ModelScanner},
    picker::builtin::{PromptHash, PromptHasher},
};

#[derive(Debug)]
pub(super) struct ExchangeUpload {
    limit: usize,
    body: BytesMut,
    scanner: ModelScanner,
    json: Result<(), JsonError>,
    hasher: PromptHasher,
}

impl ExchangeUpload {
    pub(super) fn new(limit: usize) -> Self {
        let (scanner, hasher) = (ModelScanner::new(), PromptHasher::new());
        Self { limit, body: BytesMut::new(), scanner, json: Ok(()), hasher }
    }

    /// Adds a piece. Fails at once if the body is too large. Invalid JSON is reported at the end, as production EPPs do.
    pub(super) fn push(&mut self, piece: &[u8]) -> Result<(), Refusal> {
        if piece.len() > self.limit - self.body.len() {
            return Err(Refusal::TooLong(self.limit));
        }
        self.body.extend_from_slice(piece);
        self.hasher.update(piece);
        if self.json.is_ok() {
            self.json = self.scanner.feed(piece);
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<(PromptHash, Bytes), Refusal> {
        self.json?;
        match self.scanner.finish()?.model {
            Model::Found(_) => Ok((self.hasher.finish(), self.body.freeze())),
            Model::NotYet => Err(Refusal::NoModel),
            Model::NotAString(text) => Err(Refusal::ModelIsNotAString(text)),
        }
    }
}
