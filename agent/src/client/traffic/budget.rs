//! A token bucket: a number of events that refills with time.

use std::time::Duration;

use tokio::time::Instant;

pub(super) struct FrameBudget {
    most: f64,
    left: f64,
    per_second: f64,
    at: Instant,
}

impl FrameBudget {
    /// Allows `most` events at once and refills completely within `time`.
    pub(super) fn new(most: u32, time: Duration, now: Instant) -> Self {
        let most = f64::from(most);
        Self { most, left: most, per_second: most / time.as_secs_f64(), at: now }
    }

    /// Takes one token. Returns false if the bucket is empty.
    pub(super) fn spend(&mut self, now: Instant) -> bool {
        let passed = now.duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * self.per_second).min(self.most);
        self.at = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }

    /// Adds `count` tokens, up to the maximum.
    pub(super) fn earn(&mut self, count: u32) {
        self.left = (self.left + f64::from(count)).min(self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_refills_with_time_up_to_its_maximum() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut budget = FrameBudget::new(100, Duration::from_secs(10), begin);
        assert_eq!((0..150).filter(|_| budget.spend(begin)).count(), 100);
        assert_eq!((0..150).filter(|_| budget.spend(at(1))).count(), 10);
        assert_eq!((0..150).filter(|_| budget.spend(at(1000))).count(), 100);
        budget.earn(30);
        assert_eq!((0..150).filter(|_| budget.spend(at(1000))).count(), 30);
    }

    #[test]
    fn budget_is_never_exhausted_at_an_even_rate() {
        let begin = Instant::now();
        let mut budget = FrameBudget::new(1000, Duration::from_secs(600), begin);
        for event in 0..10_000 {
            assert!(budget.spend(begin + Duration::from_millis(event * 600)), "{event}");
        }
    }
}
