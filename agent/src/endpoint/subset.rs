//! The subset of a pool that requests stay in (`[pools.subset]`). It is computed when the endpoints change, not per request.
//!
//! With `prefer` there is one list per locality, in the order of the setting. A request gets the first list that has an endpoint
//! that is not avoided: if all endpoints of the node are ejected, it gets those of the zone.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use super::member::Endpoint;
use crate::config::{self, EmptySubset, Locality, Node, Passthrough};

/// The rule and the agent's own locality.
#[derive(Debug, Clone, Default)]
pub(super) struct Rule {
    subset: config::Subset,
    node: Node,
    /// Which addresses outside the pool are allowed.
    passthrough: Passthrough,
}

/// The subsets, in order of preference. `None` if the pool has no rule.
#[derive(Debug, Default)]
pub(super) struct Subsets(Option<Vec<Arc<[SocketAddr]>>>);

impl Rule {
    pub(super) fn new(pool: &config::Pool, node: &Node) -> Self {
        Self { subset: pool.subset.clone(), node: node.clone(), passthrough: pool.passthrough.clone() }
    }

    /// Whether requests may go to this address although it is not in the pool.
    pub(super) fn admits(&self, address: SocketAddr) -> bool {
        self.passthrough.admits(address.ip())
    }

    /// Whether requests go to no endpoint outside of the pool.
    pub(super) fn knows_all(&self) -> bool {
        self.passthrough.is_off()
    }

