//! The metrics of one pool. Handles that every request uses are looked up once.

use std::{
    fmt::Display,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram};

use crate::endpoint::set::EndpointSource;

use super::{
    InFlightGauge, OK,
    families::Families,
    labels::{
        ByAnswer, ByAttribute, ByModel, ByOutcome, ByPool, ByPoolAndIndex, ByPoolAndReason, ByPoolAndState, ByReason,
        ByReplica, ByRequestModel, BySource, BySourceAndReason, EndpointState, EppOutcome, PoolName,
    },
    models::Models,
};

/// Timing of an event stream whose messages were not parsed.
#[derive(Debug, Clone, Copy)]
pub struct Streamed {
    /// From the request head to the first message.
    pub first: Duration,
    /// From the first message to the last.
    pub rest: Duration,
    /// Pieces written by user space plus segments redirected by the kernel.
    pub messages: u64,
}

impl Streamed {
    /// Mean seconds between messages; None for a single message.
    fn between(&self) -> Option<f64> {
        (self.messages > 1 && !self.rest.is_zero()).then(|| self.rest.as_secs_f64() / (self.messages - 1) as f64)
    }
}

/// Counts connections to the replicas of one EPP.
#[derive(Debug, Default)]
pub struct EppConnections {
    open: Gauge,
    opened: Counter,
    local_faults: Family<ByReason, Counter>,
}

impl EppConnections {
    /// Counts a connection as open until the guard is dropped.
    pub fn opened(&self) -> InFlightGauge {
        self.opened.inc();
        InFlightGauge::new(&self.open)
    }

    /// Counts a connection that failed because of this machine.
    pub fn local_fault(&self, reason: &'static str) {
        self.local_faults.get_or_create(&ByReason { reason }).inc();
    }
}

#[derive(Debug)]
pub struct PoolMetrics {
    name: PoolName,
    families: Arc<Families>,
    answered_ok: Counter,
    request_duration: Histogram,
    active_requests: Gauge,
    ttft: Histogram,
    time_per_output_chunk: Histogram,
    evictions: Counter,
    ejections: Counter,
    /// By [`EppOutcome`]; created on first use, because a pool may have no EPP and a histogram takes twenty lines.
    epp_exchange: [OnceLock<Histogram>; EppOutcome::ALL.len()],
    models: Arc<Models>,
}

impl PoolMetrics {
    pub(super) fn new(name: &str, families: &Arc<Families>, models: &Arc<Models>) -> Self {
        let name = PoolName(name.into());
        let pool = ByPool { pool: name.clone() };
        Self {
            answered_ok: families.requests.get_or_create_owned(&ByAnswer {
                pool: name.clone(),
                status: 200,
                reason: OK,
            }),
            request_duration: families.request_duration.get_or_create_owned(&pool),
            active_requests: families.active_requests.get_or_create_owned(&pool),
            ttft: families.ttft.get_or_create_owned(&pool),
            time_per_output_chunk: families.time_per_output_chunk.get_or_create_owned(&pool),
            evictions: families.evictions.get_or_create_owned(&pool),
            ejections: families.ejections.get_or_create_owned(&pool),
            epp_exchange: Default::default(),
            models: Arc::clone(models),
            families: Arc::clone(families),
            name,
        }
    }

    /// Counts a request answered with `status`; `reason` is [`OK`] or the label of the error.
    pub fn request(&self, status: u16, reason: &'static str, took: Duration) {
        if status == 200 && reason == OK {
            self.answered_ok.inc();
        } else {
            let answer = ByAnswer { pool: self.name.clone(), status, reason };
            self.families.requests.get_or_create(&answer).inc();
        }
        self.request_duration.observe(took.as_secs_f64());
    }

    /// Counts a request as active until the guard is dropped.
    pub fn active_request(&self) -> InFlightGauge {
        InFlightGauge::new(&self.active_requests)
    }

    /// Counts a client connection as pinned until the guard is dropped.
    pub fn pinned_connection(&self) -> InFlightGauge {
        InFlightGauge::new(&self.families.pinned_connections.get_or_create_owned(&ByPool { pool: self.name.clone() }))
    }

    /// Counts the end of a pin.
    pub fn pin_ended(&self, reason: &'static str, took: Duration) {
        let pool = ByPool { pool: self.name.clone() };
        self.families.pin_duration.get_or_create(&pool).observe(took.as_secs_f64());
        self.families.pins_ended.get_or_create(&self.and_reason(reason)).inc();
    }

    /// Counts a request sent under a lease.
    pub fn leased(&self) {
        self.families.leased_requests.get_or_create(&ByPool { pool: self.name.clone() }).inc();
    }

    /// Counts a pick that applies to a single request although the pool's picks normally apply to more.
    pub fn pick_not_held(&self, reason: &'static str) {
        self.families.picks_not_held.get_or_create(&self.and_reason(reason)).inc();
    }

