//! Long mixed traffic under faults. Every byte is compared, and at the end each agent must hold what it held after the warm-up.
//!
//! One agent process per steering mode, all concurrently over the same servers. Each pool meets one kind of fault, which determines
//! which requests may fail and when: those to the pools `mortal` and `linked`, while their server or link is away. All others must
//! be answered.

mod bounds;
mod caller;
mod faults;
mod footprint;
mod latency;
mod ledger;
mod memory;
mod subject;
mod visit;
mod world;

pub use bounds::{Allowance, Drift};
pub use ledger::Ledger;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures_util::future::{join, join_all};
use penstock_agent::config::SteeringMode;

use crate::{Random, stress::local_modes};
use footprint::Footprint;
use subject::Subject;
use world::World;

/// The warm-up's share of the time; what an agent holds after it is the baseline for the end.
const WARM_UP: f64 = 0.2;
/// Between two progress lines.
const PROGRESS: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub time: Duration,
    pub seed: u64,
    /// Only this mode; otherwise all.
    pub mode: Option<SteeringMode>,
}

/// The result of a soak run.
#[derive(Debug)]
pub struct Report {
    /// Lines to print, at least one per agent.
    pub lines: Vec<String>,
    /// Everything that is wrong.
    pub complaints: Vec<String>,
}

/// Runs for `options.time` and until the agents are idle. Passes progress to `note`. Returns an error only for causes other than
/// the agents.
pub async fn run(options: Options, note: impl Fn(&str)) -> Result<Report> {
    let modes = options.mode.map_or_else(local_modes, |mode| vec![mode]);
    let world = World::start().await.context("could not start the servers of the soak run")?;
    let mut subjects = Vec::new();
    for mode in modes {
        subjects.push(
            Subject::start(mode, &world).await.with_context(|| format!("could not start the agent with {mode:?}"))?,
        );
    }
    let mut random = Random::new(options.seed);
    let warm = options.time.mul_f64(WARM_UP);

    let mut ledgers: Vec<Ledger> = subjects.iter().map(|_| Ledger::default()).collect();
    phase(&world, &subjects, &mut ledgers, &mut random, warm, &note).await;
    let before = footprints(&world, &subjects).await.context("measuring after the warm-up")?;
    note("warmed up");
    // The warm-up's latency is not part of the run.
    ledgers.iter_mut().for_each(|ledger| ledger.latency = latency::Samples::default());
    phase(&world, &subjects, &mut ledgers, &mut random, options.time - warm, &note).await;
    let after = footprints(&world, &subjects).await.context("measuring after the run")?;

    let mut report = Report { lines: vec![world.faults.summary()], complaints: Vec::new() };
    for (((subject, ledger), before), after) in subjects.iter().zip(&ledgers).zip(&before).zip(&after) {
        let name = subject.name();
        let drift = ledger.latency.drift();
        report.lines.push(format!("{name}: {ledger}"));
        report.lines.push(format!("{name}: {drift}"));
        report.lines.push(format!("{name}: after the warm-up {before}; at the end {after}"));
        let mut complaints = ledger.complaints();
        complaints.extend(drift.complaints());
        complaints.extend(Allowance::default().complaints(before, after));
        complaints.extend(subject.complaints());
        report.complaints.extend(complaints.into_iter().map(|complaint| format!("{name}: {complaint}")));
    }
    report.complaints.extend(world.complaints(options.time));
    Ok(report)
}

/// Traffic and faults for this time.
async fn phase(
    world: &World,
    subjects: &[Subject],
    ledgers: &mut [Ledger],
    random: &mut Random,
    time: Duration,
    note: &impl Fn(&str),
) {
    let until = Instant::now() + time;
    let traffic = subjects.iter().zip(ledgers).map(|(subject, ledger)| {
        let random = Random::new(random.below(u64::MAX));
        async move { ledger.add(subject.traffic(world, random, until).await) }
    });
    let traffic: Vec<_> = traffic.collect();
    let faults = faults::run(world, subjects, Random::new(random.below(u64::MAX)), until);
    let progress = async {
        while Instant::now() + PROGRESS < until {
            tokio::time::sleep(PROGRESS).await;
            let left = until.saturating_duration_since(Instant::now()).as_secs();
            for subject in subjects {
                note(&format!("{left} s left, {}", subject.progress()));
            }
        }
    };
    join(join(join_all(traffic), faults), progress).await;
}

/// What each agent holds once it is idle.
async fn footprints(world: &World, subjects: &[Subject]) -> Result<Vec<Footprint>> {
    let mut all = Vec::new();
    for subject in subjects {
        all.push(Footprint::when_idle(world, subject).await.with_context(|| subject.name())?);
    }
    Ok(all)
}
