//! The agent's metrics, exported in Prometheus format.
//!
//! One [`Metrics`] is created at start and shared; nothing is global, so each test has its own counts. Names, labels
//! and help are in `families`. Recording waits for a scrape at most as long as encoding one metric takes.

mod families;
mod kubernetes;
mod labels;
mod models;
mod pool;
mod process;

pub use kubernetes::WatchMetrics;
pub use labels::{Connection, EndpointState, EppOutcome};
pub use pool::{EppConnections, PoolMetrics, Streamed};

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use penstock_common::path::Path;
use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

use crate::{config::Limits, kernel::slots::SlotsInUse};
use families::Families;
use labels::{ByFlow, ByListener, ByPath, ByReason, ByResult, PathState};
use models::Models;

/// Reason of a request that an endpoint answered; see [`PoolMetrics::request`].
pub const OK: &str = "ok";

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The result of reading the model from a JSON body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyModel {
    Found,
    NotFound,
    Empty,
}

/// The metrics of the process and the pools of one configuration. Series outlive the configuration.
pub struct Metrics {
    core: Arc<Core>,
    pools: Vec<Arc<PoolMetrics>>,
}

struct Core {
    registry: Registry,
    families: Arc<Families>,
    models: Arc<Models>,
    unrouted: PoolMetrics,
    /// By `Path`.
    body_bytes: [Counter; Path::ALL.len()],
    /// By [`Connection`].
    endpoint_connections: [Counter; Connection::ALL.len()],
    /// By `Path`: the exported state.
    path_states: Mutex<[Option<PathState>; Path::ALL.len()]>,
    /// Queried for the states of each pool's endpoints at every scrape.
    endpoints: Mutex<Vec<(Arc<PoolMetrics>, CountEndpoints)>>,
    /// Queried for the slots in use at every scrape.
    slots: Mutex<Option<CountSlots>>,
}

type CountSlots = Box<dyn Fn() -> SlotsInUse + Send>;

/// Number of endpoints by [`EndpointState`].
type CountEndpoints = Box<dyn Fn() -> [usize; EndpointState::ALL.len()] + Send>;

impl Metrics {
    /// `pool_names` must be in configuration order, so that indices agree.
    pub fn new(pool_names: &[String]) -> Arc<Self> {
        let mut registry = Registry::with_prefix("penstock");
        let families = Arc::new(Families::register(&mut registry));
        registry.register_collector(Box::new(process::ProcessCollector));
        let default = Limits::default().metric_models;
        let models = Arc::new(Models::new(default, families.metric_models_overflow.clone()));
        let core = Arc::new(Core {
            unrouted: PoolMetrics::new("", &families, &models),
            body_bytes: Path::ALL.map(|path| families.body_bytes.get_or_create_owned(&ByPath { path: path.label() })),
            endpoint_connections: Connection::ALL
                .map(|result| families.endpoint_connections.get_or_create_owned(&ByResult { result })),
            path_states: Mutex::default(),
            endpoints: Mutex::default(),
            slots: Mutex::default(),
            registry,
            families,
            models,
        });
        Self::of(core, pool_names)
    }

    /// The same metrics with the pools of another configuration. A pool keeps its series if its name stays.
    pub fn for_pools(&self, pool_names: &[String]) -> Arc<Self> {
        Self::of(Arc::clone(&self.core), pool_names)
    }

    fn of(core: Arc<Core>, pool_names: &[String]) -> Arc<Self> {
        let pools =
            pool_names.iter().map(|name| Arc::new(PoolMetrics::new(name, &core.families, &core.models))).collect();
        Arc::new(Self { core, pools })
    }

    /// Sets how many model names the metrics distinguish.
    pub fn limit_models(&self, limit: usize) {
        self.core.models.set_limit(limit);
    }

    /// The metrics of the pool at this index of the configuration. Panics if out of range.
    pub fn pool(&self, index: usize) -> &PoolMetrics {
        &self.pools[index]
    }

    /// As [`pool`](Self::pool), for what outlives a configuration.
    pub fn pool_handle(&self, index: usize) -> Arc<PoolMetrics> {
        Arc::clone(&self.pools[index])
    }

    /// The metrics of requests without a pool: invalid heads, and requests that no route matches.
    pub fn unrouted(&self) -> &PoolMetrics {
        &self.core.unrouted
    }

