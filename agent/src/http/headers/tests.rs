//! Tests which headers are removed and added.

use super::*;
use crate::config::ClientHint;

const ARRIVAL: Arrival =
    Arrival { client: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7)), version: Version::HTTP_11, tls: false };

/// Header names and values.
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
    prepared_by(fields, &ARRIVAL, &Headers::default())
}

fn prepared_by(fields: Fields<'_>, arrival: &Arrival, settings: &Headers) -> HeaderMap {
    let mut headers = map(fields);
    let (destination, model) = (HeaderName::from_static("x-pick"), HeaderName::from_static("x-gateway-model-name"));
    remove_control(&mut headers, &destination, &model);
    prepare_request(&mut headers, arrival, &model, settings);
    headers
}

#[test]
fn hop_by_hop_headers_are_removed() {
    let table: &[(Fields<'_>, &[&str])] = &[
        (&[("connection", "close"), ("a", "1")], &["a"]),
        (&[("connection", "X-Hop , keep-alive"), ("x-hop", "1"), ("keep-alive", "timeout=5")], &[]),
        (&[("connection", "x-b"), ("connection", "x-c"), ("x-b", "1"), ("x-c", "1"), ("x-d", "1")], &["x-d"]),
        (&[("te", "trailers"), ("upgrade", "websocket"), ("proxy-connection", "close")], &[]),
        (&[("transfer-encoding", "chunked"), ("proxy-authorization", "secret")], &[]),
        // Connection cannot remove headers that frame, address or describe the message.
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

/// Tests each name of `CONTROL` and its prefixes with dashes, underscores and both, in either case.
#[test]
fn control_headers_from_clients_are_removed() {
    let families = [
        "x-gateway-destination-endpoint",
        "x-gateway-destination-endpoint-subset",
        "x-gateway-destination-endpoint-served",
        "x-envoy-original-path",
        "x-envoy-upstream-rq-timeout-ms",
    ];
    let configured = ["x-pick", "x-gateway-model-name"];
    for name in CONTROL.iter().chain(&families).chain(&configured) {
        for name in [name.to_string(), name.replace('-', "_"), name.replacen('-', "_", 1), name.to_uppercase()] {
            let headers = prepared(&[(&name, "10.0.0.1:80"), (&name, "10.0.0.2:80"), ("x-kept", "1")]);
            assert!(!headers.contains_key(&name), "{name}");
            assert!(headers.contains_key("x-kept"), "{name}");
        }
    }
    let near = ["x-gateway-model", "x-prefiller-host-port-2", "x-env", "x-picky", "x-gateway-destination"];
    // Headers that clients may send to the picker.
    let said = [
        "x-gateway-inference-fairness-id",
        "x-llm-d-inference-objective",
        "x-gateway-model-name-rewrite",
        "x-slo-ttft-ms",
        "x-session-token",
        "prefer",
        "epp-profile",
        "x-data-parallel-rank",
    ];
    for name in near.iter().chain(&said) {
        assert!(prepared(&[(name, "1")]).contains_key(*name), "{name}");
    }
}

#[test]
fn underscore_variants_of_framing_headers_are_removed() {
    for name in ["content_length", "transfer_encoding", "Transfer_Encoding"] {
        assert!(!prepared(&[(name, "chunked")]).contains_key(name), "{name}");
    }
    assert!(prepared(&[("content_type", "x")]).contains_key("content_type"));
}

#[test]
fn pick_is_not_forwarded_to_the_endpoint() {
    let mut headers = map(&[
        ("x-gateway-destination-endpoint", "a"),
        ("x_gateway_destination_endpoint_served", "a"),
        ("x-pick", "a"),
        ("x-prefiller-host-port", "b"),
        ("x-other", "c"),
    ]);
    remove_pick(&mut headers, &HeaderName::from_static("x-pick"));
    let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
    left.sort_unstable();
    assert_eq!(left, ["x-other", "x-prefiller-host-port"]);
}

#[test]
fn forwarding_headers_are_added() {
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
        // Connection must not remove what the agent adds.
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

/// The agent's element of a list is one of its own, whatever the client began.
#[test]
fn open_quote_of_the_client_does_not_swallow_the_agents_element() {
    for (said, kept) in [
        ("for=1.1.1.1", true),
        ("for=\"[::1]\"", true),
        ("for=1.1.1.1;a=\"x\\\"\"", true),
        ("for=6.6.6.6;a=\"", false),
        ("for=6.6.6.6;a=\"x\\\"", false),
    ] {
        let mut headers = map(&[("host", "a"), ("forwarded", said)]);
        add_forwarded(&mut headers, &ARRIVAL, Forwarding::Append);
        let own = "for=192.0.2.7;host=\"a\";proto=http";
        let expected = if kept { format!("{said}, {own}") } else { own.to_owned() };
        assert_eq!(headers["forwarded"], expected);
    }
}

#[test]
fn forwarding_mode_decides_what_the_endpoint_may_trust() {
    let said: Fields<'_> = &[
        ("host", "llm.example:8443"),
        ("x-forwarded-for", "10.0.0.1"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "front.example"),
        ("x_forwarded_port", "1"),
        ("forwarded", "for=10.0.0.1"),
    ];
    let own: Fields<'_> = &[("host", "llm.example:8443")];
    let name = ["for", "proto", "host", "port"].map(|last| format!("x-forwarded-{last}"));
    let tls = Arrival { tls: true, ..ARRIVAL };
    use Forwarding::{Append, Off, Replace};
    // x-forwarded-for, -proto, -host, -port, forwarded
    #[rustfmt::skip]
    let table = [
        (said, Append, ["10.0.0.1, 192.0.2.7", "https", "front.example", "443", r#"for=10.0.0.1, for=192.0.2.7;host="llm.example:8443";proto=https"#]),
        (own, Append, ["192.0.2.7", "https", "llm.example:8443", "8443", r#"for=192.0.2.7;host="llm.example:8443";proto=https"#]),
        (said, Replace, ["192.0.2.7", "https", "llm.example:8443", "8443", r#"for=192.0.2.7;host="llm.example:8443";proto=https"#]),
        (said, Off, ["10.0.0.1", "https", "front.example", "", "for=10.0.0.1"]),
        (own, Off, ["", "", "", "", ""]),
    ];
    for (fields, forwarding, expected) in table {
        let settings = Headers { x_forwarded: forwarding, forwarded: forwarding, ..Headers::default() };
        let headers = prepared_by(fields, &tls, &settings);
        let value = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap());
        let found = [value(&name[0]), value(&name[1]), value(&name[2]), value(&name[3]), value("forwarded")];
        assert_eq!(found, expected, "{forwarding:?}");
        assert_eq!(headers.contains_key("x_forwarded_port"), fields.len() > 1 && forwarding != Replace);
    }
}

#[test]
fn forwarded_ports_and_addresses_are_formatted() {
    let settings = Headers { forwarded: Forwarding::Append, ..Headers::default() };
    let table = [
        (false, "x", "80", "192.0.2.7", "for=192.0.2.7;host=\"x\";proto=http"),
        (true, "x:", "443", "::ffff:192.0.2.7", "for=192.0.2.7;host=\"x:\";proto=https"),
        (false, "[::1]", "80", "2001:db8::7", "for=\"[2001:db8::7]\";host=\"[::1]\";proto=http"),
        (false, "[::1]:81", "81", "2001:db8::7", "for=\"[2001:db8::7]\";host=\"[::1]:81\";proto=http"),
    ];
    for (tls, host, port, client, forwarded) in table {
        let arrival = Arrival { client: client.parse().unwrap(), tls, ..ARRIVAL };
        let headers = prepared_by(&[("host", host)], &arrival, &settings);
        assert_eq!(
            (&headers["x-forwarded-port"], &headers["forwarded"]),
            (&port.parse().unwrap(), &forwarded.parse().unwrap())
        );
        let shown = arrival.client.to_canonical().to_string();
        assert_eq!(headers["x-forwarded-for"], shown.as_str());
    }
    // Behind another proxy, the port is that of the host and scheme that it names.
    let behind = |fields: &[(&str, &str)]| prepared_by(fields, &ARRIVAL, &settings)["x-forwarded-port"].clone();
    assert_eq!(behind(&[("host", "x"), ("x-forwarded-proto", "HTTPS")]), "443");
    assert_eq!(behind(&[("host", "p:8080"), ("x-forwarded-host", "x"), ("x-forwarded-proto", "https")]), "443");
    assert_eq!(behind(&[("host", "p:8080"), ("x-forwarded-host", "x:81")]), "81");
    assert_eq!(behind(&[("host", "p:8080"), ("x-forwarded-proto", "https")]), "8080");
    // HTTP/1.0 without a Host.
    let headers = prepared_by(&[], &ARRIVAL, &settings);
    assert_eq!(headers["forwarded"], "for=192.0.2.7;proto=http");
    assert!(!headers.contains_key("x-forwarded-host") && !headers.contains_key("x-forwarded-port"));
}

#[test]
fn via_uses_the_configured_name_or_is_left_out() {
    let by = |via: Option<&str>| Headers { via: via.map(str::to_owned), ..Headers::default() };
    let old = Arrival { version: Version::HTTP_10, ..ARRIVAL };
    assert_eq!(prepared_by(&[("via", "1.1 a")], &old, &by(Some("gw.example:80")))["via"], "1.1 a, 1.0 gw.example:80");
    assert_eq!(prepared_by(&[("via", "1.1 a")], &ARRIVAL, &by(None))["via"], "1.1 a");
    assert!(!prepared_by(&[], &ARRIVAL, &by(None)).contains_key("via"));
    let mut response = map(&[("via", "1.1 b")]);
    prepare_response(&mut response, Version::HTTP_11, &HeaderMap::new(), &by(Some("x")));
    assert_eq!(response["via"], "1.1 b, 1.1 x");
}

#[test]
fn responses_carry_the_request_id_if_configured() {
    let request = map(&[("x-request-id", "mine")]);
    let fields: Fields<'_> =
        &[("x-request-id", "theirs"), ("x-penstock-reason", "posing"), ("keep-alive", "timeout=5")];
    for (to_client, expected) in [(true, "mine"), (false, "theirs")] {
        let mut response = map(fields);
        let settings = Headers { request_id_to_client: to_client, ..Headers::default() };
        prepare_response(&mut response, Version::HTTP_11, &request, &settings);
        assert_eq!(response["x-request-id"], expected);
        assert!(!response.contains_key("x-penstock-reason") && !response.contains_key("keep-alive"));
    }
}

#[test]
fn hints_that_clients_may_not_set_are_removed_under_every_spelling() {
    let spelled = |field: &str| {
        let name = if field.ends_with('-') { format!("{field}ttft-ms") } else { field.to_owned() };
        [name.clone(), name.replace('-', "_"), name.to_uppercase()]
    };
    for allowed in [vec![], vec![ClientHint::Objective], ALL_HINTS.to_vec()] {
        let settings = Headers { client_hints: allowed.clone(), ..Headers::default() };
        for hint in ALL_HINTS {
            for name in hint.fields().iter().flat_map(|field| spelled(field)) {
                let headers = prepared_by(&[(&name, "1")], &ARRIVAL, &settings);
                assert_eq!(headers.contains_key(name.as_str()), allowed.contains(&hint), "{name}, {allowed:?}");
            }
        }
    }
}

/// docs/headers.md has one row for each name, in either table.
#[test]
fn fields_between_client_and_epp_are_documented() {
    let document = include_str!("../../../../docs/headers.md");
    let (own, clients) = document.split_once("\n## Clients may set").expect("two sections");
    let rows = |section: &'static str| -> Vec<Vec<&'static str>> {
        let rows = section.lines().filter(|line| line.starts_with("| `"));
        rows.map(|row| row.trim_matches('|').split(" | ").map(|cell| cell.trim_matches([' ', '`', '…'])).collect())
            .collect()
    };
    let mut documented: Vec<_> = rows(own).iter().map(|row| row[0]).collect();
    let mut removed: Vec<_> = CONTROL.iter().chain(&CONTROL_PREFIXES).map(|name| name.trim_end_matches('-')).collect();
    documented.iter_mut().for_each(|name| *name = name.trim_end_matches('-'));
    documented.sort_unstable();
    removed.sort_unstable();
    assert_eq!(documented, removed);

    let label = |hint| match hint {
        ClientHint::Objective => "objective",
        ClientHint::FairnessId => "fairness_id",
        ClientHint::ModelRewrite => "model_rewrite",
        ClientHint::Latency => "latency",
    };
    let documented: Vec<_> = rows(clients).iter().map(|row| (row[0], row[1])).collect();
    let declared: Vec<_> =
        ALL_HINTS.iter().flat_map(|&hint| hint.fields().iter().map(move |field| (*field, label(hint)))).collect();
    assert_eq!(documented, declared);
}
