//! The metrics of one watch of the Kubernetes API.

use std::{sync::Arc, time::SystemTime};

use super::{
    families::Families,
    labels::{ByWatch, ByWatchAndReason},
};

/// Dropping it removes the series that say how things are; the counters stay.
#[derive(Debug)]
pub struct WatchMetrics {
    families: Arc<Families>,
    labels: ByWatch,
}

impl WatchMetrics {
    pub(super) fn new(families: &Arc<Families>, inference_pool: &str, resource: &'static str) -> Self {
        let labels = ByWatch { inference_pool: inference_pool.to_owned(), resource };
        let metrics = Self { families: Arc::clone(families), labels };
        metrics.up(false);
        metrics
    }

    pub fn up(&self, up: bool) {
        self.families.kubernetes_watch_up.get_or_create(&self.labels).set(up.into());
    }

    /// The API server was heard of.
    pub fn synced(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.families.kubernetes_last_sync.get_or_create(&self.labels).set(now.as_secs() as i64);
    }

    pub fn objects(&self, count: usize) {
        self.families.kubernetes_objects.get_or_create(&self.labels).set(count as i64);
    }

    pub fn relisted(&self) {
        self.families.kubernetes_relists.get_or_create(&self.labels).inc();
    }

    pub fn failed(&self, reason: &'static str) {
        let ByWatch { inference_pool, resource } = self.labels.clone();
        self.families.kubernetes_failures.get_or_create(&ByWatchAndReason { inference_pool, resource, reason }).inc();
    }
}

impl Drop for WatchMetrics {
    fn drop(&mut self) {
        let Families { kubernetes_watch_up, kubernetes_last_sync, kubernetes_objects, .. } = &*self.families;
        for gauges in [kubernetes_watch_up, kubernetes_last_sync, kubernetes_objects] {
            gauges.remove(&self.labels);
        }
    }
}
