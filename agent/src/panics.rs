//! Logs and counts panics, and makes the agent unready if a panic ends one of its threads.
//!
//! [`install`] sets the process's panic hook, which sees every panic, caught or not. [`PanicWatch`] runs the threads that
//! the agent cannot do without.

use std::{
    any::Any,
    collections::BTreeMap,
    fmt::Display,
    panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind},
    sync::OnceLock,
};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{
    probe::{Point, Probe},
    readiness::Readiness,
    text::{self, cut},
};

/// Maximum number of locations that the metric distinguishes; panics at further ones count as `other`.
const PLACES: usize = 64;

/// Panics of this process by thread and location. A process has a single hook, so the count is global.
static SEEN: Mutex<BTreeMap<PanicLocation, u64>> = Mutex::new(BTreeMap::new());

/// Where a panic happened.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PanicLocation {
    /// The kind of thread; all workers are `worker`.
    pub thread: String,
    /// `file:line`.
    pub at: String,
}

/// Logs and counts every panic from now on.
pub fn install() {
    std::panic::set_hook(Box::new(record));
}

/// The number of panics at each location.
pub(crate) fn seen() -> Vec<(PanicLocation, u64)> {
    SEEN.lock().iter().map(|(place, &count)| (place.clone(), count)).collect()
}

/// Logs and counts one panic.
pub fn record(panic: &PanicHookInfo<'_>) {
    let current = std::thread::current();
    let thread = current.name().unwrap_or("unnamed");
    let at = panic.location().map_or_else(|| "unknown".to_owned(), |at| format!("{}:{}", at.file(), at.line()));
    let message = cut(message(panic.payload()), text::PHRASE);
    count(PanicLocation { thread: kind(thread).to_owned(), at: at.clone() });
    // No backtrace: resolving its symbols takes seconds of the worker's time.
    tracing::error!(thread, at, panic = &*message, "panicked");
}

fn count(place: PanicLocation) {
    let mut seen = SEEN.lock();
    let known = seen.len() < PLACES || seen.contains_key(&place);
    let place = if known { place } else { PanicLocation { thread: "other".to_owned(), at: "other".to_owned() } };
    *seen.entry(place).or_default() += 1;
}

/// `penstock-0` is a worker; other threads are few and have fixed names.
fn kind(thread: &str) -> &str {
    match thread.strip_prefix("penstock-") {
        Some(number) if number.bytes().all(|byte| byte.is_ascii_digit()) => "worker",
        _ => thread,
    }
}

/// The message of a panic.
pub fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// The result of `work`, or the message of its panic.
fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    // The state that a panic leaves behind is not used again.
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| message(&*panic).to_owned())
}

/// Handles the end of a part that the agent cannot do without: the agent becomes unready for good and has to stop.
#[derive(Clone)]
pub(crate) struct PanicWatch {
    readiness: Readiness,
    /// Cancelled when a part has failed.
    failed: CancellationToken,
    pub probe: Probe,
}

impl PanicWatch {
    pub fn new(readiness: &Readiness, probe: Probe) -> Self {
        Self { readiness: readiness.clone(), failed: CancellationToken::new(), probe }
    }

    /// Runs a thread's work; `part` names it in `/readyz` and in the log. A panic of the work fails the part.
    pub fn run(&self, part: &str, work: impl FnOnce()) {
        let work = || {
            self.probe.at(Point::Thread(part));
            work();
        };
        if let Err(why) = caught(work) {
            self.fail(part, &why);
        }
    }

    /// Reports that `part` has failed.
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

/// A [`PanicWatch`] for a thread that starts before the agent has one. It learns of an earlier failure when it is set.
pub(crate) struct LateWatch {
    part: &'static str,
    watch: OnceLock<PanicWatch>,
    failure: OnceLock<String>,
}

impl LateWatch {
    pub fn new(part: &'static str) -> Self {
        Self { part, watch: OnceLock::new(), failure: OnceLock::new() }
    }

    /// Notifies `watch` if the part has failed or fails later.
    pub fn set(&self, watch: PanicWatch) {
        let _ = self.watch.set(watch);
        self.tell();
    }

    /// Runs the thread's work. An error or a panic of it fails the part.
    pub fn run<E: Display>(&self, work: impl FnOnce() -> Result<(), E>) {
        let result = caught(work).and_then(|result| result.map_err(|error| error.to_string()));
        if let Err(why) = result {
            let _ = self.failure.set(why);
            self.tell();
        }
    }

    /// To be called in the thread's loop.
    pub fn probe(&self) {
        if let Some(watch) = self.watch.get() {
            watch.probe.at(Point::Events(self.part));
        }
    }

    fn tell(&self) {
        if let (Some(watch), Some(why)) = (self.watch.get(), self.failure.get()) {
            watch.fail(self.part, why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_of_a_part_makes_the_agent_unready() {
        let readiness = Readiness::new();
        let watch = PanicWatch::new(&readiness, Probe::default());
        watch.run("events", || {});
        assert!(readiness.is_ready() && !watch.has_failed());
        watch.run("events", || panic!("a panic of this test"));
        assert!(watch.has_failed());
        assert_eq!(readiness.pending(), ["failed: events"]);
    }

    #[test]
    fn watch_that_comes_late_learns_of_earlier_and_later_failures() {
        for comes_first in [false, true] {
            for (panics, why) in [(false, "an error"), (true, "a panic")] {
                let readiness = Readiness::new();
                let (late, watch) = (LateWatch::new("events"), PanicWatch::new(&readiness, Probe::default()));
                late.run(|| Ok::<_, String>(()));
                if comes_first {
                    late.set(watch.clone());
                    assert!(!watch.has_failed());
                }
                late.run(|| if panics { panic!("{why}") } else { Err(why) });
                assert_eq!(watch.has_failed(), comes_first);
                late.set(watch.clone());
                assert!(watch.has_failed(), "{why}");
                assert_eq!(readiness.pending(), ["failed: events"]);
            }
        }
    }

    #[test]
    fn threads_are_named_by_kind() {
        let kinds = ["penstock-0", "penstock-17", "penstock-events", "admin", "main"].map(kind);
        assert_eq!(kinds, ["worker", "worker", "penstock-events", "admin", "main"]);
    }
}
