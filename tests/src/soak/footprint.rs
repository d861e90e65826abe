//! What an idle agent holds.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData, MapInfo};

use super::subject::Subject;
use super::world::World;
use crate::agent;

/// The agent is idle within this time: endpoint connections are kept for two seconds, and retired resources are freed afterwards.
const IDLE_WITHIN: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);
/// Maps with an entry per connection, by key size.
const MAPS: [&str; 3] = ["INDEX", "LOCAL_INDEX", "TAILS"];
const GAUGES: [&str; 5] = [
    "penstock_active_requests",
    "penstock_client_connections",
    "penstock_slots_in_use",
    "penstock_request_body_memory_bytes",
    "penstock_request_body_spill_bytes",
];
/// Has no line before the first wait.
const WAITING: &str = "penstock_epp_waiting";

#[derive(Clone, Debug)]
pub(super) struct Footprint {
    pub(super) rss: u64,
    pub(super) descriptors: usize,
    /// What must be zero: gauges, connections at the servers, streams at the EPP and entries in kernel maps.
    pub(super) entries: Vec<(String, u64)>,
}

impl Footprint {
    /// Returns once everything that must be zero is, or the current state after [`IDLE_WITHIN`].
    pub(super) async fn when_idle(world: &World, subject: &Subject) -> Result<Self> {
        let begin = Instant::now();
        loop {
            let found = Self::now(world, subject).await?;
            let idle = found.entries.iter().all(|(_, count)| *count == 0);
            if idle || begin.elapsed() > IDLE_WITHIN {
                let streams = world.streams_open();
                world.streams_left.set(world.streams_left.get().max(streams));
                return Ok(found);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn now(world: &World, subject: &Subject) -> Result<Self> {
        let mut entries = Vec::new();
        let (_, metrics) = subject.agent.ask_admin("/metrics").await?;
        for gauge in GAUGES {
            ensure!(metrics.lines().any(|line| line.starts_with(gauge)), "the agent has no metric {gauge}");
            entries.push((gauge.to_owned(), agent::sum(&metrics, gauge, &[]) as u64));
        }
        entries.push((WAITING.to_owned(), agent::sum(&metrics, WAITING, &[]) as u64));
        entries.push(("connections at the servers".to_owned(), world.connections_open()));
        entries.push(("streams at the EPP".to_owned(), world.streams_open() as u64));
        entries.extend(maps(subject)?);
        let process = subject.process();
        Ok(Self { rss: process.rss()?, descriptors: process.descriptors()?, entries })
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB resident, {} descriptors", self.rss >> 10, self.descriptors)?;
        for (what, count) in self.entries.iter().filter(|(_, count)| *count > 0) {
            write!(f, ", {count} {what}")?;
        }
        Ok(())
    }
}

/// Entries of the maps that the agent holds (`/proc/pid/fdinfo`).
fn maps(subject: &Subject) -> Result<Vec<(String, u64)>> {
    let mut ids = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fdinfo", subject.process().id()))? {
        // A descriptor may be closed between the listing and the read.
        let Ok(text) = std::fs::read_to_string(entry?.path()) else { continue };
        let id = text.lines().find_map(|line| line.strip_prefix("map_id:"));
        ids.extend(id.and_then(|id| id.trim().parse::<u32>().ok()));
    }
    let mut counts = Vec::new();
    for id in ids {
        let info = MapInfo::from_id(id)?;
        let name = info.name_as_str().unwrap_or_default().to_owned();
        if !MAPS.contains(&name.as_str()) {
            continue;
        }
        let map = Map::from_map_data(MapData::from_id(id)?).with_context(|| format!("map {name}"))?;
        let count = match name.as_str() {
            "TAILS" => HashMap::<_, u32, [u8; penstock_common::tail::MEMORY]>::try_from(map)?.keys().count(),
            _ => HashMap::<_, u64, u32>::try_from(map)?.keys().count(),
        };
        counts.push((name, count as u64));
    }
    let steers = subject.mode != penstock_agent::config::SteeringMode::Off;
    ensure!(steers != counts.is_empty(), "the agent holds {} of the maps", counts.len());
    Ok(counts)
}
