//! The API objects of a Gateway: those that are kept, and the parts of their `spec` that are read. A part of a rule that is not
//! read here is found in `other`, so that it can be refused instead of ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// The group of Gateways and HTTPRoutes.
pub const GROUP: &str = "gateway.networking.k8s.io";

/// An object as it is kept: nothing of its status, its annotations or `managedFields`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ApiObject {
    pub metadata: ApiMetadata,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub spec: Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ApiMetadata {
    /// Empty for objects of the cluster.
    pub namespace: String,
    pub name: String,
    pub resource_version: String,
    /// In the form of RFC 3339, which sorts by time.
    pub creation_timestamp: String,
    pub labels: BTreeMap<String, String>,
}

impl ApiObject {
    /// `namespace/name`, unique among the objects of one kind.
    pub fn key(&self) -> String {
        format!("{}/{}", self.metadata.namespace, self.metadata.name)
    }

    /// The fields of `spec` that `T` has. The error names the first one that cannot be read.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, String> {
        T::deserialize(&self.spec).map_err(|error| error.to_string())
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct GatewaySpec {
    #[serde(default)]
    pub(super) listeners: Vec<GatewayListener>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GatewayListener {
    pub(super) name: String,
    #[serde(default)]
    pub(super) hostname: String,
    pub(super) port: u16,
    pub(super) protocol: String,
    #[serde(default)]
    pub(super) allowed_routes: AllowedRoutes,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct AllowedRoutes {
    pub(super) namespaces: RouteNamespaces,
    pub(super) kinds: Vec<RouteKind>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct RouteNamespaces {
    /// `Same` if absent.
    pub(super) from: Option<String>,
    /// Without one, `Selector` selects nothing.
    pub(super) selector: Option<Selector>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct RouteKind {
    pub(super) group: Option<String>,
    pub(super) kind: String,
}

/// A label selector. An empty one selects everything.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Selector {
    match_labels: BTreeMap<String, String>,
    match_expressions: Vec<Requirement>,
}

#[derive(Debug, Clone, Deserialize)]
struct Requirement {
    key: String,
    operator: String,
    #[serde(default)]
    values: Vec<String>,
}

impl Selector {
    /// Whether it selects an object with these labels. An unknown operator selects nothing.
    pub(super) fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let is_met = |one: &Requirement| match (one.operator.as_str(), labels.get(&one.key)) {
            ("In", Some(value)) => one.values.contains(value),
            ("NotIn", value) => value.is_none_or(|value| !one.values.contains(value)),
            ("Exists", value) => value.is_some(),
            ("DoesNotExist", value) => value.is_none(),
            _ => false,
        };
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(is_met)
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct HttpRouteSpec {
    pub(super) parent_refs: Vec<ParentRef>,
    pub(super) hostnames: Vec<String>,
    /// Each is read by itself, so that one of an unknown form does not take the others with it.
    pub(super) rules: Vec<Value>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ParentRef {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) section_name: Option<String>,
    pub(super) port: Option<u16>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct HttpRule {
    /// For humans.
    #[serde(rename = "name")]
    _name: Option<String>,
    pub(super) matches: Vec<HttpMatch>,
    pub(super) filters: Vec<HttpFilter>,
    pub(super) backend_refs: Vec<BackendRef>,
    pub(super) timeouts: RouteTimeouts,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct HttpMatch {
    pub(super) path: Option<ValueMatch>,
    pub(super) headers: Vec<ValueMatch>,
    pub(super) query_params: Vec<ValueMatch>,
    pub(super) method: Option<String>,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

/// A match of a path, a header or a parameter of the query.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ValueMatch {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) name: String,
    pub(super) value: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct HttpFilter {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) request_header_modifier: Option<HeaderModifier>,
    pub(super) url_rewrite: Option<UrlRewrite>,
    pub(super) request_redirect: Option<RequestRedirect>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct HeaderModifier {
    pub(super) set: Vec<NamedValue>,
    pub(super) add: Vec<NamedValue>,
    pub(super) remove: Vec<String>,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct NamedValue {
    pub(super) name: String,
    #[serde(default)]
    pub(super) value: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct UrlRewrite {
    pub(super) hostname: Option<String>,
    pub(super) path: Option<PathModifier>,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RequestRedirect {
    pub(super) scheme: Option<String>,
    pub(super) hostname: Option<String>,
    pub(super) path: Option<PathModifier>,
    pub(super) port: Option<u16>,
    pub(super) status_code: Option<u16>,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PathModifier {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) replace_full_path: Option<String>,
    pub(super) replace_prefix_match: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct BackendRef {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) weight: Option<u32>,
    #[serde(default)]
    pub(super) filters: Vec<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RouteTimeouts {
    pub(super) request: Option<String>,
    pub(super) backend_request: Option<String>,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct GrantSpec {
    pub(super) from: Vec<GrantFrom>,
    pub(super) to: Vec<GrantTo>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct GrantFrom {
    pub(super) group: String,
    pub(super) kind: String,
    pub(super) namespace: String,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct GrantTo {
    pub(super) group: String,
    pub(super) kind: String,
    pub(super) name: Option<String>,
}
