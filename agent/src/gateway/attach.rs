//! Which listeners of a Gateway are served, and which HTTPRoutes are attached to them with which hosts.

use super::objects::{ApiObject, GROUP, GatewayListener, GatewaySpec, HttpRouteSpec, ParentRef, RouteKind};
use crate::config::{GatewayRef, HostPattern};

/// A route at a listener, with the hosts that both have. `None`: every host.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    /// The index of the listener.
    pub(super) listener: usize,
    pub(super) hosts: Vec<Option<HostPattern>>,
}

/// Whether a route names the Gateway as a parent.
pub fn attaches(named: &GatewayRef, route: &ApiObject) -> bool {
    let is_ours = |parent: &ParentRef| parent.is_of(named, &route.metadata.namespace);
    route.read::<HttpRouteSpec>().is_ok_and(|spec| spec.parent_refs.iter().any(is_ours))
}

/// Whether a listener allows routes from namespaces other than the Gateway's.
pub fn is_any_namespace_allowed(gateway: &ApiObject) -> bool {
    let is_open =
        |listener: &GatewayListener| listener.allowed_routes.namespaces.from.as_deref().unwrap_or("Same") != "Same";
    gateway.read::<GatewaySpec>().is_ok_and(|spec| spec.listeners.iter().any(is_open))
}

/// Whether a listener selects namespaces by their labels.
pub fn selects_namespaces(gateway: &ApiObject) -> bool {
    let selects = |listener: &GatewayListener| listener.allowed_routes.namespaces.from.as_deref() == Some("Selector");
    gateway.read::<GatewaySpec>().is_ok_and(|spec| spec.listeners.iter().any(selects))
}

/// The listeners that the agent serves: HTTP at `port`, or at the port of the first HTTP listener. Listeners that conflict with
/// others are not served.
pub(super) fn served(gateway: &GatewaySpec, port: Option<u16>) -> Vec<GatewayListener> {
    let is_http = |listener: &&GatewayListener| listener.protocol == "HTTP";
    let port = port.or_else(|| gateway.listeners.iter().find(is_http).map(|listener| listener.port));
    let conflicts = |listener: &&GatewayListener| {
        let same = |other: &&GatewayListener| other.port == listener.port && other.name != listener.name;
        let others: Vec<_> = gateway.listeners.iter().filter(same).collect();
        others.iter().any(|other| other.protocol != listener.protocol || other.hostname == listener.hostname)
    };
    let is_served =
        |listener: &&GatewayListener| is_http(listener) && Some(listener.port) == port && !conflicts(listener);
    gateway.listeners.iter().filter(is_served).cloned().collect()
}

/// The listeners that the route is attached to.
pub(super) fn attachments(
    named: &GatewayRef,
    listeners: &[GatewayListener],
    route: &ApiObject,
    spec: &HttpRouteSpec,
    namespaces: &[ApiObject],
) -> Vec<Attachment> {
    let namespace = &route.metadata.namespace;
    let parents: Vec<_> = spec.parent_refs.iter().filter(|parent| parent.is_of(named, namespace)).collect();
    let is_named = |listener: &GatewayListener| {
        parents.iter().any(|parent| {
            parent.section_name.as_ref().is_none_or(|name| *name == listener.name)
                && parent.port.is_none_or(|port| port == listener.port)
        })
    };
    let attach = |(index, listener): (usize, &GatewayListener)| {
        let hosts = hosts(&listener.hostname, &spec.hostnames);
        let attaches = is_named(listener) && listener.allows(named, namespace, namespaces) && !hosts.is_empty();
        attaches.then_some(Attachment { listener: index, hosts })
    };
    listeners.iter().enumerate().filter_map(attach).collect()
}

impl ParentRef {
    /// Whether it names the Gateway. `namespace` is that of the route.
    fn is_of(&self, named: &GatewayRef, namespace: &str) -> bool {
        self.group.as_deref().unwrap_or(GROUP) == GROUP
            && self.kind.as_deref().unwrap_or("Gateway") == "Gateway"
            && self.namespace.as_deref().unwrap_or(namespace) == named.namespace
            && self.name == named.name
    }
}

impl GatewayListener {
    /// Whether HTTPRoutes of the namespace may attach.
    fn allows(&self, gateway: &GatewayRef, namespace: &str, namespaces: &[ApiObject]) -> bool {
        let allowed = &self.allowed_routes;
        let is_http = |kind: &RouteKind| kind.group.as_deref().unwrap_or(GROUP) == GROUP && kind.kind == "HTTPRoute";
        let selected = || {
            let found = namespaces.iter().find(|one| one.metadata.name == namespace);
            let selector = allowed.namespaces.selector.as_ref();
            found.zip(selector).is_some_and(|(found, selector)| selector.holds(&found.metadata.labels))
        };
        let from = match allowed.namespaces.from.as_deref() {
            None | Some("Same") => namespace == gateway.namespace,
            Some("All") => true,
            Some("Selector") => selected(),
            Some(_) => false,
        };
        from && (allowed.kinds.is_empty() || allowed.kinds.iter().any(is_http))
    }
}

/// The pattern of a host name of the Gateway API. `None` for every host.
pub(super) fn pattern(hostname: &str) -> Option<HostPattern> {
    let name = hostname.to_ascii_lowercase();
    match name.strip_prefix('*') {
        _ if name.is_empty() => None,
        Some(below) => Some(HostPattern::Below(below.to_owned())),
        None => Some(HostPattern::Exact(name)),
    }
}

/// The hosts that a listener and a route have in common.
fn hosts(listener: &str, route: &[String]) -> Vec<Option<HostPattern>> {
    let listener = pattern(listener);
    if route.is_empty() {
        return vec![listener];
    }
    let mut hosts: Vec<_> = route.iter().filter_map(|host| intersection(listener.as_ref(), pattern(host))).collect();
    let mut seen = Vec::new();
    hosts.retain(|host| {
        !seen.contains(host) && {
            seen.push(host.clone());
            true
        }
    });
    hosts
}

/// The hosts that both patterns match. The outer `None`: they share no host.
fn intersection(listener: Option<&HostPattern>, route: Option<HostPattern>) -> Option<Option<HostPattern>> {
    let (Some(listener), Some(route)) = (listener, route.as_ref()) else { return Some(route.or(listener.cloned())) };
    if listener.covers(route) {
        Some(Some(route.clone()))
    } else if route.covers(listener) {
        Some(Some(listener.clone()))
    } else {
        None
    }
}
