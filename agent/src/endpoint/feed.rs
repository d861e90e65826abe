//! The way of one source into its pool: what it gives goes into the set, and that it fails is told to whoever watches. What it
//! gave last holds until it gives something else.

use std::{fmt::Display, net::SocketAddr, sync::Arc};

use tokio::sync::oneshot;

use super::set::{EndpointSet, Source};
use crate::{config, metrics::Metrics};

pub(super) struct Feed {
    pub(super) pool: String,
    /// Of the pool, in the metrics.
    pub(super) index: usize,
    pub(super) source: Source,
    pub(super) set: Arc<EndpointSet>,
    pub(super) metrics: Arc<Metrics>,
    /// The agent's own listener, which is no endpoint.
    pub(super) listen: SocketAddr,
    /// Dropped with the first answer.
    pub(super) unanswered: Option<oneshot::Sender<()>>,
    pub(super) failing: bool,
}

impl Feed {
    /// The source has given its endpoints.
    pub(super) fn gives(&mut self, endpoints: Vec<config::Endpoint>) {
        let (pool, source, count) = (&self.pool, self.source.name(), endpoints.len());
        let changed = self.set.replace(self.source, endpoints);
        if changed || self.failing {
            tracing::info!(pool, source, endpoints = count, "endpoints");
        }
        self.metrics.pool(self.index).source_up(source, true);
        (self.failing, self.unanswered) = (false, None);
    }

    /// The source has given nothing that can be used. Says so in the log where that is news.
    pub(super) fn fails(&mut self, reason: &'static str, error: &dyn Display, news: bool) {
        let (pool, source) = (&self.pool, self.source.name());
        if news {
            tracing::warn!(pool, source, %error, "no endpoints: what was there before holds");
        } else {
            tracing::debug!(pool, source, %error, "still no endpoints");
        }
        let metrics = self.metrics.pool(self.index);
        metrics.source_failed(source, reason);
        metrics.source_up(source, false);
        self.failing = true;
    }
}
