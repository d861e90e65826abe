//! The built-in picker: least in-flight with prefix affinity over a fixed list of endpoints, shared by all workers.
//!
//! Given the hash of a request's leading blocks, gives up to three endpoints, best first. The endpoint that saw the longest
//! part of the prefix (and so probably has it in its KV cache) is best while it is not much busier than the idlest; else the
//! one with the fewest requests in flight, ties in rotation. An endpoint that failed to connect is avoided for a while.
//!
//! One short critical section a pick, with nothing in it that blocks; memory does not grow with traffic. Time is passed in.

mod affinity;
mod ejection;
mod in_flight;
mod prompt;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Instant};

use parking_lot::Mutex;

pub use in_flight::InFlight;
pub use prompt::{PromptHash, PromptHasher};

use affinity::Affinity;
use ejection::Ejection;
use in_flight::Counters;

/// The endpoint that knows the prefix may have this many more requests in flight than the idlest.
const AFFINITY_SLACK: usize = 4;
/// Endpoints in a pick: the best, and where to go when it does not answer the connect.
const MAX_PICKED: usize = 3;

/// Endpoints in order of preference: at least one, at most three.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pick {
    pub endpoints: Vec<SocketAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    #[error("no endpoint is eligible")]
    NoneEligible,
    #[error("all eligible endpoints are at their limit of requests in flight")]
    Saturated,
}

#[derive(Debug)]
pub struct BuiltinPicker {
    endpoints: Vec<SocketAddr>,
    index: HashMap<SocketAddr, usize>,
    counters: Arc<Counters>,
    max_in_flight: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    affinity: Affinity,
    /// One for each endpoint.
    ejections: Vec<Ejection>,
    /// Advances by one a pick, so that equals take turns.
    turn: usize,
}

impl BuiltinPicker {
    /// Repeated addresses count once.
    pub fn new(endpoints: Vec<SocketAddr>) -> Self {
        let mut index = HashMap::new();
        let mut distinct = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            index.entry(endpoint).or_insert_with(|| {
                distinct.push(endpoint);
                distinct.len() - 1
            });
        }
        let state = State { affinity: Affinity::new(), ejections: vec![Ejection::default(); distinct.len()], turn: 0 };
        Self {
            counters: Counters::new(distinct.len()),
            endpoints: distinct,
            index,
            max_in_flight: usize::MAX,
            state: Mutex::new(state),
        }
    }

    /// An endpoint with this many requests in flight is not picked.
    #[must_use]
    pub fn with_max_in_flight(mut self, limit: usize) -> Self {
        self.max_in_flight = limit;
        self
    }

    pub fn endpoints(&self) -> &[SocketAddr] {
        &self.endpoints
    }

    /// Chooses among the endpoints of `subset`, or all. The request is not counted before [`begin`](Self::begin).
    pub fn pick(&self, prompt: &PromptHash, subset: Option<&[SocketAddr]>, now: Instant) -> Result<Pick, NoEndpoint> {
        self.choose(&mut self.state.lock(), prompt, subset, now)
    }

    /// Chooses and counts the request at the best endpoint in one step, so that requests at the same moment see each other and
    /// the limit is never overrun.
    pub fn pick_and_begin(
        &self,
        prompt: &PromptHash,
        subset: Option<&[SocketAddr]>,
        now: Instant,
    ) -> Result<(Pick, InFlight), NoEndpoint> {
        let mut state = self.state.lock();
        let pick = self.choose(&mut state, prompt, subset, now)?;
        let in_flight = self.begin(pick.endpoints[0]);
        Ok((pick, in_flight))
    }

    /// The request is in flight at `endpoint` until the guard is dropped. An endpoint that is not of this picker is not counted.
    pub fn begin(&self, endpoint: SocketAddr) -> InFlight {
        self.counters.begin(self.index.get(&endpoint).copied())
    }

    /// Requests in flight at `endpoint` now; 0 for one that is not of this picker.
    pub fn in_flight(&self, endpoint: SocketAddr) -> usize {
        self.index.get(&endpoint).map_or(0, |&endpoint| self.counters.at(endpoint))
    }

    /// A connect to `endpoint` failed: it is avoided for a while, longer each time in a row.
    pub fn report_failure(&self, endpoint: SocketAddr, now: Instant) {
        if let Some(&endpoint) = self.index.get(&endpoint) {
            self.state.lock().ejections[endpoint].failed(now);
        }
    }

    /// `endpoint` answered: it is eligible at once, and the next failure is its first.
    pub fn report_success(&self, endpoint: SocketAddr) {
        if let Some(&endpoint) = self.index.get(&endpoint) {
            self.state.lock().ejections[endpoint].succeeded();
        }
    }

    fn choose(
        &self,
        state: &mut State,
        prompt: &PromptHash,
        subset: Option<&[SocketAddr]>,
        now: Instant,
    ) -> Result<Pick, NoEndpoint> {
        let in_subset = |endpoint: &usize| subset.is_none_or(|subset| subset.contains(&self.endpoints[*endpoint]));
        let admitted: Vec<usize> = (0..self.endpoints.len()).filter(in_subset).collect();
        let mut eligible: Vec<usize> =
            admitted.iter().copied().filter(|&endpoint| !state.ejections[endpoint].is_ejected(now)).collect();
        // With everything ejected a guess is better than a refusal.
        if eligible.is_empty() {
            eligible = admitted;
        }
        if eligible.is_empty() {
            return Err(NoEndpoint::NoneEligible);
        }

        let total = self.endpoints.len();
        let turn = state.turn % total;
        state.turn = turn + 1;
        let mut ranked: Vec<(usize, usize, usize)> = eligible
            .into_iter()
            .map(|endpoint| (self.counters.at(endpoint), (endpoint + total - turn) % total, endpoint))
            .filter(|&(load, ..)| load < self.max_in_flight)
            .collect();
        ranked.sort_unstable();
        let Some(&(least, ..)) = ranked.first() else {
            return Err(NoEndpoint::Saturated);
        };

        let near = |&&(load, _, _): &&(usize, usize, usize)| load <= least + AFFINITY_SLACK;
        let preferred = state
            .affinity
            .longest(prompt, |endpoint| ranked.iter().take_while(near).any(|&(.., other)| other == endpoint));
        if let Some(at) = preferred.and_then(|endpoint| ranked.iter().position(|&(.., other)| other == endpoint)) {
            ranked[..=at].rotate_right(1);
        }
        state.affinity.learn(prompt, ranked[0].2);
        Ok(Pick { endpoints: ranked.iter().take(MAX_PICKED).map(|&(.., endpoint)| self.endpoints[endpoint]).collect() })
    }
}
