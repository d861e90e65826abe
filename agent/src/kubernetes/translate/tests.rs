//! Objects of one pool, and the pool that they mean.

use serde_json::json;

use super::*;

fn pool(spec: &serde_json::Value) -> InferencePoolObject {
    let mut whole = json!({ "selector": { "matchLabels": { "app": "vllm" } }, "targetPorts": [{ "number": 8000 }] });
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(json!({ "metadata": { "name": "p" }, "spec": whole })).unwrap()
}

fn pod(name: &str, ip: &str, is_ready: bool, is_terminating: bool) -> Pod {
    let (version, ip) = (String::new(), ip.parse().ok());
    Pod {
        name: name.to_owned(),
        version,
        ip,
        is_ready,
        is_terminating,
        node: Some(format!("node-of-{name}")),
        zone: None,
    }
}

fn epp_service(ports: &serde_json::Value) -> Service {
    serde_json::from_value(json!({ "metadata": { "name": "epp" }, "spec": { "ports": ports } })).unwrap()
}

fn slice(name: &str, port: &str, number: u16, addresses: &[&str]) -> EndpointSlice {
    let endpoints: Vec<_> = addresses.iter().map(|address| json!({ "addresses": [address] })).collect();
    let ports = json!([{ "name": port, "port": number }]);
    serde_json::from_value(json!({ "metadata": { "name": name }, "ports": ports, "endpoints": endpoints })).unwrap()
}

fn translated(
    pool: &InferencePoolObject,
    pods: &[Pod],
    service: Option<&Service>,
    slices: &[EndpointSlice],
) -> (InferencePool, usize) {
    translate(&Objects { namespace: "n", pool, pods, service, slices })
}

fn usable(pool: &InferencePoolObject, pods: &[Pod], service: Option<&Service>, slices: &[EndpointSlice]) -> Usable {
    match translated(pool, pods, service, slices) {
        (InferencePool::Usable(usable), 0) => usable,
        other => panic!("{other:?}"),
    }
}

