//! The built-in picker: least requests in flight, with session and prefix affinity, shared by all workers. Takes a request's
//! session and the hash of its leading blocks; returns up to ten endpoints, best first. The best is the session's endpoint or,
//! without a session, the one that saw the longest prefix (probably in its KV cache), unless it is much busier than the least
//! busy one; otherwise the least busy one, with ties in rotation. A pick takes one short lock; memory does not grow with traffic.

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

/// How many more requests in flight than the least busy endpoint the endpoint with the prefix may have.
const AFFINITY_SLACK: usize = 4;
/// The same for a session's endpoint. It is higher, because sessions are configured to keep requests together.
const SESSION_SLACK: usize = 16;
/// Most endpoints in a pick: the best one and fallbacks. It is more than a pod has ports, because those fail together.
const MAX_PICKED: usize = 10;

/// One to ten endpoints in order of preference. Avoided endpoints come last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pick {
    pub endpoints: Vec<SocketAddr>,
}

/// Why the built-in picker picks no endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    #[error("no endpoint is eligible")]
    NoneEligible,
    #[error("all eligible endpoints are at their limit of requests in flight")]
    Saturated,
}

/// The built-in picker of one pool.
#[derive(Debug)]
pub struct BuiltinPicker {
    endpoints: Arc<EndpointSet>,
    max_in_flight: usize,
    state: Arc<Mutex<PickerState>>,
}

#[derive(Debug)]
struct PickerState {
    affinity: Affinity,
    /// Advances by one per pick, so that equally busy endpoints take turns.
    turn: usize,
}

impl BuiltinPicker {
    /// A picker for these endpoints, without a limit of requests in flight.
    pub fn new(endpoints: Arc<EndpointSet>) -> Self {
        let state = PickerState { affinity: Affinity::new(), turn: 0 };
        Self { endpoints, max_in_flight: usize::MAX, state: Arc::new(Mutex::new(state)) }
    }

    /// The picker of the same pool under another configuration, which knows the same prefixes.
    pub fn after(before: &Self, endpoints: Arc<EndpointSet>) -> Self {
        Self { endpoints, max_in_flight: before.max_in_flight, state: Arc::clone(&before.state) }
    }

    /// Sets the number of requests in flight from which an endpoint is not picked.
    #[must_use]
    pub fn with_max_in_flight(mut self, limit: usize) -> Self {
        self.max_in_flight = limit;
        self
    }

    /// The endpoints to pick from.
    pub fn endpoints(&self) -> &EndpointSet {
        &self.endpoints
    }

    /// Picks among the endpoints of `subset`, or all. The request is not counted until [`EndpointSet::begin`].
    pub fn pick(&self, prompt: &PromptHash, subset: Option<&[SocketAddr]>, now: Instant) -> Result<Pick, NoEndpoint> {
        self.choose(&mut self.state.lock(), prompt, subset, now)
    }

    /// Picks and counts the request at the best endpoint in one step, so that concurrent requests see each other and the limit
    /// holds.
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
        state: &mut PickerState,
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
        // If every endpoint is avoided, trying one is better than refusing the request.
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
            // Rank all endpoints by the session's score, so that its second choice is stable, too.
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
