//! Taking a request's body from the client: off the wire, through the model scanner and the prompt hash, into the copy that
//! can be sent again.
//!
//! Reading is cancel-safe so that it can race the picker; keeping is not, and is done before anything else is awaited.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, header};
use tokio::time::Instant;

use crate::{
    bbr::{Model, ModelScanner},
    client::Client,
    config::{Bbr, Limits},
    error::Error,
    http::{
        body::{BodyReader, Decoded, ReplayBody},
        request::RequestBody,
    },
    picker::builtin::{PromptHash, PromptHasher},
};

/// First read of a body; small bodies are the rule.
const READ: usize = 16 * 1024;

pub struct Upload {
    reader: BodyReader,
    pub kept: ReplayBody,
    scanner: Option<ModelScanner>,
    hasher: PromptHasher,
    model: Model,
    has_body: bool,
    received: u64,
    timeout: Duration,
    deadline: Instant,
}

impl Upload {
    /// Fails at once on a body that is declared too large.
    pub fn new(
        body: RequestBody,
        headers: &HeaderMap,
        limits: &Limits,
        bbr: &Bbr,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let reader = BodyReader::new(body, limits.body_bytes)?;
        let has_body = !reader.is_done();
        let scans = bbr.enabled && has_body && is_json(headers);
        Ok(Self {
            kept: ReplayBody::new(limits.body_memory_bytes, limits.body_bytes),
            scanner: scans.then(ModelScanner::new),
            hasher: PromptHasher::new(),
            model: Model::NotYet,
            has_body,
            received: 0,
            timeout,
            deadline: Instant::now() + timeout,
            reader,
        })
    }

    pub fn has_body(&self) -> bool {
        self.has_body
    }

    pub fn is_done(&self) -> bool {
        self.reader.is_done()
    }

    /// The model is known, or known to be absent.
    pub fn model_settled(&self) -> bool {
        self.scanner.is_none() || self.model != Model::NotYet
    }

    /// The model that the body names, when it is a string.
    pub fn model(&self) -> Option<&str> {
        match &self.model {
            Model::Found(model) => Some(model),
            Model::NotYet | Model::NotAString(_) => None,
        }
    }

    /// The next piece of the body off the wire; `None` at its end. Cancel-safe.
    pub async fn read(&mut self, client: &mut Client) -> Result<Option<Bytes>, Error> {
        let deadline = self.deadline;
        match tokio::time::timeout_at(deadline, self.next(client)).await {
            Ok(piece) => piece,
            Err(_) => Err(Error::BodyTimeout(self.timeout)),
        }
    }

    async fn next(&mut self, client: &mut Client) -> Result<Option<Bytes>, Error> {
        match client {
            Client::Http1(socket) => loop {
                match self.reader.decode(&mut socket.buf)? {
                    Decoded::Piece(piece) => return Ok(Some(piece)),
                    Decoded::Done => return Ok(None),
                    Decoded::Incomplete => {}
                }
                match socket.read(READ).await {
                    Ok(0) => return Err(Error::BodyCut { found: self.received }),
                    Ok(_) => {}
                    Err(_) => return Err(Error::ClientGone),
                }
            },
        }
    }

    /// Scans and keeps a piece. Not cancel-safe.
    pub async fn keep(&mut self, piece: &Bytes) -> Result<(), Error> {
        self.received += piece.len() as u64;
        self.hasher.update(piece);
        if let Some(scanner) = &mut self.scanner {
            scanner.feed(piece)?;
            if self.model == Model::NotYet && *scanner.model() != Model::NotYet {
                self.model = scanner.model().clone();
            }
        }
        self.kept.append(piece.clone()).await?;
        if self.is_done() { self.end() } else { Ok(()) }
    }

    /// The body is complete: it must be whole JSON where it is JSON at all.
    pub fn end(&mut self) -> Result<(), Error> {
        if let Some(scanner) = self.scanner.take() {
            self.model = scanner.finish()?.model;
        }
        Ok(())
    }

    /// Reads and keeps what is left.
    pub async fn rest(&mut self, client: &mut Client) -> Result<(), Error> {
        while let Some(piece) = self.read(client).await? {
            self.keep(&piece).await?;
        }
        self.end()
    }

    /// Lets go of the copy. The request will not be sent again.
    pub fn forget(&mut self) {
        self.kept = ReplayBody::new(0, 0);
    }

    /// The prompt as the built-in picker knows it.
    pub fn prompt(&mut self) -> PromptHash {
        std::mem::replace(&mut self.hasher, PromptHasher::new()).finish()
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json")
        || kind.len() > 5 && kind.as_bytes()[kind.len() - 5..].eq_ignore_ascii_case(b"+json")
}
