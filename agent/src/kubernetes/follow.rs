//! Follows one InferencePool: watches it, and what it refers to, and publishes what that means whenever it has changed.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use kube::Client;
use tokio::{sync::mpsc, time::sleep};

use super::{
    aimed::{Aimed, Watcher},
    objects::{EndpointSlice, InferencePoolObject, Pod, PoolSpec, Service},
    query::{self, Query},
    translate::{Objects, translate},
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

pub(super) struct Follower {
    named: InferencePoolRef,
    watcher: Watcher,
}

impl Follower {
    pub(super) fn new(client: Client, named: InferencePoolRef, metrics: Arc<Metrics>, settings: &Kubernetes) -> Self {
        let watcher = Watcher::new(client, named.to_string(), metrics, settings);
        Self { named, watcher }
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
        let pools =
            self.watcher.begin::<InferencePoolObject>(Query::one(query::pools(self.named.version), namespace, name));
        let mut parts = ReferredObjects::default();
        let (mut published, mut was_left_out) = (None, 0);
        loop {
            self.watcher.changed.notified().await;
            sleep(self.watcher.coalesce).await;
            let Some(found) = pools.store.all() else { continue };
            let (pool, left_out) = match found.iter().find(|pool| pool.name == *name) {
                None => {
                    parts = ReferredObjects::default();
                    (InferencePool::Absent, 0)
                }
                Some(pool) => {
                    parts.aim(self, pool);
                    let Some(translated) = parts.translate(namespace) else { continue };
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
}

/// What an InferencePool refers to.
#[derive(Default)]
struct ReferredObjects {
    /// The last one for which everything has been read. A change of what it refers to is used as a whole: neither the Pods of one
    /// selector at the ports of another one, nor the name of one EPP with the replicas of another one.
    settled: Option<InferencePoolObject>,
    pods: Aimed<Pod>,
    service: Aimed<Service>,
    slices: Aimed<EndpointSlice>,
}

impl ReferredObjects {
    /// Watches what the pool refers to. Nothing if it is invalid.
    fn aim(&mut self, follower: &Follower, pool: &InferencePoolObject) {
        let spec = pool.spec.as_ref().ok();
        let namespace = &follower.named.namespace;
        let labels = |spec: &PoolSpec| {
            let labels = spec.selector.iter().map(|(key, value)| (key.as_str(), value.as_str()));
            Query::labelled(query::PODS, namespace, labels)
        };
        let epp = spec.and_then(|spec| spec.epp.as_ref());
        let service = epp.map(|epp| Query::one(query::SERVICES, namespace, &epp.name));
        let slices =
            epp.map(|epp| Query::labelled(query::ENDPOINT_SLICES, namespace, [(SERVICE_NAME, epp.name.as_str())]));
        let watcher = &follower.watcher;
        self.pods.prepare(watcher, spec.map(labels), || None);
        self.service.prepare(watcher, service, || None);
        self.slices.prepare(watcher, slices, || None);
        if self.pods.is_ready() && self.service.is_ready() && self.slices.is_ready() {
            self.pods.settle();
            self.service.settle();
            self.slices.settle();
            self.settled = Some(pool.clone());
        }
    }

    /// The pool and the number of its endpoints that were left out. None until everything of one state has been read.
    fn translate(&self, namespace: &str) -> Option<(InferencePool, usize)> {
        let pool = self.settled.as_ref()?;
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
