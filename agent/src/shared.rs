//! The state that all workers share under one configuration. A reload creates a new one; running requests keep the one
//! they began with.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use anyhow::Context as _;
use http::{HeaderValue, StatusCode};
use tokio_util::sync::CancellationToken;

use crate::{
    abridge::Rewriter,
    bbr::ModelHeaders,
    budget::Bodies,
    config::{self, Config, Picker},
    endpoint::{budget::RetryBudget, set::EndpointSet, tls::EndpointTls},
    http::fields::FieldPolicy,
    listeners::Listeners,
    metrics::{Metrics, PoolMetrics},
    picker::{builtin::BuiltinPicker, replica::Replicas},
    probe::Probe,
    route::Router,
    telemetry::Telemetry,
};

pub struct Shared {
    pub config: Config,
    pub router: Router,
    pub metrics: Arc<Metrics>,
    /// None if tracing is off.
    pub telemetry: Option<Telemetry>,
    /// One per pool.
    pub endpoints: Vec<Arc<EndpointSet>>,
    /// One per pool; None if its endpoints do not speak TLS.
    pub endpoint_tls: Vec<Option<Arc<EndpointTls>>>,
    /// One per pool.
    pub retries: Vec<RetryBudget>,
    /// One per pool; picks for `builtin` pools and for fail-open.
    pub pickers: Vec<BuiltinPicker>,
    /// One per pool; None if the pool does not use an EPP.
    pub replicas: Vec<Option<Arc<Replicas>>>,
    /// One per pool.
    pub rewriters: Vec<Rewriter>,
    pub fields: FieldPolicy,
    pub model_headers: ModelHeaders,
    /// The addresses at which this agent listens.
    pub own: Listeners,
    /// The mark on requests that this agent has forwarded.
    pub mark: HeaderValue,
    /// Cancelled when the agent is about to drain: connections are asked to end after their current request.
    pub leaving: CancellationToken,
    /// Kept across reloads, as bodies are.
    pub bodies: Arc<Bodies>,
    /// Cancelled when no new connections or requests are accepted; running requests may finish.
    pub draining: CancellationToken,
    /// Cancelled when running requests have to be aborted.
    pub force: CancellationToken,
    pub probe: Probe,
}

impl Shared {
    pub fn new(config: Config, metrics: Arc<Metrics>, telemetry: Option<Telemetry>) -> anyhow::Result<Self> {
        let endpoints = config.pools.iter().map(|pool| EndpointSet::new(pool, &config.node)).collect();
        let replicas = config.pools.iter().enumerate().map(|(at, pool)| replicas(pool, None, metrics.pool(at)));
        let replicas = replicas.collect::<anyhow::Result<_>>()?;
        let tls = config.pools.iter().map(|pool| endpoint_tls(pool, None)).collect::<anyhow::Result<_>>()?;
        Ok(Self::with(config, endpoints, replicas, tls, metrics, telemetry))
    }

    /// Sets the bound addresses.
    #[must_use]
    pub fn listening(self, own: Listeners) -> Self {
        Self { own, ..self }
    }

    /// The state under another configuration. A pool with the same name keeps its endpoints, and its EPP if that has the
    /// [same replicas](config::Epp::has_same_replicas). Call [`take_effect`](Self::take_effect) before requests use it.
    pub fn after(&self, config: Config) -> anyhow::Result<Self> {
        let endpoints = config.pools.iter().map(|pool| match self.pool_named(&pool.name) {
            Some(before) => EndpointSet::after(&self.endpoints[before], pool, &config.node),
            None => EndpointSet::new(pool, &config.node),
        });
        let endpoints = endpoints.collect();
        let metrics = self.metrics.for_pools(&names(&config));
        let replicas = config.pools.iter().enumerate().map(|(at, pool)| {
            let before = self.pool_named(&pool.name).and_then(|before| self.replicas[before].as_ref());
            replicas(pool, before, metrics.pool(at))
        });
        let replicas = replicas.collect::<anyhow::Result<_>>()?;
        let tls = config.pools.iter().map(|pool| {
            let before = self.pool_named(&pool.name).and_then(|before| self.endpoint_tls[before].as_ref());
            endpoint_tls(pool, before)
        });
        let tls = tls.collect::<anyhow::Result<_>>()?;
        let bodies = Arc::clone(&self.bodies);
        bodies.set_limits(&config.limits);
        let mut after = Self {
            leaving: self.leaving.clone(),
            draining: self.draining.clone(),
            force: self.force.clone(),
            own: self.own.clone(),
            mark: self.mark.clone(),
            probe: self.probe.clone(),
            bodies,
            ..Self::with(config, endpoints, replicas, tls, metrics, self.telemetry.clone())
        };
        for (at, pool) in after.config.pools.iter().enumerate() {
            if let Some(before) = self.pool_named(&pool.name) {
                after.pickers[at] = BuiltinPicker::after(&self.pickers[before], Arc::clone(&after.endpoints[at]));
                after.retries[at] = RetryBudget::after(&self.retries[before], &pool.retry);
            }
        }
        Ok(after)
    }

