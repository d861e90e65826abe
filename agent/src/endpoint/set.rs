//! The current endpoints of one pool. Sources replace their part; requests read a [`Snapshot`], which costs one pointer copy.
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

/// The endpoints of one pool.
#[derive(Debug)]
pub struct EndpointSet {
    rules: Ejection,
    subset: Rule,
    snapshot: RwLock<Arc<Snapshot>>,
    /// Endpoints outside of the set that have answered.
    seen: Arc<SeenAddresses>,
    /// Held while the set changes and while an endpoint is ejected, so that the limit on ejections holds.
    changing: Mutex<SetContents>,
}

#[derive(Debug, Default)]
struct SetContents {
    /// By [`EndpointSource`].
    listed: [Vec<config::ListedEndpoint>; 4],
    next_id: u32,
}

/// The endpoints at one moment, ordered by source, each address once.
#[derive(Debug, Default)]
pub struct Snapshot {
    endpoints: Vec<Endpoint>,
    index: HashMap<SocketAddr, usize>,
    subsets: Subsets,
}

impl EndpointSet {
    /// A set with the endpoints that the configuration lists. Other sources add theirs later. `node` is the agent's locality.
    pub fn new(pool: &config::Pool, node: &Node) -> Self {
        Self::with(pool.endpoints.clone(), pool.ejection.clone(), Rule::new(pool, node))
    }

    /// The set of a pool after a reload. Endpoints that stay keep their health and their request count, and endpoints from a
    /// source that stays are kept until that source changes them.
    pub fn after(before: &Self, pool: &config::Pool, node: &Node) -> Self {
        let parts = before.changing.lock();
        let mut listed = parts.listed.clone();
        for (source, followed) in [
            (EndpointSource::File, pool.endpoints_file.is_some()),
            (EndpointSource::Dns, pool.endpoints_dns.is_some()),
            (EndpointSource::Kubernetes, pool.inference_pool.is_some()),
        ] {
            if !followed {
                listed[source as usize].clear();
            }
        }
        listed[EndpointSource::Config as usize].clear();
        let set = Self {
            rules: pool.ejection.clone(),
            subset: Rule::new(pool, node),
            snapshot: RwLock::new(before.snapshot()),
            seen: Arc::clone(&before.seen),
            changing: Mutex::new(SetContents { listed, next_id: parts.next_id }),
        };
        set.rebuild(&mut set.changing.lock(), EndpointSource::Config, pool.endpoints.clone());
        set
    }

    /// A set of these endpoints, without a subset.
    pub fn of(endpoints: impl IntoIterator<Item = impl Into<config::ListedEndpoint>>, rules: Ejection) -> Self {
        Self::with(endpoints.into_iter().map(Into::into).collect(), rules, Rule::default())
    }

    fn with(endpoints: Vec<config::ListedEndpoint>, rules: Ejection, subset: Rule) -> Self {
        let set = Self { rules, subset, snapshot: RwLock::default(), seen: Arc::default(), changing: Mutex::default() };
        set.replace(EndpointSource::Config, endpoints);
        set
    }

