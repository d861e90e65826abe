//! What a request leaves behind: metrics, and one line in the access log (target `penstock::access`).

use std::{net::SocketAddr, time::Duration};

use http::{StatusCode, request};
use penstock_common::slot::stop;
use tokio::time::Instant;

use crate::{
    deliver::Account, error::Error, kernel::socket::monotonic_ns, metrics, steer::choice::Path, worker::Worker,
};

pub(super) struct Record {
    started: Instant,
    started_ns: u64,
    status: StatusCode,
    reason: &'static str,
    picked_in: Duration,
    endpoint: Option<SocketAddr>,
    path: &'static str,
    path_reason: &'static str,
    account: Account,
}

impl Record {
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            started_ns: monotonic_ns(),
            status: StatusCode::INTERNAL_SERVER_ERROR,
            reason: "none",
            picked_in: Duration::ZERO,
            endpoint: None,
            path: "none",
            path_reason: "none",
            account: Account::default(),
        }
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

    /// The response had begun and was broken off.
    pub(super) fn broken(&mut self, reason: &'static str) {
        self.reason = reason;
    }

    pub(super) fn delivered(
        &mut self,
        worker: &Worker,
        pool: usize,
        path: Path,
        reason: &'static str,
        account: Account,
    ) {
        let all = &worker.shared.metrics;
        // Chosen for the kernel, but everything was here before it could be armed.
        let (path, reason) =
            if path == Path::Ingress && account.steered == 0 && account.stops.iter().all(|&stops| stops == 0) {
                (Path::Relay, "arrived")
            } else {
                (path, reason)
            };
        let label = match path {
            Path::Ingress => metrics::Path::Ingress,
            Path::Relay => metrics::Path::Relay,
        };
        all.flow(label, reason);
        all.body_bytes(metrics::Path::Relay, account.relayed);
        all.body_bytes(metrics::Path::Ingress, account.steered);
        for (reason, &times) in (0..).zip(&account.stops) {
            for _ in 0..times {
                all.steer_stopped(stop::label(reason));
            }
        }
        let pieces = account.pieces + account.segments;
        if account.first_ns > 0 {
            let first = account.first_ns.saturating_sub(self.started_ns);
            all.pool(pool).time_to_first_token(Duration::from_nanos(first));
            if pieces > 1 {
                let between = account.last_ns.saturating_sub(account.first_ns) / (pieces - 1);
                all.pool(pool).time_per_output_chunk(Duration::from_nanos(between));
            }
        }
        (self.path, self.path_reason, self.account) = (path.label(), reason, account);
    }

    /// The request has been answered, or given up.
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
        tracing::info!(
            target: "penstock::access",
            request_id = parts.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default(),
            method = %parts.method,
            path = parts.uri.path(),
            pool = worker.shared.config.pools[pool].name,
            status = self.status.as_u16(),
            reason = self.reason,
            endpoint = self.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default(),
            carried_by = self.path,
            carried_why = self.path_reason,
            bytes_kernel = self.account.steered,
            bytes_user = self.account.relayed,
            bytes_up = (self.account.upstream > 0).then_some(self.account.upstream),
            pick_us = self.picked_in.as_micros() as u64,
            ttft_us = if self.account.first_ns > 0 { first_ns / 1000 } else { 0 },
            took_us = took.as_micros() as u64,
            error = error.map(ToString::to_string),
        );
    }

    /// The request never got as far as a pool.
    pub(super) fn finish_unrouted(self, worker: &Worker, error: &Error) {
        let took = self.started.elapsed();
        worker.shared.metrics.unrouted().request(error.status().as_u16(), error.reason(), took);
        if matches!(error, Error::ClientGone) {
            return;
        }
        tracing::info!(
            target: "penstock::access",
            status = error.status().as_u16(),
            reason = error.reason(),
            took_us = took.as_micros() as u64,
            error = %error,
        );
    }
}
