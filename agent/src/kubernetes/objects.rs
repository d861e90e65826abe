//! The API objects that describe a pool, reduced while they are read to what the agent uses. Everything else of an object, such as
//! `managedFields` or a Pod's containers, is never kept.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

/// The port of an EPP whose `extensionRef` names none (v1alpha2).
const EPP_PORT: i64 = 9002;
/// The label of a Pod that Kubernetes copies from its node (1.35 and later).
const ZONE: &str = "topology.kubernetes.io/zone";

/// An object of the API.
pub(super) trait Object: DeserializeOwned + Clone + Send + 'static {
    /// Its name, unique in its namespace.
    fn name(&self) -> &str;
    /// What makes it unique among the objects of one query.
    fn key(&self) -> String {
        self.name().to_owned()
    }
    /// Takes its `resourceVersion`, from which a watch continues. Two objects that differ only in it are equal for the agent.
    fn take_version(&mut self) -> String;
}

macro_rules! named {
    ($($object:ty),+) => {
        $(impl Object for $object {
            fn name(&self) -> &str {
                &self.name
            }

            fn take_version(&mut self) -> String {
                std::mem::take(&mut self.version)
            }
        })+
    };
}

named!(InferencePoolObject, Pod, Service, EndpointSlice);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    #[serde(default)]
    resource_version: String,
    deletion_timestamp: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// An InferencePool of either version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "RawPool")]
pub(super) struct InferencePoolObject {
    pub(super) name: String,
    pub(super) version: String,
    /// The error says what in the object was wrong and what was expected.
    pub(super) spec: Result<PoolSpec, String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PoolSpec {
    /// Labels of its Pods, at least one.
    pub(super) selector: BTreeMap<String, String>,
    /// At least one.
    pub(super) ports: Vec<u16>,
    pub(super) is_h2c: bool,
    pub(super) epp: Option<EppRef>,
}

/// The reference to the Service of an EPP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EppRef {
    pub(super) name: String,
    /// Port of the Service, not of its Pods.
    pub(super) port: u16,
    pub(super) fails_open: bool,
}

#[derive(Deserialize)]
struct RawPool {
    metadata: Metadata,
    #[serde(default)]
    spec: RawPoolSpec,
}

/// The fields of both versions. v1alpha2 has `targetPortNumber`, `extensionRef` and the labels directly in `selector`.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPoolSpec {
    selector: Value,
    target_ports: Vec<RawPort>,
    target_port_number: Option<i64>,
    app_protocol: Option<String>,
    endpoint_picker_ref: Option<RawRef>,
    extension_ref: Option<RawRef>,
}

#[derive(Deserialize)]
struct RawPort {
    number: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRef {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    port: Option<RawPort>,
    port_number: Option<i64>,
    failure_mode: Option<String>,
}

impl From<RawPool> for InferencePoolObject {
    fn from(raw: RawPool) -> Self {
        Self { name: raw.metadata.name, version: raw.metadata.resource_version, spec: raw.spec.try_into() }
    }
}

impl TryFrom<RawPoolSpec> for PoolSpec {
    type Error = String;

    fn try_from(raw: RawPoolSpec) -> Result<Self, String> {
        const MAX_PORTS: usize = 8;
        let ports = match raw.target_port_number {
            Some(number) => vec![port("targetPortNumber", number)?],
            None => raw.target_ports.iter().map(|raw| port("targetPorts", raw.number)).collect::<Result<_, _>>()?,
        };
        if ports.is_empty() || ports.len() > MAX_PORTS {
            return Err(format!("targetPorts: found {} ports, expected 1 to {MAX_PORTS}", ports.len()));
        }
        let is_h2c = match raw.app_protocol.as_deref() {
            None | Some("" | "http") => false,
            Some("kubernetes.io/h2c") => true,
            Some(other) => {
                return Err(format!("appProtocol: found {other:?}, expected \"http\" or \"kubernetes.io/h2c\""));
            }
        };
        let epp = match (raw.endpoint_picker_ref, raw.extension_ref) {
            (Some(of_v1), _) => Some(epp("endpointPickerRef", of_v1, None)?),
            (None, Some(of_v1alpha2)) => Some(epp("extensionRef", of_v1alpha2, Some(EPP_PORT))?),
            (None, None) => None,
        };
        Ok(Self { selector: labels(&raw.selector)?, ports, is_h2c, epp })
    }
}

fn port(field: &str, number: i64) -> Result<u16, String> {
    let port = u16::try_from(number).ok().filter(|port| *port > 0);
    port.ok_or_else(|| format!("{field}: found port {number}, expected 1 to 65535"))
}

fn epp(field: &str, raw: RawRef, default_port: Option<i64>) -> Result<EppRef, String> {
    let (group, kind) = (raw.group.unwrap_or_default(), raw.kind.unwrap_or_else(|| "Service".to_owned()));
    if !group.is_empty() || kind != "Service" {
        return Err(format!("{field}: found kind {kind:?} of group {group:?}, expected a Service of the core group"));
    }
    let number = raw.port.map(|port| port.number).or(raw.port_number).or(default_port);
    let number =
        number.ok_or_else(|| format!("{field}.port: found nothing, expected the number of the Service's port"))?;
    let fails_open = match raw.failure_mode.as_deref() {
        None | Some("" | "FailClose") => false,
        Some("FailOpen") => true,
        Some(other) => {
            return Err(format!("{field}.failureMode: found {other:?}, expected \"FailOpen\" or \"FailClose\""));
        }
    };
    Ok(EppRef { name: raw.name, port: port(&format!("{field}.port"), number)?, fails_open })
}

fn labels(selector: &Value) -> Result<BTreeMap<String, String>, String> {
    let labels = selector.get("matchLabels").filter(|labels| labels.is_object()).unwrap_or(selector);
    let text = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
    let labels = labels.as_object().and_then(|labels| labels.iter().map(text).collect::<Option<BTreeMap<_, _>>>());
    labels
        .filter(|labels| !labels.is_empty())
        .ok_or_else(|| "selector: found no labels, expected at least one".to_owned())
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "RawPod")]
pub(super) struct Pod {
    pub(super) name: String,
    pub(super) version: String,
    /// None until it has one, and once its containers have ended for good: the address may then be that of another Pod.
    pub(super) ip: Option<IpAddr>,
    pub(super) is_ready: bool,
    /// It is being deleted.
    pub(super) is_terminating: bool,
    pub(super) node: Option<String>,
    pub(super) zone: Option<String>,
}