    /// Records the time from the request head to the first byte of the response body.
    pub fn time_to_first_token(&self, time: Duration) {
        self.ttft.observe(time.as_secs_f64());
    }

    /// Records the mean over one response, without its first chunk.
    pub fn time_per_output_chunk(&self, time: Duration) {
        self.time_per_output_chunk.observe(time.as_secs_f64());
    }

    /// Records an event stream.
    pub fn streamed(&self, model: &str, stream: &Streamed) {
        let labels = ByRequestModel { pool: self.name.clone(), gen_ai_request_model: self.models.bounded(model) };
        self.families.gen_ai_ttft.get_or_create(&labels).observe(stream.first.as_secs_f64());
        if let Some(between) = stream.between() {
            self.families.gen_ai_tpot.get_or_create(&labels).observe(between);
            self.families.gen_ai_token_rate.get_or_create(&labels).observe(1.0 / between);
        }
    }

    /// Records the outcome of an exchange with the EPP.
    pub fn epp_exchange(&self, outcome: EppOutcome, took: Duration) {
        let histogram = self.epp_exchange[outcome as usize].get_or_init(|| {
            self.families.epp_exchange.get_or_create_owned(&ByOutcome { pool: self.name.clone(), outcome })
        });
        histogram.observe(took.as_secs_f64());
    }

    /// Counts endpoints in a pick that cannot be used.
    pub fn epp_passed_over(&self, reason: &'static str, endpoints: usize) {
        if endpoints > 0 {
            self.families.epp_endpoints_passed_over.get_or_create(&self.and_reason(reason)).inc_by(endpoints as u64);
        }
    }

    /// Counts a stall of an EPP replica: it decided nothing during a request's whole time limit.
    pub fn epp_stalled(&self) {
        self.families.epp_stalls.get_or_create(&ByPool { pool: self.name.clone() }).inc();
    }

    /// Counts a failed exchange with the EPP.
    pub fn epp_failed(&self, reason: &'static str) {
        self.families.epp_failures.get_or_create(&ByPoolAndReason { pool: self.name.clone(), reason }).inc();
    }

    /// Counts a repeated attempt to ask the EPP about a request.
    pub fn epp_asked_again(&self, reason: &'static str) {
        self.families.epp_asked_again.get_or_create(&ByPoolAndReason { pool: self.name.clone(), reason }).inc();
    }

    /// Counts a request with a long body in a pool whose EPP gets abridged bodies, by what became of the body.
    pub fn epp_abridged(&self, outcome: &'static str) {
        self.families.epp_long_bodies.get_or_create(&self.and_reason(outcome)).inc();
    }

    /// Counts a request as waiting for a replica of its EPP until the guard is dropped.
    pub fn epp_waiting(&self) -> InFlightGauge {
        InFlightGauge::new(&self.families.epp_waiting.get_or_create_owned(&ByPool { pool: self.name.clone() }))
    }

    /// Counts a request that had to wait for a replica, by the outcome.
    pub fn epp_waited(&self, outcome: &'static str) {
        self.families.epp_waits.get_or_create(&self.and_reason(outcome)).inc();
    }

    /// Counts a request about which the EPP was asked once more, because no picked endpoint took it, by the outcome.
    pub fn epp_repicked(&self, outcome: &'static str) {
        self.families.epp_repicks.get_or_create(&self.and_reason(outcome)).inc();
    }

    /// Counts the connections to the replicas of the pool's EPP.
    pub fn epp_connections(&self) -> EppConnections {
        let pool = ByPool { pool: self.name.clone() };
        EppConnections {
            open: self.families.epp_connections.get_or_create_owned(&pool),
            opened: self.families.epp_connections_opened.get_or_create_owned(&pool),
            local_faults: self.families.local_faults.clone(),
        }
    }

    /// Changes the state of an EPP replica; None before it appears and after it is gone.
    pub fn epp_replica(&self, replica: &impl Display, before: Option<&'static str>, now: Option<&'static str>) {
        let labels = |state| ByReplica { pool: self.name.clone(), replica: replica.to_string(), state };
        if let Some(before) = before {
            self.families.epp_replicas.remove(&labels(before));
        }
        if let Some(now) = now {
            self.families.epp_replicas.get_or_create(&labels(now)).set(1);
        }
    }

    /// Counts the outcome of the EPP's reply about a response head.
    pub fn epp_head_reply(&self, reply: &'static str) {
        let labels = ByPoolAndReason { pool: self.name.clone(), reason: reply };
        self.families.epp_head_replies.get_or_create(&labels).inc();
    }

    /// Counts a document for which there was no memory.
    pub fn epp_body_given_up(&self) {
        self.families.epp_bodies_given_up.get_or_create(&ByPool { pool: self.name.clone() }).inc();
    }

