//! Objects for the API server of tests, as clusters have them, with fields that the agent does not use.

use std::net::SocketAddr;

use serde_json::{Value, json};

/// The namespace of all of these.
pub const NAMESPACE: &str = "models";

/// The Service of an EPP and its port, which differs from the port of its Pods.
pub const EPP: (&str, u16) = ("epp", 9002);

fn metadata(name: &str, labels: &Value) -> Value {
    json!({
        "name": name,
        "namespace": NAMESPACE,
        "uid": format!("uid-of-{name}"),
        "labels": labels,
        "managedFields": [{ "manager": "kubectl", "operation": "Update", "fieldsV1": { "f:spec": {} } }],
    })
}

/// An InferencePool v1 of the Pods with `app: vllm` at `port`, with the EPP [`EPP`].
pub fn pool(name: &str, port: u16, failure_mode: &str) -> Value {
    json!({
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": metadata(name, &json!({})),
        "spec": {
            "selector": { "matchLabels": { "app": "vllm" } },
            "targetPorts": [{ "number": port }],
            "endpointPickerRef": {
                "group": "", "kind": "Service", "name": EPP.0, "port": { "number": EPP.1 }, "failureMode": failure_mode,
            },
        },
    })
}

/// The same without an EPP.
pub fn pool_without_epp(name: &str, port: u16) -> Value {
    let mut pool = pool(name, port, "FailClose");
    pool["spec"].as_object_mut().expect("an object").remove("endpointPickerRef");
    pool
}

/// An InferencePool v1alpha2 without an EPP.
pub fn pool_v1alpha2(name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
        "kind": "InferencePool",
        "metadata": metadata(name, &json!({})),
        "spec": { "selector": { "app": "vllm" }, "targetPortNumber": port },
    })
}

/// A ready Pod with the label `app: vllm` at the address of a model server.
pub fn pod(name: &str, server: SocketAddr) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata(name, &json!({ "app": "vllm" })),
        "spec": { "nodeName": "node-1", "containers": [{ "name": "vllm", "image": "vllm" }] },
        "status": {
            "phase": "Running",
            "podIP": server.ip(),
            "podIPs": [{ "ip": server.ip() }],
            "conditions": [{ "type": "Initialized", "status": "True" }, { "type": "Ready", "status": "True" }],
        },
    })
}

/// The same Pod when it is not ready.
pub fn unready(mut pod: Value) -> Value {
    pod["status"]["conditions"][1]["status"] = "False".into();
    pod
}

/// The same Pod when it is being deleted.
pub fn terminating(mut pod: Value) -> Value {
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    pod
}

/// The Service of the EPP.
pub fn epp_service() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(EPP.0, &json!({})),
        "spec": { "type": "ClusterIP", "ports": [{ "name": "grpc", "port": EPP.1, "targetPort": "grpc", "protocol": "TCP" }] },
    })
}

/// The endpoints of the EPP's Service. All have the same port.
pub fn epp_slice(replicas: &[SocketAddr]) -> Value {
    let endpoint = |replica: &SocketAddr| json!({ "addresses": [replica.ip()], "conditions": { "ready": true, "serving": true, "terminating": false } });
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata("epp-abcde", &json!({ "kubernetes.io/service-name": EPP.0 })),
        "addressType": "IPv4",
        "ports": [{ "name": "grpc", "port": replicas.first().map_or(1, SocketAddr::port), "protocol": "TCP" }],
        "endpoints": replicas.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

/// The namespace of [`gateway`].
pub const INFRA: &str = "infra";

/// A Gateway of [`INFRA`] with these listeners.
pub fn gateway(name: &str, listeners: &Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": { "name": name, "namespace": INFRA, "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": { "gatewayClassName": "penstock", "listeners": listeners },
    })
}

/// An HTTPRoute of this namespace that names the Gateway `gateway` of [`INFRA`] as its parent.
pub fn http_route(namespace: &str, name: &str, gateway: &str, rules: &Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": { "name": name, "namespace": namespace, "creationTimestamp": "2026-01-01T00:00:00Z", "managedFields": [{}] },
        "spec": { "parentRefs": [{ "name": gateway, "namespace": INFRA }], "rules": rules },
        "status": { "parents": [] },
    })
}

/// A reference of an HTTPRoute to an InferencePool of [`NAMESPACE`].
pub fn to_pool(name: &str) -> Value {
    json!({ "group": "inference.networking.k8s.io", "kind": "InferencePool", "namespace": NAMESPACE, "name": name })
}

/// A ReferenceGrant of [`NAMESPACE`] for HTTPRoutes of this namespace to every InferencePool.
pub fn grant(from: &str) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1beta1",
        "kind": "ReferenceGrant",
        "metadata": { "name": format!("from-{from}"), "namespace": NAMESPACE },
        "spec": {
            "from": [{ "group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": from }],
            "to": [{ "group": "inference.networking.k8s.io", "kind": "InferencePool" }],
        },
    })
}

/// A namespace with these labels.
pub fn namespace(name: &str, labels: &Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } })
}
