//! A pick that holds for a while (`pick_per = "lease"`): follow-on requests of a connection go where the EPP sent the one
//! before, without asking it, for a time or a number of requests.
//!
//! A lease holds the list of endpoints and nothing else: fields and body of a request are always its own.

use std::{net::SocketAddr, sync::Arc};

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
/// destination. Always true in pools where a pick is for one request. `length` is that of the client's body, and a decision that
/// replaces it by the same bytes is one for the original.
pub(super) fn holds(worker: &Worker, pool: usize, decision: &Decision, request: &request::Parts, length: u64) -> bool {
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
