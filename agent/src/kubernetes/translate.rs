//! Translates the API objects of one InferencePool into what the agent serves. Pure: takes objects, returns the pool.

use std::net::SocketAddr;

use super::objects::{EndpointSlice, EppRef, InferencePoolObject, Pod, Service};
use crate::inference_pools::{EppService, InferencePool, PodPort, Usable};

/// Most endpoints of a pool. Every snapshot of a pool and every hint to an EPP lists them.
const MAX_ENDPOINTS: usize = 4096;
/// Most replicas of an EPP. The agent checks the health of each.
const MAX_REPLICAS: usize = 64;

/// The objects of one InferencePool that exists.
pub(super) struct Objects<'a> {
    pub(super) namespace: &'a str,
    pub(super) pool: &'a InferencePoolObject,
    pub(super) pods: &'a [Pod],
    /// The Service that the pool refers to, if it exists.
    pub(super) service: Option<&'a Service>,
    pub(super) slices: &'a [EndpointSlice],
}

/// The pool, and how many of its endpoints were left out because there are too many.
pub(super) fn translate(objects: &Objects<'_>) -> (InferencePool, usize) {
    let spec = match &objects.pool.spec {
        Ok(spec) => spec,
        Err(why) => return (InferencePool::Invalid(why.clone()), 0),
    };
    let epp = match spec.epp.as_ref().map(|epp| service(objects, epp)).transpose() {
        Ok(epp) => epp,
        Err(why) => return (InferencePool::Invalid(why), 0),
    };
    let mut endpoints: Vec<_> = objects.pods.iter().flat_map(|pod| members(pod, &spec.ports)).collect();
    endpoints.sort_by_key(|member| (member.address, member.draining));
    endpoints.dedup_by_key(|member| member.address);
    let left_out = endpoints.len().saturating_sub(MAX_ENDPOINTS);
    endpoints.truncate(MAX_ENDPOINTS);
    let fails_open = spec.epp.as_ref().is_some_and(|epp| epp.fails_open);
    (InferencePool::Usable(Usable { endpoints, epp, fails_open, is_h2c: spec.is_h2c }), left_out)
}

/// The endpoints of a Pod: none until it is ready, and draining ones while it is deleted.
fn members<'a>(pod: &'a Pod, ports: &'a [u16]) -> impl Iterator<Item = PodPort> + 'a {
    let ip = pod.ip.filter(|ip| !ip.is_unspecified() && (pod.is_ready || pod.is_terminating));
    let at = move |ip| {
        ports.iter().map(move |&port| PodPort {
            address: SocketAddr::new(ip, port),
            node: pod.node.clone(),
            zone: pod.zone.clone(),
            draining: pod.is_terminating,
        })
    };
    ip.into_iter().flat_map(at)
}

/// The EPP that the pool refers to. The error says which part of the reference does not lead to a port of a Service.
fn service(objects: &Objects<'_>, epp: &EppRef) -> Result<EppService, String> {
    let (namespace, EppRef { name, port, .. }) = (objects.namespace, epp);
    let service = objects.service.ok_or_else(|| format!("the Service {namespace}/{name} of the EPP does not exist"))?;
    if service.is_external {
        return Err(format!(
            "the Service {namespace}/{name} of the EPP has the type ExternalName, which is not supported"
        ));
    }
    let named = service.ports.iter().find(|one| one.port == *port).map(|one| one.name.as_str());
    let named = named.ok_or_else(|| format!("the Service {namespace}/{name} of the EPP has no TCP port {port}"))?;
    let mut replicas: Vec<_> = objects.slices.iter().flat_map(|slice| replicas(slice, named)).collect();
    replicas.sort_unstable();
    replicas.dedup();
    replicas.truncate(MAX_REPLICAS);
    Ok(EppService { address: format!("{name}.{namespace}.svc:{port}"), replicas })
}

/// The ready addresses of a slice at the port with this name.
fn replicas(slice: &EndpointSlice, name: &str) -> Vec<SocketAddr> {
    let is_named = |port: &&super::objects::SlicePort| port.name.as_deref().unwrap_or_default() == name;
    let port = slice.ports.iter().find(is_named).and_then(|port| port.port);
    port.map_or_else(Vec::new, |port| slice.ready.iter().map(|&ip| SocketAddr::new(ip, port)).collect())
}

#[cfg(test)]
mod tests;