    /// Counts a response body whose copy was dropped.
    pub fn epp_body_copy_dropped(&self, reason: &'static str) {
        self.families.epp_body_copies_dropped.get_or_create(&self.and_reason(reason)).inc();
    }

    /// Counts a response body for which the EPP failed to answer: `continued` without it, or `broken_off`.
    pub fn epp_body_unanswered(&self, outcome: &'static str) {
        self.families.epp_bodies_unanswered.get_or_create(&self.and_reason(outcome)).inc();
    }

    /// Adds the tokens that a response reports.
    pub fn tokens(&self, model: &str, input: u64, output: u64) {
        let model = self.models.bounded(model);
        for (kind, tokens) in [("input", input), ("output", output)] {
            let labels =
                ByModel { pool: self.name.clone(), gen_ai_response_model: Arc::clone(&model), gen_ai_token_type: kind };
            self.families.gen_ai_tokens.get_or_create(&labels).inc_by(tokens);
        }
    }

    /// Adds a number that the EPP attributes to a request. It must be finite and not negative.
    pub fn epp_attribute(&self, model: &str, attribute: String, number: f64) {
        let model = self.models.bounded(model);
        let labels = ByAttribute { pool: self.name.clone(), gen_ai_request_model: model, attribute };
        self.families.epp_attributes.get_or_create(&labels).inc_by(number);
    }

    /// Counts an attribute that cannot be added.
    pub fn epp_attribute_refused(&self, reason: &'static str) {
        self.families.epp_attributes_refused.get_or_create(&self.and_reason(reason)).inc();
    }

    /// Counts values of an EPP's metadata that were dropped.
    pub fn epp_metadata_dropped(&self, reason: &'static str, values: u64) {
        if values > 0 {
            self.families.epp_metadata_dropped.get_or_create(&self.and_reason(reason)).inc_by(values);
        }
    }

    /// Counts a request that the EPP evicted while it was being answered.
    pub fn evicted(&self) {
        self.evictions.inc();
    }

    /// Counts an ejection.
    pub fn ejected(&self) {
        self.ejections.inc();
    }

    /// Counts a request sent to the endpoint at this index of its list; index 0 is not counted.
    pub fn fallback_attempt(&self, index: usize) {
        const PLACES: [&str; 8] = ["1", "2", "3", "4", "5", "6", "7", "8+"];
        if let Some(index) = index.checked_sub(1) {
            let labels = ByPoolAndIndex { pool: self.name.clone(), index: PLACES[index.min(PLACES.len() - 1)] };
            self.families.fallback_attempts.get_or_create(&labels).inc();
        }
    }

    /// Counts a request that was not retried.
    pub fn retry_refused(&self, reason: &'static str) {
        self.families.endpoint_retries_refused.get_or_create(&self.and_reason(reason)).inc();
    }

    /// Counts a pick outside the subset that the EPP was given.
    pub fn epp_outside_subset(&self) {
        self.families.epp_outside_subset.get_or_create(&ByPool { pool: self.name.clone() }).inc();
    }

    /// Sets whether the latest result of an endpoint source was usable.
    pub fn source_up(&self, source: &'static str, up: bool) {
        let labels = BySource { pool: self.name.clone(), source };
        self.families.endpoint_source_up.get_or_create(&labels).set(up.into());
    }

    /// Counts a result of an endpoint source without usable endpoints.
    pub fn source_failed(&self, source: &'static str, reason: &'static str) {
        let labels = BySourceAndReason { pool: self.name.clone(), source, reason };
        self.families.endpoint_source_failures.get_or_create(&labels).inc();
    }

    /// Counts a failed health check.
    pub fn check_failed(&self, reason: &'static str) {
        self.families.endpoint_check_failures.get_or_create(&self.and_reason(reason)).inc();
    }

    /// Sets the number of endpoints by [`EndpointState`].
    pub(super) fn set_endpoints(&self, counts: [usize; EndpointState::ALL.len()]) {
        for (state, count) in EndpointState::ALL.into_iter().zip(counts) {
            let labels = ByPoolAndState { pool: self.name.clone(), state };
            self.families.endpoints.get_or_create(&labels).set(count.try_into().unwrap_or(i64::MAX));
        }
    }

    /// Removes the series that say how endpoints and their sources are. Counters stay.
    pub(super) fn forget_states(&self) {
        for source in EndpointSource::ALL {
            self.families.endpoint_source_up.remove(&BySource { pool: self.name.clone(), source: source.name() });
        }
        for state in EndpointState::ALL {
            self.families.endpoints.remove(&ByPoolAndState { pool: self.name.clone(), state });
        }
    }

    fn and_reason(&self, reason: &'static str) -> ByPoolAndReason {
        ByPoolAndReason { pool: self.name.clone(), reason }
    }
}
