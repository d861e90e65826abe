//! Follows the InferencePools that a section of the file selects by their labels, and publishes which ones these are.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use kube::Client;
use tokio::{sync::mpsc, time::sleep};

use super::{
    aimed::Watcher,
    query::{self, Query},
};
use crate::{
    config::{InferencePoolRef, InferencePools, Kubernetes},
    gateway::ApiObject,
    metrics::Metrics,
};

/// Pause after a panic.
const RESTART: Duration = Duration::from_secs(1);

pub(super) struct SelectionFollower {
    section: InferencePools,
    watcher: Watcher,
}

impl SelectionFollower {
    pub(super) fn new(client: Client, section: InferencePools, metrics: Arc<Metrics>, settings: &Kubernetes) -> Self {
        let watcher = Watcher::new(client, format!("InferencePools {section}"), metrics, settings);
        Self { section, watcher }
    }

    /// What is asked of the API server.
    pub(super) fn query(section: &InferencePools) -> Query {
        let namespace = section.namespace.as_deref().unwrap_or_default();
        let labels = section.labels.clone().unwrap_or_default();
        Query { labels, ..Query::labelled(query::pools(section.version), namespace, []) }
    }

    /// As [`run`](Self::run), but restarts after a panic, which the panic hook has counted.
    pub(super) async fn keep_running(
        self,
        results: mpsc::Sender<(InferencePools, Vec<InferencePoolRef>)>,
    ) -> Infallible {
        loop {
            if let Ok(never) = AssertUnwindSafe(self.run(results.clone())).catch_unwind().await {
                return never;
            }
            sleep(RESTART).await;
        }
    }

    /// Sends the pools, sorted, when they have been read, and after each change. Changes within `coalesce` are sent together.
    pub(super) async fn run(&self, results: mpsc::Sender<(InferencePools, Vec<InferencePoolRef>)>) -> Infallible {
        let pools = self.watcher.begin::<ApiObject>(Self::query(&self.section));
        let version = self.section.version;
        let mut published = None;
        loop {
            self.watcher.changed.notified().await;
            sleep(self.watcher.coalesce).await;
            let Some(found) = pools.store.all() else { continue };
            let named = |pool: ApiObject| InferencePoolRef {
                namespace: pool.metadata.namespace,
                name: pool.metadata.name,
                version,
            };
            let mut found: Vec<_> = found.into_iter().map(named).collect();
            found.sort();
            if published.as_ref() != Some(&found) {
                // Fails only when the receiver is about to drop this future.
                let _ = results.send((self.section.clone(), found.clone())).await;
                published = Some(found);
            }
        }
    }
}
