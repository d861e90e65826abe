//! A pick that holds for a while (`pick_per = "lease"`): follow-on requests of a connection go where the EPP sent the one
//! before, without asking it, for a time or a number of requests.

use std::{net::SocketAddr, sync::Arc};

use penstock_proto::ext_proc::HeaderMutation;
use tokio::time::Instant;

use crate::{config::PickPer, shared::Shared, worker::Worker};

/// What an EPP has decided, for a connection's next requests to the same pool.
pub struct Lease {
    /// Of the configuration that it was given under.
    shared: Arc<Shared>,
    pool: usize,
    endpoints: Vec<SocketAddr>,
    mutation: HeaderMutation,
    until: Instant,
    left: u32,
}

impl Lease {
    /// A lease on a decision that holds for the request itself; `None` where the pool gives none.
    pub(super) fn new(
        worker: &Worker,
        pool: usize,
        endpoints: &[SocketAddr],
        mutation: &HeaderMutation,
    ) -> Option<Self> {
        let config = &worker.shared.config.pools[pool];
        let (endpoints, mutation) = (endpoints.to_vec(), mutation.clone());
        (config.pick_per == PickPer::Lease && config.lease.requests > 1).then(|| Self {
            shared: Arc::clone(&worker.shared),
            pool,
            endpoints,
            mutation,
            until: Instant::now() + config.lease.time,
            left: config.lease.requests - 1,
        })
    }

    /// The decision for one more request to this pool, if it still holds: in time, in number, under the same configuration,
    /// and while its first endpoint takes requests.
    pub(super) fn take(&mut self, worker: &Worker, pool: usize) -> Option<(Vec<SocketAddr>, HeaderMutation)> {
        let first = *self.endpoints.first()?;
        let now = Instant::now();
        let holds = Arc::ptr_eq(&self.shared, &worker.shared)
            && self.pool == pool
            && now < self.until
            && self.left > 0
            && match worker.shared.endpoints[pool].snapshot().get(first) {
                Some(endpoint) => !endpoint.draining && !endpoint.is_avoided(now.into_std()),
                None => worker.shared.config.pools[pool].passthrough,
            };
        if !holds {
            return None;
        }
        self.left -= 1;
        worker.shared.metrics.pool(pool).leased();
        Some((self.endpoints.clone(), self.mutation.clone()))
    }
}
