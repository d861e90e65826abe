//! The current endpoints of one pool. Sources replace their part; requests read a [`Snapshot`], which costs one pointer copy.
//!
//! After a reload, the sets of both configurations have the same contents: requests that began before see every later change. Only
//! the rules are those of each configuration.
//!
//! An endpoint that stays in the set keeps its health and its request count. A draining or removed endpoint gets no new requests
//! and finishes the running ones. An avoided endpoint (ejected or down) gets requests only if no other is left.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Instant};

use parking_lot::{Mutex, RwLock};

use super::{
    in_flight::InFlight,
    member::{Endpoint, KeptState},
    seen::SeenAddresses,
    subset::{Rule, Subsets},
};
use crate::{
    config::{self, Ejection, Node},
    metrics::EndpointState,
};

/// Where endpoints come from. The set is the union; if several sources list an address, the first source in this order wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointSource {
    Config,
    File,
    Dns,
    Kubernetes,
}

impl EndpointSource {
    pub const ALL: [Self; 4] = [Self::Config, Self::File, Self::Dns, Self::Kubernetes];

    /// The label in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::File => "file",
            Self::Dns => "dns",
            Self::Kubernetes => "kubernetes",
        }
    }
}

/// The endpoints of one pool, with the rules of one configuration.
#[derive(Debug)]
pub struct EndpointSet {
    rules: Ejection,
    subset: Rule,
    /// The subsets of the snapshot for which they were computed last.
    subsets: RwLock<(Arc<Snapshot>, Arc<Subsets>)>,
    contents: Arc<SetContents>,
}

/// What the sets of all configurations share.
#[derive(Debug, Default)]
struct SetContents {
    snapshot: RwLock<Arc<Snapshot>>,
    /// Endpoints outside of the set that have answered.
    seen: SeenAddresses,
    /// Held while the set changes and while an endpoint is ejected, so that the limit on ejections holds.
    changing: Mutex<SourceLists>,
}

#[derive(Debug, Default)]
struct SourceLists {
    /// By [`EndpointSource`].
    listed: [Vec<config::ListedEndpoint>; EndpointSource::ALL.len()],
    /// By [`EndpointSource`]: since when the endpoints are those of a name or file that is not configured any more.
    outdated: [Option<Instant>; EndpointSource::ALL.len()],
    next_id: u32,
}

/// The endpoints at one moment, ordered by source, each address once.
#[derive(Debug, Default)]
pub struct Snapshot {
    endpoints: Vec<Endpoint>,
    index: HashMap<SocketAddr, usize>,
}

impl EndpointSet {
    /// A set with the endpoints that the configuration lists. Other sources add theirs later. `node` is the agent's locality.
    pub fn new(pool: &config::Pool, node: &Node) -> Self {
        Self::with(pool.endpoints.clone(), pool.ejection.clone(), Rule::new(pool, node))
    }

    /// The set of the same pool under another configuration, with the same contents. Call [`configure`](Self::configure) when the
    /// configuration comes into force.
    pub fn after(before: &Self, pool: &config::Pool, node: &Node) -> Self {
        let contents = Arc::clone(&before.contents);
        Self { rules: pool.ejection.clone(), subset: Rule::new(pool, node), subsets: RwLock::default(), contents }
    }

    /// A set of these endpoints, without a subset.
    pub fn of(endpoints: impl IntoIterator<Item = impl Into<config::ListedEndpoint>>, rules: Ejection) -> Self {
        Self::with(endpoints.into_iter().map(Into::into).collect(), rules, Rule::default())
    }

    fn with(endpoints: Vec<config::ListedEndpoint>, rules: Ejection, subset: Rule) -> Self {
        let set = Self { rules, subset, subsets: RwLock::default(), contents: Arc::default() };
        set.replace(EndpointSource::Config, endpoints);
        set
    }

    /// Applies the settings `pool` to contents that had those of `before`. Endpoints that stay keep their health and their request
    /// count. Endpoints from a source that is configured otherwise are [outdated](Self::outdated_since). No source may replace its
    /// part meanwhile.
    pub fn configure(&self, before: &config::Pool, pool: &config::Pool, now: Instant) {
        let mut lists = self.contents.changing.lock();
        let is_same_file = before.endpoints_file == pool.endpoints_file && before.ports == pool.ports;
        for (source, is_followed, is_same) in [
            (EndpointSource::File, pool.endpoints_file.is_some(), is_same_file),
            (EndpointSource::Dns, pool.endpoints_dns.is_some(), before.endpoints_dns == pool.endpoints_dns),
            // What is known about another InferencePool replaces this part at once.
            (EndpointSource::Kubernetes, pool.inference_pool.is_some(), true),
        ] {
            let (listed, outdated) = lists.of(source);
            if !is_followed {
                listed.clear();
            }
            *outdated = match *outdated {
                _ if listed.is_empty() => None,
                None if !is_same => Some(now),
                since => since,
            };
        }
        self.rebuild(&mut lists, EndpointSource::Config, pool.endpoints.clone());
        for endpoint in self.snapshot().endpoints() {
            endpoint.state.health.forget(pool.health.is_none(), pool.ejection.failures == 0);
        }
    }

