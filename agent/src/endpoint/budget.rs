//! Limits the retries of a pool, so that retries cannot overload the remaining endpoints.
//!
//! Over the last ten seconds, counted in one slot per second, retries may be a percentage of the requests plus a fixed number per
//! second. All workers share the budget. Time is passed in.

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;

use crate::config::Retry;

/// Seconds over which requests and retries are counted.
const WINDOW: usize = 10;

/// The retry budget of one pool.
#[derive(Debug)]
pub struct RetryBudget {
    percent: u64,
    per_second: u64,
    begin: Instant,
    slots: Arc<Mutex<[BudgetSecond; WINDOW]>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct BudgetSecond {
    /// The second since `begin` that this slot counts. A slot is reset when it is reused for another second.
    second: u64,
    requests: u64,
    retries: u64,
}

impl RetryBudget {
    /// A budget that counts from `now`.
    pub fn new(rules: &Retry, now: Instant) -> Self {
        Self {
            percent: rules.budget_percent.into(),
            per_second: rules.budget_min_per_second.into(),
            begin: now,
            slots: Arc::default(),
        }
    }

    /// A budget with other rules that continues the counts of `before`.
    pub fn after(before: &Self, rules: &Retry) -> Self {
        Self { slots: Arc::clone(&before.slots), ..Self::new(rules, before.begin) }
    }

    /// Counts a request.
    pub fn request(&self, now: Instant) {
        let second = self.second(now);
        slot(&mut self.slots.lock(), second).requests += 1;
    }

    /// Returns whether a retry is allowed, and counts it if so.
    pub fn retry(&self, now: Instant) -> bool {
        let second = self.second(now);
        let mut slots = self.slots.lock();
        let recent = slots.iter().filter(|slot| slot.second + WINDOW as u64 > second);
        let (requests, retries) =
            recent.fold((0, 0), |(requests, retries), slot| (requests + slot.requests, retries + slot.retries));
        let may = retries < requests * self.percent / 100 + self.per_second * WINDOW as u64;
        if may {
            slot(&mut slots, second).retries += 1;
        }
        may
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.begin).as_secs()
    }
}

fn slot(slots: &mut [BudgetSecond; WINDOW], second: u64) -> &mut BudgetSecond {
    let slot = &mut slots[second as usize % WINDOW];
    if slot.second != second {
        *slot = BudgetSecond { second, ..BudgetSecond::default() };
    }
    slot
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn budget(budget_percent: u32, budget_min_per_second: u32) -> (RetryBudget, impl Fn(u64) -> Instant) {
        let now = Instant::now();
        let rules = Retry { budget_percent, budget_min_per_second, ..Retry::default() };
        (RetryBudget::new(&rules, now), move |second| now + Duration::from_secs(second))
    }

    /// How many retries are allowed at `now`.
    fn granted(budget: &RetryBudget, now: Instant) -> usize {
        (0..1000).filter(|_| budget.retry(now)).count()
    }

    #[test]
    fn retries_are_a_percentage_of_the_requests() {
        let (budget, at) = budget(20, 0);
        assert_eq!(granted(&budget, at(0)), 0);
        for _ in 0..50 {
            budget.request(at(1));
        }
        assert_eq!(granted(&budget, at(1)), 10);
        for _ in 0..50 {
            budget.request(at(8));
        }
        assert_eq!(granted(&budget, at(10)), 10, "with second 1: 20 of 100 requests");
        assert_eq!(granted(&budget, at(11)), 0, "10 retries of second 10 for the 50 requests of second 8");
    }

    #[test]
    fn retries_per_second_are_added() {
        let (budget, at) = budget(0, 2);
        assert_eq!(granted(&budget, at(0)), 20);
        assert_eq!(granted(&budget, at(9)), 0);
        assert_eq!(granted(&budget, at(10)), 20);
        assert_eq!(granted(&budget, at(1000)), 20);
    }

    #[test]
    fn old_requests_and_retries_expire() {
        let (budget, at) = budget(100, 0);
        budget.request(at(3));
        assert!(!budget.retry(at(13)));
        budget.request(at(13));
        assert!(budget.retry(at(22)) && !budget.retry(at(22)));
    }

    #[test]
    fn reloaded_budget_continues_the_counts() {
        let (before, at) = budget(100, 0);
        before.request(at(3));
        before.request(at(3));
        assert!(before.retry(at(3)));
        let after = RetryBudget::after(&before, &Retry { budget_percent: 200, ..Retry::default() });
        assert_eq!((granted(&after, at(4)), granted(&before, at(4))), (3 + 10 * after.per_second as usize, 0));
    }
}
