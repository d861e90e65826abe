//! Feeds the endpoints of one source into its pool's set, and reports failures of the source in the log and the metrics.
//!
//! While a source fails, its previous endpoints are kept.

use std::{fmt::Display, net::SocketAddr, sync::Arc};

use tokio::sync::oneshot;

use super::set::{EndpointSet, EndpointSource};
use crate::{config, metrics::Metrics};

pub(super) struct Feed {
    pub(super) pool: String,
    /// The pool's index in the metrics.
    pub(super) index: usize,
    pub(super) source: EndpointSource,
    pub(super) set: Arc<EndpointSet>,
    pub(super) metrics: Arc<Metrics>,
    /// The agent's own listener, which is never used as an endpoint.
    pub(super) listen: SocketAddr,
    /// Dropped when the source gives its first endpoints.
    pub(super) unanswered: Option<oneshot::Sender<()>>,
    pub(super) failing: bool,
}

impl Feed {
    /// The source gave its endpoints.
    pub(super) fn update(&mut self, endpoints: Vec<config::ListedEndpoint>) {
        let (pool, source, count) = (&self.pool, self.source.name(), endpoints.len());
        let changed = self.set.replace(self.source, endpoints);
        if changed || self.failing {
            tracing::info!(pool, source, endpoints = count, "endpoints updated");
        }
        self.metrics.pool(self.index).source_up(source, true);
        (self.failing, self.unanswered) = (false, None);
    }

    /// The source failed. Warns in the log if that is `news`.
    pub(super) fn failed(&mut self, reason: &'static str, error: &dyn Display, news: bool) {
        let (pool, source) = (&self.pool, self.source.name());
        if news {
            tracing::warn!(pool, source, %error, "endpoint source failed, keeping the previous endpoints");
        } else {
            tracing::debug!(pool, source, %error, "endpoint source still fails");
        }
        let metrics = self.metrics.pool(self.index);
        metrics.source_failed(source, reason);
        metrics.source_up(source, false);
        self.failing = true;
    }
}
