//! Ends the record of a routed request: writes its line in the access log, ends its span, and adds the numbers in the metadata of
//! the EPP's replies to the counters. Dropping a [`Last`] does this. An EPP's stream drops it after the last reply.

use std::{sync::Arc, time::Duration};

use http::request;
use tracing::field::display;

use super::{
    access_log::Line,
    record::{Record, model},
};
use crate::{
    metrics::PoolMetrics,
    picker::metadata::{Collected, CountedValue, SharedMetadata},
    shared::Shared,
    telemetry::EndedRequest,
    text::{self, cut},
};

pub(super) struct Last {
    pub(super) record: Record,
    pub(super) metadata: Option<SharedMetadata>,
    pub(super) shared: Arc<Shared>,
    pub(super) pool: usize,
    pub(super) parts: request::Parts,
    /// How long the request took.
    pub(super) took: Duration,
    /// The text of the error that the agent answered with.
    pub(super) error: Option<String>,
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
        self.log(metadata.as_deref());
        let (Some(span), record) = (span, &self.record) else { return };
        span.end(&EndedRequest {
            took: self.took,
            status: record.status.as_u16(),
            reason: record.reason,
            detail: record.detail.as_deref(),
            refused: self.error.is_some(),
            broken: record.broken,
            pool: &self.shared.config.pools[self.pool].name,
            endpoint: record.endpoint,
            model: model(&self.parts, &self.shared.config),
            carried_by: record.path,
            carried_why: record.path_reason,
            first_byte: (record.account.first_ns > 0).then(|| record.first_byte()),
            metadata: metadata.as_deref(),
        });
    }
}

impl Last {
    fn log(&self, metadata: Option<&Collected>) {
        let (record, parts) = (&self.record, &self.parts);
        let request_id = parts.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        let account = &record.account;
        let up = account.upstream > 0;
        Line {
            client: Some(display(record.client)),
            request_id: Some(&cut(request_id, text::NAME)),
            method: Some(display(&cut(parts.method.as_str(), text::NAME))),
            path: Some(&cut(parts.uri.path(), text::PHRASE)),
            pool: Some(&self.shared.config.pools[self.pool].name),
            status: Some(record.status.as_u16()),
            reason: Some(record.reason),
            reason_detail: record.detail.as_deref(),
            endpoint: Some(&record.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default()),
            carried_by: Some(record.path),
            carried_why: Some(record.path_reason),
            bytes_kernel: Some(account.steered + account.local + account.wire),
            bytes_user: Some(account.relayed),
            bytes_up: up.then_some(account.upstream),
            bytes_up_kernel: up.then_some(account.upstream_steered),
            pick_us: Some(record.picked_in.as_micros() as u64),
            ttft_us: Some(record.first_byte().as_micros() as u64),
            took_us: Some(self.took.as_micros() as u64),
            metadata: metadata.and_then(Collected::json).as_deref(),
            error: self.error.as_deref(),
            ..Line::default()
        }
        .write();
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
