//! What `penstock epp` refuses, in the log: for each reason a line at once, and after it one every ten seconds at most, which says
//! how many there were.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

const EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<BTreeMap<&'static str, Untold>>);

#[derive(Debug, Default)]
struct Untold {
    count: u64,
    /// When the last line was written.
    told: Option<Instant>,
}

impl Refusals {
    /// Something was refused for this reason, of which there are few.
    pub(super) fn add(&self, reason: &'static str) {
        if let Some(count) = self.due(reason, Instant::now()) {
            tracing::warn!(reason, count, "refused");
        }
    }

    /// How many a line is to tell of, if one is due.
    fn due(&self, reason: &'static str, now: Instant) -> Option<u64> {
        let mut all = self.0.lock();
        let untold = all.entry(reason).or_default();
        untold.count += 1;
        if untold.told.is_some_and(|told| now.duration_since(told) < EVERY) {
            return None;
        }
        untold.told = Some(now);
        Some(std::mem::take(&mut untold.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_at_once_and_then_together() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let told = |reason, seconds| refusals.due(reason, begin + Duration::from_secs(seconds));
        assert_eq!((told("json", 0), told("json", 0), told("json", 9)), (Some(1), None, None));
        assert_eq!((told("streams", 9), told("streams", 9)), (Some(1), None));
        assert_eq!((told("json", 10), told("json", 19), told("json", 20)), (Some(3), None, Some(2)));
    }
}
