//! Objects as API servers send them, and what the agent keeps of them.

use serde_json::json;

use super::*;

fn pool(spec: &Value) -> InferencePoolObject {
    serde_json::from_value(json!({
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": { "name": "p", "namespace": "n", "resourceVersion": "7", "managedFields": [{ "manager": "kubectl" }] },
        "spec": spec,
        "status": { "parents": [] },
    }))
    .unwrap()
}

fn epp(name: &str, port: u16, fails_open: bool) -> EppRef {
    EppRef { name: name.to_owned(), port, fails_open }
}

fn spec(ports: &[u16], is_h2c: bool, epp: Option<EppRef>) -> Result<PoolSpec, String> {
    Ok(PoolSpec { selector: [("app".to_owned(), "vllm".to_owned())].into(), ports: ports.to_vec(), is_h2c, epp })
}

#[test]
fn both_versions_of_inference_pools_are_read() {
    let selector = json!({ "matchLabels": { "app": "vllm" } });
    let cases = [
        (json!({ "selector": selector, "targetPorts": [{ "number": 8000 }] }), spec(&[8000], false, None)),
        (
            json!({ "selector": selector, "targetPorts": [{ "number": 8000 }, { "number": 8001 }], "appProtocol": "kubernetes.io/h2c",
                    "endpointPickerRef": { "group": "", "kind": "Service", "name": "epp", "port": { "number": 9002 },
                                           "failureMode": "FailOpen" } }),
            spec(&[8000, 8001], true, Some(epp("epp", 9002, true))),
        ),
        (
            json!({ "selector": selector, "targetPorts": [{ "number": 1 }], "appProtocol": "http",
                    "endpointPickerRef": { "name": "epp", "port": { "number": 80 } } }),
            spec(&[1], false, Some(epp("epp", 80, false))),
        ),
        (
            json!({ "selector": { "app": "vllm" }, "targetPortNumber": 8000,
                    "extensionRef": { "name": "epp", "failureMode": "FailClose" } }),
            spec(&[8000], false, Some(epp("epp", 9002, false))),
        ),
        (
            json!({ "selector": { "app": "vllm" }, "targetPortNumber": 8000, "extensionRef": { "name": "epp", "portNumber": 7 } }),
            spec(&[8000], false, Some(epp("epp", 7, false))),
        ),
    ];
    for (raw, expected) in cases {
        let mut found = pool(&raw);
        assert_eq!((found.take_version(), found.name()), ("7".to_owned(), "p"));
        assert_eq!(found.spec, expected, "{raw}");
    }
}

