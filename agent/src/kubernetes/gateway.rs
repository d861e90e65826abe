//! Follows a Gateway: watches it, the HTTPRoutes that name it as a parent, and what they need, and publishes these objects whenever
//! one has changed.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use kube::Client;
use tokio::{sync::mpsc, time::sleep};

use super::{
    aimed::{Aimed, Watcher},
    objects::Object,
    query::{GATEWAYS, HTTP_ROUTES, NAMESPACES, Query, REFERENCE_GRANTS},
    store::KeepFilter,
};
use crate::{
    config::{GatewayRef, Kubernetes},
    gateway::{self, ApiObject, GatewayObjects},
    metrics::Metrics,
};

/// Pause after a panic.
const RESTART: Duration = Duration::from_secs(1);

pub(super) struct GatewayFollower {
    named: GatewayRef,
    watcher: Watcher,
}

impl Object for ApiObject {
    fn name(&self) -> &str {
        &self.metadata.name
    }

    fn key(&self) -> String {
        ApiObject::key(self)
    }

    fn take_version(&mut self) -> String {
        std::mem::take(&mut self.metadata.resource_version)
    }
}

/// What is watched besides the Gateway.
#[derive(Default)]
struct GatewayParts {
    routes: Aimed<ApiObject>,
    grants: Aimed<ApiObject>,
    namespaces: Aimed<ApiObject>,
}

impl GatewayFollower {
    pub(super) fn new(client: Client, named: GatewayRef, metrics: Arc<Metrics>, settings: &Kubernetes) -> Self {
        let watcher = Watcher::new(client, format!("Gateway {named}"), metrics, settings);
        Self { named, watcher }
    }

    /// As [`run`](Self::run), but restarts after a panic, which the panic hook has counted.
    pub(super) async fn keep_running(self, results: mpsc::Sender<GatewayObjects>) -> Infallible {
        loop {
            if let Ok(never) = AssertUnwindSafe(self.run(results.clone())).catch_unwind().await {
                return never;
            }
            sleep(RESTART).await;
        }
    }

    /// Sends the objects when all of them have been read, and after each change. Changes within `coalesce` are sent together.
    pub(super) async fn run(&self, results: mpsc::Sender<GatewayObjects>) -> Infallible {
        let GatewayRef { namespace, name, .. } = &self.named;
        let gateways = self.watcher.begin::<ApiObject>(Query::one(GATEWAYS, namespace, name));
        let mut parts = GatewayParts::default();
        let mut published = None;
        loop {
            self.watcher.changed.notified().await;
            sleep(self.watcher.coalesce).await;
            let Some(found) = gateways.store.all() else { continue };
            let objects = match found.into_iter().find(|gateway| gateway.metadata.name == *name) {
                None => {
                    parts = GatewayParts::default();
                    GatewayObjects::default()
                }
                Some(gateway) => {
                    let Some(objects) = self.read(&mut parts, gateway) else { continue };
                    objects
                }
            };
            if published.as_ref() != Some(&objects) {
                // Fails only when the receiver is about to drop this future.
                let _ = results.send(objects.clone()).await;
                published = Some(objects);
            }
        }
    }

    /// What belongs to the Gateway. None until everything has been read.
    fn read(&self, parts: &mut GatewayParts, gateway: ApiObject) -> Option<GatewayObjects> {
        let (namespace, watcher) = (self.named.namespace.as_str(), &self.watcher);
        // All namespaces if the name is empty.
        let from = if gateway::is_any_namespace_allowed(&gateway) { "" } else { namespace };
        let query = Some(Query::labelled(HTTP_ROUTES, from, []));
        let named = self.named.clone();
        let keep =
            || Some(Box::new(move |route: &ApiObject| gateway::attaches(&named, route)) as KeepFilter<ApiObject>);
        parts.routes.aim_keeping(watcher, query, keep);
        let selects = gateway::selects_namespaces(&gateway);
        parts.namespaces.aim(watcher, selects.then(|| Query::labelled(NAMESPACES, "", [])));
        let routes = parts.routes.objects()?;
        let crosses = routes.iter().any(gateway::crosses_namespaces);
        parts.grants.aim(watcher, crosses.then(|| Query::labelled(REFERENCE_GRANTS, "", [])));
        let grants = if crosses { parts.grants.objects()? } else { Vec::new() };
        let namespaces = if selects { parts.namespaces.objects()? } else { Vec::new() };
        Some(GatewayObjects { gateway: Some(gateway), routes, grants, namespaces })
    }
}
