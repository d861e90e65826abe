//! Follows one InferencePool: watches it, and what it refers to, and publishes what that means whenever it has changed.
//!
//! A selector or a reference that changes begins another watch. The objects of the previous one are used until the new list is
//! whole, so no change of the InferencePool empties the pool for a moment.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use kube::Client;
use tokio::{
    sync::{Notify, mpsc},
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    objects::{EndpointSlice, InferencePoolObject, Object, Pod, PoolSpec, Service},
    query::{self, Query},
    store::Store,
    translate::{Objects, translate},
    watch::{self, WatchParameters},
};
use crate::{
    config::{InferencePoolRef, Kubernetes},
    inference_pools::InferencePool,
    metrics::Metrics,
};

/// The label of an EndpointSlice with the name of its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Pause after a panic.
const RESTART: Duration = Duration::from_secs(1);

/// What every watch of a pool uses.
pub(super) struct Follower {
    pub(super) client: Client,
    pub(super) named: InferencePoolRef,
    pub(super) metrics: Arc<Metrics>,
    watch_timeout: Duration,
    coalesce: Duration,
    /// Notified when an object has changed.
    changed: Arc<Notify>,
}

impl Follower {
    pub(super) fn new(client: Client, named: InferencePoolRef, metrics: Arc<Metrics>, settings: &Kubernetes) -> Self {
        let Kubernetes { watch_timeout, coalesce, .. } = *settings;
        Self { client, named, metrics, watch_timeout, coalesce, changed: Arc::default() }
    }

    /// As [`run`](Self::run), but restarts after a panic, which the panic hook has counted.
    pub(super) async fn keep_running(self, results: mpsc::Sender<(InferencePoolRef, InferencePool)>) -> Infallible {
        loop {
            if let Ok(never) = AssertUnwindSafe(self.run(results.clone())).catch_unwind().await {
                return never;
            }
            sleep(RESTART).await;
        }
    }

    /// Sends the pool when everything about it has been read, and after each change. Changes within `coalesce` are sent together.
    pub(super) async fn run(&self, results: mpsc::Sender<(InferencePoolRef, InferencePool)>) -> Infallible {
        let (namespace, name) = (&self.named.namespace, &self.named.name);
        let pools = self.begin::<InferencePoolObject>(Query::one(query::pools(self.named.version), namespace, name));
        let mut parts = ReferredObjects::default();
        let (mut published, mut was_left_out) = (None, 0);
        loop {
            self.changed.notified().await;
            sleep(self.coalesce).await;
            let Some(found) = pools.store.all() else { continue };
            let (pool, left_out) = match found.iter().find(|pool| pool.name == *name) {
                None => {
                    parts = ReferredObjects::default();
                    (InferencePool::Absent, 0)
                }
                Some(pool) => {
                    parts.aim(self, pool.spec.as_ref().ok());
                    let Some(translated) = parts.translate(namespace, pool) else { continue };
                    translated
                }
            };
            if left_out != was_left_out && left_out > 0 {
                tracing::error!(inference_pool = %self.named, left_out, "too many endpoints, using the lowest addresses");
            }
            was_left_out = left_out;
            if published.as_ref() != Some(&pool) {
                // Fails only when the receiver is about to drop this future.
                let _ = results.send((self.named.clone(), pool.clone())).await;
                published = Some(pool);
            }
        }
    }

    /// Begins a watch.
    fn begin<K: Object + PartialEq>(&self, query: Query) -> ObjectWatch<K> {
        let store = Arc::new(Store::new(Arc::clone(&self.changed)));
        let inference_pool = self.named.to_string();
        let metrics = self.metrics.kubernetes_watch(&inference_pool, query.resource.plural);
        let (client, lasts) = (self.client.clone(), self.watch_timeout);
        let source = WatchParameters { client, inference_pool, query: query.clone(), lasts };
        let task = AbortOnDropHandle::new(tokio::spawn(watch::keep_watching(source, Arc::clone(&store), metrics)));
        ObjectWatch { query, store, _task: task }
    }
}

/// A watch and its objects.
struct ObjectWatch<K> {
    query: Query,
    store: Arc<Store<K>>,
    _task: AbortOnDropHandle<()>,
}

/// A watch whose query may change.
struct Aimed<K> {
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
    fn aim(&mut self, follower: &Follower, query: Option<Query>) {
        let Some(query) = query else {
            *self = Self::default();
            return;
        };
        if self.current.as_ref().is_some_and(|current| current.query == query) {
            self.next = None;
        } else if self.next.as_ref().is_none_or(|next| next.query != query) {
            self.next = Some(follower.begin(query));
        }
        if self.next.as_ref().is_some_and(|next| next.store.all().is_some()) {
            self.current = self.next.take();
        }
    }

    /// The objects, or None if none have been read yet.
    fn objects(&self) -> Option<Vec<K>> {
        self.current.as_ref()?.store.all()
    }
}

/// What an InferencePool refers to.
#[derive(Default)]
struct ReferredObjects {
    pods: Aimed<Pod>,
    service: Aimed<Service>,
    slices: Aimed<EndpointSlice>,
}

impl ReferredObjects {
    /// Watches what `spec` refers to. Nothing if it is invalid.
    fn aim(&mut self, follower: &Follower, spec: Option<&PoolSpec>) {
        let namespace = &follower.named.namespace;
        let labels = |spec: &PoolSpec| {
            let labels = spec.selector.iter().map(|(key, value)| (key.as_str(), value.as_str()));
            Query::labelled(query::PODS, namespace, labels)
        };
        let epp = spec.and_then(|spec| spec.epp.as_ref());
        let service = epp.map(|epp| Query::one(query::SERVICES, namespace, &epp.name));
        let slices =
            epp.map(|epp| Query::labelled(query::ENDPOINT_SLICES, namespace, [(SERVICE_NAME, epp.name.as_str())]));
        self.pods.aim(follower, spec.map(labels));
        self.service.aim(follower, service);
        self.slices.aim(follower, slices);
    }

    /// The pool and the number of its endpoints that were left out. None until everything has been read.
    fn translate(&self, namespace: &str, pool: &InferencePoolObject) -> Option<(InferencePool, usize)> {
        let needs = |of: fn(&PoolSpec) -> bool| pool.spec.as_ref().is_ok_and(of);
        let pods = if needs(|_| true) { self.pods.objects()? } else { Vec::new() };
        let has_epp = needs(|spec| spec.epp.is_some());
        let service = if has_epp { self.service.objects()? } else { Vec::new() };
        let slices = if has_epp { self.slices.objects()? } else { Vec::new() };
        let name = pool.spec.as_ref().ok().and_then(|spec| spec.epp.as_ref()).map(|epp| epp.name.as_str());
        let service = service.iter().find(|service| Some(service.name.as_str()) == name);
        Some(translate(&Objects { namespace, pool, pods: &pods, service, slices: &slices }))
    }
}
