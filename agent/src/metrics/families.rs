//! Every exported metric with its name, labels and help. The doc comment is the HELP text. `cargo xtask settings` writes
//! docs/metrics.md from it.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};

use super::labels::{
    Build, ByAnswer, ByAttribute, ByFlow, ByListener, ByModel, ByOutcome, ByPath, ByPool, ByPoolAndIndex,
    ByPoolAndReason, ByPoolAndState, ByReason, ByReplica, ByRequestModel, ByResult, BySource, BySourceAndReason,
    ByWatch, ByWatchAndReason, PathState,
};

type Histograms<Labels> = Family<Labels, Histogram, fn() -> Histogram>;

macro_rules! families {
    ($($(#[doc = $help:literal])+ $field:ident: $type:ty = $name:literal $(in $new:expr)?;)+) => {
        #[derive(Debug)]
        pub(super) struct Families {
            $($(#[doc = $help])+ pub(super) $field: $type,)+
        }

        impl Families {
            pub(super) fn register(registry: &mut Registry) -> Self {
                let families = Self { $($field: families!(@new $($new)?),)+ };
                // The registry appends a full stop to each text.
                $(registry.register($name, concat!($($help),+).trim().trim_end_matches('.'), families.$field.clone());)+
                registry.register("build", "The running agent", Info::new(Build { version: env!("CARGO_PKG_VERSION") }));
                families
            }
        }

        /// The name, type and help of each metric.
        #[cfg(test)]
        const DECLARED: &[(&str, &str, &str)] = &[$(($name, stringify!($type), concat!($($help),+)),)+];
    };
    (@new) => { Default::default() };
    (@new $buckets:expr) => { Family::new_with_constructor(|| Histogram::new($buckets)) };
}

families! {
    /// Requests answered, by endpoints, pickers or the agent; pool is empty if no pool was selected.
    requests: Family<ByAnswer, Counter> = "requests";
    /// Time from the first byte of a request to the last byte of its answer.
    request_duration: Histograms<ByPool> = "request_duration_seconds" in REQUEST_SECONDS;
    /// Requests that are being read, picked for, forwarded or answered.
    active_requests: Family<ByPool, Gauge> = "active_requests";
    /// Bytes from clients on upgraded or pinned connections, by path.
    upstream_bytes: Family<ByPath, Counter> = "upstream_bytes";
    /// How long client connections were pinned to an endpoint.
    pin_duration: Histograms<ByPool> = "pin_duration_seconds" in PIN_SECONDS;
    /// Client connections that are pinned to an endpoint.
    pinned_connections: Family<ByPool, Gauge> = "pinned_connections";
    /// Client connections that were pinned to an endpoint, by the reason why the pin ended.
    pins_ended: Family<ByPoolAndReason, Counter> = "pins_ended";
    /// Requests sent to the endpoint of the previous request under a lease, without a pick.
    leased_requests: Family<ByPool, Counter> = "leased_requests";
    /// Picks of pools with `pick_per` "lease" or "connection" that apply to a single request, because the EPP changed
    /// its headers or its body.
    picks_not_held: Family<ByPoolAndReason, Counter> = "picks_not_held";
    /// Time from the request head to the first byte of the response body.
    ttft: Histograms<ByPool> = "ttft_seconds" in TTFT_SECONDS;
    /// Mean time between the chunks of a streamed response, without its first.
    time_per_output_chunk: Histograms<ByPool> = "time_per_output_chunk_seconds" in CHUNK_SECONDS;
    /// Time from the request head to the first message of an event stream, on any path;
    /// gen_ai.server.time_to_first_token.
    gen_ai_ttft: Histograms<ByRequestModel> = "gen_ai_server_time_to_first_token_seconds" in TTFT_SECONDS;
    /// Mean time between messages, once per event stream; messages are tokens if the server writes each token
    /// separately; gen_ai.server.time_per_output_token.
    gen_ai_tpot: Histograms<ByRequestModel> = "gen_ai_server_time_per_output_token_seconds" in TOKEN_SECONDS;
    /// Messages per second after the first, once per event stream.
    gen_ai_token_rate: Histograms<ByRequestModel> = "gen_ai_server_output_tokens_per_second" in TOKENS_PER_SECOND;
    /// Model names reported as `other`, because the limit limits.metric_models was reached.
    metric_models_overflow: Counter = "metric_models_overflow";

    /// Configuration reloads, by result.
    reloads: Family<ByReason, Counter> = "config_reloads";

    /// Whether the watch of a resource for an InferencePool runs; if not, what was known last is used.
    kubernetes_watch_up: Family<ByWatch, Gauge> = "kubernetes_watch_up";
    /// When the API server was last heard of on the watch: a list, an event or a bookmark (Unix time).
    kubernetes_last_sync: Family<ByWatch, Gauge> = "kubernetes_last_sync_timestamp_seconds";
    /// Objects that the agent knows.
    kubernetes_objects: Family<ByWatch, Gauge> = "kubernetes_objects";
    /// Lists after the first, which were needed because the watch could not continue where it had ended.
    kubernetes_relists: Family<ByWatch, Counter> = "kubernetes_relists";
    /// Lists and watches that failed.
    kubernetes_failures: Family<ByWatchAndReason, Counter> = "kubernetes_failures";

    /// Client connections that are open.
    client_connections: Gauge = "client_connections";
    /// Maximum number of concurrent client connections (listen.max_connections).
    client_connections_limit: Gauge = "client_connections_limit";
    /// Client connections refused at a limit, with 503 if possible.
    client_connections_refused: Family<ByReason, Counter> = "client_connections_refused";
    /// Client connections that ended because they were older than `listen.max_connection_age`.
    client_connections_aged: Counter = "client_connections_aged";
    /// Idle client connections closed to make room for new ones.
    client_connections_shed: Counter = "client_connections_shed";
    /// Connections that could not be accepted for lack of descriptors or memory, by listener.
    accept_failures: Family<ByListener, Counter> = "accept_failures";
    /// Connections of clients closed because their PROXY header was absent, invalid or late.
    proxy_headers_refused: Family<ByReason, Counter> = "proxy_headers_refused";
    /// TLS handshakes with clients that failed.
    tls_handshakes_failed: Family<ByReason, Counter> = "tls_handshakes_failed";
    /// TLS handshakes with clients in progress.
    tls_handshakes_active: Gauge = "tls_handshakes_active";
    /// Requests whose client disconnected before the answer was complete.
    client_aborts: Counter = "client_aborts";
    /// Client connections closed because no request arrived within the keep-alive time.
    client_idle_closes: Counter = "client_idle_closes";
    /// Answers aborted because the client read none of them within the idle time.
    client_stalls: Counter = "client_stalls";
    /// Client connections closed while the client was still sending, by the limit that was reached.
    client_lingers_cut: Family<ByReason, Counter> = "client_lingers_cut";
    /// HTTP/2 connections closed by the agent, by reason: too many resets, too many control frames, a head that took longer than
    /// `timeouts.head`, no answer to PING, stalled client.
    http2_ended: Family<ByReason, Counter> = "http2_connections_ended";

    /// Bytes of memory used by request bodies, including replacements by EPPs; at most limits.total_body_memory_bytes.
    request_body_memory: Gauge = "request_body_memory_bytes";
    /// Bytes of request bodies in temporary files; at most limits.total_spill_bytes.
    request_body_spill: Gauge = "request_body_spill_bytes";
    /// Request bodies that spilled to a file, by the limit that was reached: the body's own, or that of all bodies
    /// (total).
    request_bodies_spilled: Family<ByReason, Counter> = "request_bodies_spilled";
    /// Requests refused for lack of space for their body: in files, on the disk, or in memory if it cannot spill.
    request_bodies_refused: Family<ByReason, Counter> = "request_bodies_refused";

    /// JSON bodies that name a model.
    bbr_success: Counter = "bbr_success";
    /// JSON bodies without a model, or with a model that is null, an array or an object.
    bbr_body_field_not_found: Counter = "bbr_body_field_not_found";
    /// JSON bodies with an empty model.
    bbr_body_field_empty: Counter = "bbr_body_field_empty";

    /// Time from opening the stream to the EPP until its decision or failure, including the upload of the body.
    epp_exchange: Histograms<ByOutcome> = "epp_exchange_seconds" in EPP_SECONDS;
    /// Exchanges with the EPP that failed, in either failure mode.
    epp_failures: Family<ByPoolAndReason, Counter> = "epp_failures";
    /// Endpoints in picks that were skipped because they are invalid or not admitted to the pool.
    epp_endpoints_passed_over: Family<ByPoolAndReason, Counter> = "epp_endpoints_passed_over";
    /// Stalls of an EPP replica: it decided nothing during a request's whole time limit.
    epp_stalls: Family<ByPool, Counter> = "epp_stalls";
    /// Requests sent to the EPP again, on another connection or to another replica, by the outcome of the previous
    /// attempt.
    epp_asked_again: Family<ByPoolAndReason, Counter> = "epp_asked_again";
    /// Requests with a long body in pools with body_to_picker = "abridged": unchanged (the EPP left the abridged body as it was),
    /// renamed (it changed the model), rewritten (it changed something else, and was asked again with the whole body), undecided
    /// (there was no pick), or why the body was sent whole: coded, not_json, structure (too much of it cannot be cut), short (no
    /// string is long enough), memory (no room for the abridged body), rewriter (the EPP has rewritten a body in the last minute).
    epp_long_bodies: Family<ByPoolAndReason, Counter> = "epp_long_bodies";
    /// Requests that wait for a replica of their EPP, none of which can be connected.
    epp_waiting: Family<ByPool, Gauge> = "epp_waiting";
    /// Requests that had to wait for a replica of their EPP, by outcome: served, in_vain (none came in time, or the EPP failed
    /// otherwise), full (too many waited already), or left (the client left, or its body failed).
    epp_waits: Family<ByPoolAndReason, Counter> = "epp_waits";
    /// Requests that no picked endpoint took, for which the EPP was to pick once more, by outcome: served, failed (the second
    /// pick's endpoints did not take the request either), replied (the EPP answered it), ignored (the EPP picked the same
    /// endpoints again), none_left (the agent knows no other endpoint), or picker_failed.
    epp_repicks: Family<ByPoolAndReason, Counter> = "epp_repicks";
    /// Replicas of EPPs by the state their health checks report; always 1.
    epp_replicas: Family<ByReplica, Gauge> = "epp_replicas";
    /// Open connections to replicas of EPPs over which requests are sent: one for each worker and replica in use, and more if the
    /// replica takes few streams on each.
    epp_connections: Family<ByPool, Gauge> = "epp_connections";
    /// Connections to replicas of EPPs that were opened for requests.
    epp_connections_opened: Family<ByPool, Counter> = "epp_connections_opened";
    /// Open streams to EPPs; a stream lasts as long as the response of its request.
    epp_streams_inflight: Gauge = "epp_streams_inflight";
    /// Responses by the outcome of the EPP's reply about their head: answered in time, given up, or not waited for.
    epp_head_replies: Family<ByPoolAndReason, Counter> = "epp_head_replies";
    /// Responses whose token counts the EPP was not told, because there was no memory to keep the document.
    epp_bodies_given_up: Family<ByPool, Counter> = "epp_bodies_given_up";
    /// Response bodies of which the copy was dropped that the agent keeps until the EPP has answered, by the limit: the body of
    /// such a response cannot go out without the EPP.
    epp_body_copies_dropped: Family<ByPoolAndReason, Counter> = "epp_body_copies_dropped";
    /// Response bodies for which the EPP failed to answer, by what became of them.
    epp_bodies_unanswered: Family<ByPoolAndReason, Counter> = "epp_bodies_unanswered";
    /// Tokens that responses report, if the EPP's settings ask the agent to read them: gen_ai.client.inference.tokens.
    gen_ai_tokens: Family<ByModel, Counter> = "gen_ai_client_inference_tokens";
    /// Numbers in the dynamic metadata of EPP replies that `metadata.counters` names, added at the end of each request.
    epp_attributes: Family<ByAttribute, Counter<f64, AtomicU64>> = "epp_attributes";
    /// Values of `metadata.counters` that were not added: negative, not finite, or not a number.
    epp_attributes_refused: Family<ByPoolAndReason, Counter> = "epp_attributes_refused";
    /// Values in the dynamic metadata of EPP replies that the access log and the span do not have, by the limit.
    epp_metadata_dropped: Family<ByPoolAndReason, Counter> = "epp_metadata_dropped";
    /// Requests that the EPP evicted while they were being answered.
    evictions: Family<ByPool, Counter> = "evictions";

    /// Connections to endpoints that requests asked for, by their origin.
    endpoint_connections: Family<ByResult, Counter> = "endpoint_connections";
    /// Connections to endpoints and replicas of EPPs that failed because of this machine; they never count against an endpoint.
    local_faults: Family<ByReason, Counter> = "local_faults";
    /// Requests that were retried on another connection or endpoint, because one did not connect, had closed a kept
    /// connection, or closed before it answered.
    endpoint_retries: Family<ByReason, Counter> = "endpoint_retries";
    /// Requests that may have been executed and were not retried although another endpoint was available: the method
    /// does not allow it, or the attempts or the budget were exhausted.
    endpoint_retries_refused: Family<ByPoolAndReason, Counter> = "endpoint_retries_refused";
    /// Requests sent to an endpoint other than the first of their list, by index: 1 is the second.
    fallback_attempts: Family<ByPoolAndIndex, Counter> = "fallback_attempts";
    /// Picks of the EPP whose first endpoint is outside the given subset; they are followed.
    epp_outside_subset: Family<ByPool, Counter> = "epp_outside_subset";

    /// Endpoints of a pool, by their state.
    endpoints: Family<ByPoolAndState, Gauge> = "endpoints";
    /// Whether the latest result of a pool's name or file was usable; if not, the previous endpoints remain.
    endpoint_source_up: Family<BySource, Gauge> = "endpoint_source_up";
    /// Lookups of a name and changes of a file that yielded no endpoints.
    endpoint_source_failures: Family<BySourceAndReason, Counter> = "endpoint_source_failures";
    /// Failed health checks of endpoints.
    endpoint_check_failures: Family<ByPoolAndReason, Counter> = "endpoint_check_failures";
    /// Endpoints ejected from their pool for a time because they failed requests.
    ejections: Family<ByPool, Counter> = "ejections";

    /// Responses, counted once each, by path and reason.
    flows: Family<ByFlow, Counter> = "flows";
    /// Bytes of response bodies, by path.
    body_bytes: Family<ByPath, Counter> = "body_bytes";
    /// Steered flows that the kernel disarmed before the end of their message.
    steer_stops: Family<ByReason, Counter> = "steer_stops";
    /// Flows on path `wire` that another agent began and this one adopted, and that have not ended.
    adopted_flows: Gauge = "adopted_flows";
    /// Adopted flows that have ended, by reason.
    adopted_flows_ended: Family<ByReason, Counter> = "adopted_flows_ended";
    /// Events of the kernel programs lost because the ring buffer was full.
    steer_events_missed: Counter = "steer_events_missed";
    /// Slots of the kernel maps that are not free, of `steering.max_flows`.
    slots_in_use: Gauge = "slots_in_use";
    /// Those of `penstock_slots_in_use` whose connections have closed, and which kernel programs may still use for up to two seconds.
    slots_retired: Gauge = "slots_retired";
    /// Spans that the collector accepted.
    trace_spans_exported: Counter = "trace_spans_exported";
    /// Spans that were lost: the queue was full, the collector did not accept them, or the agent stopped.
    trace_spans_dropped: Family<ByReason, Counter> = "trace_spans_dropped";

    /// Whether a path passed its self-test and is in use.
    steering_path_active: Family<ByPath, Gauge> = "steering_path_active";
    /// Why a path is active or not; always 1.
    steering_path_info: Family<PathState, Gauge> = "steering_path_info";
}

/// gen_ai.server.request.duration, extended below for the agent's own answers and above for long generations.
const REQUEST_SECONDS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    163.84, 327.68, 655.36,
];

/// gen_ai.server.time_to_first_token.
const TTFT_SECONDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

/// gen_ai.server.time_per_output_token.
const CHUNK_SECONDS: [f64; 13] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];

/// From a single exchange to hours.
const PIN_SECONDS: [f64; 10] = [0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0];

/// gen_ai.server.time_per_output_token, extended below for small models on fast machines.
const TOKEN_SECONDS: [f64; 16] =
    [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];

const TOKENS_PER_SECOND: [f64; 14] =
    [1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0];

/// From an EPP on the same machine to one that queues requests.
const EPP_SECONDS: [f64; 19] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Every metric has a row with its type and help, in this order, and every row has a metric.
    #[test]
    fn every_metric_is_documented() {
        let text = include_str!("../../../docs/metrics.md");
        let rows: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("| `penstock_")).collect();
        assert_eq!(rows.len(), DECLARED.len());
        for (row, (name, declared, help)) in rows.iter().zip(DECLARED) {
            let kinds = [("Counter", "_total` | counter"), ("Gauge", "` | gauge"), ("Histogram", "` | histogram")];
            let kind = kinds.iter().find(|(kind, _)| declared.contains(kind)).expect("a type").1;
            assert!(row.starts_with(&format!("{name}{kind} | ")), "{name}: {row}");
            assert!(row.ends_with(&format!(" | {} |", help.trim())), "{name}: {row}");
        }
    }

    /// The labels of a row are those of the exported metric.
    #[test]
    fn documented_labels_are_exported() {
        let text = include_str!("../../../docs/metrics.md");
        let labels = |name: &str| {
            let row = text.lines().find(|line| line.starts_with(&format!("| `{name}` |"))).expect("a row");
            row.split(" | ").nth(2).expect("labels").replace('`', "")
        };
        let mut registry = Registry::with_prefix("penstock");
        let families = Families::register(&mut registry);
        let pool = || super::super::labels::PoolName("p".into());
        families.requests.get_or_create(&ByAnswer { pool: pool(), status: 200, reason: "ok" }).inc();
        families
            .epp_attributes
            .get_or_create(&ByAttribute { pool: pool(), gen_ai_request_model: "m".into(), attribute: "n/k".to_owned() })
            .inc_by(1.0);
        families.flows.get_or_create(&ByFlow { path: "relay", reason: "off" }).inc();
        let mut exported = String::new();
        prometheus_client::encoding::text::encode(&mut exported, &registry).unwrap();
        for name in ["penstock_requests_total", "penstock_epp_attributes_total", "penstock_flows_total"] {
            let line = exported.lines().find(|line| line.starts_with(&format!("{name}{{"))).expect("a sample");
            let names: Vec<_> =
                line[name.len() + 1..].split("\",").map(|pair| pair.split('=').next().unwrap()).collect();
            assert_eq!(names.join(", "), labels(name));
        }
    }
}
