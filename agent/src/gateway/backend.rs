//! Translates the references of a rule to pools. A reference to another namespace needs a ReferenceGrant there.

use serde_json::Value;

use super::{
    MAX_POOLS,
    objects::{ApiObject, BackendRef, GROUP, GrantSpec, HttpRouteSpec},
};
use crate::config::{InferencePoolRef, InferencePoolVersion, RefusedRoute, WeightedPool};

/// What namespaces grant to references from others, and the pools that references have led to.
pub(super) struct Grants {
    /// Each with its namespace.
    grants: Vec<(String, GrantSpec)>,
    pools: Vec<InferencePoolRef>,
}

/// Whether a rule refers to another namespace, so that ReferenceGrants are needed.
pub fn crosses_namespaces(route: &ApiObject) -> bool {
    let own = route.metadata.namespace.as_str();
    let other = |backend: &Value| backend["namespace"].as_str().is_some_and(|namespace| namespace != own);
    let crosses = |rule: &Value| rule["backendRefs"].as_array().is_some_and(|backends| backends.iter().any(other));
    route.read::<HttpRouteSpec>().is_ok_and(|spec| spec.rules.iter().any(crosses))
}

impl Grants {
    pub(super) fn new(objects: &[ApiObject]) -> Self {
        let grant = |object: &ApiObject| Some((object.metadata.namespace.clone(), object.read().ok()?));
        Self { grants: objects.iter().filter_map(grant).collect(), pools: Vec::new() }
    }

    /// The pools of all shares, sorted.
    pub(super) fn into_pools(mut self) -> Vec<InferencePoolRef> {
        self.pools.sort();
        self.pools
    }

    /// The share of a reference of this route. `rule` names the rule in errors.
    pub(super) fn share(&mut self, of: &ApiObject, rule: &str, backend: &BackendRef) -> WeightedPool {
        let weight = backend.weight.unwrap_or(1);
        match self.pool(of, backend) {
            Ok(pool) => WeightedPool::new(pool_name(&pool), weight),
            Err(BackendRefusal::Backend(why)) => {
                refused(backend, weight, RefusedRoute::Backend(format!("{rule}: {why}")))
            }
            Err(BackendRefusal::Unsupported(why)) => {
                refused(backend, weight, RefusedRoute::Unsupported(format!("{rule}: {why}")))
            }
        }
    }

    fn pool(&mut self, of: &ApiObject, backend: &BackendRef) -> Result<InferencePoolRef, BackendRefusal> {
        let (group, kind) = (backend.group.as_deref().unwrap_or(""), backend.kind.as_deref().unwrap_or("Service"));
        let version = match (group, kind) {
            ("inference.networking.k8s.io", "InferencePool") => InferencePoolVersion::V1,
            ("inference.networking.x-k8s.io", "InferencePool") => InferencePoolVersion::V1Alpha2,
            _ => {
                let found = format!("backendRefs of kind {kind} of group {group:?} are not implemented");
                return Err(BackendRefusal::Backend(format!("{found}, expected an InferencePool")));
            }
        };
        if !backend.filters.is_empty() {
            return Err(BackendRefusal::Unsupported("backendRefs.filters is not implemented".to_owned()));
        }
        let own = &of.metadata.namespace;
        let namespace = backend.namespace.as_ref().unwrap_or(own);
        if namespace != own && !self.is_granted(own, namespace, group, &backend.name) {
            let what = format!("the InferencePool {namespace}/{}", backend.name);
            return Err(BackendRefusal::Backend(format!(
                "no ReferenceGrant in {namespace} permits the reference to {what}"
            )));
        }
        let pool = InferencePoolRef { namespace: namespace.clone(), name: backend.name.clone(), version };
        if !self.pools.contains(&pool) {
            if self.pools.len() == MAX_POOLS {
                return Err(BackendRefusal::Backend(format!(
                    "HTTPRoutes refer to more than {MAX_POOLS} InferencePools"
                )));
            }
            self.pools.push(pool.clone());
        }
        Ok(pool)
    }

    /// Whether HTTPRoutes of the namespace `from` may refer to an InferencePool of the namespace `to`.
    fn is_granted(&self, from: &str, to: &str, group: &str, name: &str) -> bool {
        let in_namespace = self.grants.iter().filter(|(namespace, _)| namespace == to);
        let grants = |grant: &GrantSpec| {
            let comes =
                grant.from.iter().any(|one| one.group == GROUP && one.kind == "HTTPRoute" && one.namespace == from);
            let is_target =
                |named: &Option<String>| named.as_ref().is_none_or(|named| named.is_empty() || named == name);
            comes
                && grant.to.iter().any(|one| one.group == group && one.kind == "InferencePool" && is_target(&one.name))
        };
        in_namespace.map(|(_, grant)| grant).any(grants)
    }
}

enum BackendRefusal {
    Backend(String),
    Unsupported(String),
}

fn refused(backend: &BackendRef, weight: u32, why: RefusedRoute) -> WeightedPool {
    WeightedPool { refused: Some(why), ..WeightedPool::new(backend.name.clone(), weight) }
}

/// The name of the pool of an InferencePool to which HTTPRoutes refer, unless the file names it otherwise.
pub fn pool_name(pool: &InferencePoolRef) -> String {
    match pool.version {
        InferencePoolVersion::V1 => pool.to_string(),
        InferencePoolVersion::V1Alpha2 => format!("{pool}/v1alpha2"),
    }
}
