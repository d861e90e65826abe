//! What Kubernetes says about pools and routes, and how it is applied: the settings that an InferencePool determines and the routes of
//! a Gateway become part of the configuration, endpoints and the replicas of EPPs go where those of DNS names go.
//!
//! Takes facts that were already translated from API objects, so it is independent of Kubernetes' types.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    config::{
        self, AppProtocol, Config, Epp, FailureMode, InferencePoolRef, InferencePools, Picker, Pool, PoolSource,
        RefusedRoute, Route, UnusablePool,
    },
    endpoint::set::EndpointSource,
    gateway::{self, KnownGateway},
    picker::replica::Replicas,
    readiness::Gate,
    shared::Shared,
};

/// What is known from Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Known {
    pub pools: KnownPools,
    /// The Gateway of `kubernetes.gateway`. None if it has not been read yet.
    pub gateway: Option<Arc<KnownGateway>>,
    /// Those that each section of the file selects by their labels, sorted. One without an entry has not been read yet.
    pub selected: SelectedPools,
}

/// The InferencePools of sections with `from = "labels"`.
pub type SelectedPools = BTreeMap<InferencePools, Vec<InferencePoolRef>>;

/// What the file wants to know from Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The InferencePools that the file names, each once.
    pub pools: Vec<InferencePoolRef>,
    /// The sections that select InferencePools by their labels.
    pub sections: Vec<InferencePools>,
}

impl Wanted {
    pub fn of(file: &Config) -> Self {
        let is_selecting = |pools: &&InferencePools| pools.from == PoolSource::Labels;
        let sections = file.pools.iter().filter_map(|pool| pool.inference_pools.as_ref()).filter(is_selecting);
        Self { pools: named(file), sections: sections.cloned().collect() }
    }

    pub fn is_empty(&self) -> bool {
        self.pools.is_empty() && self.sections.is_empty()
    }
}

/// The gates that hold back readiness until the API server has answered.
#[derive(Default)]
#[cfg_attr(not(feature = "kubernetes"), allow(dead_code, reason = "only the discovery opens them"))]
pub struct DiscoveryGates {
    /// Of each InferencePool that the file names.
    pub pools: Vec<Gate>,
    /// Of each section that selects InferencePools.
    pub sections: Vec<Gate>,
    pub gateway: Option<Gate>,
}

/// What is known about each InferencePool. One without an entry has not been read yet.
pub type KnownPools = BTreeMap<InferencePoolRef, InferencePool>;

/// What the Kubernetes API says about one InferencePool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InferencePool {
    Absent,
    /// It exists, and this in it cannot be used.
    Invalid(String),
    Usable(Usable),
}

