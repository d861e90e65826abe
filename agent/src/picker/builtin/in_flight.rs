//! Requests in flight at each endpoint: a counter that a guard keeps raised for as long as it lives.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

#[derive(Debug)]
pub(super) struct Counters(Vec<AtomicUsize>);

impl Counters {
    pub(super) fn new(endpoints: usize) -> Arc<Self> {
        Arc::new(Self((0..endpoints).map(|_| AtomicUsize::new(0)).collect()))
    }

    // Relaxed throughout: the counts steer choices and publish nothing. Where a limit must hold, the picker's lock orders them.
    pub(super) fn at(&self, endpoint: usize) -> usize {
        self.0[endpoint].load(Ordering::Relaxed)
    }

    pub(super) fn begin(self: &Arc<Self>, endpoint: Option<usize>) -> InFlight {
        InFlight(endpoint.map(|endpoint| {
            self.0[endpoint].fetch_add(1, Ordering::Relaxed);
            (Arc::clone(self), endpoint)
        }))
    }
}

/// One request in flight; dropping it ends the count.
#[derive(Debug)]
#[must_use = "dropping it ends the count"]
pub struct InFlight(Option<(Arc<Counters>, usize)>);

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some((counters, endpoint)) = &self.0 {
            counters.0[*endpoint].fetch_sub(1, Ordering::Relaxed);
        }
    }
}
