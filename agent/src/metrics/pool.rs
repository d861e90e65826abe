//! The metrics of one pool, looked up once: what every request touches is a handle, not a search.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

use super::{
    InFlight, OK,
    families::Families,
    labels::{
        ByAnswer, ByModel, ByOutcome, ByPool, ByPoolAndIndex, ByPoolAndReason, ByPoolAndState, ByReplica,
        ByRequestModel, BySource, BySourceAndReason, EndpointState, EppOutcome, PoolName,
    },
    models::Models,
};

/// What is known of an event stream whose messages nobody has looked into.
#[derive(Debug, Clone, Copy)]
pub struct Streamed {
    /// From the request's head to the first message.
    pub first: Duration,
    /// From there to the last one.
    pub rest: Duration,
    /// Pieces that user space wrote, and segments that the kernel redirected.
    pub messages: u64,
}

impl Streamed {
    /// Mean seconds between messages, where there are several.
    fn between(&self) -> Option<f64> {
        (self.messages > 1 && !self.rest.is_zero()).then(|| self.rest.as_secs_f64() / (self.messages - 1) as f64)
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
    /// By [`EppOutcome`]; filled on first use, because a pool may have no EPP and a histogram is twenty lines.
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

    /// A request answered with `status`; `reason` is [`OK`] or the label of the error.
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
    pub fn active_request(&self) -> InFlight {
        InFlight::new(&self.active_requests)
    }

    /// Counts a client's connection as pinned until the guard is dropped.
    pub fn pinned_connection(&self) -> InFlight {
        InFlight::new(&self.families.pinned_connections.get_or_create_owned(&ByPool { pool: self.name.clone() }))
    }

    /// A pinned connection is no longer.
    pub fn pin_ended(&self, reason: &'static str, took: Duration) {
        let pool = ByPool { pool: self.name.clone() };
        self.families.pin_duration.get_or_create(&pool).observe(took.as_secs_f64());
        self.families.pins_ended.get_or_create(&self.and_reason(reason)).inc();
    }

    /// A request goes where the one before has gone.
    pub fn leased(&self) {
        self.families.leased_requests.get_or_create(&ByPool { pool: self.name.clone() }).inc();
    }

    /// A pick is for its request alone although the pool's picks hold for more.
    pub fn pick_not_held(&self, reason: &'static str) {
        self.families.picks_not_held.get_or_create(&self.and_reason(reason)).inc();
    }

    /// From the request's head to the first byte of the response's body.
    pub fn time_to_first_token(&self, time: Duration) {
        self.ttft.observe(time.as_secs_f64());
    }

    /// Mean over one response, its first chunk left out.
    pub fn time_per_output_chunk(&self, time: Duration) {
        self.time_per_output_chunk.observe(time.as_secs_f64());
    }

    /// An event stream was carried.
    pub fn streamed(&self, model: &str, stream: &Streamed) {
        let labels = ByRequestModel { pool: self.name.clone(), gen_ai_request_model: self.models.bounded(model) };
        self.families.gen_ai_ttft.get_or_create(&labels).observe(stream.first.as_secs_f64());
        if let Some(between) = stream.between() {
            self.families.gen_ai_tpot.get_or_create(&labels).observe(between);
            self.families.gen_ai_token_rate.get_or_create(&labels).observe(1.0 / between);
        }
    }

    /// An exchange with the EPP came to its decision.
    pub fn epp_exchange(&self, outcome: EppOutcome, took: Duration) {
        let histogram = self.epp_exchange[outcome as usize].get_or_init(|| {
            self.families.epp_exchange.get_or_create_owned(&ByOutcome { pool: self.name.clone(), outcome })
        });
        histogram.observe(took.as_secs_f64());
    }

    /// The EPP named so many endpoints that cannot be used.
    pub fn epp_passed_over(&self, reason: &'static str, endpoints: usize) {
        if endpoints > 0 {
            self.families.epp_endpoints_passed_over.get_or_create(&self.and_reason(reason)).inc_by(endpoints as u64);
        }
    }

    /// A replica of the EPP let a request wait in vain, and decided no other meanwhile.
    pub fn epp_stalled(&self) {
        self.families.epp_stalls.get_or_create(&ByPool { pool: self.name.clone() }).inc();
    }

    /// An exchange with the EPP failed.
    pub fn epp_failed(&self, reason: &'static str) {
        self.families.epp_failures.get_or_create(&ByPoolAndReason { pool: self.name.clone(), reason }).inc();
    }

    /// The EPP is asked again about a request.
    pub fn epp_asked_again(&self, reason: &'static str) {
        self.families.epp_asked_again.get_or_create(&ByPoolAndReason { pool: self.name.clone(), reason }).inc();
    }

    /// A replica of the EPP was in one state, or not there, and is now in another, or gone.
    pub fn epp_replica(&self, replica: SocketAddr, before: Option<&'static str>, now: Option<&'static str>) {
        let labels = |state| ByReplica { pool: self.name.clone(), replica: replica.to_string(), state };
        if let Some(before) = before {
            self.families.epp_replicas.remove(&labels(before));
        }
        if let Some(now) = now {
            self.families.epp_replicas.get_or_create(&labels(now)).set(1);
        }
    }

    /// What became of the question about a response's head.
    pub fn epp_head_reply(&self, reply: &'static str) {
        let labels = ByPoolAndReason { pool: self.name.clone(), reason: reply };
        self.families.epp_head_replies.get_or_create(&labels).inc();
    }

    /// The EPP did not take a response's body, and is told no more of it.
    pub fn epp_body_given_up(&self) {
        self.families.epp_bodies_given_up.get_or_create(&ByPool { pool: self.name.clone() }).inc();
    }

    /// The tokens that a response took.
    pub fn tokens(&self, model: &str, input: u64, output: u64) {
        let model = self.models.bounded(model);
        for (kind, tokens) in [("input", input), ("output", output)] {
            let labels =
                ByModel { pool: self.name.clone(), gen_ai_response_model: Arc::clone(&model), gen_ai_token_type: kind };
            self.families.gen_ai_tokens.get_or_create(&labels).inc_by(tokens);
        }
    }

    /// The EPP gave up a request that was being answered.
    pub fn evicted(&self) {
        self.evictions.inc();
    }

    /// An endpoint was taken out for a while.
    pub fn ejected(&self) {
        self.ejections.inc();
    }

    /// A request goes to the endpoint at this place of its list, counted from 0, which is not counted here.
    pub fn fallback_attempt(&self, index: usize) {
        const PLACES: [&str; 8] = ["1", "2", "3", "4", "5", "6", "7", "8+"];
        if let Some(index) = index.checked_sub(1) {
            let labels = ByPoolAndIndex { pool: self.name.clone(), index: PLACES[index.min(PLACES.len() - 1)] };
            self.families.fallback_attempts.get_or_create(&labels).inc();
        }
    }

    /// A request is not sent again.
    pub fn retry_refused(&self, reason: &'static str) {
        self.families.endpoint_retries_refused.get_or_create(&self.and_reason(reason)).inc();
    }

    /// The EPP named an endpoint that it was not to choose from.
    pub fn epp_outside_subset(&self) {
        self.families.epp_outside_subset.get_or_create(&ByPool { pool: self.name.clone() }).inc();
    }

    /// What a source of endpoints gave can be used, or not.
    pub fn source_up(&self, source: &'static str, up: bool) {
        let labels = BySource { pool: self.name.clone(), source };
        self.families.endpoint_source_up.get_or_create(&labels).set(up.into());
    }

    /// A source of endpoints gave none that can be used.
    pub fn source_failed(&self, source: &'static str, reason: &'static str) {
        let labels = BySourceAndReason { pool: self.name.clone(), source, reason };
        self.families.endpoint_source_failures.get_or_create(&labels).inc();
    }

    /// A check found an endpoint unwell.
    pub fn check_failed(&self, reason: &'static str) {
        self.families.endpoint_check_failures.get_or_create(&self.and_reason(reason)).inc();
    }

    /// How many endpoints there are, by [`EndpointState`].
    pub(super) fn set_endpoints(&self, counts: [usize; EndpointState::ALL.len()]) {
        for (state, count) in EndpointState::ALL.into_iter().zip(counts) {
            let labels = ByPoolAndState { pool: self.name.clone(), state };
            self.families.endpoints.get_or_create(&labels).set(count.try_into().unwrap_or(i64::MAX));
        }
    }

    pub(super) fn forget_endpoints(&self) {
        for state in EndpointState::ALL {
            self.families.endpoints.remove(&ByPoolAndState { pool: self.name.clone(), state });
        }
    }

    fn and_reason(&self, reason: &'static str) -> ByPoolAndReason {
        ByPoolAndReason { pool: self.name.clone(), reason }
    }
}
