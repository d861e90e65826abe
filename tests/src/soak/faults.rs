//! The faults of a soak run and their times: a fault excuses only failures within its time.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::subject::Subject;
use super::world::World;
use crate::{Random, ScriptedEpp};

/// Pause between two faults, so that most requests meet none.
const QUIET: Duration = Duration::from_millis(1500);
/// Duration of an outage.
const AWAY: Duration = Duration::from_millis(1500);
/// Failures caused by a fault occur within this time: the longest wait is a client's for bytes of a dead connection.
const SETTLE: Duration = Duration::from_secs(12);
/// A run of this length has every kind of fault.
const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// The EPP stops with all connections, and another starts at the same address. Its pools fail open.
    EppRestarts,
    /// GOAWAY, like servers that limit connection age.
    EppGoesAway,
    EndpointDies,
    LinkGoesDown,
    /// SIGHUP with another configuration.
    Reload,
    MemoryPressure,
}

const ALL: [Fault; 6] = [
    Fault::EppRestarts,
    Fault::EppGoesAway,
    Fault::EndpointDies,
    Fault::LinkGoesDown,
    Fault::Reload,
    Fault::MemoryPressure,
];

/// The faults so far.
#[derive(Default)]
pub(super) struct Faults {
    windows: RefCell<Vec<(Fault, Instant, Option<Instant>)>>,
    counts: RefCell<BTreeMap<Fault, u32>>,
    failures: RefCell<Vec<String>>,
}

impl Faults {
    fn begin(&self, fault: Fault) {
        self.windows.borrow_mut().push((fault, Instant::now(), None));
        *self.counts.borrow_mut().entry(fault).or_default() += 1;
    }

    fn failed(&self, fault: Fault, error: &anyhow::Error) {
        self.failures.borrow_mut().push(format!("fault {fault:?} was not made: {error:#}"));
    }

    fn end(&self) {
        if let Some((_, _, end)) = self.windows.borrow_mut().last_mut() {
            *end = Some(Instant::now());
        }
    }

    /// Whether this fault was active between `from` and now, or shortly before.
    pub(super) fn explain(&self, fault: Fault, from: Instant) -> bool {
        let windows = self.windows.borrow();
        let mut own = windows.iter().rev().filter(|(kind, ..)| *kind == fault);
        own.any(|(_, _, end)| end.is_none_or(|end| end + SETTLE >= from))
    }

    pub(super) fn summary(&self) -> String {
        let counts = self.counts.borrow();
        let counts: Vec<String> = counts.iter().map(|(fault, count)| format!("{fault:?} {count}")).collect();
        format!("faults: {}", counts.join(", "))
    }

    /// Faults that were not made, of a run of length `time`: their windows have excused failures, or nothing was tested.
    pub(super) fn complaints(&self, time: Duration) -> Vec<String> {
        let mut complaints = self.failures.borrow().clone();
        let counts = self.counts.borrow();
        let missing = ALL.iter().filter(|fault| time >= LONG && !counts.contains_key(fault));
        complaints.extend(missing.map(|fault| format!("fault {fault:?} was never made")));
        complaints
    }
}

/// Causes one fault after another, all kinds in turns, in an order set by `random`.
pub(super) async fn run(world: &World, subjects: &[Subject], mut random: Random, until: Instant) {
    let mut left: Vec<Fault> = Vec::new();
    loop {
        tokio::time::sleep(QUIET).await;
        // A fault must be over before the end.
        if Instant::now() + AWAY * 2 >= until {
            return;
        }
        if left.is_empty() {
            left = ALL.to_vec();
        }
        let fault = left.swap_remove(random.below(left.len() as u64) as usize);
        world.faults.begin(fault);
        if let Err(error) = make(fault, world, subjects).await {
            world.faults.failed(fault, &error);
        }
        world.faults.end();
    }
}

async fn make(fault: Fault, world: &World, subjects: &[Subject]) -> Result<()> {
    match fault {
        Fault::EppRestarts => {
            drop(world.epp.borrow_mut().take());
            tokio::time::sleep(AWAY).await;
            world.epp_returns().await
        }
        Fault::EppGoesAway => {
            world.epp.borrow().iter().for_each(ScriptedEpp::go_away);
            Ok(())
        }
        Fault::EndpointDies => {
            drop(world.mortal.borrow_mut().take());
            tokio::time::sleep(AWAY).await;
            world.mortal_returns().await
        }
        Fault::LinkGoesDown => {
            world.link.set("down")?;
            tokio::time::sleep(AWAY).await;
            world.link.set("up")
        }
        Fault::Reload => subjects.iter().try_for_each(|subject| subject.reload(world)),
        Fault::MemoryPressure => {
            let pressed: Result<Vec<_>> = subjects.iter().map(Subject::press).collect();
            tokio::time::sleep(AWAY).await;
            drop(pressed?);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_excuses_only_overlapping_requests() {
        let faults = Faults::default();
        let begin = Instant::now();
        assert!(!faults.explain(Fault::EndpointDies, begin));
        faults.begin(Fault::EndpointDies);
        assert!(faults.explain(Fault::EndpointDies, begin) && !faults.explain(Fault::LinkGoesDown, begin));
        faults.end();
        assert!(faults.explain(Fault::EndpointDies, begin));
        assert!(!faults.explain(Fault::EndpointDies, Instant::now() + SETTLE));
    }

    #[test]
    fn faults_that_were_not_made_are_complaints() {
        let faults = Faults::default();
        let short = LONG / 2;
        assert!(faults.complaints(short).is_empty());
        assert_eq!(faults.complaints(LONG).len(), ALL.len());
        ALL.iter().for_each(|fault| faults.begin(*fault));
        assert!(faults.complaints(LONG).is_empty());
        faults.failed(Fault::MemoryPressure, &anyhow::anyhow!("no cgroup is mounted"));
        for time in [short, LONG] {
            assert_eq!(faults.complaints(time), ["fault MemoryPressure was not made: no cgroup is mounted"]);
        }
    }
}
