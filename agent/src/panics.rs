//! Panics are logged with their place and counted, and a thread that ends by one makes the agent unready.
//!
//! [`install`] replaces the process's panic hook, which sees every panic, whoever catches it. [`Watch`] runs the thread of a
//! part that the agent cannot do without.

use std::{
    any::Any,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind},
};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{
    probe::{Point, Probe},
    readiness::Readiness,
    text::{self, cut},
};

/// Places that the metric tells apart; panics at further ones count as `other`.
const PLACES: usize = 64;

/// Panics of this process by thread and place. A process has one hook, so this counts for the process.
static SEEN: Mutex<BTreeMap<Place, u64>> = Mutex::new(BTreeMap::new());

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// What kind of thread: workers are all `worker`.
    pub thread: String,
    /// `file:line`.
    pub at: String,
}

/// Logs and counts every panic from now on.
pub fn install() {
    std::panic::set_hook(Box::new(record));
}

/// How many there were at each place.
pub fn seen() -> Vec<(Place, u64)> {
    SEEN.lock().iter().map(|(place, &count)| (place.clone(), count)).collect()
}

/// Logs and counts one.
pub fn record(panic: &PanicHookInfo<'_>) {
    let current = std::thread::current();
    let thread = current.name().unwrap_or("unnamed");
    let at = panic.location().map_or_else(|| "unknown".to_owned(), |at| format!("{}:{}", at.file(), at.line()));
    let message = cut(message(panic.payload()), text::PHRASE);
    count(Place { thread: kind(thread).to_owned(), at: at.clone() });
    // Without a backtrace, which takes seconds to make readable, of a worker's time.
    tracing::error!(thread, at, panic = &*message, "panicked");
}

fn count(place: Place) {
    let mut seen = SEEN.lock();
    let known = seen.len() < PLACES || seen.contains_key(&place);
    let place = if known { place } else { Place { thread: "other".to_owned(), at: "other".to_owned() } };
    *seen.entry(place).or_default() += 1;
}

/// `penstock-0` is a worker; other threads are few and have fixed names.
fn kind(thread: &str) -> &str {
    match thread.strip_prefix("penstock-") {
        Some(number) if number.bytes().all(|byte| byte.is_ascii_digit()) => "worker",
        _ => thread,
    }
}

/// What a panic says.
pub fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// What happens when a part of the agent ends that should not: the agent is unready for good, and is to end.
#[derive(Clone)]
pub struct Watch {
    readiness: Readiness,
    /// Cancelled when a part has failed.
    failed: CancellationToken,
    pub probe: Probe,
}

impl Watch {
    pub fn new(readiness: &Readiness, probe: Probe) -> Self {
        Self { readiness: readiness.clone(), failed: CancellationToken::new(), probe }
    }

    /// Runs a thread's work; `part` names it in `/readyz` and in the log. The part has failed if the work panics.
    pub fn run(&self, part: &str, work: impl FnOnce()) {
        // Whatever the work has left half done is not used again.
        let work = || {
            self.probe.at(Point::Thread(part));
            work();
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            self.fail(part, message(&*panic));
        }
    }

    /// `part` cannot go on.
    pub fn fail(&self, part: &str, why: &str) {
        let why = cut(why, text::PHRASE);
        tracing::error!(part, error = &*why, "a part of the agent failed, draining and exiting");
        self.readiness.fail(format!("failed: {part}"));
        self.failed.cancel();
    }

    pub fn has_failed(&self) -> bool {
        self.failed.is_cancelled()
    }

    /// Resolves when a part has failed. Cancel-safe.
    pub async fn failed(&self) {
        self.failed.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_of_a_part_makes_the_agent_unready() {
        let readiness = Readiness::new();
        let watch = Watch::new(&readiness, Probe::default());
        watch.run("events", || {});
        assert!(readiness.is_ready() && !watch.has_failed());
        watch.run("events", || panic!("a fault of this test's"));
        assert!(watch.has_failed());
        assert_eq!(readiness.pending(), ["failed: events"]);
    }

    #[test]
    fn threads_are_told_apart_by_what_they_do() {
        let kinds = ["penstock-0", "penstock-17", "penstock-events", "admin", "main"].map(kind);
        assert_eq!(kinds, ["worker", "worker", "penstock-events", "admin", "main"]);
    }
}