    /// The current endpoints. In a snapshot only the endpoints' health and request counts change.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.read())
    }

    /// Replaces the endpoints of `source`. Returns true if the set changed.
    pub fn replace(&self, source: EndpointSource, endpoints: Vec<config::ListedEndpoint>) -> bool {
        let mut parts = self.changing.lock();
        if parts.listed[source as usize] == endpoints {
            return false;
        }
        self.rebuild(&mut parts, source, endpoints);
        true
    }

    fn rebuild(&self, parts: &mut SetContents, source: EndpointSource, endpoints: Vec<config::ListedEndpoint>) {
        parts.listed[source as usize] = endpoints;
        let mut snapshot = parts.merged(&self.snapshot());
        snapshot.subsets = self.subset.subsets(&snapshot.endpoints, |address| snapshot.get(address));
        *self.snapshot.write() = Arc::new(snapshot);
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
            None if self.subset.admits(address) => self.seen.answered(address, now),
            None => {}
        }
    }

    /// A request to `address` failed. Returns true if that ejects the endpoint.
    pub fn failed(&self, address: SocketAddr, now: Instant) -> bool {
        let _changing = self.changing.lock();
        let snapshot = self.snapshot();
        let Some(endpoint) = snapshot.get(address) else {
            self.seen.failed(address);
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
        self.subset.choose(&snapshot.subsets, |address| snapshot.get(address), now, &[])
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
        let known = match self.subset.choose(&snapshot.subsets, |address| snapshot.get(address), now, dead) {
            Some(subset) => subset.to_vec(),
            None => {
                let mut known: Vec<_> = snapshot.ready().map(|endpoint| endpoint.address).collect();
                known.extend(
                    self.seen
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

impl SetContents {
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
mod tests {
    use std::time::Duration;

    use super::*;

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 8000))
    }

    fn listed(numbers: impl IntoIterator<Item = u8>) -> Vec<config::ListedEndpoint> {
        numbers.into_iter().map(|n| address(n).into()).collect()
    }

    fn set(endpoints: u8) -> EndpointSet {
        EndpointSet::of(listed(1..=endpoints), Ejection { failures: 1, ..Ejection::default() })
    }

    fn addresses(set: &EndpointSet) -> Vec<SocketAddr> {
        set.snapshot().endpoints().iter().map(|endpoint| endpoint.address).collect()
    }

    #[test]
    fn set_is_the_union_and_the_first_source_wins() {
        let set = set(2);
        let named = config::ListedEndpoint { zone: Some("a".into()), ..address(2).into() };
        assert!(set.replace(EndpointSource::Dns, vec![address(3).into(), address(3).into()]));
        assert!(set.replace(EndpointSource::File, vec![named, address(4).into()]));
        assert_eq!(addresses(&set), [1, 2, 4, 3].map(address));
        assert_eq!(set.snapshot().get(address(2)).unwrap().zone, None);
        assert!(set.replace(EndpointSource::File, vec![]));
        assert!(!set.replace(EndpointSource::File, vec![]), "unchanged");
        assert_eq!(addresses(&set), [1, 2, 3].map(address));
    }

    #[test]
    fn endpoint_that_stays_keeps_its_state_and_one_that_returns_is_new() {
        let (set, now) = (set(3), Instant::now());
        let running = [set.begin(address(1), now), set.begin(address(1), now)];
        set.failed(address(1), now);
        set.replace(
            EndpointSource::Config,
            vec![config::ListedEndpoint { draining: true, ..address(1).into() }, address(2).into()],
        );
        let one = |set: &EndpointSet| {
            let snapshot = set.snapshot();
            let endpoint = snapshot.get(address(1)).unwrap();
            (endpoint.id(), endpoint.in_flight(), endpoint.is_avoided(now), endpoint.state())
        };
        let (id, ..) = one(&set);
        assert_eq!(one(&set), (id, 2, true, EndpointState::Draining));
        assert_eq!(set.states(), [1, 0, 0, 1]);
        assert_eq!(set.snapshot().ready().count(), 1);
        set.replace(EndpointSource::Config, listed([2]));
        set.replace(EndpointSource::Config, listed([1, 2]));
        assert_eq!(one(&set), (4, 0, false, EndpointState::Ready));
        drop(running);
        assert_eq!(one(&set), (4, 0, false, EndpointState::Ready));
    }

    #[test]
    fn ejections_are_limited_and_spare_the_last_endpoint() {
        for (endpoints, percent, most) in [(1, 100, 0), (2, 50, 1), (3, 50, 1), (4, 50, 2), (4, 100, 3), (4, 24, 0)] {
            let rules = Ejection { failures: 1, max_percent: percent, ..Ejection::default() };
            let (set, now) = (EndpointSet::of(listed(1..=endpoints), rules), Instant::now());
            let ejected = (1..=endpoints).filter(|&n| set.failed(address(n), now)).count();
            assert_eq!(ejected, most, "{endpoints} endpoints, {percent} %");
        }
    }

    #[test]
    fn avoided_endpoints_move_to_the_end() {
        let (set, now) = (set(4), Instant::now());
        set.failed(address(1), now);
        set.failed(address(3), now);
        let mut list = [1, 9, 3, 2].map(address);
        set.avoided_last(&mut list, now);
        assert_eq!(list, [9, 2, 1, 3].map(address));
    }

    #[track_caller]
    fn assert_hint(hint: Option<Arc<[SocketAddr]>>, expected: Option<&[u8]>) {
        let expected = expected.map(|numbers| numbers.iter().map(|&n| address(n)).collect::<Vec<_>>());
        assert_eq!(hint.map(|hint| hint.to_vec()), expected);
    }

    #[test]
    fn avoided_endpoints_are_left_out_of_hints_while_others_are_left() {
        let mut pool = config::Pool::new("p", [1, 2, 3].map(address));
        pool.ejection = Ejection { failures: 1, max_percent: 100, ..Ejection::default() };
        let new = |pool: &config::Pool| (EndpointSet::new(pool, &Node::default()), Instant::now());
        let (set, now) = new(&pool);
        assert_hint(set.hint(now), None);
        set.failed(address(2), now);
        assert_hint(set.hint(now), Some(&[1, 3]));
        set.failed(address(1), now);
        assert_hint(set.hint(now), Some(&[3]));
        assert_hint(set.hint(now + Duration::from_secs(3600)), None);

        pool.subset.endpoints = [1, 2].map(address).into();
        let (set, now) = new(&pool);
        assert_hint(set.hint(now), Some(&[1, 2]));
        set.failed(address(1), now);
        assert_hint(set.hint(now), Some(&[2]));
        set.failed(address(2), now);
        assert_hint(set.hint(now), Some(&[1, 2]));

        // The EPP may know endpoints that the agent does not.
        (pool.subset.endpoints, pool.passthrough) = (Vec::new(), config::Passthrough::On);
        let (set, now) = new(&pool);
        set.failed(address(1), now);
        assert_hint(set.hint(now), None);
    }

    #[test]
    fn second_hint_lacks_the_dead_endpoints() {
        let mut pool = config::Pool::new("p", [1, 2, 3].map(address));
        pool.ejection = Ejection { failures: 1, max_percent: 100, ..Ejection::default() };
        let (set, now) = (EndpointSet::new(&pool, &Node::default()), Instant::now());
        assert_hint(set.hint_without(&[address(1)], now), Some(&[2, 3]));
        set.failed(address(2), now);
        assert_hint(set.hint_without(&[address(1)], now), Some(&[3]));
        assert_hint(set.hint_without(&[1, 3].map(address), now), Some(&[2]));
        assert_hint(set.hint_without(&[1, 2, 3].map(address), now), None);

        pool.passthrough = config::Passthrough::On;
        let (set, now) = (EndpointSet::new(&pool, &Node::default()), Instant::now());
        for n in [8, 9, 1] {
            set.succeeded(address(n), now);
        }
        assert_hint(set.hint_without(&[address(1)], now), Some(&[2, 3, 8, 9]));
        set.failed(address(9), now);
        assert_hint(set.hint_without(&[1, 2].map(address), now), Some(&[3, 8]));
    }

    #[test]
    fn unknown_address_is_not_counted() {
        let (set, now) = (set(1), Instant::now());
        let _unknown = set.begin(address(9), now);
        assert!(!set.failed(address(9), now));
        set.succeeded(address(9), now);
        assert_eq!(addresses(&set), [address(1)]);
    }

    #[test]
    fn reloaded_set_keeps_endpoints_and_their_state() {
        let (before, now) = (set(3), Instant::now());
        before.replace(EndpointSource::Dns, listed([7]));
        before.replace(EndpointSource::File, listed([8]));
        let _running = before.begin(address(1), now);
        before.failed(address(1), now);
        let pool = config::Pool {
            endpoints_dns: Some(config::NamedEndpoints { name: "a".into(), ports: vec![1] }),
            ..config::Pool::new("p", vec![address(1), address(4)])
        };
        let after = EndpointSet::after(&before, &pool, &Node::default());
        assert_eq!(addresses(&after), [1, 4, 7].map(address), "the file is no longer configured");
        let snapshot = after.snapshot();
        let one = snapshot.get(address(1)).unwrap();
        assert!(one.in_flight() == 1 && one.is_avoided(now));
        let ids: std::collections::HashSet<_> = snapshot.endpoints().iter().map(Endpoint::id).collect();
        assert_eq!(ids.len(), 3);
    }
}