    /// Applies this configuration to what pools share with those of the same name in `before`. No source of endpoints may run.
    pub fn take_effect(&self, before: &Config) {
        for ((pool, endpoints), replicas) in self.config.pools.iter().zip(&self.endpoints).zip(&self.replicas) {
            if let Some(before) = before.pools.iter().find(|before| before.name == pool.name) {
                endpoints.configure(before, pool, Instant::now());
            }
            if let (Some(replicas), Picker::Epp(epp)) = (replicas, &pool.picker) {
                replicas.waiting_room.set_limits(epp.unreachable_wait_requests, epp.unreachable_wait_bytes);
            }
        }
    }

    fn with(
        config: Config,
        endpoints: Vec<EndpointSet>,
        replicas: Vec<Option<Arc<Replicas>>>,
        endpoint_tls: Vec<Option<Arc<EndpointTls>>>,
        metrics: Arc<Metrics>,
        telemetry: Option<Telemetry>,
    ) -> Self {
        metrics.limit_models(config.limits.metric_models);
        let endpoints: Vec<_> = endpoints.into_iter().map(Arc::new).collect();
        Self {
            router: Router::new(&config),
            pickers: endpoints.iter().map(|endpoints| BuiltinPicker::new(Arc::clone(endpoints))).collect(),
            retries: config.pools.iter().map(|pool| RetryBudget::new(&pool.retry, Instant::now())).collect(),
            rewriters: config.pools.iter().map(|_| Rewriter::default()).collect(),
            fields: FieldPolicy::new(&config),
            model_headers: ModelHeaders::new(&config.bbr),
            bodies: Bodies::new(&config.limits, &metrics),
            endpoints,
            endpoint_tls,
            replicas,
            metrics,
            telemetry,
            own: Listeners::default(),
            mark: mark(),
            leaving: CancellationToken::new(),
            draining: CancellationToken::new(),
            force: CancellationToken::new(),
            probe: Probe::default(),
            config,
        }
    }

    /// The index of the pool with this name.
    pub fn pool_named(&self, name: &str) -> Option<usize> {
        self.config.pools.iter().position(|pool| pool.name == name)
    }

    /// Records that a request got no answer from `address`.
    pub fn endpoint_failed(&self, pool: usize, address: SocketAddr) {
        if self.endpoints[pool].failed(address, Instant::now()) {
            self.metrics.pool(pool).ejected();
            tracing::warn!(pool = self.config.pools[pool].name, %address, "endpoint ejected");
        }
    }

    /// Records that `address` answered with `status`.
    pub fn endpoint_answered(&self, pool: usize, address: SocketAddr, status: StatusCode) {
        if status.is_server_error() && self.endpoints[pool].counts_server_errors() {
            self.endpoint_failed(pool, address);
        } else {
            self.endpoints[pool].succeeded(address, Instant::now());
        }
    }

    /// Whether requests of the pool may be sent to `address`: it is in the pool and not draining, or the pool admits it
    /// by passthrough; and it is not a listener of this agent.
    pub fn admits(&self, pool: usize, address: SocketAddr) -> bool {
        let listed = self.endpoints[pool].snapshot();
        let stranger = || self.config.pools[pool].passthrough.admits(address.ip());
        listed.get(address).map_or_else(stranger, |endpoint| !endpoint.draining) && !self.own.accept(address)
    }

