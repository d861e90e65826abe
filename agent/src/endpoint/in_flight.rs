//! Requests in flight at an endpoint: a counter that a guard keeps raised for as long as it lives. The counter outlives the
//! endpoint's place in its pool, so that what runs when it is taken out is counted to its end.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

#[derive(Debug, Clone, Default)]
pub(super) struct Counter(Arc<AtomicUsize>);

impl Counter {
    // Relaxed throughout: the counts steer choices and publish nothing. Where a limit must hold, the picker's lock orders them.
    pub(super) fn now(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn begin(&self) -> InFlight {
        self.0.fetch_add(1, Ordering::Relaxed);
        InFlight(Some(self.clone()))
    }
}

/// One request in flight; dropping it ends the count.
#[derive(Debug)]
#[must_use = "dropping it ends the count"]
pub struct InFlight(Option<Counter>);

impl InFlight {
    /// A request at an endpoint that is not counted.
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