    /// Counts a client connection until the guard is dropped.
    pub fn client_connection(&self) -> InFlightGauge {
        InFlightGauge::new(&self.core.families.client_connections)
    }

    /// Counts a client that disconnected before its answer was complete.
    pub fn client_aborted(&self) {
        self.core.families.client_aborts.inc();
    }

    /// Counts a client connection closed because it was idle.
    pub fn client_idle_closed(&self) {
        self.core.families.client_idle_closes.inc();
    }

    /// Sets the limit of concurrent client connections.
    pub fn set_connections_limit(&self, limit: usize) {
        self.core.families.client_connections_limit.set(limit as i64);
    }

    /// Counts a client connection refused at a limit.
    pub fn client_refused(&self, reason: &'static str) {
        self.core.families.client_connections_refused.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts a client connection that ends for its age.
    pub fn client_aged(&self) {
        self.core.families.client_connections_aged.inc();
    }

    /// Counts an idle client connection closed to make room.
    pub fn client_shed(&self) {
        self.core.families.client_connections_shed.inc();
    }

    /// Counts a connection that could not be accepted for lack of descriptors or memory.
    pub fn accept_failed(&self, listener: &'static str) {
        self.core.families.accept_failures.get_or_create(&ByListener { listener }).inc();
    }

    /// Counts an answer aborted because its client stalled.
    pub fn client_stalled(&self) {
        self.core.families.client_stalls.inc();
    }

    /// Counts a connection closed while the client was still sending.
    pub fn client_linger_cut(&self, reason: &'static str) {
        self.core.families.client_lingers_cut.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts a client's HTTP/2 connection closed by the agent.
    pub fn http2_ended(&self, reason: &'static str) {
        self.core.families.http2_ended.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts a JSON body by its model.
    pub fn body_model(&self, model: BodyModel) {
        let counter = match model {
            BodyModel::Found => &self.core.families.bbr_success,
            BodyModel::NotFound => &self.core.families.bbr_body_field_not_found,
            BodyModel::Empty => &self.core.families.bbr_body_field_empty,
        };
        counter.inc();
    }

    /// The metrics of one watch for an InferencePool.
    pub fn kubernetes_watch(&self, inference_pool: &str, resource: &'static str) -> WatchMetrics {
        WatchMetrics::new(&self.core.families, inference_pool, resource)
    }

    /// The bytes of request bodies in memory and in files.
    pub fn body_gauges(&self) -> [Gauge; 2] {
        [self.core.families.request_body_memory.clone(), self.core.families.request_body_spill.clone()]
    }

    /// Counts a request body that began to spill to a file.
    pub fn body_spilled(&self, why: &'static str) {
        self.core.families.request_bodies_spilled.get_or_create(&ByReason { reason: why }).inc();
    }

    /// Counts a request refused because a body budget was exhausted.
    pub fn body_refused(&self, at: &'static str) {
        self.core.families.request_bodies_refused.get_or_create(&ByReason { reason: at }).inc();
    }

    /// Counts a stream to an EPP until the guard is dropped.
    pub fn epp_stream(&self) -> InFlightGauge {
        InFlightGauge::new(&self.core.families.epp_streams_inflight)
    }

    /// Counts a request for a connection to an endpoint.
    pub fn endpoint_connection(&self, result: Connection) {
        self.core.endpoint_connections[result as usize].inc();
    }

    /// Counts a TLS handshake until the guard is dropped.
    pub fn tls_handshake(&self) -> InFlightGauge {
        InFlightGauge::new(&self.core.families.tls_handshakes_active)
    }

    /// Counts a connection closed for its PROXY header, by reason.
    pub fn proxy_header_refused(&self, reason: &'static str) {
        self.core.families.proxy_headers_refused.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts a TLS handshake that failed for this reason, a label of the metric.
    pub fn tls_handshake_failed(&self, reason: &'static str) {
        self.core.families.tls_handshakes_failed.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts a retry.
    pub fn endpoint_retried(&self, reason: &'static str) {
        self.core.families.endpoint_retries.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts a connection to an endpoint that failed because of this machine.
    pub fn local_fault(&self, reason: &'static str) {
        self.core.families.local_faults.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts a response by the path that carries it.
    pub fn flow(&self, path: Path, reason: &'static str) {
        self.core.families.flows.get_or_create(&ByFlow { path: path.label(), reason }).inc();
    }

    /// Adds bytes of a response body carried by `path`.
    pub fn body_bytes(&self, path: Path, bytes: u64) {
        self.core.body_bytes[path as usize].inc_by(bytes);
    }

    /// Adds bytes from a client, of an upgraded or pinned connection, carried by `path`.
    pub fn upstream_bytes(&self, path: Path, bytes: u64) {
        if bytes > 0 {
            self.core.families.upstream_bytes.get_or_create(&ByPath { path: path.label() }).inc_by(bytes);
        }
    }

    /// Counts a flow that the kernel disarmed before the end of its message.
    pub fn steer_stopped(&self, reason: &'static str) {
        self.core.families.steer_stops.get_or_create(&ByReason { reason }).inc();
    }

    /// Sets how many adopted flows have not ended.
    pub fn set_adopted_flows(&self, flows: usize) {
        self.core.families.adopted_flows.set(flows as i64);
    }

    /// Counts an adopted flow that has ended.
    pub fn adopted_flow_ended(&self, reason: &'static str) {
        self.core.families.adopted_flows_ended.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts lost events of the kernel programs.
    pub fn steer_events_missed(&self, events: u64) {
        self.core.families.steer_events_missed.inc_by(events);
    }

    /// Counts the slots of the kernel maps at every scrape. `count` must not block.
    pub fn count_slots(&self, count: impl Fn() -> SlotsInUse + Send + 'static) {
        *self.core.slots.lock() = Some(Box::new(count));
    }

    /// Counts spans that the collector accepted.
    pub fn trace_spans_exported(&self, spans: u64) {
        self.core.families.trace_spans_exported.inc_by(spans);
    }

    /// Counts lost spans.
    pub fn trace_spans_dropped(&self, reason: &'static str, spans: u64) {
        self.core.families.trace_spans_dropped.get_or_create(&ByReason { reason }).inc_by(spans);
    }

    /// Sets the self-test result of a path, replacing the previous one.
    pub fn set_steering_path(&self, path: Path, active: bool, reason: &str) {
        let state = PathState { path: path.label(), reason: reason.to_owned() };
        let mut shown = self.core.path_states.lock();
        if let Some(before) = shown[path as usize].replace(state.clone()) {
            self.core.families.steering_path_info.remove(&before);
        }
        self.core.families.steering_path_info.get_or_create(&state).set(1);
        self.core.families.steering_path_active.get_or_create(&ByPath { path: path.label() }).set(i64::from(active));
    }

    /// Counts the endpoints of each pool at every scrape, replacing the previous counters; one element of `counts` per
    /// pool. They must not block.
    pub fn count_endpoints(&self, counts: impl IntoIterator<Item = CountEndpoints>) {
        let mut counted = self.core.endpoints.lock();
        for (pool, _) in counted.drain(..) {
            pool.forget_states();
        }
        counted.extend(self.pools.iter().cloned().zip(counts));
    }

    /// Counts a reload: `applied` or `refused`.
    pub fn reloaded(&self, result: &'static str) {
        self.core.families.reloads.get_or_create(&ByReason { reason: result }).inc();
    }

    /// The metrics as OpenMetrics text of type [`CONTENT_TYPE`].
    pub fn encode(&self) -> String {
        for (pool, count) in &*self.core.endpoints.lock() {
            pool.set_endpoints(count());
        }
        if let Some(SlotsInUse { all, retired }) = self.core.slots.lock().as_ref().map(|count| count()) {
            self.core.families.slots_in_use.set(all as i64);
            self.core.families.slots_retired.set(retired as i64);
        }
        let mut text = String::with_capacity(16 << 10);
        // Writing to a String cannot fail. If a metric ever failed to encode, the text before it would remain.
        let _ = text::encode(&mut text, &self.core.registry);
        text
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("pools", &self.pools.len()).finish_non_exhaustive()
    }
}

/// Adds one to a gauge until dropped.
#[derive(Debug)]
#[must_use = "counts only while it is held"]
pub struct InFlightGauge(Gauge);

impl InFlightGauge {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InFlightGauge {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests;
