use super::*;

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

/// Names and values.
type Fields<'a> = &'a [(&'a str, &'a str)];

fn map(fields: Fields<'_>) -> HeaderMap {
    fields
        .iter()
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap()))
        .fold(HeaderMap::new(), |mut map, (name, value)| {
            map.append(name, value);
            map
        })
}

fn prepared(fields: Fields<'_>) -> HeaderMap {
    let mut headers = map(fields);
    let (destination, model) = (HeaderName::from_static("x-pick"), HeaderName::from_static("x-gateway-model-name"));
    remove_control(&mut headers, &destination, &model);
    prepare_request(&mut headers, Version::HTTP_11, CLIENT, &model);
    headers
}

#[test]
fn hop_by_hop_fields_stay_behind() {
    let table: &[(Fields<'_>, &[&str])] = &[
        (&[("connection", "close"), ("a", "1")], &["a"]),
        (&[("connection", "X-Hop , keep-alive"), ("x-hop", "1"), ("keep-alive", "timeout=5")], &[]),
        (&[("connection", "x-b"), ("connection", "x-c"), ("x-b", "1"), ("x-c", "1"), ("x-d", "1")], &["x-d"]),
        (&[("te", "trailers"), ("upgrade", "websocket"), ("proxy-connection", "close")], &[]),
        (&[("transfer-encoding", "chunked"), ("proxy-authorization", "secret")], &[]),
        // Connection cannot take away what frames, addresses or explains the message.
        (
            &[("connection", "host, content-length, content-type"), ("host", "h"), ("content-length", "1")],
            &["content-length", "host"],
        ),
        (&[("connection", ",, (bad),"), ("a", "1")], &["a"]),
    ];
    for (fields, left) in table {
        let mut headers = map(fields);
        remove_hop_by_hop(&mut headers);
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, *left, "{fields:?}");
    }
}

#[test]
fn control_fields_from_clients_are_stripped() {
    let control = [
        "x-gateway-destination-endpoint",
        "X-Gateway-Destination-Endpoint-Subset",
        "x-gateway-destination-endpoint-served",
        "x_gateway_destination_endpoint",
        "x-prefiller-host-port",
        "x-encoder-hosts-ports",
        "x-data-parallel-host-port",
        "x-kv-cache-source-host-port",
        "x-envoy-original-path",
        "x_envoy_upstream_rq_timeout_ms",
        "x-pick",
        "X_Pick",
        "x-gateway-model-name",
    ];
    for name in control {
        let headers = prepared(&[(name, "10.0.0.1:80"), (name, "10.0.0.2:80"), ("x-kept", "1")]);
        assert!(!headers.contains_key(name), "{name}");
        assert!(headers.contains_key("x-kept"), "{name}");
    }
    let near = ["x-gateway-model", "x-prefiller-host-port-2", "x-env", "x-picky"];
    for name in near {
        assert!(prepared(&[(name, "1")]).contains_key(name), "{name}");
    }
}

#[test]
fn forwarding_fields_are_added() {
    let headers = prepared(&[]);
    assert_eq!(headers["via"], "1.1 penstock");
    assert_eq!(headers["x-forwarded-for"], "192.0.2.7");
    assert_eq!(headers["x-forwarded-proto"], "http");
    let id = uuid::Uuid::parse_str(headers["x-request-id"].to_str().unwrap()).unwrap();
    assert_eq!(id.get_version_num(), 4);

    let headers = prepared(&[
        ("via", "1.0 a"),
        ("x-forwarded-for", "10.0.0.1"),
        ("x-forwarded-for", "10.0.0.2"),
        ("x-forwarded-proto", "https"),
        ("x-request-id", "mine"),
        // Must not remove what the agent adds.
        ("connection", "x-forwarded-for, via"),
    ]);
    assert_eq!(headers["via"], "1.1 penstock");
    assert_eq!(headers["x-forwarded-for"], "192.0.2.7");
    assert_eq!(headers["x-forwarded-proto"], "https");
    assert_eq!(headers["x-request-id"], "mine");

    let headers = prepared(&[("via", "1.0 a"), ("x-forwarded-for", "10.0.0.1"), ("x-forwarded-for", "10.0.0.2")]);
    assert_eq!(headers["via"], "1.0 a, 1.1 penstock");
    assert_eq!(headers.get_all("x-forwarded-for").iter().collect::<Vec<_>>(), ["10.0.0.1, 10.0.0.2, 192.0.2.7"]);
}

#[test]
fn an_ipv4_client_on_a_dual_stack_listener_is_named_as_ipv4() {
    let mut headers = HeaderMap::new();
    add_forwarded(&mut headers, "::ffff:192.0.2.7".parse().unwrap());
    assert_eq!(headers["x-forwarded-for"], "192.0.2.7");
}