impl InferencePool {
    fn epp(&self) -> Option<&EppService> {
        match self {
            Self::Usable(usable) => usable.epp.as_ref(),
            Self::Absent | Self::Invalid(_) => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usable {
    pub endpoints: Vec<PodPort>,
    /// None without `endpointPickerRef`.
    pub epp: Option<EppService>,
    pub fails_open: bool,
    /// Whether the endpoints speak HTTP/2 without TLS.
    pub is_h2c: bool,
}

/// One port of a Pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodPort {
    pub address: SocketAddr,
    pub node: Option<String>,
    pub zone: Option<String>,
    /// It gets no new requests.
    pub draining: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EppService {
    /// `service.namespace.svc:port`, which names the EPP in requests to it and in TLS.
    pub address: String,
    /// Those that are ready, sorted.
    pub replicas: Vec<SocketAddr>,
}

impl From<&PodPort> for config::ListedEndpoint {
    fn from(member: &PodPort) -> Self {
        let PodPort { address, node, zone, draining } = member.clone();
        Self { address, node, zone, draining }
    }
}

/// The configuration of the file with what is known from Kubernetes.
pub fn merged(file: &Config, known: &Known) -> Config {
    let merged = |pool: &Pool| match &pool.inference_pool {
        Some(named) => discovered(pool, named, known.pools.get(named)),
        None => pool.clone(),
    };
    let mut pools: Vec<Pool> = file.pools.iter().filter(|pool| pool.inference_pools.is_none()).map(merged).collect();
    for (section, settings) in sections(file) {
        for named in known.selected.get(section).into_iter().flatten() {
            pool_of(&mut pools, settings, named, known.pools.get(named));
        }
    }
    let exists = |name: &str| pools.iter().any(|pool| pool.name == name);
    let mut routes = file.routes.clone();
    for share in routes.iter_mut().flat_map(|route| &mut route.pools).filter(|share| !exists(&share.name)) {
        share.refused = Some(RefusedRoute::Absent(share.name.clone()));
    }
    match (&file.kubernetes.gateway, &known.gateway) {
        (None, _) => {}
        (Some(named), None) => routes.push(gateway::rest(RefusedRoute::Unread(named.to_string()))),
        (Some(_), Some(gateway)) => {
            let names = add_pools(file, &mut pools, &gateway.meaning.pools, &known.pools);
            routes.extend(gateway.meaning.routes.iter().map(|route| with_names(route, &names)));
        }
    }
    Config { pools, routes, ..file.clone() }
}

/// Adds the pools to which HTTPRoutes refer and that the file does not name. Returns, by the names that the routes use, the pool or
/// why the agent refuses the route.
fn add_pools(
    file: &Config,
    pools: &mut Vec<Pool>,
    referred: &[InferencePoolRef],
    known: &KnownPools,
) -> BTreeMap<String, Result<String, RefusedRoute>> {
    let is_of_gateway = |pool: &&Pool| pool.inference_pools.as_ref().is_some_and(|one| one.from == PoolSource::Gateway);
    let settings = file.pools.iter().find(is_of_gateway).cloned().unwrap_or_default();
    let mut names = BTreeMap::new();
    for named in referred {
        let found = match known.get(named) {
            Some(InferencePool::Absent) => {
                Err(RefusedRoute::Backend(format!("refers to the InferencePool {named}, which does not exist")))
            }
            pool => Ok(pool_of(pools, &settings, named, pool)),
        };
        names.insert(gateway::pool_name(named), found);
    }
    names
}

/// The sections that select InferencePools by their labels, with their settings.
fn sections(file: &Config) -> impl Iterator<Item = (&InferencePools, &Pool)> {
    file.pools
        .iter()
        .filter_map(|pool| Some((pool.inference_pools.as_ref()?, pool)))
        .filter(|(section, _)| section.from == PoolSource::Labels)
}

/// The name of the pool that an InferencePool is, which is added with these settings if it is not there.
fn pool_of(pools: &mut Vec<Pool>, settings: &Pool, named: &InferencePoolRef, known: Option<&InferencePool>) -> String {
    if let Some(there) = pools.iter().find(|pool| pool.inference_pool.as_ref() == Some(named)) {
        return there.name.clone();
    }
    let mut name = gateway::pool_name(named);
    while pools.iter().any(|other| other.name == name) {
        name.push_str("/discovered");
    }
    let inference_pool = Some(named.clone());
    let settings = Pool { name: name.clone(), inference_pool, inference_pools: None, ..settings.clone() };
    pools.push(discovered(&settings, named, known));
    name
}

/// The route with the names of the pools in this configuration.
fn with_names(route: &Route, names: &BTreeMap<String, Result<String, RefusedRoute>>) -> Route {
    let mut route = route.clone();
    for share in route.pools.iter_mut().filter(|share| share.refused.is_none()) {
        match names.get(&share.name) {
            Some(Ok(name)) => share.name.clone_from(name),
            Some(Err(why)) => share.refused = Some(why.clone()),
            None => {}
        }
    }
    route
}

fn discovered(pool: &Pool, named: &InferencePoolRef, known: Option<&InferencePool>) -> Pool {
    let unusable = match known {
        None => UnusablePool::Unread(named.clone()),
        Some(InferencePool::Absent) => UnusablePool::Absent(named.clone()),
        Some(InferencePool::Invalid(why)) => UnusablePool::Invalid(named.clone(), why.clone()),
        Some(InferencePool::Usable(usable)) => {
            return Pool {
                picker: picker(pool, usable.epp.as_ref()),
                failure_mode: if usable.fails_open { FailureMode::Open } else { FailureMode::Closed },
                app_protocol: if usable.is_h2c { AppProtocol::H2c } else { AppProtocol::Http1 },
                ..pool.clone()
            };
        }
    };
    Pool { picker: Picker::Builtin, unusable: Some(unusable), ..pool.clone() }
}

/// The picker with the settings of the file and the address of the InferencePool's EPP.
fn picker(pool: &Pool, epp: Option<&EppService>) -> Picker {
    let Some(service) = epp else { return Picker::Builtin };
    let settings = match &pool.picker {
        Picker::Epp(settings) => settings.clone(),
        Picker::Builtin => Epp::default(),
    };
    Picker::Epp(Epp { addresses: vec![service.address.clone()], is_service: true, ..settings })
}

/// Gives the pools their endpoints and the replicas of their EPP. Leaves out addresses at which this agent listens.
pub fn fill(shared: &Shared, known: &KnownPools) {
    for (index, pool) in shared.config.pools.iter().enumerate() {
        let Some(named) = &pool.inference_pool else { continue };
        let usable = match known.get(named) {
            Some(InferencePool::Usable(usable)) => Some(usable),
            Some(InferencePool::Absent | InferencePool::Invalid(_)) | None => None,
        };
        let is_other = |address: &SocketAddr| !shared.own.accept(*address);
        let members = usable.map_or_else(Vec::new, |usable| {
            usable.endpoints.iter().filter(|member| is_other(&member.address)).map(Into::into).collect()
        });
        let (endpoints, pool) = (members.len(), &pool.name);
        if shared.endpoints[index].replace(EndpointSource::Kubernetes, members) {
            tracing::info!(pool, inference_pool = %named, endpoints, "endpoints updated");
        }
        if let (Some(replicas), Some(service)) =
            (&shared.replicas[index], usable.and_then(|usable| usable.epp.as_ref()))
        {
            let listed: Vec<_> = service.replicas.iter().copied().filter(is_other).collect();
            if replicas.listed(listed) {
                let replicas = service.replicas.len();
                tracing::info!(pool, inference_pool = %named, epp = service.address, replicas, "EPP replicas updated");
            }
        }
    }
}

/// Gives EPPs of previous configurations the current replicas of their Service, if a pool still names it.
pub fn fill_retired(shared: &Shared, retired: &[Arc<Replicas>], known: &KnownPools) {
    for service in known.values().filter_map(InferencePool::epp) {
        let listed = service.replicas.iter().copied().filter(|address| !shared.own.accept(*address));
        let listed: Vec<_> = listed.collect();
        let of_it =
            |one: &&Arc<Replicas>| one.settings.is_service && one.settings.addresses == [service.address.as_str()];
        for replicas in retired.iter().filter(of_it) {
            replicas.listed(listed.clone());
        }
    }
}

/// The configuration as if the file had listed the endpoints and the replicas, without pools that are not usable.
pub fn spelled_out(file: &Config, known: &Known) -> Config {
    let mut config = merged(file, known);
    config.pools.retain(|pool| pool.unusable.is_none());
    for pool in &mut config.pools {
        let Some(InferencePool::Usable(usable)) = pool.inference_pool.as_ref().and_then(|named| known.pools.get(named))
        else {
            continue;
        };
        pool.endpoints = usable.endpoints.iter().map(Into::into).collect();
        if let (Picker::Epp(epp), Some(service)) = (&mut pool.picker, &usable.epp) {
            let host = service.address.split(':').next().unwrap_or_default();
            epp.is_service = false;
            epp.addresses = service.replicas.iter().map(ToString::to_string).collect();
            epp.server_name.get_or_insert_with(|| host.to_owned());
        }
    }
    config
}

/// The InferencePools that the file names, each once.
pub fn named(file: &Config) -> Vec<InferencePoolRef> {
    let mut named: Vec<_> = file.pools.iter().filter_map(|pool| pool.inference_pool.clone()).collect();
    named.sort();
    named.dedup();
    named
}

/// The InferencePools that the file names or selects, and those to which HTTPRoutes refer, each once.
pub fn used(file: &Config, known: &Known) -> Vec<InferencePoolRef> {
    let mut used = named(file);
    used.extend(known.gateway.iter().flat_map(|gateway| gateway.meaning.pools.iter().cloned()));
    used.extend(sections(file).filter_map(|(section, _)| known.selected.get(section)).flatten().cloned());
    used.sort();
    used.dedup();
    used
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn file(more: &str) -> Config {
        let text = format!(
            "[[pools]]\nname = \"a\"\ninference_pool = {{ namespace = \"n\", name = \"p\" }}\n{more}\n[pools.timeouts]\nidle = \"7s\"\n"
        );
        Config::parse(&text, "p.toml").unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn usable(epp: Option<&str>) -> Usable {
        let member =
            |n: u8, draining| PodPort { address: ([10, 0, 0, n], 8000).into(), node: None, zone: None, draining };
        let service =
            |address: &str| EppService { address: address.into(), replicas: vec![([10, 0, 1, 1], 9002).into()] };
        Usable {
            endpoints: vec![member(1, false), member(2, true)],
            epp: epp.map(service),
            fails_open: true,
            is_h2c: true,
        }
    }

    fn known(pool: &InferencePool) -> Known {
        let pools = named(&file("")).into_iter().map(|named| (named, pool.clone())).collect();
        Known { pools, ..Known::default() }
    }

    fn only(config: &Config) -> &Pool {
        &config.pools[0]
    }

    #[test]
    fn unread_absent_and_invalid_pools_are_unusable() {
        let (file, named) = (file(""), named(&file("")).remove(0));
        let of = |known: &Known| only(&merged(&file, known)).unusable.clone();
        assert_eq!(of(&Known::default()), Some(UnusablePool::Unread(named.clone())));
        assert_eq!(of(&known(&InferencePool::Absent)), Some(UnusablePool::Absent(named.clone())));
        let invalid = known(&InferencePool::Invalid("no port".into()));
        assert_eq!(of(&invalid), Some(UnusablePool::Invalid(named, "no port".into())));
        assert_eq!(of(&known(&InferencePool::Usable(usable(None)))), None);
    }

    #[test]
    fn inference_pool_determines_picker_failure_mode_and_protocol() {
        let epp = Some("epp.n.svc:9002");
        let cases = [
            ("", epp, Some("75s")),
            ("picker = { kind = \"epp\", decision_timeout = \"9s\" }", epp, Some("9s")),
            ("picker = { kind = \"epp\" }", None, None),
        ];
        for (settings, epp, decision) in cases {
            let config = merged(&file(settings), &known(&InferencePool::Usable(usable(epp))));
            let pool = only(&config);
            assert_eq!((pool.failure_mode, pool.app_protocol), (FailureMode::Open, AppProtocol::H2c), "{settings}");
            assert_eq!(pool.timeouts, only(&file("")).timeouts, "{settings}");
            let found = match &pool.picker {
                Picker::Epp(epp) => {
                    assert!(epp.is_service && epp.addresses == ["epp.n.svc:9002"], "{settings}");
                    epp.decision_timeout.map(|timeout| format!("{}s", timeout.as_secs()))
                }
                Picker::Builtin => None,
            };
            assert_eq!(found.as_deref(), decision, "{settings}");
        }
    }

    #[test]
    fn endpoints_and_replicas_are_filled_and_emptied() {
        let all_known = known(&InferencePool::Usable(usable(Some("epp.n.svc:9002"))));
        let config = merged(&file(""), &all_known);
        let shared = Shared::new(config.clone(), Metrics::new(&["a".to_owned()]), None).unwrap();
        fill(&shared, &all_known.pools);
        let endpoints = |shared: &Shared| shared.endpoints[0].snapshot().endpoints().len();
        assert_eq!((endpoints(&shared), shared.endpoints[0].snapshot().ready().count()), (2, 1));
        let replicas = Arc::clone(shared.replicas[0].as_ref().unwrap());
        let first = Arc::clone(&replicas.snapshot().replicas[0]);
        assert_eq!(first.address, SocketAddr::from(([10, 0, 1, 1], 9002)).into());
        // A change of the endpoints alone keeps the replica, and with it the connections to it.
        let shared =
            shared.after(Config { limits: config::Limits { body_bytes: 1, ..config.limits }, ..config }).unwrap();
        fill(&shared, &all_known.pools);
        let kept = shared.replicas[0].as_ref().unwrap().snapshot().replicas[0].clone();
        assert!(Arc::ptr_eq(&kept, &first) && endpoints(&shared) == 2);
        let absent = known(&InferencePool::Absent);
        let shared = shared.after(merged(&file(""), &absent)).unwrap();
        fill(&shared, &absent.pools);
        assert_eq!(endpoints(&shared), 0);
    }
}
