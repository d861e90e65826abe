//! Receives a request body: reads it from the client, scans it for the model and the prompt hash, and keeps it for
//! replay.
//!
//! Reading is cancel-safe, so that it can race the picker; keeping is not, and is finished before anything else is
//! awaited.

mod clock;
mod complete;
mod scan;
mod source;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::HeaderMap;

pub use self::complete::CompleteBody;
use self::{clock::Clock, scan::Scan, source::BodySource};
use crate::{
    bbr::Naming,
    budget::Bodies,
    client::Client,
    config::Limits,
    error::Error,
    http::{
        body::{BodyReader, ReplayBody},
        request::RequestBody,
    },
    picker::builtin::PromptHash,
};

pub struct Upload {
    source: BodySource,
    clock: Clock,
    pub kept: ReplayBody,
    scan: Scan,
    has_body: bool,
}

impl Upload {
    /// Prepares the upload of a request with these headers. Fails immediately if the declared length is too large.
    /// `naming` gets whether there is a body.
    pub fn new(
        body: RequestBody,
        headers: &HeaderMap,
        limits: &Limits,
        bodies: &Arc<Bodies>,
        naming: impl FnOnce(bool) -> Naming,
    ) -> Result<Self, Error> {
        let reader = BodyReader::new(body, limits.body_bytes)?;
        let has_body = !reader.is_done();
        let in_files = limits.total_spill_bytes > 0;
        let memory =
            if in_files { limits.body_memory_bytes } else { limits.body_bytes.try_into().unwrap_or(usize::MAX) };
        Ok(Self {
            kept: ReplayBody::new(memory, limits.body_bytes, bodies),
            scan: Scan::new(naming(has_body), headers, limits, bodies),
            has_body,
            source: BodySource::new(reader),
            clock: Clock::new(limits.body_min_rate),
        })
    }

    /// Must be called before anything is read: sets whether the request's route needs the model, and how long the
    /// client may be silent.
    pub fn begin(&mut self, needs_model: bool, timeout: Option<Duration>) -> Result<(), Error> {
        self.set_timeout(timeout);
        Ok(self.scan.begin(needs_model)?)
    }

    /// Sets how long the client may be silent.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.clock.set_limit(timeout);
    }

    pub fn has_body(&self) -> bool {
        self.has_body
    }

    pub fn is_done(&self) -> bool {
        self.source.is_done()
    }

    pub fn naming(&self) -> &Naming {
        self.scan.naming()
    }

    /// Reads the next piece of the body; `None` at its end. Cancel-safe.
    pub async fn read(&mut self, client: &mut Client) -> Result<Option<Bytes>, Error> {
        let piece = self.clock.limit(self.source.next(client)).await?;
        self.clock.progress(piece.as_ref().map_or(0, Bytes::len));
        Ok(piece)
    }

    /// Like [`read`](Self::read), but after the end of the body waits until the client disconnects and then fails.
    pub async fn read_or_gone(&mut self, client: &mut Client) -> Result<Option<Bytes>, Error> {
        if self.is_done() {
            client.gone().await;
            return Err(Error::ClientGone);
        }
        self.read(client).await
    }

    /// Keeps and scans what was read: a piece, or the end. Not cancel-safe.
    pub async fn take(&mut self, read: Option<Bytes>) -> Result<(), Error> {
        if let Some(piece) = read {
            self.scan.take(&piece).await?;
            self.kept.append(piece).await?;
        }
        if self.is_done() { Ok(self.scan.end().await?) } else { Ok(()) }
    }

    /// Reads and keeps the rest of the body, and moves the whole out.
    pub async fn complete(&mut self, client: &mut Client) -> Result<CompleteBody, Error> {
        while !self.is_done() {
            let read = self.read(client).await?;
            self.take(read).await?;
        }
        Ok(CompleteBody::new(self.has_body, self.kept.take(), std::mem::take(&mut self.source.trailers)))
    }

    /// Takes the body back, so that the request can be picked anew.
    pub fn give_back(&mut self, body: CompleteBody) {
        (self.kept, self.source.trailers) = body.into_parts();
    }

    /// Runs `work`, and reads and keeps the body meanwhile. Fails if reading fails or the client disconnects.
    pub async fn during<T>(&mut self, client: &mut Client, work: impl Future<Output = T>) -> Result<T, Error> {
        let mut work = std::pin::pin!(work);
        loop {
            let read = tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                read = self.read_or_gone(client) => read?,
            };
            self.take(read).await?;
        }
    }

    /// The prompt hash for the built-in picker.
    pub fn prompt(&mut self) -> PromptHash {
        self.scan.prompt()
    }
}