#[derive(Deserialize)]
struct RawPod {
    metadata: Metadata,
    #[serde(default)]
    spec: RawPodSpec,
    #[serde(default)]
    status: RawPodStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct RawPodSpec {
    node_name: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPodStatus {
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    conditions: Vec<RawCondition>,
}

#[derive(Deserialize)]
struct RawCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

impl From<RawPod> for Pod {
    fn from(RawPod { mut metadata, spec, status }: RawPod) -> Self {
        let has_ended = matches!(status.phase.as_str(), "Failed" | "Succeeded");
        Self {
            zone: metadata.labels.remove(ZONE),
            name: metadata.name,
            version: metadata.resource_version,
            ip: status.pod_ip.filter(|_| !has_ended).and_then(|ip| ip.parse().ok()),
            is_ready: status.conditions.iter().any(|one| one.kind == "Ready" && one.status == "True"),
            is_terminating: metadata.deletion_timestamp.is_some(),
            node: spec.node_name,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "RawService")]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) version: String,
    /// It stands for a DNS name outside of the cluster.
    pub(super) is_external: bool,
    /// Those for TCP.
    pub(super) ports: Vec<ServicePort>,
}

/// A port with its protocol. A Service may have the same number for several protocols.
#[derive(Deserialize)]
struct RawProtocolPort<P> {
    /// TCP if absent.
    protocol: Option<String>,
    #[serde(flatten)]
    port: P,
}

/// The ports for TCP.
fn tcp<P>(ports: Vec<RawProtocolPort<P>>) -> Vec<P> {
    let is_tcp = |port: &RawProtocolPort<P>| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
    ports.into_iter().filter(is_tcp).map(|raw| raw.port).collect()
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct ServicePort {
    /// May be empty if it is the only one.
    #[serde(default)]
    pub(super) name: String,
    pub(super) port: u16,
}

#[derive(Deserialize)]
struct RawService {
    metadata: Metadata,
    #[serde(default)]
    spec: RawServiceSpec,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawServiceSpec {
    #[serde(rename = "type")]
    kind: String,
    ports: Vec<RawProtocolPort<ServicePort>>,
}

impl From<RawService> for Service {
    fn from(RawService { metadata, spec }: RawService) -> Self {
        let is_external = spec.kind == "ExternalName";
        Self { name: metadata.name, version: metadata.resource_version, is_external, ports: tcp(spec.ports) }
    }
}

/// A part of a Service's endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "RawSlice")]
pub(super) struct EndpointSlice {
    pub(super) name: String,
    pub(super) version: String,
    /// Those for TCP.
    pub(super) ports: Vec<SlicePort>,
    /// The addresses of ready endpoints. All of one slice have the same ports.
    pub(super) ready: Vec<IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct SlicePort {
    pub(super) name: Option<String>,
    pub(super) port: Option<u16>,
}

#[derive(Deserialize)]
struct RawSlice {
    metadata: Metadata,
    /// Null in an empty list.
    endpoints: Option<Vec<RawEndpoint>>,
    ports: Option<Vec<RawProtocolPort<SlicePort>>>,
}

#[derive(Deserialize)]
struct RawEndpoint {
    /// Consumers use the first.
    addresses: Vec<String>,
    #[serde(default)]
    conditions: RawConditions,
}

#[derive(Deserialize, Default)]
struct RawConditions {
    /// Unknown counts as ready.
    ready: Option<bool>,
}

impl From<RawSlice> for EndpointSlice {
    fn from(raw: RawSlice) -> Self {
        let is_ready = |endpoint: &RawEndpoint| endpoint.conditions.ready.unwrap_or(true);
        // A slice of DNS names has no address that can be parsed.
        let address = |endpoint: RawEndpoint| endpoint.addresses.first()?.parse().ok();
        let ready = raw.endpoints.unwrap_or_default().into_iter().filter(is_ready).filter_map(address).collect();
        let ports = tcp(raw.ports.unwrap_or_default());
        Self { name: raw.metadata.name, version: raw.metadata.resource_version, ports, ready }
    }
}

#[cfg(test)]
mod tests;
