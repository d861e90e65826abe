//! Passive health of one endpoint: after a connect failure it is avoided for a second, then two, up to half a minute; after that
//! it is let in again, and the next request is the probe.

use std::time::{Duration, Instant};

pub(super) const FIRST: Duration = Duration::from_secs(1);
pub(super) const LONGEST: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ejection {
    /// In a row.
    failures: u32,
    until: Option<Instant>,
}

impl Ejection {
    pub(super) fn is_ejected(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// Requests that were under way together fail together: while the endpoint is ejected further failures say nothing new.
    pub(super) fn failed(&mut self, now: Instant) {
        if self.is_ejected(now) {
            return;
        }
        let time = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + time);
    }

    pub(super) fn succeeded(&mut self) {
        *self = Self::default();
    }
}
