//! What a Gateway of the Gateway API, the HTTPRoutes that are attached to it and the ReferenceGrants mean: the routes to serve and
//! the InferencePools that they refer to.
//!
//! Pure: takes objects, returns settings. `attach` finds the listeners of a route, `rule` translates a rule, `backend` its
//! references, and `order` sorts everything by precedence. What is not implemented becomes a route that is refused.

mod attach;
mod backend;
mod filters;
mod objects;
mod order;
mod rule;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use self::{
    attach::{Attachment, attachments, served},
    backend::Grants,
    objects::{GatewaySpec, HttpRouteSpec},
    order::Precedence,
};
use crate::config::{GatewayRef, HostPattern, InferencePoolRef, RefusedRoute, Route};

pub use attach::{attaches, is_any_namespace_allowed, selects_namespaces};
pub use backend::{crosses_namespaces, pool_name};
pub use objects::{ApiObject, GROUP};

/// Most routes: each match of a rule counts for each host.
const MAX_ROUTES: usize = 4096;
/// Most pools that routes may refer to.
pub const MAX_POOLS: usize = 256;

/// The objects of a Gateway as they were last read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GatewayObjects {
    /// None if it does not exist.
    pub gateway: Option<ApiObject>,
    /// The HTTPRoutes that name the Gateway as a parent.
    pub routes: Vec<ApiObject>,
    pub grants: Vec<ApiObject>,
    /// Empty unless a listener selects namespaces by label.
    pub namespaces: Vec<ApiObject>,
}

/// What the objects of a Gateway mean.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GatewayRoutes {
    /// By precedence, the last one for every request that no other takes. A share names its pool by `pool_name`.
    pub routes: Vec<Route>,
    /// Sorted.
    pub pools: Vec<InferencePoolRef>,
    /// How many routes were left out because there are too many.
    pub left_out: usize,
}

/// A Gateway that has been read, and what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownGateway {
    pub objects: GatewayObjects,
    pub meaning: GatewayRoutes,
}

impl KnownGateway {
    pub fn new(named: &GatewayRef, objects: GatewayObjects) -> Self {
        let meaning = translate(named, &objects);
        Self { objects, meaning }
    }
}

/// A route that refuses what no other route takes.
pub fn rest(refused: RefusedRoute) -> Route {
    Route { refused: Some(refused), ..Route::default() }
}

/// Sorts the routes, and drops those beyond the limit.
fn keep_first(found: &mut Vec<(Precedence, Route)>) {
    // Stable: the order among matches of one rule is that of the list.
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    found.truncate(MAX_ROUTES);
}

fn translate(named: &GatewayRef, objects: &GatewayObjects) -> GatewayRoutes {
    let Some(spec) = objects.gateway.as_ref().and_then(|gateway| gateway.read::<GatewaySpec>().ok()) else {
        return GatewayRoutes { routes: vec![rest(RefusedRoute::NoRoute)], ..GatewayRoutes::default() };
    };
    let mut listeners = served(&spec, named.port);
    listeners.sort_by_key(|listener| order::by_host(attach::pattern(&listener.hostname).as_ref()));
    let mut grants = Grants::new(&objects.grants);
    let mut found: Vec<(Precedence, Route)> = Vec::new();
    let mut count = 0;
    for route in &objects.routes {
        let Ok(spec) = route.read::<HttpRouteSpec>() else { continue };
        for Attachment { listener, hosts } in attachments(named, &listeners, route, &spec, &objects.namespaces) {
            for (index, rule) in spec.rules.iter().enumerate() {
                let port = listeners[listener].port;
                for translated in rule::routes(route, index, rule, port, &mut grants) {
                    for host in &hosts {
                        let precedence = Precedence::new(listener, host.as_ref(), &translated, route, index);
                        let hosts = host.iter().cloned().collect();
                        found.push((precedence, Route { hosts, ..translated.route.clone() }));
                        count += 1;
                        if found.len() == 2 * MAX_ROUTES {
                            keep_first(&mut found);
                        }
                    }
                }
            }
        }
    }
    keep_first(&mut found);
    let left_out = count - found.len();
    let mut found = found.into_iter().peekable();
    let mut routes = Vec::new();
    for (index, listener) in listeners.iter().enumerate() {
        while let Some((_, route)) = found.next_if(|(precedence, _)| precedence.listener == index) {
            routes.push(route);
        }
        // A request belongs to the listener with the most specific host alone.
        let hosts: Vec<HostPattern> = attach::pattern(&listener.hostname).into_iter().collect();
        if !hosts.is_empty() {
            routes.push(Route { hosts, ..rest(RefusedRoute::NoRoute) });
        }
    }
    routes.push(rest(RefusedRoute::NoRoute));
    GatewayRoutes { routes, pools: grants.into_pools(), left_out }
}
