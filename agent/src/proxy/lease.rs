//! A pick that holds for a while (`pick_per = "lease"`): follow-on requests of a connection go where the EPP sent the one
//! before, without asking it, for a time or a number of requests.
//!
//! A lease holds the list of endpoints and nothing else: fields and body of a request are always its own.

use std::{net::SocketAddr, sync::Arc};

use http::request;
use tokio::time::Instant;

use crate::{
    config::PickPer,
    error::Error,
    http::body::ReplayBody,
    picker::{
        echo,
        exchange::{Body, Decision},
    },
    shared::Shared,
    worker::Worker,
};

/// Where an EPP has sent a request, for a connection's next requests to the same pool.
pub struct Lease {
    /// Of the configuration that it was given under.
    shared: Arc<Shared>,
    pool: usize,
    endpoints: Vec<SocketAddr>,
    until: Instant,
    left: u32,
}

impl Lease {
    /// A lease on a pick that [holds](holds) for more than its request; `None` where the pool gives none.
    pub(super) fn new(worker: &Worker, pool: usize, endpoints: &[SocketAddr]) -> Option<Self> {
        let config = &worker.shared.config.pools[pool];
        (config.pick_per == PickPer::Lease && config.lease.requests > 1).then(|| Self {
            shared: Arc::clone(&worker.shared),
            pool,
            endpoints: endpoints.to_vec(),
            until: Instant::now() + config.lease.time,
            left: config.lease.requests - 1,
        })
    }

    /// The endpoints for one more request to this pool, if the lease still holds: in time, in number, under the same
    /// configuration, and while its first endpoint takes requests.
    pub(super) fn take(&mut self, worker: &Worker, pool: usize) -> Option<Vec<SocketAddr>> {
        let first = *self.endpoints.first()?;
        let now = Instant::now();
        let avoided = |first| {
            worker.shared.endpoints[pool].snapshot().get(first).is_some_and(|one| one.is_avoided(now.into_std()))
        };
        let holds = Arc::ptr_eq(&self.shared, &worker.shared)
            && self.pool == pool
            && now < self.until
            && self.left > 0
            && worker.shared.admits(pool, first)
            && !avoided(first);
        if !holds {
            return None;
        }
        self.left -= 1;
        worker.shared.metrics.pool(pool).leased();
        Some(self.endpoints.iter().copied().filter(|&address| worker.shared.admits(pool, address)).collect())
    }
}

/// Whether a decision about this request is one for those that follow it too: then the EPP has changed nothing but the
/// destination. Always true in pools where a pick is for one request.
pub(super) async fn holds(
    worker: &Worker,
    pool: usize,
    decision: &Decision,
    request: &request::Parts,
    kept: &ReplayBody,
) -> Result<bool, Error> {
    if worker.shared.config.pools[pool].pick_per == PickPer::Request {
        return Ok(true);
    }
    let changed = if echo::changes(&decision.mutation, request, kept.len()) {
        "fields"
    } else if replaces(&decision.body, kept).await? {
        "body"
    } else {
        return Ok(true);
    };
    worker.shared.metrics.pool(pool).pick_not_held(changed);
    Ok(false)
}

/// Whether the body that the EPP gave is another than the client's.
async fn replaces(body: &Body, kept: &ReplayBody) -> Result<bool, Error> {
    let Body::Replaced(pieces) = body else { return Ok(false) };
    if pieces.iter().map(|piece| piece.len() as u64).sum::<u64>() != kept.len() {
        return Ok(true);
    }
    let (mut ours, mut theirs) = (kept.pieces(), pieces.iter());
    let mut rest: &[u8] = &[];
    while let Some(piece) = ours.next().await? {
        let mut piece = &piece[..];
        while !piece.is_empty() {
            if rest.is_empty() {
                let Some(next) = theirs.next() else { return Ok(true) };
                rest = next;
                continue;
            }
            let length = piece.len().min(rest.len());
            let ((this, piece_left), (that, rest_left)) = (piece.split_at(length), rest.split_at(length));
            if this != that {
                return Ok(true);
            }
            (piece, rest) = (piece_left, rest_left);
        }
    }
    Ok(false)
}
