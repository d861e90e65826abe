//! Tests which headers are removed and added.

use super::*;
use crate::{
    config::Config,
    http::fields::tests::{Fields, map},
};

const ARRIVAL: Arrival =
    Arrival { client: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7)), version: Version::HTTP_11, tls: false };

fn prepared(fields: Fields<'_>) -> HeaderMap {
    prepared_by(fields, &ARRIVAL, &Headers::default())
}

fn prepared_by(fields: Fields<'_>, arrival: &Arrival, settings: &Headers) -> HeaderMap {
    let mut headers = map(fields);
    prepare_request(&mut headers, arrival, &FieldPolicy::new(&Config::default()), settings);
    headers
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