    /// Whether a request may still go to `address`. If not, idle connections to it can be closed.
    pub fn is_dialled(&self, address: SocketAddr) -> bool {
        let listed =
            |endpoints: &Arc<EndpointSet>| endpoints.snapshot().get(address).is_some_and(|endpoint| !endpoint.draining);
        let named =
            |pool: &config::Pool| pool.passthrough.admits(address.ip()) || pool.default_upstream == Some(address);
        self.endpoints.iter().any(listed) || self.config.pools.iter().any(named)
    }
}

/// The replicas of the pool's EPP, which may be those of `before`.
fn replicas(
    pool: &config::Pool,
    before: Option<&Arc<Replicas>>,
    metrics: &PoolMetrics,
) -> anyhow::Result<Option<Arc<Replicas>>> {
    let Picker::Epp(epp) = &pool.picker else { return Ok(None) };
    if let Some(same) = before.filter(|before| before.settings.has_same_replicas(epp)) {
        return Ok(Some(Arc::clone(same)));
    }
    let replicas = Replicas::new(epp).with_context(|| format!("cannot set up the EPP of pool {}", pool.name))?;
    let replicas = replicas.counted(metrics.epp_connections());
    Ok(Some(Arc::new(match before {
        Some(before) => replicas.found_by(before),
        None => replicas,
    })))
}

/// TLS to the pool's endpoints, which may be that of `before`.
fn endpoint_tls(pool: &config::Pool, before: Option<&Arc<EndpointTls>>) -> anyhow::Result<Option<Arc<EndpointTls>>> {
    match before.filter(|before| before.is_of(pool)) {
        Some(same) => Ok(Some(Arc::clone(same))),
        None => Ok(EndpointTls::new(pool)?.map(Arc::new)),
    }
}

/// The names of the pools, in configuration order.
pub fn names(config: &Config) -> Vec<String> {
    config.pools.iter().map(|pool| pool.name.clone()).collect()
}

/// A random mark that identifies this agent.
fn mark() -> HeaderValue {
    let mut text = uuid::Uuid::encode_buffer();
    let id = uuid::Uuid::new_v4().simple().encode_lower(&mut text);
    HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("penstock"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Epp, Pool};

    fn shared(epp: Epp) -> Shared {
        let pool = Pool { picker: Picker::Epp(epp), ..Pool::new("p", []) };
        Shared::new(Config::new(vec![pool]), Metrics::new(&["p".to_owned()]), None).unwrap()
    }

    #[test]
    fn replicas_stay_unless_their_connections_or_checks_change() {
        let before = shared(Epp::new("epp.example:9002"));
        let first = before.replicas[0].as_ref().unwrap();
        first.resolved(0, vec![[10, 0, 0, 1].into()]);
        let time = Duration::from_secs(7);
        type Change = fn(&mut Epp, Duration);
        let changes: [(Change, bool, usize); 10] = [
            (|_, _| {}, true, 1),
            (|epp, time| epp.decision_timeout = Some(time), true, 1),
            (|epp, time| epp.unreachable_wait = Some(Some(time)), true, 1),
            (|epp, _| epp.unreachable_wait_requests = 1, true, 1),
            (|epp, _| epp.limits.fields += 1, true, 1),
            (|epp, time| epp.health_interval = Some(time), false, 1),
            (|epp, time| epp.connect_timeout = time, false, 1),
            (|epp, _| epp.tls = config::ServerTls::Insecure, false, 1),
            (|epp, _| epp.addresses = vec!["other.example:9002".to_owned()], false, 0),
            (|epp, _| epp.addresses = vec!["epp.example:9003".to_owned()], false, 0),
        ];
        for (number, (change, stays, known)) in changes.into_iter().enumerate() {
            let mut epp = Epp::new("epp.example:9002");
            change(&mut epp, time);
            let after = before.after(shared(epp).config).unwrap();
            after.take_effect(&before.config);
            let replicas = after.replicas[0].as_ref().unwrap();
            assert_eq!((Arc::ptr_eq(replicas, first), replicas.snapshot().replicas.len()), (stays, known), "{number}");
            let limit = if number == 3 { 1 } else { 2 };
            let places: Vec<_> = (0..2).map_while(|_| replicas.waiting_room.enter()).collect();
            assert_eq!(places.len(), limit, "{number}");
        }
    }
}
