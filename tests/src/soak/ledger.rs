//! The results of the requests to one agent.

use std::fmt;

use anyhow::Error;

use super::latency::Samples;
use crate::content::Mismatch;
use crate::stress::Tally;

/// Number of failures kept in detail; all are counted.
const KEPT: usize = 10;

/// A body that looks complete and differs from the one sent.
#[derive(Debug)]
pub(super) struct Wrong(pub(super) String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

#[derive(Debug, Default)]
pub struct Ledger {
    /// Requests answered correctly.
    pub done: u64,
    /// Bodies with a wrong byte, or with an orderly close too early.
    pub wrong: u64,
    /// Failures excused by a fault.
    pub explained: u64,
    /// Other failures.
    pub unexplained: u64,
    /// The first wrong or unexcused failures.
    pub failures: Vec<String>,
    pub(super) latency: Samples,
}

impl Ledger {
    pub(super) fn done(&mut self) {
        self.done += 1;
    }

    /// Records the failure `what`; a fault may excuse it, but never a wrong byte.
    pub(super) fn failed(&mut self, what: &str, error: &Error, explained: bool) {
        let wrong = error.is::<Mismatch>() || error.is::<Wrong>();
        let count = match (wrong, explained) {
            (true, _) => &mut self.wrong,
            (false, true) => &mut self.explained,
            (false, false) => &mut self.unexplained,
        };
        *count += 1;
        if (wrong || !explained) && self.failures.len() < KEPT {
            self.failures.push(format!("{error:#}\n    {what}"));
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.done += other.done;
        self.wrong += other.wrong;
        self.explained += other.explained;
        self.unexplained += other.unexplained;
        self.failures.extend(other.failures);
        self.failures.truncate(KEPT);
        self.latency = other.latency;
    }

    /// The tallies of the stress clients, which no fault affects.
    pub(super) fn add_stress(&mut self, tally: &Tally) {
        self.done += tally.complete + tally.broken + tally.left;
        self.wrong += tally.wrong + tally.short;
        self.unexplained += tally.odd;
        self.failures.extend(tally.failures.iter().cloned());
        self.failures.truncate(KEPT);
    }

    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let mut complaints = self.failures.clone();
        let failed = self.wrong + self.unexplained;
        if failed > self.failures.len() as u64 {
            complaints.push(format!("{} more failures", failed - self.failures.len() as u64));
        }
        if self.done == 0 {
            complaints.push("no request was answered".to_owned());
        }
        complaints
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { done, wrong, explained, unexplained, .. } = self;
        write!(f, "{done} requests, {wrong} wrong, {explained} failed during a fault, {unexplained} failed otherwise")
    }
}
