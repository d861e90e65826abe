//! Bytes that all requests share: one [`Budget`] for request bodies in memory, one for those in files.
//!
//! Taking never waits. What there is no room for is refused, and whoever asked spills or sheds. A [`Share`] gives back what it
//! took when it is dropped, so `used` is never more than the limit that held when it was taken.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use prometheus_client::metrics::gauge::Gauge;

use crate::{config::Limits, metrics::Metrics};

#[derive(Debug)]
pub struct Budget {
    limit: AtomicU64,
    used: AtomicU64,
    gauge: Gauge,
}

impl Budget {
    /// `gauge` shows what is used.
    pub fn new(limit: u64, gauge: Gauge) -> Arc<Self> {
        Arc::new(Self { limit: AtomicU64::new(limit), used: AtomicU64::new(0), gauge })
    }

    /// Refuses nothing, for what is bounded otherwise.
    pub fn unlimited() -> Arc<Self> {
        Self::new(u64::MAX, Gauge::default())
    }

    /// Holds for what is taken from now on.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// An empty share.
    pub fn share(self: &Arc<Self>) -> Share {
        Share { budget: Arc::clone(self), bytes: 0 }
    }

    /// The same bytes, which count until their last clone is dropped; if there is no room for them, they come back as they are.
    pub fn hold(self: &Arc<Self>, bytes: Bytes) -> Result<Bytes, Bytes> {
        let mut share = self.share();
        if share.grow(bytes.len() as u64) { Ok(share.hold(bytes)) } else { Err(bytes) }
    }

    fn take(&self, bytes: u64) -> bool {
        let limit = self.limit();
        let more = |used: u64| used.checked_add(bytes).filter(|&used| used <= limit);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        if taken {
            self.gauge.inc_by(bytes as i64);
        }
        taken
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        self.gauge.dec_by(bytes as i64);
    }
}

/// What one holder has taken of a budget.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Share {
    /// Takes `bytes` more; false if there is no room for them, and then nothing is taken.
    #[must_use]
    pub fn grow(&mut self, bytes: u64) -> bool {
        let taken = self.budget.take(bytes);
        if taken {
            self.bytes += bytes;
        }
        taken
    }

    /// The same bytes, which keep this share until their last clone is dropped.
    pub fn hold(self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Held { bytes, _share: self })
    }

    /// Gives `bytes` back, of those that it has.
    pub fn shrink(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.give_back(bytes);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

struct Held {
    bytes: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The budgets of request bodies, over all workers and across reloads.
#[derive(Debug)]
pub struct Bodies {
    pub memory: Arc<Budget>,
    pub spill: Arc<Budget>,
    metrics: Arc<Metrics>,
}

impl Bodies {
    pub fn new(limits: &Limits, metrics: &Arc<Metrics>) -> Arc<Self> {
        let [memory, spill] = metrics.body_gauges();
        let metrics = Arc::clone(metrics);
        let (memory, spill) =
            (Budget::new(limits.total_body_bytes, memory), Budget::new(limits.total_spill_bytes, spill));
        Arc::new(Self { memory, spill, metrics })
    }

    /// After a reload.
    pub fn set_limits(&self, limits: &Limits) {
        self.memory.set_limit(limits.total_body_bytes);
        self.spill.set_limit(limits.total_spill_bytes);
    }

    /// A body has begun to go to a file: a label for why.
    pub fn spilled(&self, why: &'static str) {
        self.metrics.body_spilled(why);
    }

    /// A request is refused because there was no room for its body: a label for where.
    pub fn refused(&self, at: &'static str) {
        self.metrics.body_refused(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_gives_back_what_it_took_and_no_more_than_the_limit_is_taken() {
        let gauge = Gauge::default();
        let budget = Budget::new(100, gauge.clone());
        let (mut one, mut other) = (budget.share(), budget.share());
        assert!(one.grow(60) && !other.grow(41) && other.grow(40) && !one.grow(1));
        assert_eq!(gauge.get(), 100);
        one.shrink(10);
        assert!(other.grow(10));
        drop(other);
        assert_eq!(gauge.get(), 50);
        budget.set_limit(10);
        assert!(!one.grow(1), "what is taken already counts against the new limit");
        drop(one);
        assert_eq!(gauge.get(), 0);
        assert!(!budget.share().grow(u64::MAX));
    }

    #[test]
    fn held_bytes_count_until_their_last_clone_is_gone() {
        let gauge = Gauge::default();
        let budget = Budget::new(5, gauge.clone());
        let held = budget.hold(Bytes::from_static(b"hello")).unwrap();
        assert_eq!(held, "hello");
        assert!(budget.hold(Bytes::from_static(b"x")).is_err());
        let part = held.slice(1..2);
        drop(held);
        assert_eq!(gauge.get(), 5);
        drop(part);
        assert_eq!(gauge.get(), 0);
    }
}
