//! Taking a request's body from the client: off the wire, through the model scanner and the prompt hash, into the copy that
//! can be sent again.
//!
//! Reading is cancel-safe so that it can race the picker; keeping is not, and is done before anything else is awaited.

use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::Frame;
use tokio::time::Instant;

use crate::{
    bbr::Naming,
    client::Client,
    config::Limits,
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
    pub naming: Naming,
    hasher: PromptHasher,
    has_body: bool,
    /// Behind the body.
    pub trailers: HeaderMap,
    received: u64,
    begun: Instant,
    timeout: Option<Duration>,
}

impl Upload {
    /// Fails at once on a body that is declared too large. `naming` is told whether there is a body.
    pub fn new(body: RequestBody, limits: &Limits, naming: impl FnOnce(bool) -> Naming) -> Result<Self, Error> {
        let reader = BodyReader::new(body, limits.body_bytes)?;
        let has_body = !reader.is_done();
        Ok(Self {
            kept: ReplayBody::new(limits.body_memory_bytes, limits.body_bytes),
            naming: naming(has_body),
            hasher: PromptHasher::new(),
            has_body,
            trailers: HeaderMap::new(),
            received: 0,
            begun: Instant::now(),
            timeout: None,
            reader,
        })
    }

    /// How long it may take.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    pub fn has_body(&self) -> bool {
        self.has_body
    }

    pub fn is_done(&self) -> bool {
        self.reader.is_done()
    }

    /// The next piece of the body off the wire; `None` at its end. Cancel-safe.
    pub async fn read(&mut self, client: &mut Client) -> Result<Option<Bytes>, Error> {
        let Some(limit) = self.timeout else { return self.next(client).await };
        match tokio::time::timeout_at(self.begun + limit, self.next(client)).await {
            Ok(piece) => piece,
            Err(_) => Err(Error::BodyTimeout(limit)),
        }
    }

    async fn next(&mut self, client: &mut Client) -> Result<Option<Bytes>, Error> {
        match client {
            Client::Http1(socket) => loop {
                match self.reader.decode(&mut socket.buf)? {
                    Decoded::Piece(piece) => return Ok(Some(piece)),
                    Decoded::Done => {
                        self.trailers = self.reader.trailers();
                        return Ok(None);
                    }
                    Decoded::Incomplete => {}
                }
                match socket.read(READ).await {
                    Ok(0) => return Err(Error::BodyCut { found: self.received }),
                    Ok(_) => {}
                    Err(_) => return Err(Error::ClientGone),
                }
            },
            Client::Http2(stream) => {
                while !self.reader.is_done() {
                    let frame = stream.frame().await.transpose().map_err(|_| Error::ClientGone)?;
                    if frame.is_none() || stream.is_read() {
                        self.reader.end();
                    }
                    match frame.map(Frame::into_data) {
                        Some(Ok(data)) if !data.is_empty() => {
                            self.reader.frame(data.len())?;
                            return Ok(Some(data));
                        }
                        Some(Err(trailers)) => self.trailers = trailers.into_trailers().unwrap_or_default(),
                        Some(Ok(_)) | None => {}
                    }
                }
                Ok(None)
            }
        }
    }

    /// Scans and keeps a piece. Not cancel-safe.
    pub async fn keep(&mut self, piece: &Bytes) -> Result<(), Error> {
        self.received += piece.len() as u64;
        self.hasher.update(piece);
        self.naming.feed(piece)?;
        self.kept.append(piece.clone()).await?;
        if self.is_done() { self.end() } else { Ok(()) }
    }

    /// The body is complete: it must be whole JSON where it is JSON at all.
    pub fn end(&mut self) -> Result<(), Error> {
        Ok(self.naming.end()?)
    }

    /// Reads and keeps what is left.
    pub async fn rest(&mut self, client: &mut Client) -> Result<(), Error> {
        while let Some(piece) = self.read(client).await? {
            self.keep(&piece).await?;
        }
        self.end()
    }

    /// Gives the copy away.
    pub fn take_kept(&mut self) -> ReplayBody {
        std::mem::replace(&mut self.kept, ReplayBody::new(0, 0))
    }

    /// Gives the trailers away.
    pub fn take_trailers(&mut self) -> HeaderMap {
        std::mem::take(&mut self.trailers)
    }

    /// The prompt as the built-in picker knows it.
    pub fn prompt(&mut self) -> PromptHash {
        std::mem::replace(&mut self.hasher, PromptHasher::new()).finish()
    }
}
