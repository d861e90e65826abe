//! Byte budgets that all requests share: one [`Budget`] for request bodies in memory, one for those in files.
//!
//! Taking never waits. If the budget is exhausted, `grow` returns false and the caller spills or sheds. A [`Share`]
//! returns its bytes when it is dropped. `used` never exceeds the limit that was set when the bytes were taken.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use prometheus_client::metrics::gauge::Gauge;

use crate::{config::Limits, metrics::Metrics};

/// A limit in bytes, and how many of them are taken.
#[derive(Debug)]
pub struct Budget {
    limit: AtomicU64,
    used: AtomicU64,
    gauge: Gauge,
}

impl Budget {
    /// `gauge` shows the used bytes.
    pub fn new(limit: u64, gauge: Gauge) -> Arc<Self> {
        Arc::new(Self { limit: AtomicU64::new(limit), used: AtomicU64::new(0), gauge })
    }

    /// A budget without a limit, for bytes that are bounded otherwise.
    pub fn unlimited() -> Arc<Self> {
        Self::new(u64::MAX, Gauge::default())
    }

    /// Sets the limit in bytes for later calls; bytes already taken stay.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// The limit in bytes.
    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// An empty share.
    pub fn share(self: &Arc<Self>) -> Share {
        Share { budget: Arc::clone(self), bytes: 0 }
    }

    /// Returns the same bytes, counted until their last clone is dropped; or, as an error, the bytes uncounted if the
    /// budget is exhausted.
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

/// The bytes that one holder has taken from a budget.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Share {
    /// Takes `bytes` more. Returns false and takes nothing if the budget is exhausted.
    #[must_use]
    pub fn grow(&mut self, bytes: u64) -> bool {
        let taken = self.budget.take(bytes);
        if taken {
            self.bytes += bytes;
        }
        taken
    }

    /// Returns the same bytes, which keep this share until their last clone is dropped.
    pub fn hold(self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(HeldBytes { bytes, _share: self })
    }

    /// Returns up to `bytes` of this share to the budget.
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

struct HeldBytes {
    bytes: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for HeldBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The budgets of request bodies, shared by all workers and kept across reloads.
#[derive(Debug)]
pub struct Bodies {
    /// Bytes of bodies in memory.
    pub(crate) memory: Arc<Budget>,
    /// Bytes of bodies in temporary files.
    pub(crate) spill: Arc<Budget>,
    metrics: Arc<Metrics>,
}

impl Bodies {
    /// Budgets of `limits.total_body_bytes` and `limits.total_spill_bytes`. `metrics` shows what is taken.
    pub fn new(limits: &Limits, metrics: &Arc<Metrics>) -> Arc<Self> {
        let [memory, spill] = metrics.body_gauges();
        let metrics = Arc::clone(metrics);
        let (memory, spill) =
            (Budget::new(limits.total_body_bytes, memory), Budget::new(limits.total_spill_bytes, spill));
        Arc::new(Self { memory, spill, metrics })
    }

    /// Applies the limits of a reloaded configuration.
    pub fn set_limits(&self, limits: &Limits) {
        self.memory.set_limit(limits.total_body_bytes);
        self.spill.set_limit(limits.total_spill_bytes);
    }

    /// Counts a body that began to spill to a file, by reason.
    pub fn spilled(&self, why: &'static str) {
        self.metrics.body_spilled(why);
    }

    /// Counts a request refused because a budget was exhausted, by the budget's label.
    pub fn refused(&self, at: &'static str) {
        self.metrics.body_refused(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_stays_within_the_limit_and_returns_its_bytes() {
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
        assert!(!one.grow(1), "bytes taken before count against the new limit");
        drop(one);
        assert_eq!(gauge.get(), 0);
        assert!(!budget.share().grow(u64::MAX));
    }

    #[test]
    fn held_bytes_count_until_their_last_clone_is_dropped() {
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
