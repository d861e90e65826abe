//! Logs what `penstock epp` refuses: for each reason one line at once, and then at most one line every ten seconds with the count.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Least time between two lines with the same reason.
const INTERVAL: Duration = Duration::from_secs(10);

/// The refusals by reason.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<BTreeMap<&'static str, Unlogged>>);

#[derive(Debug, Default)]
struct Unlogged {
    count: u64,
    /// When the last line was written.
    logged: Option<Instant>,
}

impl Refusals {
    /// Counts a refusal and logs it if a line is due. There are few reasons, so the map stays small.
    pub(super) fn add(&self, reason: &'static str) {
        if let Some(count) = self.due(reason, Instant::now()) {
            tracing::warn!(reason, count, "requests refused");
        }
    }

    /// Counts a refusal. Returns the number of refusals since the last line if a line is due.
    fn due(&self, reason: &'static str, now: Instant) -> Option<u64> {
        let mut all = self.0.lock();
        let unlogged = all.entry(reason).or_default();
        unlogged.count += 1;
        if unlogged.logged.is_some_and(|logged| now.duration_since(logged) < INTERVAL) {
            return None;
        }
        unlogged.logged = Some(now);
        Some(std::mem::take(&mut unlogged.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_logged_at_once_and_then_in_batches() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let logged = |reason, seconds| refusals.due(reason, begin + Duration::from_secs(seconds));
        assert_eq!((logged("json", 0), logged("json", 0), logged("json", 9)), (Some(1), None, None));
        assert_eq!((logged("streams", 9), logged("streams", 9)), (Some(1), None));
        assert_eq!((logged("json", 10), logged("json", 19), logged("json", 20)), (Some(3), None, Some(2)));
    }
}
