//! A request whose processing panics: its client gets 500 where nothing of an answer has been sent, and otherwise a message
//! that visibly breaks off. The panic harms no other request.

use std::{net::SocketAddr, panic::AssertUnwindSafe};

use futures_util::FutureExt as _;
use tokio::time::Instant;

use super::{After, Lease, answer, record::Record, run};
use crate::{
    client::Client,
    error::{Error, Manner},
    http::{reply::is_grpc, request::RequestHead},
    worker::Worker,
};

/// What becomes of the connection.
pub struct Panicked(pub After);

/// As [`run`]. A panic has been logged and counted by the hook.
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
    // Nothing that the request has left half done is used again: its lease goes, and its connection ends.
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
    answer(client, &method, &manner, &Error::Panicked, false).await;
    Err(Panicked(After::Close))
}
