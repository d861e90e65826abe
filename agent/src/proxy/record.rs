//! Records a request: metrics, one line in the access log (target `penstock::access`) and, if tracing is enabled, a span.

use std::{net::SocketAddr, time::Duration};

use http::{StatusCode, request};
use penstock_common::{path::Path, slot::stop};
use tokio::time::Instant;
use tracing::field::display;

use super::{access_log::Line, picked::PickOutcome};
use crate::{
    config::Picker,
    error::Error,
    http::{headers::Arrival, trace_context},
    kernel::socket::monotonic_ns,
    metrics::{Metrics, Streamed},
    picker::client::PickStream,
    steer::{account::Account, reason::SteerReason},
    telemetry::{Ended, Pick, RequestSpan},
    text::{self, cut},
    worker::Worker,
};

pub(super) struct Record {
    /// When the first byte of the request arrived.
    started: Instant,
    started_ns: u64,
    status: StatusCode,
    reason: &'static str,
    broken: bool,
    picked_in: Duration,
    endpoint: Option<SocketAddr>,
    path: &'static str,
    path_reason: &'static str,
    event_stream: bool,
    account: Account,
    span: Option<Box<RequestSpan>>,
}

impl Record {
    /// A record of a request whose first byte arrived at `started`.
    pub(super) fn new(started: Instant) -> Self {
        Self {
            started,
            started_ns: monotonic_ns().saturating_sub(started.elapsed().as_nanos() as u64),
            status: StatusCode::INTERNAL_SERVER_ERROR,
            reason: "none",
            broken: false,
            picked_in: Duration::ZERO,
            endpoint: None,
            path: "none",
            path_reason: "none",
            event_stream: false,
            account: Account::default(),
            span: None,
        }
    }

    /// Continues the client's trace. Starts a span if tracing is enabled.
    pub(super) fn trace(&mut self, worker: &Worker, parts: &mut request::Parts, arrival: &Arrival) {
        let caller = trace_context::received(&mut parts.headers);
        let telemetry = worker.shared.telemetry.as_ref();
        self.span = telemetry.map(|telemetry| Box::new(telemetry.request(parts, arrival, caller, self.started)));
    }

    /// Records the result of the pick that began at `began` in the span.
    pub(super) fn pick(&self, worker: &Worker, pool: usize, began: Instant, outcome: &Result<PickOutcome, Error>) {
        let Some(span) = &self.span else { return };
        let stream = if let Ok(PickOutcome::Forward(picked)) = outcome { picked.stream.as_ref() } else { None };
        let epp = match &worker.shared.config.pools[pool].picker {
            // The EPP that was asked. If several failed, the first one configured is named.
            Picker::Epp(epp) => stream.map(PickStream::authority).or(epp.addresses.first().map(String::as_str)),
            Picker::Builtin => None,
        };
        let (by, endpoints, error) = match outcome {
            Ok(PickOutcome::Forward(picked)) if epp.is_some() && picked.stream.is_none() => {
                ("fail_open", picked.endpoints.as_slice(), None)
            }
            Ok(PickOutcome::Forward(picked)) => {
                (if epp.is_some() { "epp" } else { "builtin" }, picked.endpoints.as_slice(), None)
            }
            Ok(PickOutcome::Reply(_)) => ("epp", &[][..], None),
            Err(error) => (if epp.is_some() { "epp" } else { "builtin" }, &[][..], Some(error.reason())),
        };
        span.pick(began, &Pick { by, epp, endpoints, error });
    }

    pub(super) fn picked_in(&mut self, took: Duration) {
        self.picked_in = took;
    }

    pub(super) fn served(&mut self, endpoint: SocketAddr) {
        self.endpoint = Some(endpoint);
    }

    pub(super) fn status(&mut self, status: StatusCode, reason: &'static str) {
        (self.status, self.reason) = (status, reason);
    }

    /// Sets whether the response is an event stream. For event streams the times of the messages are kept.
    pub(super) fn event_stream(&mut self, is: bool) {
        self.event_stream = is;
    }

    /// Records that the response was aborted after it had begun.
    pub(super) fn broken(&mut self, reason: &'static str) {
        (self.reason, self.broken) = (reason, true);
    }

    pub(super) fn delivered(
        &mut self,
        worker: &Worker,
        pool: usize,
        path: Path,
        reason: SteerReason,
        account: Account,
    ) {
        let all = &worker.shared.metrics;
        // The kernel's path was chosen, but the whole body arrived before the flow could be armed.
        let (path, reason) = if account.steered + account.local == 0
            && account.stops.iter().all(|&stops| stops == 0)
            && path != Path::Relay
        {
            (Path::Relay, SteerReason::Arrived)
        } else {
            (path, reason)
        };
        all.flow(path, reason.label());
        count(all, &account);
        let pieces = account.pieces + account.segments;
        if account.first_ns > 0 {
            let first = account.first_ns.saturating_sub(self.started_ns);
            all.pool(pool).time_to_first_token(Duration::from_nanos(first));
            if pieces > 1 {
                let between = account.last_ns.saturating_sub(account.first_ns) / (pieces - 1);
                all.pool(pool).time_per_output_chunk(Duration::from_nanos(between));
            }
        }
        (self.path, self.path_reason, self.account) = (path.label(), reason.label(), account);
    }

