//! What is recorded of a request while it passes through its phases, for the access log (`access_log.rs`) and the span. `last.rs` ends
//! the record.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{StatusCode, request};
use penstock_common::{path::Path, slot::stop};
use tokio::time::Instant;

use super::picked::PickOutcome;
use crate::{
    config::{EppMetadata, Picker},
    error::Error,
    http::{headers::Arrival, trace_context},
    kernel::socket::monotonic_ns,
    metrics::Metrics,
    picker::{
        client::{PickStream, StreamEnding},
        exchange::ImmediateReply,
        metadata::{Collected, SharedMetadata},
    },
    steer::{account::Account, reason::SteerReason},
    telemetry::{PickResult, RequestSpan},
    text::{self, cut},
    tls::identity::ClientIdentity,
    worker::Worker,
};

/// Where a request came from, and when.
#[derive(Clone)]
pub struct Origin {
    pub client: SocketAddr,
    /// Who the client is by its certificate.
    pub identity: Option<Arc<ClientIdentity>>,
    /// When the first byte of the request arrived.
    pub begun: Instant,
    /// From when on a response over HTTP/1.1 is the last one of its connection.
    pub last_at: Option<Instant>,
}

pub(super) struct Record {
    pub(super) client: SocketAddr,
    pub(super) identity: Option<Arc<ClientIdentity>>,
    /// When the first byte of the request arrived.
    pub(super) started: Instant,
    pub(super) started_ns: u64,
    pub(super) status: StatusCode,
    pub(super) reason: &'static str,
    /// The EPP's own reason for its immediate reply.
    pub(super) detail: Option<String>,
    pub(super) broken: bool,
    pub(super) picked_in: Duration,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) path: &'static str,
    pub(super) path_reason: &'static str,
    pub(super) event_stream: bool,
    pub(super) account: Account,
    /// The metadata of the EPP's replies, if an EPP was asked.
    pub(super) metadata: Option<SharedMetadata>,
    /// The end of the EPP's stream, if the response was complete.
    pub(super) ending: Option<StreamEnding>,
    pub(super) span: Option<Box<RequestSpan>>,
}

impl Record {
    pub(super) fn new(Origin { client, identity, begun: started, last_at: _ }: Origin) -> Self {
        Self {
            client,
            identity,
            started,
            started_ns: monotonic_ns().saturating_sub(started.elapsed().as_nanos() as u64),
            status: StatusCode::INTERNAL_SERVER_ERROR,
            reason: "none",
            detail: None,
            broken: false,
            picked_in: Duration::ZERO,
            endpoint: None,
            path: "none",
            path_reason: "none",
            event_stream: false,
            account: Account::default(),
            metadata: None,
            ending: None,
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
        let stream = if let Ok(PickOutcome::Forward(picked, _)) = outcome { picked.stream.as_ref() } else { None };
        let epp = match &worker.shared.config.pools[pool].picker {
            // The EPP that was asked. If several failed, the first one configured is named.
            Picker::Epp(epp) => stream.map(PickStream::authority).or(epp.addresses.first().map(String::as_str)),
            Picker::Builtin => None,
        };
        let (by, endpoints, error) = match outcome {
            Ok(PickOutcome::Forward(picked, _)) if epp.is_some() && picked.stream.is_none() => {
                ("fail_open", picked.endpoints.as_slice(), None)
            }
            Ok(PickOutcome::Forward(picked, _)) => {
                (if epp.is_some() { "epp" } else { "builtin" }, picked.endpoints.as_slice(), None)
            }
            Ok(PickOutcome::Reply(_)) => ("epp", &[][..], None),
            Err(error) => (if epp.is_some() { "epp" } else { "builtin" }, &[][..], Some(error.reason())),
        };
        span.pick(began, &PickResult { by, epp, endpoints, error });
    }

    /// An EPP is asked: its metadata is collected from now on, also if it is asked again.
    pub(super) fn collect(&mut self, rules: &Arc<EppMetadata>) {
        self.metadata.get_or_insert_with(|| Arc::new(Collected::new(rules).into()));
    }

    pub(super) fn metadata(&self) -> Option<SharedMetadata> {
        self.metadata.clone()
    }

    /// The EPP's stream ends in the background.
    pub(super) fn ending(&mut self, ending: Option<StreamEnding>) {
        self.ending = ending;
    }

    /// The EPP replied to the client, or evicted the request.
    pub(super) fn immediate(&mut self, reply: &ImmediateReply) {
        self.detail = reply.dropped_reason().map(|reason| cut(&reason, text::NAME).into_owned());
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
        let (path, reason) = if account.steered + account.local + account.wire == 0
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

    /// From the first byte of the request to the first byte of the response body; 0 without one.
    pub(super) fn first_byte(&self) -> Duration {
        if self.account.first_ns == 0 {
            return Duration::ZERO;
        }
        Duration::from_nanos(self.account.first_ns.saturating_sub(self.started_ns))
    }
}

/// Adds the bytes of a flow to the metrics.
pub(super) fn count(metrics: &Metrics, account: &Account) {
    metrics.body_bytes(Path::Relay, account.relayed);
    metrics.body_bytes(Path::Ingress, account.steered);
    metrics.body_bytes(Path::Local, account.local);
    metrics.body_bytes(Path::Wire, account.wire);
    metrics.upstream_bytes(Path::Relay, account.upstream - account.upstream_steered);
    metrics.upstream_bytes(Path::Ingress, account.upstream_steered);
    for (reason, &times) in (0..).zip(&account.stops) {
        for _ in 0..times {
            metrics.steer_stopped(stop::label(reason));
        }
    }
}