fn invalid(pool: &InferencePoolObject, service: Option<&Service>) -> String {
    match translated(pool, &[], service, &[]) {
        (InferencePool::Invalid(why), _) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ready_pods_serve_and_terminating_ones_drain() {
    let pods = [
        pod("ready", "10.0.0.2", true, false),
        pod("unready", "10.0.0.3", false, false),
        pod("leaving", "10.0.0.1", true, true),
        pod("leaving-unready", "10.0.0.4", false, true),
        pod("without-ip", "", true, false),
        pod("unspecified", "0.0.0.0", true, false),
    ];
    let found = usable(&pool(&json!({})), &pods, None, &[]);
    let found: Vec<_> = found.endpoints.iter().map(|member| (member.address.to_string(), member.draining)).collect();
    let expected = [("10.0.0.1:8000", true), ("10.0.0.2:8000", false), ("10.0.0.4:8000", true)];
    assert_eq!(found, expected.map(|(address, draining)| (address.to_owned(), draining)));
}

#[test]
fn each_target_port_of_a_pod_is_an_endpoint() {
    let pool = pool(&json!({ "targetPorts": [{ "number": 8001 }, { "number": 8000 }] }));
    let pods = [pod("a", "10.0.0.1", true, false), pod("b", "fd00::1", true, false)];
    let found = usable(&pool, &pods, None, &[]).endpoints;
    let addresses: Vec<_> = found.iter().map(|member| member.address.to_string()).collect();
    assert_eq!(addresses, ["10.0.0.1:8000", "10.0.0.1:8001", "[fd00::1]:8000", "[fd00::1]:8001"]);
    assert_eq!(found[0].node.as_deref(), Some("node-of-a"));
}

#[test]
fn address_of_two_pods_is_one_endpoint_that_serves() {
    // Two Pods in the network of the same node, of which the older one is leaving.
    let pods = [pod("old", "10.0.0.1", true, true), pod("new", "10.0.0.1", true, false)];
    let found = usable(&pool(&json!({})), &pods, None, &[]).endpoints;
    assert!(found.len() == 1 && !found[0].draining, "{found:?}");
}

#[test]
fn too_many_endpoints_are_cut() {
    let pods: Vec<_> =
        (0..MAX_ENDPOINTS + 3).map(|n| pod("a", &format!("10.0.{}.{}", n / 256, n % 256), true, false)).collect();
    let (found, left_out) = translated(&pool(&json!({})), &pods, None, &[]);
    let InferencePool::Usable(found) = found else { panic!("{found:?}") };
    assert_eq!((found.endpoints.len(), left_out), (MAX_ENDPOINTS, 3));
}

#[test]
fn replicas_are_the_ready_addresses_at_the_port_with_the_services_name() {
    let pool =
        pool(&json!({ "endpointPickerRef": { "name": "epp", "port": { "number": 9002 }, "failureMode": "FailOpen" } }));
    let service = epp_service(&json!([{ "name": "metrics", "port": 9090 }, { "name": "grpc", "port": 9002 }]));
    let slices = [
        slice("epp-1", "grpc", 9102, &["10.0.1.2", "10.0.1.1"]),
        slice("epp-2", "grpc", 9202, &["10.0.1.1", "fd00::1"]),
        slice("epp-3", "metrics", 9090, &["10.0.1.3"]),
    ];
    let found = usable(&pool, &[], Some(&service), &slices);
    assert!(found.fails_open);
    let epp = found.epp.unwrap();
    assert_eq!(epp.address, "epp.n.svc:9002");
    let replicas: Vec<_> = epp.replicas.iter().map(ToString::to_string).collect();
    assert_eq!(replicas, ["10.0.1.1:9102", "10.0.1.1:9202", "10.0.1.2:9102", "[fd00::1]:9202"]);
    let none = usable(&pool, &[], Some(&service), &[]).epp.unwrap();
    assert!(none.replicas.is_empty(), "an EPP without a ready replica is not an invalid reference");
    // The same number for another protocol is another port.
    let service = epp_service(&json!([
        { "name": "quic", "port": 9002, "protocol": "UDP" },
        { "name": "grpc", "port": 9002, "protocol": "TCP" },
    ]));
    let found = usable(&pool, &[], Some(&service), &slices[..1]);
    assert_eq!(found.epp.unwrap().replicas.len(), 2);
    // The only port of a Service needs no name.
    let service = epp_service(&json!([{ "port": 9002 }]));
    let found = usable(&pool, &[], Some(&service), &[slice("epp-1", "", 9102, &["10.0.1.1"])]);
    assert_eq!(found.epp.unwrap().replicas.len(), 1);
}

#[test]
fn reference_that_leads_nowhere_makes_the_pool_invalid() {
    let pool_with = |port: u16| pool(&json!({ "endpointPickerRef": { "name": "epp", "port": { "number": port } } }));
    let service = epp_service(&json!([{ "name": "grpc", "port": 9002 }]));
    let udp = epp_service(&json!([{ "name": "quic", "port": 9002, "protocol": "UDP" }]));
    let external = Service { is_external: true, ..service.clone() };
    let cases = [
        (invalid(&pool_with(9002), None), "the Service n/epp of the EPP does not exist"),
        (invalid(&pool_with(9003), Some(&service)), "the Service n/epp of the EPP has no TCP port 9003"),
        (invalid(&pool_with(9002), Some(&udp)), "the Service n/epp of the EPP has no TCP port 9002"),
        (
            invalid(&pool_with(9002), Some(&external)),
            "the Service n/epp of the EPP has the type ExternalName, which is not supported",
        ),
        (invalid(&pool(&json!({ "targetPorts": [] })), None), "targetPorts: found 0 ports, expected 1 to 8"),
    ];
    for (found, expected) in cases {
        assert_eq!(found, expected);
    }
}