    /// Writes the record of a request that was routed. `error` is the reason if the agent answered it or aborted it.
    pub(super) fn finish(mut self, worker: &Worker, pool: usize, parts: &request::Parts, error: Option<&Error>) {
        if let Some(error) = error {
            (self.status, self.reason) = (error.status(), error.reason());
        }
        let took = self.started.elapsed();
        worker.shared.metrics.pool(pool).request(self.status.as_u16(), self.reason, took);
        if matches!(self.reason, "client_gone") {
            worker.shared.metrics.client_aborted();
        }
        let first_ns = self.account.first_ns.saturating_sub(self.started_ns);
        let model = parts.headers.get(&worker.shared.config.bbr.header).and_then(|model| model.to_str().ok());
        if self.event_stream && self.status.is_success() && self.account.first_ns > 0 {
            let rest = self.account.last_ns.saturating_sub(self.account.first_ns);
            let messages = self.account.pieces + self.account.segments;
            let stream = Streamed { first: Duration::from_nanos(first_ns), rest: Duration::from_nanos(rest), messages };
            worker.shared.metrics.pool(pool).streamed(model.unwrap_or_default(), &stream);
        }
        self.log(worker, pool, parts, took, error);
        let Some(span) = self.span else { return };
        span.end(&Ended {
            status: self.status.as_u16(),
            reason: self.reason,
            refused: error.is_some(),
            broken: self.broken,
            pool: &worker.shared.config.pools[pool].name,
            endpoint: self.endpoint,
            model,
            carried_by: self.path,
            carried_why: self.path_reason,
            first_byte: (self.account.first_ns > 0).then(|| Duration::from_nanos(first_ns)),
        });
    }

    fn log(&self, worker: &Worker, pool: usize, parts: &request::Parts, took: Duration, error: Option<&Error>) {
        let request_id = parts.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        let account = &self.account;
        let up = account.upstream > 0;
        let first_ns = account.first_ns.saturating_sub(self.started_ns);
        Line {
            request_id: Some(&cut(request_id, text::NAME)),
            method: Some(display(&cut(parts.method.as_str(), text::NAME))),
            path: Some(&cut(parts.uri.path(), text::PHRASE)),
            pool: Some(&worker.shared.config.pools[pool].name),
            status: Some(self.status.as_u16()),
            reason: Some(self.reason),
            endpoint: Some(&self.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default()),
            carried_by: Some(self.path),
            carried_why: Some(self.path_reason),
            bytes_kernel: Some(account.steered + account.local),
            bytes_user: Some(account.relayed),
            bytes_up: up.then_some(account.upstream),
            bytes_up_kernel: up.then_some(account.upstream_steered),
            pick_us: Some(self.picked_in.as_micros() as u64),
            ttft_us: Some(if account.first_ns > 0 { first_ns / 1000 } else { 0 }),
            took_us: Some(took.as_micros() as u64),
            error: error.map(logged).as_deref(),
            ..Line::default()
        }
        .write();
    }

    /// Writes the record of a request that failed before it was routed to a pool.
    pub(super) fn finish_unrouted(self, worker: &Worker, error: &Error) {
        let took = self.started.elapsed();
        worker.shared.metrics.unrouted().request(error.status().as_u16(), error.reason(), took);
        if let Some(span) = self.span {
            span.end(&Ended {
                status: error.status().as_u16(),
                reason: error.reason(),
                refused: true,
                broken: false,
                pool: "",
                endpoint: None,
                model: None,
                carried_by: self.path,
                carried_why: self.path_reason,
                first_byte: None,
            });
        }
        if matches!(error, Error::ClientGone) {
            return;
        }
        Line {
            status: Some(error.status().as_u16()),
            reason: Some(error.reason()),
            took_us: Some(took.as_micros() as u64),
            error: Some(&logged(error)),
            ..Line::default()
        }
        .write();
    }
}

/// The error's text, cut, because it may quote input from a client, an endpoint or an EPP.
fn logged(error: &Error) -> String {
    cut(&error.to_string(), text::PHRASE).into_owned()
}

/// Adds the bytes of a flow to the metrics.
pub(super) fn count(metrics: &Metrics, account: &Account) {
    metrics.body_bytes(Path::Relay, account.relayed);
    metrics.body_bytes(Path::Ingress, account.steered);
    metrics.body_bytes(Path::Local, account.local);
    metrics.upstream_bytes(Path::Relay, account.upstream - account.upstream_steered);
    metrics.upstream_bytes(Path::Ingress, account.upstream_steered);
    for (reason, &times) in (0..).zip(&account.stops) {
        for _ in 0..times {
            metrics.steer_stopped(stop::label(reason));
        }
    }
}
