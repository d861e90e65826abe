//! The built-in picker: least in-flight with session and prefix affinity over the endpoints of a pool, shared by all workers.
//!
//! Given a request's session and the hash of its leading blocks, gives up to ten endpoints, best first. The endpoint that
//! the session belongs to, or without one that saw the longest part of the prefix (and so probably has it in its KV cache),
//! is best while it is not much busier than the idlest; else the one with the fewest requests in flight, ties in rotation.
//! Of endpoints that are avoided it knows from the pool's set.
//!
//! One short critical section a pick, with nothing in it that blocks; memory does not grow with traffic. Time is passed in.

mod affinity;
mod prompt;
mod session;
#[cfg(test)]
mod tests;

use std::{cmp::Reverse, net::SocketAddr, sync::Arc, time::Instant};

use parking_lot::Mutex;

pub use prompt::{PromptHash, PromptHasher};
pub use session::SessionHash;

use crate::endpoint::{in_flight::InFlight, member::Endpoint, set::EndpointSet};
use affinity::Affinity;

/// The endpoint that knows the prefix may have this many more requests in flight than the idlest.
const AFFINITY_SLACK: usize = 4;
/// The endpoint that a session belongs to may have this many: whoever asked for sessions wants them kept together.
const SESSION_SLACK: usize = 16;
/// Endpoints in a pick: the best, and where to go when it cannot be reached. More than a pod has ports, since those fail
/// together.
const MAX_PICKED: usize = 10;

/// Endpoints in order of preference, those that are avoided last: at least one, at most ten.
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
    endpoints: Arc<EndpointSet>,
    max_in_flight: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    affinity: Affinity,
    /// Advances by one a pick, so that equals take turns.
    turn: usize,
}

impl BuiltinPicker {
    pub fn new(endpoints: Arc<EndpointSet>) -> Self {
        let state = State { affinity: Affinity::new(), turn: 0 };
        Self { endpoints, max_in_flight: usize::MAX, state: Mutex::new(state) }
    }

    /// An endpoint with this many requests in flight is not picked.
    #[must_use]
    pub fn with_max_in_flight(mut self, limit: usize) -> Self {
        self.max_in_flight = limit;
        self
    }

    /// What it picks from.
    pub fn endpoints(&self) -> &EndpointSet {
        &self.endpoints
    }

    /// Chooses among the endpoints of `subset`, or all. The request is not counted before [`EndpointSet::begin`].
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
        let in_flight = self.endpoints.begin(pick.endpoints[0], now);
        Ok((pick, in_flight))
    }

    fn choose(
        &self,
        state: &mut State,
        prompt: &PromptHash,
        subset: Option<&[SocketAddr]>,
        now: Instant,
    ) -> Result<Pick, NoEndpoint> {
        let snapshot = self.endpoints.snapshot();
        let admitted: Vec<&Endpoint> = match subset {
            Some(subset) => {
                let known = subset.iter().filter_map(|&address| snapshot.get(address));
                known.filter(|endpoint| !endpoint.draining).collect()
            }
            None => snapshot.ready().collect(),
        };
        let (mut eligible, mut avoided): (Vec<&Endpoint>, Vec<&Endpoint>) =
            admitted.into_iter().partition(|endpoint| !endpoint.is_avoided(now));
        // With nothing better left a guess is better than a refusal.
        if eligible.is_empty() {
            std::mem::swap(&mut eligible, &mut avoided);
        }
        if eligible.is_empty() {
            return Err(NoEndpoint::NoneEligible);
        }

        let total = eligible.len();
        let turn = state.turn % total;
        state.turn = turn + 1;
        let mut ranked: Vec<(usize, usize, &Endpoint)> = eligible
            .into_iter()
            .enumerate()
            .map(|(at, endpoint)| (endpoint.in_flight(), (at + total - turn) % total, endpoint))
            .filter(|&(load, ..)| load < self.max_in_flight)
            .collect();
        ranked.sort_unstable_by_key(|&(load, turn, _)| (load, turn));
        let Some(&(least, ..)) = ranked.first() else {
            return Err(NoEndpoint::Saturated);
        };

        if let Some(session) = prompt.session {
            // All in the session's own order, so that its second choice is always the same, too.
            ranked.sort_by_cached_key(|&(load, _, endpoint)| {
                (load > least + SESSION_SLACK, Reverse(session.score(endpoint.address)))
            });
        } else {
            let near = |&&(load, _, _): &&(usize, usize, &Endpoint)| load <= least + AFFINITY_SLACK;
            let preferred = state
                .affinity
                .longest(prompt, |id| ranked.iter().take_while(near).any(|(.., endpoint)| endpoint.id() == id));
            if let Some(at) = preferred.and_then(|id| ranked.iter().position(|(.., endpoint)| endpoint.id() == id)) {
                ranked[..=at].rotate_right(1);
            }
        }
        state.affinity.learn(prompt, ranked[0].2.id());
        avoided.retain(|endpoint| endpoint.in_flight() < self.max_in_flight);
        let in_order = ranked.iter().map(|(.., endpoint)| *endpoint).chain(avoided);
        Ok(Pick { endpoints: in_order.take(MAX_PICKED).map(|endpoint| endpoint.address).collect() })
    }
}
