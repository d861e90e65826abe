//! What is asked of the API server: a resource, where, and which of its objects.

use std::{fmt, time::Duration};

use http::Request;
use kube::core::params::{ListParams, WatchParams};

use crate::{config::InferencePoolVersion, gateway};

/// Objects of one reply to a list.
const PAGE: u32 = 500;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resource {
    /// Empty for the core group.
    pub(super) group: &'static str,
    pub(super) version: &'static str,
    pub(super) plural: &'static str,
}

pub(super) const PODS: Resource = Resource { group: "", version: "v1", plural: "pods" };
pub(super) const SERVICES: Resource = Resource { group: "", version: "v1", plural: "services" };
pub(super) const ENDPOINT_SLICES: Resource =
    Resource { group: "discovery.k8s.io", version: "v1", plural: "endpointslices" };

pub(super) const GATEWAYS: Resource = Resource { group: gateway::GROUP, version: "v1", plural: "gateways" };
pub(super) const HTTP_ROUTES: Resource = Resource { group: gateway::GROUP, version: "v1", plural: "httproutes" };
pub(super) const REFERENCE_GRANTS: Resource =
    Resource { group: gateway::GROUP, version: "v1beta1", plural: "referencegrants" };
/// They have no namespace themselves.
pub(super) const NAMESPACES: Resource = Resource { group: "", version: "v1", plural: "namespaces" };

/// The InferencePools of a version.
pub(super) fn pools(version: InferencePoolVersion) -> Resource {
    let (group, version) = match version {
        InferencePoolVersion::V1 => ("inference.networking.k8s.io", "v1"),
        InferencePoolVersion::V1Alpha2 => ("inference.networking.x-k8s.io", "v1alpha2"),
    };
    Resource { group, version, plural: "inferencepools" }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.group {
            "" => f.write_str(self.plural),
            group => write!(f, "{}.{group}", self.plural),
        }
    }
}

/// Some objects of a resource in one namespace, or in all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Query {
    pub(super) resource: Resource,
    /// Empty for all.
    pub(super) namespace: String,
    /// As in the API's `labelSelector`; empty selects all.
    pub(super) labels: String,
    /// As in the API's `fieldSelector`; empty selects all.
    pub(super) fields: String,
}

type Built = Result<Request<Vec<u8>>, kube::core::request::Error>;

impl Query {
    /// The object with this name.
    pub(super) fn one(resource: Resource, namespace: &str, name: &str) -> Self {
        let fields = format!("metadata.name={name}");
        Self { resource, namespace: namespace.to_owned(), labels: String::new(), fields }
    }

    /// The objects with these labels.
    pub(super) fn labelled<'a>(
        resource: Resource,
        namespace: &str,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        let labels: Vec<_> = labels.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
        Self { resource, namespace: namespace.to_owned(), labels: labels.join(","), fields: String::new() }
    }

    fn url(&self) -> String {
        let Resource { group, version, plural } = self.resource;
        let api = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
        match self.namespace.as_str() {
            "" => format!("{api}/{plural}"),
            namespace => format!("{api}/namespaces/{namespace}/{plural}"),
        }
    }

    fn selectors(&self) -> (Option<String>, Option<String>) {
        let given = |selector: &String| Some(selector.clone()).filter(|selector| !selector.is_empty());
        (given(&self.labels), given(&self.fields))
    }

    /// The request for a page of a list.
    pub(super) fn list(&self, next: Option<&str>) -> Built {
        let (label_selector, field_selector) = self.selectors();
        let continue_token = next.map(ToOwned::to_owned);
        let limit = Some(PAGE);
        let page = ListParams { label_selector, field_selector, limit, continue_token, ..ListParams::default() };
        kube::core::Request::new(self.url()).list(&page)
    }

    /// The request for the changes after `version`, for this time.
    pub(super) fn watch(&self, version: &str, lasts: Duration) -> Built {
        let seconds = u32::try_from(lasts.as_secs().max(1)).unwrap_or(u32::MAX);
        let (label_selector, field_selector) = self.selectors();
        let params = WatchParams { label_selector, field_selector, timeout: Some(seconds), ..WatchParams::default() };
        kube::core::Request::new(self.url()).watch(&params, version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_group_namespace_and_selector() {
        let pods = Query::labelled(PODS, "n", [("app", "vllm"), ("x/y", "z")]);
        let uri = pods.list(None).unwrap().uri().to_string();
        assert_eq!(uri, "/api/v1/namespaces/n/pods?&labelSelector=app%3Dvllm%2Cx%2Fy%3Dz&limit=500");
        let everywhere = Query::labelled(HTTP_ROUTES, "", []).list(None).unwrap().uri().to_string();
        assert!(everywhere.starts_with("/apis/gateway.networking.k8s.io/v1/httproutes?"), "{everywhere}");
        let pool = Query::one(pools(InferencePoolVersion::V1), "n", "p");
        let uri = pool.watch("7", Duration::from_millis(1500)).unwrap().uri().to_string();
        let (path, query) = uri.split_once('?').unwrap();
        assert_eq!(path, "/apis/inference.networking.k8s.io/v1/namespaces/n/inferencepools");
        for part in [
            "watch=true",
            "timeoutSeconds=1",
            "fieldSelector=metadata.name%3Dp",
            "allowWatchBookmarks=true",
            "resourceVersion=7",
        ] {
            assert!(query.split('&').any(|found| found == part), "{part}: {query}");
        }
    }

    #[test]
    fn next_page_has_the_token() {
        let uri = Query::labelled(PODS, "n", []).list(Some("a b")).unwrap().uri().to_string();
        assert!(uri.contains("continue=a") && uri.contains("limit=500"), "{uri}");
    }
}