    /// Since when the endpoints of `source` are those of a name or file that is not configured any more. `None` if they are
    /// current, or it has none.
    pub fn outdated_since(&self, source: EndpointSource) -> Option<Instant> {
        *self.contents.changing.lock().of(source).1
    }

    /// Removes the endpoints of `source` if they are [outdated](Self::outdated_since). Returns their number.
    pub fn remove_outdated(&self, source: EndpointSource) -> usize {
        let mut lists = self.contents.changing.lock();
        let (listed, outdated) = lists.of(source);
        if outdated.is_none() {
            return 0;
        }
        let count = listed.len();
        self.rebuild(&mut lists, source, Vec::new());
        count
    }

    /// The current endpoints. In a snapshot only the endpoints' health and request counts change.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.contents.snapshot.read())
    }

    /// Replaces the endpoints of `source`. Returns true if the set changed.
    pub fn replace(&self, source: EndpointSource, endpoints: Vec<config::ListedEndpoint>) -> bool {
        let mut lists = self.contents.changing.lock();
        let (listed, outdated) = lists.of(source);
        *outdated = None;
        if *listed == endpoints {
            return false;
        }
        self.rebuild(&mut lists, source, endpoints);
        true
    }

    fn rebuild(&self, lists: &mut SourceLists, source: EndpointSource, endpoints: Vec<config::ListedEndpoint>) {
        (lists.listed[source as usize], lists.outdated[source as usize]) = (endpoints, None);
        let snapshot = lists.merged(&self.snapshot());
        *self.contents.snapshot.write() = Arc::new(snapshot);
    }

    /// The subsets of a snapshot, computed once for each.
    fn subsets(&self, snapshot: &Arc<Snapshot>) -> Arc<Subsets> {
        let known = self.subsets.read().clone();
        if Arc::ptr_eq(&known.0, snapshot) {
            return known.1;
        }
        let subsets = Arc::new(self.subset.subsets(&snapshot.endpoints, |address| snapshot.get(address)));
        *self.subsets.write() = (Arc::clone(snapshot), Arc::clone(&subsets));
        subsets
    }

    /// Counts a request to `address` until the guard is dropped. An address that is not in the set is not counted.
    pub fn begin(&self, address: SocketAddr, now: Instant) -> InFlight {
        self.snapshot().get(address).map_or_else(InFlight::uncounted, |endpoint| {
            endpoint.state.health.begins(&self.rules, now);
            endpoint.state.in_flight.begin()
        })
    }

    /// A request to `address` succeeded.
    pub fn succeeded(&self, address: SocketAddr, now: Instant) {
        match self.snapshot().get(address) {
            Some(endpoint) => endpoint.state.health.succeeded(),
            None if self.subset.admits(address) => self.contents.seen.answered(address, now),
            None => {}
        }
    }

    /// A request to `address` failed. Returns true if that ejects the endpoint.
    pub fn failed(&self, address: SocketAddr, now: Instant) -> bool {
        let _changing = self.contents.changing.lock();
        let snapshot = self.snapshot();
        let Some(endpoint) = snapshot.get(address) else {
            self.contents.seen.failed(address);
            return false;
        };
        endpoint.state.health.failed(&self.rules, now, snapshot.may_eject_one_more(self.rules.max_percent))
    }

    /// Whether a response with a 5xx status counts as a failure.
    pub fn counts_server_errors(&self) -> bool {
        self.rules.server_errors
    }

    /// The subset to pick from; `None` means the whole pool.
    pub fn subset(&self, now: Instant) -> Option<Arc<[SocketAddr]>> {
        let snapshot = self.snapshot();
        self.subset.choose(&self.subsets(&snapshot), |address| snapshot.get(address), now, &[])
    }

    /// The subset hint for an EPP: the subset without avoided endpoints, or all of it if no other is left. Without a subset, the
    /// pool's other endpoints if some are avoided and `passthrough` adds none that the agent does not know.
    pub fn hint(&self, now: Instant) -> Option<Arc<[SocketAddr]>> {
        let snapshot = self.snapshot();
        let is_avoided = |address| snapshot.get(address).is_some_and(|endpoint| endpoint.is_avoided(now));
        if let Some(subset) = self.subset(now) {
            if !subset.iter().any(|&address| is_avoided(address)) {
                return Some(subset);
            }
            let left: Vec<_> = subset.iter().copied().filter(|&address| !is_avoided(address)).collect();
            return Some(if left.is_empty() { subset } else { left.into() });
        }
        if !self.subset.knows_all() || !snapshot.ready().any(|endpoint| endpoint.is_avoided(now)) {
            return None;
        }
        let left = snapshot.ready().filter(|endpoint| !endpoint.is_avoided(now)).map(|endpoint| endpoint.address);
        let left: Vec<_> = left.collect();
        (!left.is_empty()).then(|| left.into())
    }

    /// The subset hint for an EPP that has to pick another endpoint than those in `dead`: the subset, or else all endpoints that
    /// the agent knows, without avoided ones as long as another is left. `None` if nothing is left.
    pub fn hint_without(&self, dead: &[SocketAddr], now: Instant) -> Option<Arc<[SocketAddr]>> {
        let snapshot = self.snapshot();
        let known = match self.subset.choose(&self.subsets(&snapshot), |address| snapshot.get(address), now, dead) {
            Some(subset) => subset.to_vec(),
            None => {
                let mut known: Vec<_> = snapshot.ready().map(|endpoint| endpoint.address).collect();
                known.extend(
                    self.contents
                        .seen
                        .recent(now)
                        .into_iter()
                        .filter(|&address| snapshot.get(address).is_none() && self.subset.admits(address)),
                );
                known
            }
        };
        let mut left: Vec<_> = known.into_iter().filter(|address| !dead.contains(address)).collect();
        let is_avoided = |address| snapshot.get(address).is_some_and(|endpoint| endpoint.is_avoided(now));
        if left.iter().any(|&address| !is_avoided(address)) {
            left.retain(|&address| !is_avoided(address));
        }
        (!left.is_empty()).then(|| left.into())
    }

    /// The number of endpoints in each [`EndpointState`].
    pub fn states(&self) -> [usize; EndpointState::ALL.len()] {
        let mut counts = [0; EndpointState::ALL.len()];
        for endpoint in self.snapshot().endpoints() {
            counts[endpoint.state() as usize] += 1;
        }
        counts
    }

    /// Moves avoided endpoints to the end of the list and keeps the order otherwise.
    pub fn avoided_last(&self, addresses: &mut [SocketAddr], now: Instant) {
        let snapshot = self.snapshot();
        addresses.sort_by_key(|&address| snapshot.get(address).is_some_and(|endpoint| endpoint.is_avoided(now)));
    }
}

