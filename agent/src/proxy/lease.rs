//! A lease (`pick_per = "lease"`) lets later requests of a connection reuse the EPP's pick for a time or a number of requests.
//!
//! It holds only the list of endpoints. Each request keeps its own fields and body.

use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
};

use http::request;
use tokio::time::Instant;

use crate::{
    config::PickPer,
    picker::{
        echo,
        exchange::{Body, Decision},
    },
    shared::Shared,
    worker::Worker,
};

/// The endpoints that an EPP picked, for the connection's next requests to the same pool.
pub struct Lease {
    /// The configuration under which the lease was given.
    shared: Weak<Shared>,
    pool: usize,
    endpoints: Vec<SocketAddr>,
    until: Instant,
    left: u32,
}

impl Lease {
    /// A lease on a pick that [may be reused](is_reusable). Returns `None` if the pool does not use leases.
    pub(super) fn new(worker: &Worker, pool: usize, endpoints: &[SocketAddr]) -> Option<Self> {
        let config = &worker.shared.config.pools[pool];
        (config.pick_per == PickPer::Lease && config.lease.requests > 1).then(|| Self {
            shared: Arc::downgrade(&worker.shared),
            pool,
            endpoints: endpoints.to_vec(),
            until: Instant::now() + config.lease.time,
            left: config.lease.requests - 1,
        })
    }

    /// Uses the lease for one more request to this pool. Returns `None` if its time or number of requests is used up, if the
    /// configuration has changed, or if its first endpoint takes no requests.
    pub(super) fn take(&mut self, worker: &Worker, pool: usize) -> Option<Vec<SocketAddr>> {
        let first = *self.endpoints.first()?;
        let now = Instant::now();
        let avoided = |first| {
            worker.shared.endpoints[pool].snapshot().get(first).is_some_and(|one| one.is_avoided(now.into_std()))
        };
        let holds = std::ptr::eq(self.shared.as_ptr(), Arc::as_ptr(&worker.shared))
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

/// Whether the decision may be reused for later requests of the connection: the EPP changed only the destination. A body that was
/// replaced with the same bytes does not count as a change. Always true for pools with `pick_per = "request"`. `length` is the
/// length of the client's body, `None` if the EPP got an abridged one.
pub(super) fn is_reusable(
    worker: &Worker,
    pool: usize,
    decision: &Decision,
    request: &request::Parts,
    length: Option<u64>,
) -> bool {
    if worker.shared.config.pools[pool].pick_per == PickPer::Request {
        return true;
    }
    let changed = if echo::changes(&decision.mutation, request, length) {
        "fields"
    } else if decision.body != Body::Original {
        "body"
    } else {
        return true;
    };
    worker.shared.metrics.pool(pool).pick_not_held(changed);
    false
}
