//! Health checks of a pool's endpoints (`[pools.health]`): one GET per endpoint and interval, each on a new connection.
//!
//! The checks are spread over the interval. An endpoint has at most one check in progress.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use http::{HeaderMap, HeaderValue, StatusCode, header, uri::PathAndQuery};
use thiserror::Error;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    local_fault::local_fault,
    set::{EndpointSet, Snapshot},
    single::{SingleError, SingleRequest},
    tls::EndpointTls,
};
use crate::{
    config::{AppProtocol, HealthCheck},
    metrics::Metrics,
};

pub(super) struct Checks {
    pub(super) pool: String,
    /// The pool's index in the metrics.
    pub(super) index: usize,
    pub(super) rules: HealthCheck,
    /// The endpoints' protocol.
    pub(super) protocol: AppProtocol,
    pub(super) tls: Option<Arc<EndpointTls>>,
    pub(super) set: Arc<EndpointSet>,
    pub(super) metrics: Arc<Metrics>,
}

#[derive(Debug, Error)]
enum CheckError {
    #[error("no response within {0:?}")]
    Timeout(Duration),
    #[error("{0}")]
    Single(#[from] SingleError),
    #[error("status {0}")]
    Status(StatusCode),
}

impl CheckError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            Self::Single(SingleError::Connect(_)) => "connect",
            Self::Single(SingleError::Tls(_)) => "tls",
            Self::Single(SingleError::Http(_) | SingleError::Body(_)) => "http",
            Self::Status(_) => "status",
        }
    }
}

impl Checks {
    /// Checks the endpoints until the future is dropped.
    pub(super) async fn run(self) {
        let mut running = FuturesUnordered::new();
        let mut busy: Vec<SocketAddr> = Vec::new();
        let mut round = Instant::now();
        loop {
            let snapshot = self.set.snapshot();
            let addresses: Vec<_> = snapshot.ready().map(|endpoint| endpoint.address).collect();
            let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
            let moment = |at: usize| round + (self.rules.interval / count).saturating_mul(at as u32);
            // The last item, `None`, is the end of the round.
            for (at, address) in addresses.iter().map(Some).chain([None]).enumerate() {
                let then = if address.is_some() { moment(at) } else { round + self.rules.interval };
                loop {
                    tokio::select! {
                        biased;
                        Some(done) = running.next() => busy.retain(|&address| address != done),
                        () = sleep_until(then) => break,
                    }
                }
                if let Some(&address) = address.filter(|address| !busy.contains(address)) {
                    busy.push(address);
                    running.push(self.check(Arc::clone(&snapshot), address));
                }
            }
            // Missed rounds are skipped.
            round = (round + self.rules.interval).max(Instant::now());
        }
    }

    /// Checks one endpoint of the snapshot and records the result. Returns its address.
    async fn check(&self, snapshot: Arc<Snapshot>, address: SocketAddr) -> SocketAddr {
        let limit = self.rules.timeout;
        let asked = SingleRequest { address, protocol: self.protocol, tls: self.tls.as_deref() };
        let result =
            timeout(limit, send_check(asked, &self.rules.path)).await.unwrap_or(Err(CheckError::Timeout(limit)));
        if let Err(CheckError::Single(SingleError::Connect(error))) = &result
            && let Some(fault) = local_fault(error)
        {
            // A local fault does not count against the endpoint.
            tracing::warn!(pool = self.pool, %address, %error, "health check failed, local fault");
            self.metrics.local_fault(fault);
            return address;
        }
        if let Err(error) = &result {
            tracing::debug!(pool = self.pool, %address, %error, "health check failed");
            self.metrics.pool(self.index).check_failed(error.reason());
        }
        let changed = snapshot.get(address).is_some_and(|endpoint| endpoint.checked(result.is_ok(), &self.rules));
        match result {
            Ok(()) if changed => tracing::info!(pool = self.pool, %address, "endpoint recovered"),
            Err(error) if changed => {
                tracing::warn!(pool = self.pool, %address, %error, "endpoint failed its health checks");
            }
            _ => {}
        }
        address
    }
}

/// Sends a GET and expects a 2xx status. The connection is closed after the head.
async fn send_check(asked: SingleRequest<'_>, path: &PathAndQuery) -> Result<(), CheckError> {
    let agent = (header::USER_AGENT, HeaderValue::from_static("penstock-health-check"));
    let status = asked.get(path, HeaderMap::from_iter([agent]), 0).await?.status();
    if status.is_success() { Ok(()) } else { Err(CheckError::Status(status)) }
}
