//! The metrics of one pool, looked up once: what every request touches is a handle, not a search.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

use super::{
    InFlight, OK,
    families::Families,
    labels::{ByAnswer, ByOutcome, ByPool, ByPoolAndReason, EppOutcome, PoolName},
};

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
}

impl PoolMetrics {
    pub(super) fn new(name: &str, families: &Arc<Families>) -> Self {
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

    /// From the request's head to the first byte of the response's body.
    pub fn time_to_first_token(&self, time: Duration) {
        self.ttft.observe(time.as_secs_f64());
    }

    /// Mean over one response, its first chunk left out.
    pub fn time_per_output_chunk(&self, time: Duration) {
        self.time_per_output_chunk.observe(time.as_secs_f64());
    }

    /// An exchange with the EPP came to its decision.
    pub fn epp_exchange(&self, outcome: EppOutcome, took: Duration) {
        let histogram = self.epp_exchange[outcome as usize].get_or_init(|| {
            self.families.epp_exchange.get_or_create_owned(&ByOutcome { pool: self.name.clone(), outcome })
        });
        histogram.observe(took.as_secs_f64());
    }

    /// An exchange with the EPP failed.
    pub fn epp_failed(&self, reason: &'static str) {
        self.families.epp_failures.get_or_create(&ByPoolAndReason { pool: self.name.clone(), reason }).inc();
    }

    /// The EPP gave up a request that was being answered.
    pub fn evicted(&self) {
        self.evictions.inc();
    }

    /// An endpoint was taken out for a while.
    pub fn ejected(&self) {
        self.ejections.inc();
    }
}
