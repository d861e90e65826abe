//! The health of one endpoint, from two sides: what requests saw of it (passive) and what checks found (active).
//!
//! An endpoint that failed some requests in a row is ejected for a time. After that one request is let through: if it
//! succeeds the endpoint is in again, if it fails the endpoint is out for twice as long, and if nothing is heard of it
//! another one is let through when the first time has passed once more. Time is passed in.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use parking_lot::Mutex;

use crate::config::{Ejection, HealthCheck};

#[derive(Debug, Default)]
pub(super) struct Health {
    /// Whether `state` is other than at the start: the requests of a healthy endpoint take no lock.
    troubled: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    passive: Passive,
    active: Active,
}

/// What requests saw.
#[derive(Debug, Default)]
struct Passive {
    /// In a row.
    failures: u32,
    /// In a row.
    ejections: u32,
    /// Ejected; from then on a probe may go.
    until: Option<Instant>,
    probing: bool,
}

/// What checks found.
#[derive(Debug, Default)]
struct Active {
    down: bool,
    /// Results in a row that speak against `down`.
    against: u32,
}

impl Health {
    /// Whether requests should go elsewhere if they can.
    pub(super) fn is_avoided(&self, now: Instant) -> bool {
        self.with(|state| state.active.down || state.passive.until.is_some_and(|until| now < until)).unwrap_or(false)
    }

    /// Taken out by failures, whether or not a probe is due.
    pub(super) fn is_ejected(&self) -> bool {
        self.ejected_until().is_some()
    }

    pub(super) fn ejected_until(&self) -> Option<Instant> {
        self.with(|state| state.passive.until).flatten()
    }

    /// Taken out by checks.
    pub(super) fn is_down(&self) -> bool {
        self.with(|state| state.active.down).unwrap_or(false)
    }

    /// A request goes to the endpoint. It is the probe if one is due.
    pub(super) fn begins(&self, rules: &Ejection, now: Instant) {
        self.with(|state| state.passive.begins(rules, now));
    }

    /// A request succeeded.
    pub(super) fn succeeded(&self) {
        self.with(|state| state.passive = Passive::default());
    }

    /// A request failed. True if the endpoint is ejected by this, which it is only if it `may_be`.
    pub(super) fn failed(&self, rules: &Ejection, now: Instant, may_be: bool) -> bool {
        self.change(|state| state.passive.failed(rules, now, may_be))
    }

    /// A check has its result. True if the endpoint went up or down by it.
    pub(super) fn checked(&self, healthy: bool, rules: &HealthCheck) -> bool {
        self.change(|state| state.active.checked(healthy, rules))
    }

    /// None if the endpoint is as at the start.
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> Option<T> {
        self.troubled.load(Ordering::Relaxed).then(|| self.change(f))
    }

    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
        let value = f(&mut state);
        let (Passive { failures, until, .. }, Active { down, against }) = (&state.passive, &state.active);
        let troubled = *failures > 0 || until.is_some() || *down || *against > 0;
        // Under the lock, so that the last word on the state is also the last one here.
        self.troubled.store(troubled, Ordering::Relaxed);
        value
    }
}

impl Passive {
    fn begins(&mut self, rules: &Ejection, now: Instant) {
        if self.until.is_some_and(|until| now >= until) {
            self.until = Some(now + rules.base);
            self.probing = true;
        }
    }

    fn failed(&mut self, rules: &Ejection, now: Instant, may_eject: bool) -> bool {
        // Requests that were under way together fail together: while the endpoint is ejected, only the probe says anything new.
        if rules.failures == 0 || (self.until.is_some() && !self.probing) {
            return false;
        }
        self.failures = self.failures.saturating_add(1);
        if !self.probing && (self.failures < rules.failures || !may_eject) {
            return false;
        }
        let time = rules.base.saturating_mul(1 << self.ejections.min(16)).min(rules.max);
        self.ejections = self.ejections.saturating_add(1);
        self.until = Some(now + time);
        self.probing = false;
        true
    }
}

impl Active {
    fn checked(&mut self, healthy: bool, rules: &HealthCheck) -> bool {
        if healthy != self.down {
            self.against = 0;
            return false;
        }
        self.against += 1;
        let enough = if healthy { rules.healthy_after } else { rules.unhealthy_after };
        if self.against < enough {
            return false;
        }
        *self = Self { down: !healthy, against: 0 };
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn rules() -> Ejection {
        Ejection { failures: 3, base: 5 * SECOND, max: 15 * SECOND, ..Ejection::default() }
    }

    fn fail(health: &Health, now: Instant) -> bool {
        health.failed(&rules(), now, true)
    }

    #[test]
    fn the_third_failure_in_a_row_ejects() {
        let (health, now) = (Health::default(), Instant::now());
        assert!(!fail(&health, now) && !fail(&health, now));
        health.succeeded();
        assert!(!fail(&health, now) && !fail(&health, now) && !health.is_avoided(now));
        assert!(fail(&health, now) && health.is_avoided(now));
        assert!(!fail(&health, now), "the fourth says nothing new");
        assert_eq!(health.ejected_until(), Some(now + 5 * SECOND));
    }

    #[test]
    fn one_probe_at_a_time_and_twice_as_long_when_it_fails() {
        let (health, mut now) = (Health::default(), Instant::now());
        for _ in 0..3 {
            fail(&health, now);
        }
        for seconds in [5, 10, 15, 15] {
            assert!(health.is_avoided(now + seconds * SECOND - Duration::from_nanos(1)));
            now += seconds * SECOND;
            assert!(!health.is_avoided(now), "a probe is due after {seconds} s");
            health.begins(&rules(), now);
            assert!(health.is_avoided(now), "and only one");
            assert!(fail(&health, now));
        }
        now += 15 * SECOND;
        health.begins(&rules(), now);
        health.succeeded();
        assert!(!health.is_avoided(now) && !health.is_ejected());
        assert!(!fail(&health, now) && !fail(&health, now) && fail(&health, now));
        assert_eq!(health.ejected_until(), Some(now + 5 * SECOND), "a success ends the doubling");
    }

    #[test]
    fn a_probe_that_is_never_heard_of_is_followed_by_another() {
        let (health, now) = (Health::default(), Instant::now());
        for _ in 0..3 {
            fail(&health, now);
        }
        health.begins(&rules(), now + 5 * SECOND);
        assert!(health.is_avoided(now + 9 * SECOND));
        assert!(!health.is_avoided(now + 10 * SECOND));
    }

    #[test]
    fn not_more_than_allowed_and_not_at_all_when_off() {
        let (health, now) = (Health::default(), Instant::now());
        for _ in 0..5 {
            assert!(!health.failed(&rules(), now, false));
        }
        assert!(!health.is_avoided(now));
        assert!(fail(&health, now), "as soon as it is allowed");
        let off = Ejection { failures: 0, ..rules() };
        let health = Health::default();
        assert!((0..9).all(|_| !health.failed(&off, now, true)));
    }

    #[test]
    fn checks_count_in_a_row() {
        let rules = HealthCheck { unhealthy_after: 2, healthy_after: 3, ..HealthCheck::new("/".parse().unwrap()) };
        let (health, now) = (Health::default(), Instant::now());
        let check = |healthy| health.checked(healthy, &rules);
        assert!(!check(false) && !check(true) && !check(false) && !health.is_down());
        assert!(check(false) && health.is_down() && health.is_avoided(now));
        health.succeeded();
        assert!(health.is_down(), "requests do not overrule checks");
        assert!(!check(true) && !check(true) && !check(false) && !check(true) && !check(true));
        assert!(check(true) && !health.is_avoided(now));
    }
}
