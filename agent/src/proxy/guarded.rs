//! Contains a panic to its request. The client gets 500 if no byte of a response was sent; otherwise its connection is aborted.

use std::{net::SocketAddr, panic::AssertUnwindSafe};

use futures_util::FutureExt as _;
use tokio::time::Instant;

use super::{After, Lease, record::Record, run, send_error};
use crate::{
    client::Client,
    error::{Error, Manner},
    http::{reply::is_grpc, request::RequestHead},
    worker::Worker,
};

/// The request panicked, and what happens to the client's connection.
pub struct Panicked(pub After);

/// As [`run`], but catches a panic. The panic hook has already logged and counted it.
pub async fn guarded(
    worker: &Worker,
    client: &mut Client,
    head: RequestHead,
    begun: Instant,
    peer: SocketAddr,
    lease: &mut Option<Lease>,
) -> Result<After, Panicked> {
    let (method, grpc) = (head.parts.method.clone(), is_grpc(&head.parts.headers));
    let uri = head.parts.uri.clone();
    client.begin_answer();
    // Unwind safe: the lease is dropped after a panic and the connection closes, so no half-changed state is used again.
    let processed = AssertUnwindSafe(run(worker, client, head, begun, peer, lease)).catch_unwind().await;
    if let Ok(after) = processed {
        return Ok(after);
    }
    *lease = None;
    Record::new(begun).finish_unrouted(worker, &Error::Panicked);
    if client.is_answered() {
        return Err(Panicked(After::Abort));
    }
    let mut manner = Manner::unknown(&worker.shared.config).at(uri.path());
    manner.grpc = grpc;
    send_error(client, &method, &manner, &Error::Panicked, false).await;
    Err(Panicked(After::Close))
}
