//! Watches of one subject, such as an InferencePool with what it refers to. Their queries may change; the objects of the previous
//! query are used until the new list is whole, so no change empties the subject for a moment.

use std::{sync::Arc, time::Duration};

use kube::Client;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::{
    objects::Object,
    query::Query,
    store::{KeepFilter, Store},
    watch::{self, WatchParameters},
};
use crate::{config::Kubernetes, metrics::Metrics};

/// What every watch of a subject uses.
pub(super) struct Watcher {
    client: Client,
    /// For the log and the metrics.
    subject: String,
    metrics: Arc<Metrics>,
    watch_timeout: Duration,
    /// How long changes are collected.
    pub(super) coalesce: Duration,
    /// Notified when an object has changed.
    pub(super) changed: Arc<Notify>,
}

impl Watcher {
    pub(super) fn new(client: Client, subject: String, metrics: Arc<Metrics>, settings: &Kubernetes) -> Self {
        let Kubernetes { watch_timeout, coalesce, .. } = *settings;
        Self { client, subject, metrics, watch_timeout, coalesce, changed: Arc::default() }
    }

    /// Begins a watch.
    pub(super) fn begin<K: Object + PartialEq>(&self, query: Query) -> ObjectWatch<K> {
        self.begin_keeping(query, None)
    }

    /// Begins a watch that keeps only objects for which `keep` returns true.
    pub(super) fn begin_keeping<K: Object + PartialEq>(
        &self,
        query: Query,
        keep: Option<KeepFilter<K>>,
    ) -> ObjectWatch<K> {
        let store = Arc::new(Store::new(Arc::clone(&self.changed), keep));
        let subject = self.subject.clone();
        let metrics = self.metrics.kubernetes_watch(&subject, query.resource.plural);
        let (client, lasts) = (self.client.clone(), self.watch_timeout);
        let source = WatchParameters { client, subject, query: query.clone(), lasts };
        let task = AbortOnDropHandle::new(tokio::spawn(watch::keep_watching(source, Arc::clone(&store), metrics)));
        ObjectWatch { query, store, _task: task }
    }
}

/// A watch and its objects.
pub(super) struct ObjectWatch<K> {
    query: Query,
    pub(super) store: Arc<Store<K>>,
    _task: AbortOnDropHandle<()>,
}

/// A watch whose query may change.
pub(super) struct Aimed<K> {
    /// The last one whose objects are known.
    current: Option<ObjectWatch<K>>,
    /// The one that will replace it.
    next: Option<ObjectWatch<K>>,
}

impl<K> Default for Aimed<K> {
    fn default() -> Self {
        Self { current: None, next: None }
    }
}

impl<K: Object + PartialEq> Aimed<K> {
    pub(super) fn aim(&mut self, watcher: &Watcher, query: Option<Query>) {
        self.aim_keeping(watcher, query, || None);
    }

    /// As [`aim`](Self::aim), for a watch that keeps some objects.
    pub(super) fn aim_keeping(
        &mut self,
        watcher: &Watcher,
        query: Option<Query>,
        keep: impl FnOnce() -> Option<KeepFilter<K>>,
    ) {
        let Some(query) = query else {
            *self = Self::default();
            return;
        };
        if self.current.as_ref().is_some_and(|current| current.query == query) {
            self.next = None;
        } else if self.next.as_ref().is_none_or(|next| next.query != query) {
            self.next = Some(watcher.begin_keeping(query, keep()));
        }
        if self.next.as_ref().is_some_and(|next| next.store.all().is_some()) {
            self.current = self.next.take();
        }
    }

    /// The objects, or None if none have been read yet.
    pub(super) fn objects(&self) -> Option<Vec<K>> {
        self.current.as_ref()?.store.all()
    }
}
