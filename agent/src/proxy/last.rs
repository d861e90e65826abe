//! Ends the record of a request: counts it, has its line in the access log written and ends its span.
//!
//! The line, the span and the counters from the EPP's metadata wait for the EPP's last reply, which may come after the response:
//! dropping a [`Last`] writes them, and an EPP's stream drops it after that reply.

use std::{sync::Arc, time::Duration};

use http::{StatusCode, request};

use super::{access_log, record::Record};
use crate::{
    config::Config,
    error::Error,
    metrics::{PoolMetrics, Streamed},
    picker::metadata::{Collected, CountedValue, SharedMetadata},
    shared::Shared,
    telemetry::EndedRequest,
    text::{self, cut},
    worker::Worker,
};

impl Record {
    /// Records a request that was routed. `error` is the reason if the agent answered it or aborted it.
    pub(super) fn finish(mut self, worker: &Worker, pool: usize, parts: request::Parts, error: Option<&Error>) {
        if let Some(error) = error {
            (self.status, self.reason) = (error.status(), error.reason());
        }
        let took = self.started.elapsed();
        worker.shared.metrics.pool(pool).request(self.status.as_u16(), self.reason, took);
        if matches!(self.reason, "client_gone") {
            worker.shared.metrics.client_aborted();
        }
        let model = model(&parts, &worker.shared.config);
        if self.event_stream && self.status.is_success() && self.account.first_ns > 0 {
            let rest = self.account.last_ns.saturating_sub(self.account.first_ns);
            let messages = self.account.pieces + self.account.segments;
            let stream = Streamed { first: self.first_byte(), rest: Duration::from_nanos(rest), messages };
            worker.shared.metrics.pool(pool).streamed(model.unwrap_or_default(), &stream);
        }
        let (metadata, ending) = (self.metadata.take(), self.ending.take());
        let shared = Arc::clone(&worker.shared);
        let last = Last { record: self, metadata, shared, pool, parts, took, error: error.map(logged) };
        match ending {
            Some(ending) => ending.hold(last),
            None => drop(last),
        }
    }

    /// Writes the record of a request that failed before it was routed to a pool.
    pub(super) fn finish_unrouted(self, worker: &Worker, error: &Error) {
        let took = self.started.elapsed();
        if matches!(error, Error::ClientGone) {
            worker.shared.metrics.client_aborted();
        }
        worker.shared.metrics.unrouted().request(error.status().as_u16(), error.reason(), took);
        if let Some(span) = self.span {
            span.end(&EndedRequest {
                took,
                status: error.status().as_u16(),
                reason: error.reason(),
                detail: None,
                refused: true,
                broken: false,
                pool: "",
                endpoint: None,
                model: None,
                carried_by: self.path,
                carried_why: self.path_reason,
                first_byte: None,
                metadata: None,
            });
        }
        if !matches!(error, Error::ClientGone) {
            let (status, reason) = (error.status(), error.reason());
            access_log::unrouted(self.client, status, reason, Some(&logged(error)), took);
        }
    }

    /// Writes the record of a CORS preflight that the agent answered.
    pub(super) fn finish_preflight(self, worker: &Worker, status: StatusCode) {
        const REASON: &str = "cors_preflight";
        let took = self.started.elapsed();
        worker.shared.metrics.unrouted().request(status.as_u16(), REASON, took);
        access_log::unrouted(self.client, status, REASON, None, took);
    }
}

/// The model that the request names.
fn model<'p>(parts: &'p request::Parts, config: &Config) -> Option<&'p str> {
    parts.headers.get(&config.bbr.header).and_then(|model| std::str::from_utf8(model.as_bytes()).ok())
}

/// The error's text, cut, because it may quote input from a client, an endpoint or an EPP.
fn logged(error: &Error) -> String {
    cut(&error.to_string(), text::PHRASE).into_owned()
}

/// A routed request whose line and span are still to be written.
struct Last {
    record: Record,
    metadata: Option<SharedMetadata>,
    shared: Arc<Shared>,
    pool: usize,
    parts: request::Parts,
    /// How long the request took.
    took: Duration,
    /// The text of the error that the agent answered with.
    error: Option<String>,
}

impl Drop for Last {
    fn drop(&mut self) {
        let span = self.record.span.take();
        let metadata = self.metadata.take();
        let metadata = metadata.as_ref().map(|metadata| metadata.lock());
        if let Some(metadata) = metadata.as_deref() {
            let model = model(&self.parts, &self.shared.config).unwrap_or_default();
            count(metadata, self.shared.metrics.pool(self.pool), model);
        }
        let pool = &self.shared.config.pools[self.pool].name;
        access_log::routed(&self.record, &self.parts, pool, self.took, metadata.as_deref(), self.error.as_deref());
        let (Some(span), record) = (span, &self.record) else { return };
        span.end(&EndedRequest {
            took: self.took,
            status: record.status.as_u16(),
            reason: record.reason,
            detail: record.detail.as_deref(),
            refused: self.error.is_some(),
            broken: record.broken,
            pool,
            endpoint: record.endpoint,
            model: model(&self.parts, &self.shared.config),
            carried_by: record.path,
            carried_why: record.path_reason,
            first_byte: (record.account.first_ns > 0).then(|| record.first_byte()),
            metadata: metadata.as_deref(),
        });
    }
}

/// Adds the numbers of a request that are counted, and what was dropped of its metadata, to the metrics.
fn count(metadata: &Collected, metrics: &PoolMetrics, model: &str) {
    for (attribute, number) in metadata.numbers() {
        match number {
            CountedValue::Valid(number) => metrics.epp_attribute(model, attribute, number),
            CountedValue::Negative => metrics.epp_attribute_refused("negative"),
            CountedValue::NotFinite => metrics.epp_attribute_refused("not_finite"),
            CountedValue::Absent => metrics.epp_attribute_refused("not_a_number"),
        }
    }
    let dropped = metadata.dropped();
    for (reason, values) in [
        ("bytes", dropped.bytes),
        ("depth", dropped.depth),
        ("entries", dropped.entries),
        ("no_namespace", dropped.form),
    ] {
        metrics.epp_metadata_dropped(reason, values);
    }
}
