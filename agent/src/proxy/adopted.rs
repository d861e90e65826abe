//! Keeps the flows of path `wire` that agents before this one have begun: looks at them twice a second, ends those that are idle or
//! late, and counts and logs those that have ended.
//!
//! Runs on a thread of its own until the agent drains. Then it leaves them to the next agent, or waits for their end
//! (`steering.at_stop`).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_common::path::Path;
use tokio::sync::watch;

use super::access_log;
use crate::{
    deliver::{End, judge},
    kernel::{
        socket::monotonic_ns,
        wire::{Adopted, AdoptedFlow, Adoption, FlowStop, LastBytes, Seen, Story, silence},
    },
    shared::Shared,
};

/// Time between two looks at the flows, and at the folders of other agents.
const LOOK: Duration = Duration::from_millis(500);
const SCAN: Duration = Duration::from_secs(5);

/// The flows of agents that are gone.
pub struct Keeper {
    adoption: Adoption,
    adopted: Vec<Adopted>,
    /// Whether flows are left to the next agent when this one stops.
    leaves: bool,
}

impl Keeper {
    /// Adopts what has no owner now. Returns what to report.
    pub fn new(mut adoption: Adoption, leaves: bool) -> (Self, Vec<String>) {
        adoption.sweep();
        let (adopted, mut notes) = adoption.scan();
        notes.extend(adopted.iter().map(|one| format!("adopted {} flows of {}", one.flows().len(), one.describe())));
        (Self { adoption, adopted, leaves }, notes)
    }

    /// Runs until the agent drains, and then until no flow is left or the agent is forced to stop.
    pub fn run(mut self, updates: &watch::Receiver<Arc<Shared>>) -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let mut scanned = Instant::now();
        loop {
            let shared = Arc::clone(&updates.borrow());
            let (drains, is_forced) = (shared.draining.is_cancelled(), shared.force.is_cancelled());
            if drains && self.leaves {
                break;
            }
            if scanned.elapsed() >= SCAN && !drains {
                self.scan();
                scanned = Instant::now();
            }
            self.look(&shared, is_forced);
            if is_forced || drains && self.adopted.iter().all(|one| one.flows().is_empty()) {
                break;
            }
            runtime.block_on(async {
                let until = if drains { &shared.force } else { &shared.draining };
                tokio::select! {
                    () = until.cancelled() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            });
        }
        let done = self.adopted.into_iter().filter(|one| one.flows().is_empty());
        done.for_each(Adopted::remove);
        Ok(())
    }

    fn scan(&mut self) {
        let (adopted, notes) = self.adoption.scan();
        for one in &adopted {
            tracing::info!(folder = one.describe(), flows = one.flows().len(), "flows adopted");
        }
        notes.iter().for_each(|note| tracing::warn!("{note}"));
        self.adopted.extend(adopted);
    }

    /// Counts flows that have ended, and ends those that are idle or late. `force`: ends all.
    fn look(&mut self, shared: &Shared, force: bool) {
        let mut kept = Vec::new();
        for mut one in self.adopted.drain(..) {
            one.count(|one, flow| {
                let (seen, story) = (one.seen(flow), one.story(flow));
                let last = || one.last_bytes(flow);
                let Some(reason) = end(&seen, &story, flow.stop(), last, shared, force) else { return false };
                if !seen.is_orderly() || !matches!(reason, Reason::Ended(_)) {
                    one.reset(flow);
                }
                record(flow, &seen, &story, reason.label(), shared);
                true
            });
            if one.tidy() {
                one.remove();
            } else {
                kept.push(one);
            }
        }
        self.adopted = kept;
        shared.metrics.set_adopted_flows(self.adopted.iter().map(|one| one.flows().len()).sum());
    }
}

/// Why a flow is over.
enum Reason {
    Ended(End),
    Asked(FlowStop),
    Idle,
    Late,
    Stopped,
}

impl Reason {
    fn label(&self) -> &'static str {
        match self {
            Self::Ended(end) => end.reason(),
            Self::Asked(why) => why.reason(),
            Self::Idle => End::Idle.reason(),
            Self::Late => "request_timeout",
            Self::Stopped => "agent_stopped",
        }
    }
}

fn end(
    seen: &Seen,
    story: &Story,
    stop: Option<FlowStop>,
    last: impl FnOnce() -> LastBytes,
    shared: &Shared,
    force: bool,
) -> Option<Reason> {
    let (now, timeouts) = (monotonic_ns(), &shared.config.timeouts);
    let lasted = Duration::from_nanos(now.saturating_sub(story.started_ns));
    match () {
        () if seen.has_ended() => Some(Reason::Ended(judge(seen, story.framing, story.left, &last()).0)),
        () if stop.is_some() => stop.map(Reason::Asked),
        () if force => Some(Reason::Stopped),
        () if timeouts.idle.is_some_and(|idle| silence(seen, now) >= idle) => Some(Reason::Idle),
        () if timeouts.request.is_some_and(|limit| lasted >= limit) => Some(Reason::Late),
        () => None,
    }
}

fn record(flow: &AdoptedFlow, seen: &Seen, story: &Story, reason: &'static str, shared: &Shared) {
    shared.metrics.body_bytes(Path::Wire, seen.bytes);
    shared.metrics.body_bytes(Path::Relay, story.relayed);
    shared.metrics.adopted_flow_ended(reason);
    access_log::adopted(flow, seen, story, reason);
}
