//! The combined results of many cases.

use std::fmt;

use anyhow::Error;
use penstock_agent::config::SteeringMode;

use super::case::{Case, Exchange};
use super::counters::Counters;
use super::exchange::{Garbled, Outcome, Short};
use super::{mode_name, paths};
use crate::{cable::Carried, content::Mismatch};

/// Number of failures kept in detail; all are counted.
const KEPT: usize = 10;

/// What agents in one mode carried, and whether it was correct.
#[derive(Clone, Debug)]
pub struct Tally {
    pub mode: SteeringMode,
    pub complete: u64,
    /// Broken off by the endpoint, as planned.
    pub broken: u64,
    /// The client left.
    pub left: u64,
    /// The agent was killed or stopped.
    pub cut: u64,
    /// How many of these connections switched protocols.
    pub switched: u64,
    /// Responses of the endpoint that overwrites what it has sent: complete and exact, and visibly broken.
    pub overwritten: [u64; 2],
    /// Response bytes read by clients, framing included.
    pub read: u64,
    /// The part of them in complete responses.
    pub whole: u64,
    /// Streams with a wrong byte.
    pub wrong: u64,
    /// Streams that closed orderly and too early.
    pub short: u64,
    /// Other failures.
    pub odd: u64,
    /// The first failures of these three kinds.
    pub failures: Vec<String>,
    pub counters: Counters,
    /// What happened between the places of mode `wire`.
    pub network: Option<Network>,
}

/// What cables did to packets, and how agents succeeded each other.
#[derive(Clone, Debug, Default)]
pub struct Network {
    pub carried: Carried,
    /// Agents that were killed or stopped, and their flows that ran on and were adopted.
    pub replaced: u64,
    pub adopted: u64,
}

impl Tally {
    pub(super) fn new(mode: SteeringMode) -> Self {
        Self {
            mode,
            complete: 0,
            broken: 0,
            left: 0,
            cut: 0,
            switched: 0,
            overwritten: [0; 2],
            read: 0,
            whole: 0,
            wrong: 0,
            short: 0,
            odd: 0,
            failures: Vec::new(),
            counters: Counters::default(),
            network: None,
        }
    }

    #[must_use]
    pub fn name(&self) -> String {
        mode_name(self.mode)
    }

    #[must_use]
    pub fn requests(&self) -> u64 {
        self.complete + self.broken + self.left + self.cut + self.overwritten.iter().sum::<u64>() + self.failed()
    }

    #[must_use]
    pub fn failed(&self) -> u64 {
        self.wrong + self.short + self.odd
    }

    pub(super) fn done(&mut self, case: &Case, outcome: Outcome, bytes: u64) {
        let count = match outcome {
            Outcome::Complete => &mut self.complete,
            Outcome::Broken => &mut self.broken,
            Outcome::Left => &mut self.left,
        };
        *count += 1;
        self.switched += u64::from(matches!(case.exchange, Exchange::Switch { .. }));
        self.read += bytes;
        self.whole += if outcome == Outcome::Complete { bytes } else { 0 };
    }

    /// A response of the endpoint that overwrites what it has sent.
    pub(super) fn overwritten(&mut self, complete: bool, bytes: u64) {
        self.overwritten[usize::from(!complete)] += 1;
        self.read += bytes;
    }

    /// `what` says where it happened.
    pub(super) fn fail(&mut self, what: &str, error: &Error) {
        let count = if error.is::<Mismatch>() || error.is::<Garbled>() {
            &mut self.wrong
        } else if error.is::<Short>() {
            &mut self.short
        } else {
            &mut self.odd
        };
        *count += 1;
        if self.failures.len() < KEPT {
            self.failures.push(format!("{error:#}\n    {what}"));
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.complete += other.complete;
        self.broken += other.broken;
        self.left += other.left;
        self.cut += other.cut;
        self.switched += other.switched;
        for (sum, one) in self.overwritten.iter_mut().zip(other.overwritten) {
            *sum += one;
        }
        self.read += other.read;
        self.whole += other.whole;
        self.wrong += other.wrong;
        self.short += other.short;
        self.odd += other.odd;
        self.failures.extend_from_slice(&other.failures[..other.failures.len().min(KEPT - self.failures.len())]);
        self.counters.add(&other.counters);
        if let Some(other) = &other.network {
            let network = self.network.get_or_insert_default();
            network.carried.add(&other.carried);
            network.replaced += other.replaced;
            network.adopted += other.adopted;
        }
    }

    /// Everything that is wrong, including paths that carried nothing; empty if all is well.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let mode = self.name();
        let mut complaints: Vec<String> = self.failures.iter().map(|failure| format!("{mode}: {failure}")).collect();
        if self.failed() > self.failures.len() as u64 {
            complaints.push(format!("{mode}: {} more", self.failed() - self.failures.len() as u64));
        }
        // An endpoint's pages are not shared between machines.
        if self.overwritten[0] == 0 && self.mode != SteeringMode::Wire {
            complaints.push(format!("{mode}: no response of the endpoint that overwrites its pages was complete"));
        }
        if self.complete == 0 {
            complaints.push(format!("{mode}: no response was complete"));
        }
        for path in paths(self.mode).iter().filter(|path| self.counters.bytes.get(path) == 0) {
            complaints.push(format!("{mode}: the path {path} carried nothing"));
        }
        complaints
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { complete, broken, left, switched, overwritten, read, wrong, short, odd, counters, cut, .. } = self;
        writeln!(
            f,
            "{:<8} {} requests, {switched} of them switches of protocol: {complete} complete, {broken} broken off by \
             the endpoint as told, {left} left by the client; {read} bytes read",
            self.name(),
            self.requests(),
        )?;
        let [exact, visible] = overwritten;
        if self.mode != SteeringMode::Wire {
            writeln!(f, "  pages overwritten after sending: {exact} responses exact, {visible} visibly broken")?;
        }
        writeln!(f, "  bytes  {}", counters.bytes)?;
        writeln!(f, "  flows  {}: {}", counters.flows.sum(), counters.flows)?;
        writeln!(f, "  stops  {}", counters.stops)?;
        writeln!(
            f,
            "  wrong  {wrong} streams with a wrong byte, {short} closed orderly too early, {odd} other failures"
        )?;
        if let Some(Network { carried, replaced, adopted }) = &self.network {
            writeln!(f, "  cables {carried}")?;
            writeln!(f, "  agents {replaced} replaced, {cut} requests cut by that; {adopted} flows adopted")?;
        }
        Ok(())
    }
}