impl SourceLists {
    /// The endpoints of `source`, and since when they are outdated.
    fn of(&mut self, source: EndpointSource) -> (&mut Vec<config::ListedEndpoint>, &mut Option<Instant>) {
        (&mut self.listed[source as usize], &mut self.outdated[source as usize])
    }

    fn merged(&mut self, before: &Snapshot) -> Snapshot {
        let mut merged = Snapshot::default();
        for listed in self.listed.iter().flatten() {
            if merged.index.contains_key(&listed.address) {
                continue;
            }
            let kept = before.get(listed.address).map(|endpoint| Arc::clone(&endpoint.state));
            let state = kept.unwrap_or_else(|| {
                self.next_id += 1;
                Arc::new(KeptState::new(self.next_id))
            });
            merged.index.insert(listed.address, merged.endpoints.len());
            merged.endpoints.push(Endpoint::new(listed.clone(), state));
        }
        merged
    }
}

impl Snapshot {
    /// All endpoints, in order.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The endpoint at this address.
    pub fn get(&self, address: SocketAddr) -> Option<&Endpoint> {
        self.index.get(&address).map(|&at| &self.endpoints[at])
    }

    /// The endpoints that may get new requests.
    pub fn ready(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter().filter(|endpoint| !endpoint.draining)
    }

    fn may_eject_one_more(&self, max_percent: u32) -> bool {
        let ready = self.ready().count();
        let ejected = self.ready().filter(|endpoint| endpoint.state.health.is_ejected()).count();
        let most = (ready * max_percent as usize / 100).min(ready.saturating_sub(1));
        ejected < most
    }
}

#[cfg(test)]
mod tests;