    /// Computes the subsets. `find` returns the endpoint of the set at an address.
    pub(super) fn subsets<'e>(
        &self,
        endpoints: &'e [Endpoint],
        find: impl Fn(SocketAddr) -> Option<&'e Endpoint>,
    ) -> Subsets {
        let near = |locality: &Locality| {
            let is_near = |endpoint: &&Endpoint| {
                let (its, own) = match locality {
                    Locality::Node => (&endpoint.node, &self.node.name),
                    Locality::Zone => (&endpoint.zone, &self.node.zone),
                };
                own.is_some() && its == own && !endpoint.draining
            };
            endpoints.iter().filter(is_near).map(|near| near.address).collect()
        };
        let is_there = |&&address: &&SocketAddr| {
            find(address).map_or_else(|| self.passthrough.admits(address.ip()), |endpoint| !endpoint.draining)
        };
        let explicit = &self.subset.endpoints;
        if !explicit.is_empty() {
            Subsets(Some(vec![explicit.iter().filter(is_there).copied().collect()]))
        } else if !self.subset.prefer.is_empty() {
            Subsets(Some(self.subset.prefer.iter().map(near).collect()))
        } else {
            Subsets(None)
        }
    }

    /// The subset for a request that cannot go to the endpoints in `dead`; `None` means the whole pool. If all of its endpoints are
    /// avoided or dead, the subset still contains them.
    pub(super) fn choose<'e>(
        &self,
        subsets: &Subsets,
        find: impl Fn(SocketAddr) -> Option<&'e Endpoint>,
        now: Instant,
        dead: &[SocketAddr],
    ) -> Option<Arc<[SocketAddr]>> {
        let subsets = subsets.0.as_ref()?;
        let is_healthy = |address: &SocketAddr| {
            !dead.contains(address) && find(*address).is_none_or(|endpoint| !endpoint.is_avoided(now))
        };
        if let Some(healthy) = subsets.iter().find(|subset| subset.iter().any(is_healthy)) {
            return Some(Arc::clone(healthy));
        }
        // Every endpoint is avoided. An explicit subset, or one with `empty = "fail"`, is used as long as it has endpoints.
        let kept = self.subset.prefer.is_empty() || self.subset.empty == EmptySubset::Fail;
        let rest = subsets.iter().find(|subset| kept && !subset.is_empty());
        match self.subset.empty {
            EmptySubset::All => rest.map(Arc::clone),
            EmptySubset::Fail => Some(rest.map_or_else(|| Arc::from([]), Arc::clone)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Ejection, Pool},
        endpoint::set::{EndpointSet, EndpointSource},
    };

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 8000))
    }

    fn at(n: u8, node: &str, zone: &str) -> config::ListedEndpoint {
        config::ListedEndpoint { node: Some(node.into()), zone: Some(zone.into()), ..address(n).into() }
    }

    /// Endpoints 1 and 2 are on this node, 1 to 3 in this zone, 4 in another zone, and 5 has no locality.
    fn set(adjust: impl FnOnce(&mut Pool)) -> EndpointSet {
        let mut pool = Pool::new("a", []);
        pool.endpoints =
            vec![at(1, "n1", "a"), at(2, "n1", "a"), at(3, "n2", "a"), at(4, "n3", "b"), address(5).into()];
        pool.ejection = Ejection { failures: 1, max_percent: 100, ..Ejection::default() };
        adjust(&mut pool);
        EndpointSet::new(&pool, &Node { name: Some("n1".into()), zone: Some("a".into()) })
    }

    fn prefer(localities: &[Locality], empty: EmptySubset) -> EndpointSet {
        set(|pool| pool.subset = config::Subset { prefer: localities.to_vec(), endpoints: vec![], empty })
    }

    #[track_caller]
    fn assert_subset(set: &EndpointSet, expected: Option<&[u8]>) {
        let expected = expected.map(|numbers| numbers.iter().map(|&n| address(n)).collect::<Vec<_>>());
        assert_eq!(set.subset(Instant::now()).as_deref(), expected.as_deref());
    }

    fn fail(set: &EndpointSet, numbers: impl IntoIterator<Item = u8>) {
        for n in numbers {
            assert!(set.failed(address(n), Instant::now()), "{n}");
        }
    }

    #[test]
    fn subset_is_computed_once_per_set() {
        let set = prefer(&[Locality::Zone], EmptySubset::All);
        let subset = || set.subset(Instant::now()).unwrap();
        let first = subset();
        assert!(Arc::ptr_eq(&first, &subset()));
        fail(&set, [1]);
        assert!(Arc::ptr_eq(&first, &subset()));
        set.replace(EndpointSource::File, vec![at(6, "n1", "a")]);
        assert_subset(&set, Some(&[1, 2, 3, 6]));
    }

    #[test]
    fn subset_without_rule_is_the_whole_pool() {
        assert_subset(&set(|_| {}), None);
        assert_subset(&set(|pool| pool.subset.empty = EmptySubset::Fail), None);
    }

    #[test]
    fn nearest_subset_with_a_healthy_endpoint_is_chosen() {
        let set = prefer(&[Locality::Node, Locality::Zone], EmptySubset::All);
        assert_subset(&set, Some(&[1, 2]));
        fail(&set, [1]);
        assert_subset(&set, Some(&[1, 2]));
        fail(&set, [2]);
        assert_subset(&set, Some(&[1, 2, 3]));
        fail(&set, [3]);
        assert_subset(&set, None);
        set.succeeded(address(2), Instant::now());
        assert_subset(&set, Some(&[1, 2]));
    }

    #[test]
    fn draining_and_removed_endpoints_are_in_no_subset() {
        let set = prefer(&[Locality::Node, Locality::Zone], EmptySubset::All);
        let draining = config::ListedEndpoint { draining: true, ..at(1, "n1", "a") };
        set.replace(EndpointSource::Config, vec![draining.clone(), at(2, "n1", "a"), at(3, "n2", "a")]);
        assert_subset(&set, Some(&[2]));
        set.replace(EndpointSource::Config, vec![draining.clone(), at(3, "n2", "a")]);
        assert_subset(&set, Some(&[3]));
        set.replace(EndpointSource::Config, vec![draining, at(4, "n3", "b")]);
        assert_subset(&set, None);
    }

    #[test]
    fn failing_subset_is_empty_only_without_endpoints() {
        let set = prefer(&[Locality::Node], EmptySubset::Fail);
        fail(&set, [1, 2]);
        assert_subset(&set, Some(&[1, 2]));
        set.replace(EndpointSource::Config, vec![at(3, "n2", "a")]);
        assert_subset(&set, Some(&[]));
    }

    #[test]
    fn explicit_subset_is_limited_to_the_pool() {
        let explicit = |empty| {
            move |pool: &mut Pool| {
                pool.subset = config::Subset { prefer: vec![], endpoints: [9, 3, 1].map(address).into(), empty };
            }
        };
        let set_all = set(explicit(EmptySubset::All));
        assert_subset(&set_all, Some(&[3, 1]));
        fail(&set_all, [3, 1]);
        assert_subset(&set_all, Some(&[3, 1]));
        set_all.replace(EndpointSource::Config, vec![address(2).into()]);
        assert_subset(&set_all, None);
        let set_fail = set(explicit(EmptySubset::Fail));
        set_fail.replace(EndpointSource::Config, vec![address(2).into()]);
        assert_subset(&set_fail, Some(&[]));
        let with_passthrough = set(|pool| {
            explicit(EmptySubset::All)(pool);
            pool.passthrough = Passthrough::On;
        });
        assert_subset(&with_passthrough, Some(&[9, 3, 1]));
    }
}
