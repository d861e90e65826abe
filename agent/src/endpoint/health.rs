//! The health of one endpoint, from the results of requests (passive) and of health checks (active). Time is passed in.
//!
//! An endpoint that fails several requests in a row is ejected. After the ejection one request is let through as a probe: a
//! success lets the endpoint recover, a failure ejects it for twice as long. If the probe has no result, another one is let
//! through after the base time.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use parking_lot::Mutex;

use crate::config::{Ejection, HealthCheck};

#[derive(Debug, Default)]
pub(super) struct Health {
    /// Whether `state` differs from the initial state. Requests to a healthy endpoint take no lock.
    troubled: AtomicBool,
    state: Mutex<HealthState>,
}

#[derive(Debug, Default)]
struct HealthState {
    passive: Passive,
    active: ActiveChecks,
}

/// Results of requests.
#[derive(Debug, Default)]
struct Passive {
    /// In a row.
    failures: u32,
    /// In a row.
    ejections: u32,
    /// The end of the ejection, when a probe may be sent. `None` if the endpoint is not ejected.
    until: Option<Instant>,
    probing: bool,
}

/// Results of health checks.
#[derive(Debug, Default)]
struct ActiveChecks {
    down: bool,
    /// Consecutive results that contradict `down`.
    against: u32,
}

impl Health {
    /// Whether requests should go to other endpoints if there are any.
    pub(super) fn is_avoided(&self, now: Instant) -> bool {
        self.with(|state| state.active.down || state.passive.until.is_some_and(|until| now < until)).unwrap_or(false)
    }

    /// Whether failed requests have ejected the endpoint. Stays true while a probe is due.
    pub(super) fn is_ejected(&self) -> bool {
        self.ejected_until().is_some()
    }

    pub(super) fn ejected_until(&self) -> Option<Instant> {
        self.with(|state| state.passive.until).flatten()
    }

    /// Whether health checks have marked the endpoint as down.
    pub(super) fn is_down(&self) -> bool {
        self.with(|state| state.active.down).unwrap_or(false)
    }

    /// A request is sent to the endpoint. It becomes the probe if one is due.
    pub(super) fn begins(&self, rules: &Ejection, now: Instant) {
        self.with(|state| state.passive.begins(rules, now));
    }

    /// A request succeeded.
    pub(super) fn succeeded(&self) {
        self.with(|state| state.passive = Passive::default());
    }

    /// A request failed. Returns true if that ejects the endpoint, which it does only if `may_be` is true.
    pub(super) fn failed(&self, rules: &Ejection, now: Instant, may_be: bool) -> bool {
        self.change(|state| state.passive.failed(rules, now, may_be))
    }

    /// A health check ended. Returns true if the endpoint went up or down.
    pub(super) fn checked(&self, healthy: bool, rules: &HealthCheck) -> bool {
        self.change(|state| state.active.checked(healthy, rules))
    }

    /// Forgets the results of health checks, of requests, or of both.
    pub(super) fn forget(&self, checks: bool, requests: bool) {
        self.with(|state| {
            if checks {
                state.active = ActiveChecks::default();
            }
            if requests {
                state.passive = Passive::default();
            }
        });
    }

    /// Calls `f` only if the state differs from the initial state.
    fn with<T>(&self, f: impl FnOnce(&mut HealthState) -> T) -> Option<T> {
        self.troubled.load(Ordering::Relaxed).then(|| self.change(f))
    }

    fn change<T>(&self, f: impl FnOnce(&mut HealthState) -> T) -> T {
        let mut state = self.state.lock();
        let value = f(&mut state);
        let (Passive { failures, until, .. }, ActiveChecks { down, against }) = (&state.passive, &state.active);
        let troubled = *failures > 0 || until.is_some() || *down || *against > 0;
        // Stored under the lock, so that the flag always matches the latest state.
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
        // Concurrent requests fail together. While the endpoint is ejected, only the probe's result counts.
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

impl ActiveChecks {
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
    fn third_failure_in_a_row_ejects() {
        let (health, now) = (Health::default(), Instant::now());
        assert!(!fail(&health, now) && !fail(&health, now));
        health.succeeded();
        assert!(!fail(&health, now) && !fail(&health, now) && !health.is_avoided(now));
        assert!(fail(&health, now) && health.is_avoided(now));
        assert!(!fail(&health, now), "the fourth changes nothing");
        assert_eq!(health.ejected_until(), Some(now + 5 * SECOND));
    }

    #[test]
    fn failed_probe_doubles_the_ejection() {
        let (health, mut now) = (Health::default(), Instant::now());
        for _ in 0..3 {
            fail(&health, now);
        }
        for seconds in [5, 10, 15, 15] {
            assert!(health.is_avoided(now + seconds * SECOND - Duration::from_nanos(1)));
            now += seconds * SECOND;
            assert!(!health.is_avoided(now), "a probe is due after {seconds} s");
            health.begins(&rules(), now);
            assert!(health.is_avoided(now), "only one probe at a time");
            assert!(fail(&health, now));
        }
        now += 15 * SECOND;
        health.begins(&rules(), now);
        health.succeeded();
        assert!(!health.is_avoided(now) && !health.is_ejected());
        assert!(!fail(&health, now) && !fail(&health, now) && fail(&health, now));
        assert_eq!(health.ejected_until(), Some(now + 5 * SECOND), "a success resets the ejection time");
    }

    #[test]
    fn probe_without_result_is_followed_by_another() {
        let (health, now) = (Health::default(), Instant::now());
        for _ in 0..3 {
            fail(&health, now);
        }
        health.begins(&rules(), now + 5 * SECOND);
        assert!(health.is_avoided(now + 9 * SECOND));
        assert!(!health.is_avoided(now + 10 * SECOND));
    }

    #[test]
    fn ejection_is_limited_and_can_be_off() {
        let (health, now) = (Health::default(), Instant::now());
        for _ in 0..5 {
            assert!(!health.failed(&rules(), now, false));
        }
        assert!(!health.is_avoided(now));
        assert!(fail(&health, now), "ejected as soon as it is allowed");
        let off = Ejection { failures: 0, ..rules() };
        let health = Health::default();
        assert!((0..9).all(|_| !health.failed(&off, now, true)));
    }

    #[test]
    fn consecutive_checks_change_the_state() {
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
