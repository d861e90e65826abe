//! Counts the requests in flight at an endpoint with guards. The counter outlives the endpoint's membership in its pool, so
//! requests that run when the endpoint is removed are counted to their end.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

#[derive(Debug, Clone, Default)]
pub(super) struct Counter(Arc<AtomicUsize>);

impl Counter {
    // Relaxed throughout: the counts influence choices and publish no other memory. For hard limits the picker's lock orders them.
    pub(super) fn now(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn begin(&self) -> InFlight {
        self.0.fetch_add(1, Ordering::Relaxed);
        InFlight(Some(self.clone()))
    }
}

/// Counts one request in flight until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the count"]
pub struct InFlight(Option<Counter>);

impl InFlight {
    /// A guard that counts nothing, for addresses outside the set.
    pub(super) fn uncounted() -> Self {
        Self(None)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(Counter(count)) = &self.0 {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
