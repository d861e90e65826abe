//! Scans a body as it arrives: the model that it names and the hash of its prompt.
//!
//! A body with a content coding is decoded for the scan only and forwarded unchanged. Decoding is required only if the
//! route needs the model or `missing_model = "reject"`: then a body that cannot be decoded is refused. Otherwise such a
//! body counts as one without a model.

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;

use crate::{
    bbr::{Naming, NamingError},
    budget::Bodies,
    config::Limits,
    http::coding::{CodingError, Codings, Decoder},
    picker::builtin::{PromptHash, PromptHasher},
};

pub(super) struct Scan {
    naming: Naming,
    hasher: PromptHasher,
    form: Form,
    /// Whether the request is refused if its body cannot be decoded.
    needed: bool,
    /// No byte has come yet.
    empty: bool,
    bodies: Arc<Bodies>,
}

enum Form {
    Plain,
    Coded(Box<Decoder>),
    /// In an unsupported coding.
    Unknown(String),
    /// No longer scanned.
    Opaque,
}

impl Scan {
    pub(super) fn new(naming: Naming, headers: &HeaderMap, limits: &Limits, bodies: &Arc<Bodies>) -> Self {
        let form = match Codings::of(headers) {
            // The model is not wanted.
            _ if naming.is_settled() => Form::Plain,
            Codings::Known(codings) if codings.is_empty() => Form::Plain,
            Codings::Known(codings) => {
                Form::Coded(Box::new(Decoder::new(&codings, limits.decoded_body_bytes, &bodies.memory)))
            }
            Codings::Unknown(field) => Form::Unknown(field),
        };
        let needed = naming.rejects();
        Self { naming, hasher: PromptHasher::new(), form, needed, empty: true, bodies: Arc::clone(bodies) }
    }

    /// Must be called before the first piece: whether the request's route needs the model.
    pub(super) fn begin(&mut self, needed: bool) -> Result<(), NamingError> {
        self.needed |= needed;
        if let Form::Unknown(field) = &self.form {
            let found = field.clone();
            self.fault(CodingError::Unsupported { found })?;
        }
        Ok(())
    }

    pub(super) fn naming(&self) -> &Naming {
        &self.naming
    }

    /// Scans the next piece of the body. Not cancel-safe.
    pub(super) async fn take(&mut self, piece: &Bytes) -> Result<(), NamingError> {
        self.empty &= piece.is_empty();
        match &mut self.form {
            Form::Plain => {
                self.hasher.update(piece);
                self.naming.feed(piece)
            }
            Form::Coded(decoder) => {
                decoder.push(piece);
                self.decode().await
            }
            Form::Unknown(_) | Form::Opaque => {
                self.hasher.update(piece);
                Ok(())
            }
        }
    }

    /// Finishes a complete body; a JSON body must be valid to its end. Not cancel-safe.
    pub(super) async fn end(&mut self) -> Result<(), NamingError> {
        if self.empty {
            self.form = Form::Opaque;
            self.naming.skip();
            return Ok(());
        }
        if let Form::Coded(decoder) = &mut self.form {
            decoder.end();
            self.decode().await?;
        }
        self.form = Form::Opaque;
        self.naming.end()
    }

    async fn decode(&mut self) -> Result<(), NamingError> {
        while let Form::Coded(decoder) = &mut self.form {
            match decoder.step() {
                Ok(Some(piece)) => {
                    self.hasher.update(&piece);
                    self.naming.feed(&piece)?;
                    // A small coded body can expand to a large one.
                    tokio::task::yield_now().await;
                }
                Ok(None) => break,
                Err(error) => self.fault(error)?,
            }
        }
        Ok(())
    }

    fn fault(&mut self, error: CodingError) -> Result<(), NamingError> {
        self.form = Form::Opaque;
        if !self.needed {
            return self.naming.give_up();
        }
        if error == CodingError::NoRoom {
            self.bodies.refused("memory");
        }
        Err(error.into())
    }

    /// The prompt hash for the built-in picker. It is computed from decoded bytes, so that the same conversation has
    /// the same hash in any coding.
    pub(super) fn prompt(&mut self) -> PromptHash {
        std::mem::replace(&mut self.hasher, PromptHasher::new()).finish()
    }
}
