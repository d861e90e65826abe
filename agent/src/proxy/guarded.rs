//! Contains a panic to its request. The client gets 500 if no byte of a response was sent; otherwise its connection is aborted.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;
use http::{Method, Uri};

use super::{
    record::{Origin, Record},
    reply::send_error,
    request::AfterRequest,
};
use crate::{
    client::Client,
    error::{Error, Manner},
    http::{cors::Grant, reply::is_grpc, request::RequestHead},
    worker::Worker,
};

/// The request panicked, and what happens to the client's connection.
pub struct Panicked(pub AfterRequest);

/// What the answer to a request needs if its processing panics.
pub(super) struct ReplyGuard {
    method: Method,
    uri: Uri,
    grpc: bool,
    grant: Option<Grant>,
    origin: Origin,
}

impl ReplyGuard {
    pub(super) fn new(worker: &Worker, head: &RequestHead, origin: Origin) -> Self {
        let parts = &head.parts;
        let cors = worker.shared.config.listen.cors.as_ref();
        let grant = cors.map(|cors| Grant::of(cors, &parts.headers));
        Self { method: parts.method.clone(), uri: parts.uri.clone(), grpc: is_grpc(&parts.headers), grant, origin }
    }

    /// Processes the request. Returns `None` if that panicked.
    pub(super) async fn run<T>(&self, processing: impl Future<Output = T>) -> Option<T> {
        // Unwind safe: the lease is dropped after a panic and the connection closes, so no half-changed state is used again.
        AssertUnwindSafe(processing).catch_unwind().await.ok()
    }

    /// Answers and records a request that panicked.
    pub(super) async fn answer(self, worker: &Worker, client: &mut Client) -> Panicked {
        Record::new(self.origin.clone()).finish_unrouted(worker, &Error::Panicked);
        if client.is_answered() {
            return Panicked(AfterRequest::Abort);
        }
        let config = &worker.shared.config;
        let manner = Manner::unknown(config).at(self.uri.path());
        let mut manner = manner.to(config.listen.cors.as_ref(), self.grant.as_ref());
        manner.grpc = self.grpc;
        send_error(client, &self.method, &manner, &Error::Panicked, false).await;
        Panicked(AfterRequest::Close)
    }
}
