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
    next: Next<K>,
}

/// What will replace a watch.
#[derive(Default)]
enum Next<K> {
    /// It stays.
    #[default]
    Same,
    Nothing,
    Watch(ObjectWatch<K>),
}

impl<K> Default for Aimed<K> {
    fn default() -> Self {
        Self { current: None, next: Next::Same }
    }
}

impl<K: Object + PartialEq> Aimed<K> {
    pub(super) fn aim(&mut self, watcher: &Watcher, query: Option<Query>) {
        self.aim_keeping(watcher, query, || None);
    }

    /// As [`aim`](Self::aim), for a watch that keeps some objects. The objects are those of this query as soon as they are known.
    pub(super) fn aim_keeping(
        &mut self,
        watcher: &Watcher,
        query: Option<Query>,
        keep: impl FnOnce() -> Option<KeepFilter<K>>,
    ) {
        self.prepare(watcher, query, keep);
        if self.is_ready() {
            self.settle();
        }
    }

    /// Begins to read the objects of this query. Those of the previous one are used until [`settle`](Self::settle).
    pub(super) fn prepare(
        &mut self,
        watcher: &Watcher,
        query: Option<Query>,
        keep: impl FnOnce() -> Option<KeepFilter<K>>,
    ) {
        let stays = self.current.as_ref().map(|current| &current.query) == query.as_ref();
        self.next = match (query, std::mem::take(&mut self.next)) {
            _ if stays => Next::Same,
            (None, _) => Next::Nothing,
            (Some(query), Next::Watch(next)) if next.query == query => Next::Watch(next),
            (Some(query), _) => Next::Watch(watcher.begin_keeping(query, keep())),
        };
    }

    /// Whether the objects of the last query are known.
    pub(super) fn is_ready(&self) -> bool {
        match &self.next {
            Next::Same | Next::Nothing => true,
            Next::Watch(next) => next.store.is_known(),
        }
    }

    /// From now on the objects are those of the last query.
    pub(super) fn settle(&mut self) {
        match std::mem::take(&mut self.next) {
            Next::Same => {}
            Next::Nothing => self.current = None,
            Next::Watch(next) => self.current = Some(next),
        }
    }

    /// The objects, or None if none have been read yet.
    pub(super) fn objects(&self) -> Option<Vec<K>> {
        self.current.as_ref()?.store.all()
    }
}