#[test]
fn invalid_inference_pools_say_what_is_wrong() {
    let with = |field: &str, value: Value| {
        let mut raw = json!({ "selector": { "matchLabels": { "app": "vllm" } }, "targetPorts": [{ "number": 8000 }] });
        raw[field] = value;
        pool(&raw).spec.expect_err(field)
    };
    let ports = |count: i64| (0..count).map(|n| json!({ "number": 8000 + n })).collect::<Value>();
    let epp_with = |field: &str, value: Value| {
        let mut epp = json!({ "name": "epp", "port": { "number": 9002 } });
        epp[field] = value;
        with("endpointPickerRef", epp)
    };
    let cases = [
        (with("targetPorts", ports(0)), "targetPorts: found 0 ports, expected 1 to 8"),
        (with("targetPorts", ports(9)), "targetPorts: found 9 ports, expected 1 to 8"),
        (with("targetPorts", json!([{ "number": 70_000 }])), "targetPorts: found port 70000, expected 1 to 65535"),
        (with("targetPortNumber", json!(0)), "targetPortNumber: found port 0, expected 1 to 65535"),
        (with("selector", json!({ "matchLabels": {} })), "selector: found no labels, expected at least one"),
        (with("selector", Value::Null), "selector: found no labels, expected at least one"),
        (with("appProtocol", json!("https")), r#"appProtocol: found "https", expected "http" or "kubernetes.io/h2c""#),
        (
            epp_with("kind", json!("Deployment")),
            r#"endpointPickerRef: found kind "Deployment" of group "", expected a Service of the core group"#,
        ),
        (
            epp_with("group", json!("example.com")),
            r#"endpointPickerRef: found kind "Service" of group "example.com", expected a Service of the core group"#,
        ),
        (
            epp_with("port", Value::Null),
            "endpointPickerRef.port: found nothing, expected the number of the Service's port",
        ),
        (
            epp_with("failureMode", json!("Ajar")),
            r#"endpointPickerRef.failureMode: found "Ajar", expected "FailOpen" or "FailClose""#,
        ),
    ];
    for (found, expected) in cases {
        assert_eq!(found, expected);
    }
}

#[test]
fn pods_are_reduced_to_address_readiness_and_place() {
    let pod = |metadata: Value, spec: Value, status: Value| -> Pod {
        let mut raw = json!({ "metadata": { "name": "a" }, "spec": spec, "status": status });
        raw["metadata"].as_object_mut().unwrap().extend(metadata.as_object().unwrap().clone());
        serde_json::from_value(raw).unwrap()
    };
    let conditions =
        |ready: &str| json!([{ "type": "Initialized", "status": "True" }, { "type": "Ready", "status": ready }]);
    let ready = json!({ "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }], "conditions": conditions("True") });
    let (name, version, zone) = ("a".to_owned(), String::new(), Some("z1".to_owned()));
    let whole = Pod {
        name,
        version,
        ip: "10.0.0.1".parse().ok(),
        is_ready: true,
        is_terminating: false,
        node: Some("n1".into()),
        zone,
    };
    let labels = json!({ "labels": { "topology.kubernetes.io/zone": "z1", "app": "vllm" } });
    let node = json!({ "nodeName": "n1", "containers": [{ "name": "c" }] });
    assert_eq!(pod(labels.clone(), node.clone(), ready.clone()), whole);
    let deleted = json!({ "deletionTimestamp": "2026-01-01T00:00:00Z", "labels": labels["labels"] });
    assert_eq!(pod(deleted.clone(), node.clone(), ready.clone()), Pod { is_terminating: true, ..whole.clone() });
    for conditions in [conditions("False"), conditions("Unknown"), json!([])] {
        assert!(!pod(json!({}), json!({}), json!({ "conditions": conditions })).is_ready, "{conditions}");
    }
    for (phase, ip) in
        [("Pending", whole.ip), ("Running", whole.ip), ("Unknown", whole.ip), ("Failed", None), ("Succeeded", None)]
    {
        // The condition may be stale, and the address that of another Pod.
        let mut status = ready.clone();
        status["phase"] = phase.into();
        for metadata in [labels.clone(), deleted.clone()] {
            assert_eq!(pod(metadata, node.clone(), status.clone()).ip, ip, "{phase}");
        }
    }
    let new = pod(json!({}), json!({}), json!({}));
    assert_eq!(new, Pod { ip: None, is_ready: false, node: None, zone: None, ..whole });
}

#[test]
fn services_and_slices_are_reduced_to_ports_and_ready_addresses() {
    let service: Service = serde_json::from_value(json!({
        "metadata": { "name": "epp" },
        "spec": { "type": "ClusterIP", "ports": [{ "name": "grpc", "port": 9002, "targetPort": "grpc" }, { "port": 9090 }] },
    }))
    .unwrap();
    let port = |name: &str, port| ServicePort { name: name.to_owned(), port };
    assert!(!service.is_external && service.ports == [port("grpc", 9002), port("", 9090)]);
    let external: Service = serde_json::from_value(json!({
        "metadata": { "name": "epp" }, "spec": { "type": "ExternalName", "externalName": "epp.example.com" },
    }))
    .unwrap();
    assert!(external.is_external && external.ports.is_empty());

    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": { "name": "epp-1", "labels": { "kubernetes.io/service-name": "epp" } },
        "addressType": "IPv4",
        "ports": [
            { "name": "grpc", "port": 9103, "protocol": "UDP" },
            { "name": "grpc", "port": 9104, "protocol": "SCTP" },
            { "name": "grpc", "port": 9102, "protocol": "TCP" },
        ],
        "endpoints": [
            { "addresses": ["10.0.1.1", "10.0.9.9"], "conditions": { "ready": true } },
            { "addresses": ["10.0.1.2"], "conditions": { "ready": false, "serving": true, "terminating": true } },
            { "addresses": ["10.0.1.3"], "conditions": {} },
            { "addresses": ["10.0.1.4"] },
            { "addresses": [] },
        ],
    }))
    .unwrap();
    let ready: Vec<_> = slice.ready.iter().map(ToString::to_string).collect();
    assert_eq!(ready, ["10.0.1.1", "10.0.1.3", "10.0.1.4"]);
    assert_eq!(slice.ports, [SlicePort { name: Some("grpc".into()), port: Some(9102) }]);
    for raw in [
        json!({ "metadata": { "name": "a" }, "endpoints": null, "ports": null }),
        json!({ "metadata": { "name": "a" }, "addressType": "FQDN", "endpoints": [{ "addresses": ["epp.example.com"] }] }),
    ] {
        let empty: EndpointSlice = serde_json::from_value(raw).unwrap();
        assert!(empty.ready.is_empty());
    }
}
