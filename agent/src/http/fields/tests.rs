//! Tests which fields pass.

use http::HeaderValue;

use super::*;

/// Header names and values.
pub(in crate::http) type Fields<'a> = &'a [(&'a str, &'a str)];

pub(in crate::http) fn map(fields: Fields<'_>) -> HeaderMap {
    fields
        .iter()
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap()))
        .fold(HeaderMap::new(), |mut map, (name, value)| {
            map.append(name, value);
            map
        })
}

/// A client's head that was filtered. Clients may set every hint.
fn filtered(fields: Fields<'_>) -> HeaderMap {
    let mut head = map(fields);
    policy(&ALL_HINTS).filter_client_head(&mut head);
    head
}

/// `x-pick` is the field in which an EPP returns its pick.
fn policy(client_hints: &[ClientHint]) -> FieldPolicy {
    let mut config = Config::default();
    config.headers.client_hints = client_hints.to_vec();
    FieldPolicy { picks: vec![HeaderName::from_static("x-pick")], ..FieldPolicy::new(&config) }
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
            let headers = filtered(&[(&name, "10.0.0.1:80"), (&name, "10.0.0.2:80"), ("x-kept", "1")]);
            assert!(!headers.contains_key(&name), "{name}");
            assert!(headers.contains_key("x-kept"), "{name}");
            let mut trailers = map(&[(&name, "10.0.0.1:80"), ("x-kept", "1")]);
            policy(&ALL_HINTS).filter_client_trailers(&mut trailers);
            assert_eq!(trailers, map(&[("x-kept", "1")]), "{name}");
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
        assert!(filtered(&[(name, "1")]).contains_key(*name), "{name}");
    }
}

#[test]
fn underscore_variants_of_framing_headers_are_removed() {
    for name in ["content_length", "transfer_encoding", "Transfer_Encoding"] {
        assert!(!filtered(&[(name, "chunked")]).contains_key(name), "{name}");
    }
    assert!(filtered(&[("content_type", "x")]).contains_key("content_type"));
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
    policy(&ALL_HINTS).filter_picked_head(&mut headers);
    let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
    left.sort_unstable();
    assert_eq!(left, ["x-other", "x-prefiller-host-port"]);
}

#[test]
fn forbidden_trailers_are_removed() {
    let allowed = ["digest", "content-digest", "grpc-status", "grpc-message", "x-checksum", "server-timing", "etag"];
    let denied = [
        "content-length",
        "content_length",
        "transfer-encoding",
        "trailer",
        "te",
        "host",
        "connection",
        "proxy-authorization",
        "authorization",
        "set-cookie",
        "content-type",
        "content_encoding",
        "max-forwards",
        "cache-control",
        "x-forwarded-for",
        "x_forwarded_host",
        "if-none-match",
    ];
    let names = allowed.iter().chain(&denied).map(|name| HeaderName::from_bytes(name.as_bytes()).unwrap());
    let mut trailers: HeaderMap = names.map(|name| (name, HeaderValue::from_static("1"))).collect();
    trailers.insert("connection", HeaderValue::from_static("x-hop"));
    trailers.insert("x-hop", HeaderValue::from_static("1"));
    filter_trailers(&mut trailers);
    let mut left: Vec<&str> = trailers.keys().map(HeaderName::as_str).collect();
    left.sort_unstable();
    let mut allowed = allowed.to_vec();
    allowed.sort_unstable();
    assert_eq!(left, allowed);
}

#[test]
fn hints_that_clients_may_not_set_are_removed_under_every_spelling() {
    let spelled = |field: &str| {
        let name = if field.ends_with('-') { format!("{field}ttft-ms") } else { field.to_owned() };
        [name.clone(), name.replace('-', "_"), name.to_uppercase()]
    };
    for allowed in [vec![], vec![ClientHint::Objective], ALL_HINTS.to_vec()] {
        let policy = policy(&allowed);
        for hint in ALL_HINTS {
            for name in hint_fields(hint).iter().flat_map(|field| spelled(field)) {
                let (mut head, mut trailers) = (map(&[(&name, "1")]), map(&[(&name, "1")]));
                policy.filter_client_head(&mut head);
                policy.filter_client_trailers(&mut trailers);
                for fields in [head, trailers] {
                    assert_eq!(fields.contains_key(name.as_str()), allowed.contains(&hint), "{name}, {allowed:?}");
                }
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
    let prefixes = PICK_PREFIXES.iter().chain(&[ENVOY_PREFIX]);
    let mut removed: Vec<_> = CONTROL.iter().chain(prefixes).map(|name| name.trim_end_matches('-')).collect();
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
        ALL_HINTS.iter().flat_map(|&hint| hint_fields(hint).iter().map(move |field| (*field, label(hint)))).collect();
    assert_eq!(documented, declared);
}
