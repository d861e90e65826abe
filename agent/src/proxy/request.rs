//! A request in progress, and what happens to the client's connection after it.

use std::time::Duration;

use http::{HeaderValue, request};
use tokio::time::{Instant, timeout_at};

use super::record::Record;
use crate::{
    endpoint::connection::EndpointConnection, error::Error, rename::Names, route::RequestTimeouts, worker::Worker,
};

/// What happens to the client's connection after a request.
pub enum After {
    /// Read the next request.
    Next,
    /// Relay to this endpoint from now on.
    Pinned(Box<Pin>),
    /// Orderly close.
    Close,
    /// Close in the middle of a message.
    Abort,
}

/// A request in progress, passed from phase to phase.
pub(super) struct Request {
    pub(super) parts: request::Parts,
    pub(super) keep_alive: bool,
    /// The protocol that the client wants to switch to.
    pub(super) upgrade: Option<HeaderValue>,
    pub(super) pool: usize,
    /// Its body asks for a stream.
    pub(super) streams: bool,
    pub(super) record: Record,
    /// The client socket's key in the kernel's map, if path `local` is possible.
    pub(super) target: Option<u64>,
    /// Set if the EPP changed the model.
    pub(super) names: Option<Names>,
    /// When its first byte arrived.
    pub(super) begun: Instant,
    pub(super) timeouts: RequestTimeouts,
    /// When the request, including its response, has to be complete.
    pub(super) deadline: Option<Instant>,
}

impl Request {
    /// Applies these timeouts from now on.
    pub(super) fn set_timeouts(&mut self, timeouts: RequestTimeouts) {
        self.timeouts = timeouts;
        self.deadline = timeouts.request.map(|limit| self.begun + limit);
    }
}

impl Request {
    /// Whether the connection stays open after a response whose head is written now.
    pub(super) fn keeps_alive(&self, worker: &Worker) -> bool {
        self.keep_alive && !worker.shared.leaving.is_cancelled()
    }
}

/// Runs a phase before the response. Returns `RequestTimeout` at the request's deadline, which comes with the configured limit.
pub(super) async fn with_deadline<T, E: From<Error>>(
    deadline: Option<(Instant, Duration)>,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match deadline {
        Some((deadline, limit)) => {
            timeout_at(deadline, work).await.unwrap_or_else(|_| Err(Error::RequestTimeout(limit).into()))
        }
        None => work.await,
    }
}

/// The endpoint connection that a client connection is pinned to.
pub struct Pin {
    pub(super) endpoint: EndpointConnection,
    pub(super) pool: usize,
    pub(super) target: Option<u64>,
    /// The idle timeout of the first request's route.
    pub(super) idle: Option<Duration>,
}
