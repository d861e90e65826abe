//! Every metric the agent exports, with its name, its labels and its help. The doc comment is the HELP text.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};

use super::labels::{
    Build, ByAnswer, ByFlow, ByListener, ByModel, ByOutcome, ByPath, ByPool, ByPoolAndIndex, ByPoolAndReason,
    ByPoolAndState, ByReason, ByReplica, ByRequestModel, ByResult, BySource, BySourceAndReason, PathState,
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
                // The registry ends each text with a full stop of its own.
                $(registry.register($name, concat!($($help),+).trim().trim_end_matches('.'), families.$field.clone());)+
                registry.register("build", "The running agent", Info::new(Build { version: env!("CARGO_PKG_VERSION") }));
                families
            }
        }
    };
    (@new) => { Default::default() };
    (@new $buckets:expr) => { Family::new_with_constructor(|| Histogram::new($buckets)) };
}

families! {
    /// Requests answered, whoever wrote the answer; pool is empty where none was reached.
    requests: Family<ByAnswer, Counter> = "requests";
    /// Time from the first byte of a request to the last byte of its answer.
    request_duration: Histograms<ByPool> = "request_duration_seconds" in REQUEST_SECONDS;
    /// Requests that are being read, picked for, forwarded or answered.
    active_requests: Family<ByPool, Gauge> = "active_requests";
    /// Bytes from clients behind a switch of protocols, or to an endpoint that they stay with, by who carried them.
    upstream_bytes: Family<ByPath, Counter> = "upstream_bytes";
    /// How long client connections stayed with an endpoint.
    pin_duration: Histograms<ByPool> = "pin_duration_seconds" in PIN_SECONDS;
    /// Client connections that stay with an endpoint now.
    pinned_connections: Family<ByPool, Gauge> = "pinned_connections";
    /// Client connections that have stayed with an endpoint, by how that ended.
    pins_ended: Family<ByPoolAndReason, Counter> = "pins_ended";
    /// Requests that went where the one before had gone, without a pick.
    leased_requests: Family<ByPool, Counter> = "leased_requests";
    /// Picks of pools with `pick_per` "lease" or "connection" that hold for their request alone, because the EPP changed its fields or
    /// its body.
    picks_not_held: Family<ByPoolAndReason, Counter> = "picks_not_held";
    /// Time from the request's head to the first byte of the response's body.
    ttft: Histograms<ByPool> = "ttft_seconds" in TTFT_SECONDS;
    /// Mean time between the chunks of a streamed response after its first.
    time_per_output_chunk: Histograms<ByPool> = "time_per_output_chunk_seconds" in CHUNK_SECONDS;
    /// Of event streams, whoever carried them: time from the request's head to the first message; gen_ai.server.time_to_first_token.
    gen_ai_ttft: Histograms<ByRequestModel> = "gen_ai_server_time_to_first_token_seconds" in TTFT_SECONDS;
    /// Of event streams, each once: mean time between messages, which are tokens where the server writes each for itself;
    /// gen_ai.server.time_per_output_token.
    gen_ai_tpot: Histograms<ByRequestModel> = "gen_ai_server_time_per_output_token_seconds" in TOKEN_SECONDS;
    /// Of event streams, each once: messages a second behind the first.
    gen_ai_token_rate: Histograms<ByRequestModel> = "gen_ai_server_output_tokens_per_second" in TOKENS_PER_SECOND;
    /// Label values for a model that became `other`, because limits.metric_models names are known already.
    metric_models_overflow: Counter = "metric_models_overflow";

    /// Times the configuration was read again, by what came of it.
    reloads: Family<ByReason, Counter> = "config_reloads";

    /// Client connections that are open.
    client_connections: Gauge = "client_connections";
    /// Client connections that may be open at once (listen.max_connections).
    client_connections_limit: Gauge = "client_connections_limit";
    /// Client connections that were refused at a limit, with 503 where that was possible.
    client_connections_refused: Family<ByReason, Counter> = "client_connections_refused";
    /// Idle client connections that were closed to make room for new ones.
    client_connections_shed: Counter = "client_connections_shed";
    /// Times that a connection could not be accepted because the process had no descriptor or no memory left, by listener.
    accept_failures: Family<ByListener, Counter> = "accept_failures";
    /// TLS handshakes with clients that came to nothing.
    tls_handshakes_failed: Family<ByReason, Counter> = "tls_handshakes_failed";
    /// TLS handshakes with clients that are under way.
    tls_handshakes_active: Gauge = "tls_handshakes_active";
    /// Requests whose client went away before the answer was complete.
    client_aborts: Counter = "client_aborts";
    /// Client connections that were closed because no request came in the keep-alive time.
    client_idle_closes: Counter = "client_idle_closes";
    /// Answers that were broken off because their client took nothing of them in the idle time.
    client_stalls: Counter = "client_stalls";
    /// Client connections that were closed while the client was still sending, by what ended the wait for its end.
    client_lingers_cut: Family<ByReason, Counter> = "client_lingers_cut";
    /// HTTP/2 connections that the agent ended: too many resets, too many control frames, no answer to PING, nothing taken.
    http2_ended: Family<ByReason, Counter> = "http2_connections_ended";

    /// Bytes of memory that request bodies take, those that EPPs put in their place among them; at most limits.total_body_bytes.
    request_body_memory: Gauge = "request_body_memory_bytes";
    /// Bytes of request bodies in temporary files; at most limits.total_spill_bytes.
    request_body_spill: Gauge = "request_body_spill_bytes";
    /// Request bodies that went to a file: because of the body's own limit, or of that of all bodies (total).
    request_bodies_spilled: Family<ByReason, Counter> = "request_bodies_spilled";
    /// Requests refused because there was no room for their body: in files, on the disk, or in memory where nothing else will do.
    request_bodies_refused: Family<ByReason, Counter> = "request_bodies_refused";

    /// JSON bodies that named a model.
    bbr_success: Counter = "bbr_success";
    /// JSON bodies without a model, or with one that is null, an array or an object.
    bbr_body_field_not_found: Counter = "bbr_body_field_not_found";
    /// JSON bodies with an empty model.
    bbr_body_field_empty: Counter = "bbr_body_field_empty";

    /// Time from the opening of the EPP's stream to its decision, or to giving up on it; the upload of the body is part of it.
    epp_exchange: Histograms<ByOutcome> = "epp_exchange_seconds" in EPP_SECONDS;
    /// Exchanges with the EPP that failed, whatever the pool's failure mode made of it.
    epp_failures: Family<ByPoolAndReason, Counter> = "epp_failures";
    /// Endpoints in picks that cannot be used, and are passed over: invalid, or not admitted to the pool.
    epp_endpoints_passed_over: Family<ByPoolAndReason, Counter> = "epp_endpoints_passed_over";
    /// Times that a replica of an EPP stalled: it let a request wait for the decision's whole time, and decided no other meanwhile.
    epp_stalls: Family<ByPool, Counter> = "epp_stalls";
    /// Questions put to the EPP again, on another connection or to another replica, by what became of the one before.
    epp_asked_again: Family<ByPoolAndReason, Counter> = "epp_asked_again";
    /// Replicas of EPPs by what their health checks say of them; always 1.
    epp_replicas: Family<ByReplica, Gauge> = "epp_replicas";
    /// Streams to EPPs that are open; one lives as long as the response of its request.
    epp_streams_inflight: Gauge = "epp_streams_inflight";
    /// Responses by what became of the question about their head: answered in time, given up, or not waited for.
    epp_head_replies: Family<ByPoolAndReason, Counter> = "epp_head_replies";
    /// Responses whose body the EPP was not told to the end, because it did not take it.
    epp_bodies_given_up: Family<ByPool, Counter> = "epp_bodies_given_up";
    /// Tokens that responses say they took, where the EPP's settings have the agent look: gen_ai.client.inference.tokens.
    gen_ai_tokens: Family<ByModel, Counter> = "gen_ai_client_inference_tokens";
    /// Requests that the EPP gave up while they were being answered.
    evictions: Family<ByPool, Counter> = "evictions";

    /// Connections to endpoints that requests asked for, by where they came from.
    endpoint_connections: Family<ByResult, Counter> = "endpoint_connections";
    /// Connections to endpoints that did not come about for a fault of this machine's, which never counts against the endpoint.
    local_faults: Family<ByReason, Counter> = "local_faults";
    /// Requests that went on to another connection or endpoint, because one did not connect, had closed a kept connection, or
    /// closed before it answered.
    endpoint_retries: Family<ByReason, Counter> = "endpoint_retries";
    /// Requests that may have been executed and were not sent again although there was somewhere to send them: the method does
    /// not allow it, or the attempts or the budget were used up.
    endpoint_retries_refused: Family<ByPoolAndReason, Counter> = "endpoint_retries_refused";
    /// Turns of endpoints that were not the first of their list, by place: 1 is the second.
    fallback_attempts: Family<ByPoolAndIndex, Counter> = "fallback_attempts";
    /// Picks of the EPP that begin outside the subset that it was given; they are followed.
    epp_outside_subset: Family<ByPool, Counter> = "epp_outside_subset";

    /// Endpoints of a pool, by their state.
    endpoints: Family<ByPoolAndState, Gauge> = "endpoints";
    /// Whether the last that a pool's name or file gave could be used; if not, what it gave before holds.
    endpoint_source_up: Family<BySource, Gauge> = "endpoint_source_up";
    /// Lookups of a name, and changes of a file, that gave no endpoints.
    endpoint_source_failures: Family<BySourceAndReason, Counter> = "endpoint_source_failures";
    /// Checks of an endpoint's health that found it unwell.
    endpoint_check_failures: Family<ByPoolAndReason, Counter> = "endpoint_check_failures";
    /// Times that an endpoint was taken out of its pool for a while because it failed requests.
    ejections: Family<ByPool, Counter> = "ejections";

    /// Responses, each once, by who carried the body and why.
    flows: Family<ByFlow, Counter> = "flows";
    /// Bytes of response bodies, by who carried them.
    body_bytes: Family<ByPath, Counter> = "body_bytes";
    /// Times the kernel gave a steered flow back before the end of its message.
    steer_stops: Family<ByReason, Counter> = "steer_stops";
    /// Events of the kernel program that found no room in the ring buffer.
    steer_events_missed: Counter = "steer_events_missed";
    /// Endpoint connections that hold a slot of the kernel maps.
    slots_in_use: Gauge = "slots_in_use";
    /// Spans that the collector has taken.
    trace_spans_exported: Counter = "trace_spans_exported";
    /// Spans that were lost: the queue was full, the collector did not take them, or the agent stopped.
    trace_spans_dropped: Family<ByReason, Counter> = "trace_spans_dropped";

    /// Whether a path passed its self-test and is in use.
    steering_path_active: Family<ByPath, Gauge> = "steering_path_active";
    /// Why a path is active or not; always 1.
    steering_path_info: Family<PathState, Gauge> = "steering_path_info";
}

/// gen_ai.server.request.duration, with room below for the agent's own answers and above for long generations.
const REQUEST_SECONDS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    163.84, 327.68, 655.36,
];

/// gen_ai.server.time_to_first_token.
const TTFT_SECONDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

/// gen_ai.server.time_per_output_token.
const CHUNK_SECONDS: [f64; 13] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];

/// From one exchange to hours.
const PIN_SECONDS: [f64; 10] = [0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0];

/// The same, with room below for small models on fast machines.
const TOKEN_SECONDS: [f64; 16] =
    [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];

const TOKENS_PER_SECOND: [f64; 14] =
    [1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0];

/// From an EPP on the same machine to one that queues requests.
const EPP_SECONDS: [f64; 19] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0,
];
