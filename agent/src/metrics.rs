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

use crate::config::Limits;
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
}

/// Number of endpoints by [`EndpointState`].
type CountEndpoints = Box<dyn Fn() -> [usize; EndpointState::ALL.len()] + Send>;

impl Metrics {
    /// `pool_names` must be in configuration order, so that indices agree.
    pub fn new(pool_names: &[String]) -> Arc<Self> {
        let mut registry = Registry::with_prefix("penstock");
        let families = Arc::new(Families::register(&mut registry));
        registry.register_collector(Box::new(process::Process));
        let default = Limits::default().metric_models;
        let models = Arc::new(Models::new(default, families.metric_models_overflow.clone()));
        let core = Arc::new(Core {
            unrouted: PoolMetrics::new("", &families, &models),
            body_bytes: Path::ALL.map(|path| families.body_bytes.get_or_create_owned(&ByPath { path: path.label() })),
            endpoint_connections: Connection::ALL
                .map(|result| families.endpoint_connections.get_or_create_owned(&ByResult { result })),
            path_states: Mutex::default(),
            endpoints: Mutex::default(),
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

    /// The metrics of requests without a pool: invalid heads, and requests that no route matches.
    pub fn unrouted(&self) -> &PoolMetrics {
        &self.core.unrouted
    }

    /// Counts a client connection until the guard is dropped.
    pub fn client_connection(&self) -> InFlight {
        InFlight::new(&self.core.families.client_connections)
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
    pub fn epp_stream(&self) -> InFlight {
        InFlight::new(&self.core.families.epp_streams_inflight)
    }

    /// Counts a request for a connection to an endpoint.
    pub fn endpoint_connection(&self, result: Connection) {
        self.core.endpoint_connections[result as usize].inc();
    }

    /// Counts a TLS handshake until the guard is dropped.
    pub fn tls_handshake(&self) -> InFlight {
        InFlight::new(&self.core.families.tls_handshakes_active)
    }

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

    /// Counts lost events of the kernel programs.
    pub fn steer_events_missed(&self, events: u64) {
        self.core.families.steer_events_missed.inc_by(events);
    }

    /// Counts a slot of the kernel maps until the guard is dropped.
    pub fn slot(&self) -> InFlight {
        InFlight::new(&self.core.families.slots_in_use)
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
            pool.forget_endpoints();
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
pub struct InFlight(Gauge);

impl InFlight {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn metrics() -> Arc<Metrics> {
        Metrics::new(&["gpu".to_owned(), "cpu".to_owned()])
    }

    #[track_caller]
    fn assert_line(metrics: &Metrics, line: &str) {
        let text = metrics.encode();
        assert!(text.lines().any(|l| l == line), "no line {line:?} in\n{text}");
    }

    #[test]
    fn requests_are_counted_by_pool_status_and_reason() {
        let metrics = metrics();
        metrics.pool(0).request(200, OK, Duration::from_millis(3));
        metrics.pool(0).request(200, OK, Duration::from_millis(3));
        metrics.pool(0).request(200, "client_aborted", Duration::from_millis(3));
        metrics.pool(1).request(503, "fail_closed", Duration::from_secs(1000));
        metrics.unrouted().request(404, "no_route", Duration::ZERO);
        assert_line(&metrics, r#"penstock_requests_total{pool="gpu",status="200",reason="ok"} 2"#);
        assert_line(&metrics, r#"penstock_requests_total{pool="gpu",status="200",reason="client_aborted"} 1"#);
        assert_line(&metrics, r#"penstock_requests_total{pool="cpu",status="503",reason="fail_closed"} 1"#);
        assert_line(&metrics, r#"penstock_requests_total{pool="",status="404",reason="no_route"} 1"#);
        assert_line(&metrics, r#"penstock_request_duration_seconds_bucket{le="0.005",pool="gpu"} 3"#);
        assert_line(&metrics, r#"penstock_request_duration_seconds_bucket{le="655.36",pool="cpu"} 0"#);
        assert_line(&metrics, r#"penstock_request_duration_seconds_count{pool="cpu"} 1"#);
    }

    #[test]
    fn reloaded_pool_keeps_its_series() {
        let metrics = metrics();
        metrics.pool(0).evicted();
        metrics.for_pools(&["gpu".to_owned()]).pool(0).evicted();
        assert_line(&metrics, r#"penstock_evictions_total{pool="gpu"} 2"#);
    }

    #[test]
    fn event_streams_are_measured_by_pool_and_model() {
        let metrics = metrics();
        metrics.limit_models(1);
        let ms = Duration::from_millis;
        let stream = Streamed { first: ms(30), rest: ms(900), messages: 10 };
        metrics.pool(0).streamed("m", &stream);
        metrics.pool(0).streamed("m", &Streamed { messages: 1, rest: Duration::ZERO, ..stream });
        metrics.pool(1).streamed("m", &stream);
        metrics.pool(1).streamed("unheard-of", &stream);
        metrics.pool(1).streamed("", &stream);
        let name = "penstock_gen_ai_server_time_to_first_token_seconds";
        assert_line(&metrics, &format!(r#"{name}_count{{pool="gpu",gen_ai_request_model="m"}} 2"#));
        assert_line(&metrics, &format!(r#"{name}_sum{{pool="gpu",gen_ai_request_model="m"}} 0.06"#));
        assert_line(&metrics, &format!(r#"{name}_count{{pool="cpu",gen_ai_request_model="other"}} 1"#));
        assert_line(&metrics, &format!(r#"{name}_count{{pool="cpu",gen_ai_request_model=""}} 1"#));
        // A stream of one message has no time between messages.
        let name = "penstock_gen_ai_server_time_per_output_token_seconds";
        assert_line(&metrics, &format!(r#"{name}_count{{pool="gpu",gen_ai_request_model="m"}} 1"#));
        assert_line(&metrics, &format!(r#"{name}_sum{{pool="gpu",gen_ai_request_model="m"}} 0.1"#));
        let name = "penstock_gen_ai_server_output_tokens_per_second";
        assert_line(&metrics, &format!(r#"{name}_sum{{pool="cpu",gen_ai_request_model="m"}} 10.0"#));
        assert_line(&metrics, "penstock_metric_models_overflow_total 1");
        // Limit and known names survive a reload.
        metrics.for_pools(&["gpu".to_owned()]).pool(0).tokens("m2", 1, 2);
        assert_line(&metrics, "penstock_metric_models_overflow_total 2");
    }

    #[test]
    fn epp_exchange_buckets_reach_from_microseconds_to_a_minute() {
        let metrics = metrics();
        assert!(!metrics.encode().contains("epp_exchange"));
        metrics.pool(0).epp_exchange(EppOutcome::Picked, Duration::from_micros(40));
        metrics.pool(0).epp_exchange(EppOutcome::FailClosed, Duration::from_secs(59));
        metrics.pool(0).epp_failed("timeout");
        assert_line(&metrics, r#"penstock_epp_exchange_seconds_bucket{le="0.00005",pool="gpu",outcome="picked"} 1"#);
        assert_line(&metrics, r#"penstock_epp_exchange_seconds_bucket{le="30.0",pool="gpu",outcome="fail_closed"} 0"#);
        assert_line(&metrics, r#"penstock_epp_exchange_seconds_bucket{le="60.0",pool="gpu",outcome="fail_closed"} 1"#);
        assert_line(&metrics, r#"penstock_epp_failures_total{pool="gpu",reason="timeout"} 1"#);
    }

    #[test]
    fn replica_has_one_state_at_a_time() {
        let metrics = metrics();
        let replica = "10.0.0.1:9002".parse().unwrap();
        metrics.pool(0).epp_replica(replica, None, Some("unknown"));
        metrics.pool(0).epp_replica(replica, Some("unknown"), Some("serving"));
        metrics.pool(0).epp_asked_again("connect");
        assert_line(&metrics, r#"penstock_epp_replicas{pool="gpu",replica="10.0.0.1:9002",state="serving"} 1"#);
        assert_line(&metrics, r#"penstock_epp_asked_again_total{pool="gpu",reason="connect"} 1"#);
        assert_eq!(metrics.encode().matches("penstock_epp_replicas{").count(), 1);
        metrics.pool(0).epp_replica(replica, Some("serving"), None);
        assert!(!metrics.encode().contains("penstock_epp_replicas{"));
    }

    #[test]
    fn guards_count_while_they_are_held() {
        let metrics = metrics();
        let guards = [
            metrics.client_connection(),
            metrics.epp_stream(),
            metrics.slot(),
            metrics.pool(1).active_request(),
            metrics.pool(1).active_request(),
        ];
        let gauges = [
            ("penstock_client_connections", 1),
            ("penstock_epp_streams_inflight", 1),
            ("penstock_slots_in_use", 1),
            (r#"penstock_active_requests{pool="cpu"}"#, 2),
        ];
        for (gauge, value) in gauges {
            assert_line(&metrics, &format!("{gauge} {value}"));
        }
        drop(guards);
        for (gauge, _) in gauges {
            assert_line(&metrics, &format!("{gauge} 0"));
        }
    }

    #[test]
    fn endpoints_are_counted_when_metrics_are_read() {
        let metrics = metrics();
        let ready = Arc::new(std::sync::atomic::AtomicUsize::new(2));
        let counted = Arc::clone(&ready);
        let count = move || [1, 0, 0, counted.load(std::sync::atomic::Ordering::Relaxed)];
        metrics.count_endpoints([Box::new(|| [0usize; 4]) as CountEndpoints, Box::new(count)]);
        assert_line(&metrics, r#"penstock_endpoints{pool="cpu",state="draining"} 1"#);
        assert_line(&metrics, r#"penstock_endpoints{pool="cpu",state="ready"} 2"#);
        ready.store(0, std::sync::atomic::Ordering::Relaxed);
        assert_line(&metrics, r#"penstock_endpoints{pool="cpu",state="ready"} 0"#);
        metrics.for_pools(&["gpu".to_owned()]).count_endpoints([Box::new(|| [0, 0, 0, 7usize]) as CountEndpoints]);
        assert_line(&metrics, r#"penstock_endpoints{pool="gpu",state="ready"} 7"#);
        assert!(!metrics.encode().contains(r#"endpoints{pool="cpu""#), "a removed pool has no endpoints");
    }

    #[test]
    fn fallback_attempt_index_is_bounded() {
        let metrics = metrics();
        for index in 0..20 {
            metrics.pool(0).fallback_attempt(index);
        }
        assert_line(&metrics, r#"penstock_fallback_attempts_total{pool="gpu",index="1"} 1"#);
        assert_line(&metrics, r#"penstock_fallback_attempts_total{pool="gpu",index="8+"} 12"#);
        assert!(!metrics.encode().contains(r#"index="0""#));
    }

    #[test]
    fn steering_metrics_are_counted() {
        let metrics = metrics();
        metrics.flow(Path::Ingress, "chunked");
        metrics.body_bytes(Path::Ingress, 10);
        metrics.body_bytes(Path::Relay, 5);
        metrics.steer_stopped("room");
        metrics.steer_events_missed(3);
        metrics.endpoint_connection(Connection::Reused);
        metrics.endpoint_retried("reset");
        metrics.tls_handshake_failed("timeout");
        metrics.client_aborted();
        metrics.pool(0).time_to_first_token(Duration::from_millis(30));
        metrics.pool(0).time_per_output_chunk(Duration::from_millis(30));
        for line in [
            r#"penstock_flows_total{path="ingress",reason="chunked"} 1"#,
            r#"penstock_body_bytes_total{path="local"} 0"#,
            r#"penstock_body_bytes_total{path="ingress"} 10"#,
            r#"penstock_body_bytes_total{path="relay"} 5"#,
            r#"penstock_steer_stops_total{reason="room"} 1"#,
            "penstock_steer_events_missed_total 3",
            r#"penstock_endpoint_connections_total{result="new"} 0"#,
            r#"penstock_endpoint_connections_total{result="reused"} 1"#,
            r#"penstock_endpoint_retries_total{reason="reset"} 1"#,
            "penstock_client_aborts_total 1",
            r#"penstock_ttft_seconds_bucket{le="0.04",pool="gpu"} 1"#,
            r#"penstock_time_per_output_chunk_seconds_bucket{le="0.05",pool="gpu"} 1"#,
        ] {
            assert_line(&metrics, line);
        }
    }

    #[test]
    fn body_models_are_counted_by_the_names_of_bbr() {
        let metrics = metrics();
        for (model, times) in [(BodyModel::Found, 3), (BodyModel::NotFound, 2), (BodyModel::Empty, 1)] {
            (0..times).for_each(|_| metrics.body_model(model));
        }
        assert_line(&metrics, "penstock_bbr_success_total 3");
        assert_line(&metrics, "penstock_bbr_body_field_not_found_total 2");
        assert_line(&metrics, "penstock_bbr_body_field_empty_total 1");
    }

    #[test]
    fn path_has_one_state_at_a_time() {
        let metrics = metrics();
        metrics.set_steering_path(Path::Ingress, true, "passed");
        assert_line(&metrics, r#"penstock_steering_path_active{path="ingress"} 1"#);
        metrics.set_steering_path(Path::Ingress, false, "no \"BTF\"");
        assert_line(&metrics, r#"penstock_steering_path_active{path="ingress"} 0"#);
        assert_line(&metrics, r#"penstock_steering_path_info{path="ingress",reason="no \"BTF\""} 1"#);
        assert_eq!(metrics.encode().matches("steering_path_info{").count(), 1);
    }

    #[test]
    fn doc_comments_are_the_help_texts() {
        let metrics = metrics();
        assert_line(&metrics, "# HELP penstock_client_connections Client connections that are open.");
        assert_line(&metrics, "# TYPE penstock_client_connections gauge");
        assert_line(&metrics, &format!("penstock_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")));
        let text = metrics.encode();
        assert!(text.ends_with("# EOF\n"));
        assert!(text.lines().filter(|line| !line.starts_with('#')).all(|line| line.starts_with("penstock_")));
    }
}
