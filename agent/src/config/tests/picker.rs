//! Invalid pickers.

use super::*;

#[test]
fn wrong_unix_sockets_are_rejected() {
    let cases = [
        (
            "address = \"unix:epp.sock\"",
            r#"address: found "unix:epp.sock", expected host:port, such as "epp.default.svc:9002", or unix:/path"#,
        ),
        (
            "address = \"unix:/epp.sock\"\nhealth_port = 1",
            "health_port: found a port of an EPP at a Unix socket, expected health on the same socket",
        ),
    ];
    for (settings, expected) in cases {
        let messages = messages(&format!("{POOL}[pools.picker]\nkind = \"epp\"\n{settings}"));
        let [message] = &messages[..] else { panic!("{messages:?}") };
        assert!(message.ends_with(expected), "{message}");
    }
}

#[test]
fn wrong_epps_are_rejected() {
    const HOST_PORT: &str = r#"expected host:port, such as "epp.default.svc:9002", or unix:/path"#;
    for address in ["epp", "epp:0", ":9002", "http://epp:9002", "user@epp:9002", "epp:99999", ""] {
        assert_message(
            &format!("{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"{address}\""),
            &format!("p.toml:6:11: pools[0].picker.address: found \"{address}\", {HOST_PORT}"),
        );
    }
    let cases = [
        ("address = []", "address: found an empty array, expected at least one value"),
        (
            "address = [\"e:1\", \"e\"]",
            r#"address[1]: found "e", expected host:port, such as "epp.default.svc:9002", or unix:/path"#,
        ),
        ("address = [\"e:1\", \"f:1\", \"e:1\"]", r#"address[2]: found "e:1" again, expected each address once"#),
        ("tls = \"on\"", r#"tls: found "on", expected "off" or "insecure" or "ca" or "pinned""#),
        ("tls = \"ca\"", "ca_file: found nothing, expected the file with the CA's certificate"),
        ("ca_file = \"ca.pem\"", r#"ca_file: found a setting without effect, expected tls = "ca""#),
        ("server_name = \"a\"", r#"server_name: found a setting without effect, expected a tls other than "off""#),
        (
            "tls = \"insecure\"\nserver_name = \"a b\"",
            r#"server_name: found "a b", expected a DNS name or an IP address"#,
        ),
        ("tls = \"pinned\"", "pins: found nothing, expected the SHA-256 of at least one public key"),
        (
            "tls = \"pinned\"\npins = [\"00ff\"]",
            r#"pins[0]: found "00ff", expected the SHA-256 of a public key, 64 hexadecimal digits"#,
        ),
        (
            "tls = \"insecure\"\npins = \"00000000000000000000000000000000000000000000000000000000000000ff\"",
            r#"pins: found a setting without effect, expected tls = "pinned""#,
        ),
        (
            "tls = \"insecure\"\nclient_cert_file = \"a\"",
            "client_cert_file: found no client_key_file, expected both or neither",
        ),
        (
            "decision_timeout = 3",
            r#"decision_timeout: found 3, expected "off" or a duration such as "250ms", "4s", "5m" or "1h", from 1ms to 24h"#,
        ),
        ("health_port = 0", "health_port: found 0, expected an integer from 1 to 65535"),
        ("health_tls = true", "health_tls: found a setting without effect, expected health_port in the same section"),
        ("health_port = 1\nhealth_tls = true", r#"health_tls: found tls = "off", expected a tls other than "off""#),
        ("health_service = \"\"", r#"health_service: found "", expected a string that is not empty"#),
        (
            "response_to_picker = \"all\"",
            r#"response_to_picker: found "all", expected "off" or "headers" or "usage" or "body""#,
        ),
        ("response_queue_bytes = 1", "response_queue_bytes: found 1, expected an integer from 65536 to 1073741824"),
        (
            "destination_header = \"a b\"",
            r#"destination_header: found "a b", expected the name of a header that does not frame the message"#,
        ),
    ];
    for (more, expected) in cases {
        let address = if more.starts_with("address") { "" } else { "address = \"[::1]:1\"\n" };
        let messages = messages(&format!("{POOL}[pools.picker]\nkind = \"epp\"\n{address}{more}"));
        assert_eq!(messages.len(), 1, "{messages:?}");
        assert_eq!(messages[0].split_once(": pools[0].picker.").unwrap().1, expected);
    }
}

#[test]
fn decision_timeout_off_is_accepted() {
    let text = format!(
        "{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\ndecision_timeout = \"off\"\nhealth_interval = \"off\""
    );
    let config = Config::parse(&text, "p.toml").unwrap();
    let expected = Epp { decision_timeout: None, health_interval: None, ..Epp::new("e:1") };
    assert_eq!(config.pools[0].picker, Picker::Epp(expected));
}

#[test]
fn closed_pool_waits_for_an_unreachable_epp_by_default() {
    let wait = |more: &str, mode| {
        let text = format!("{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\n{more}");
        let config = Config::parse(&text, "p.toml").unwrap();
        let Picker::Epp(epp) = &config.pools[0].picker else { panic!("no EPP") };
        epp.unreachable_wait(mode)
    };
    let seconds = |seconds| Some(std::time::Duration::from_secs(seconds));
    for (more, closed, open) in [
        ("", seconds(2), None),
        ("unreachable_wait = \"off\"", None, None),
        ("unreachable_wait = \"3s\"", seconds(3), seconds(3)),
    ] {
        assert_eq!((wait(more, FailureMode::Closed), wait(more, FailureMode::Open)), (closed, open), "{more}");
    }
}

#[test]
fn wrong_counters_are_rejected() {
    const NAME: &str = r#"expected namespace/key, such as "envoy.lb/cost""#;
    let many = (0..65).map(|n| format!("\"a/{n}\"")).collect::<Vec<_>>().join(",");
    for (counters, error) in [
        (r#""cost""#, format!(r#"counters[0]: found "cost", {NAME}"#)),
        (r#""a/b", "/b""#, format!(r#"counters[1]: found "/b", {NAME}"#)),
        (r#""a/""#, format!(r#"counters[0]: found "a/", {NAME}"#)),
        (r#""a/b", "a/b""#, r#"counters[1]: found "a/b" again, expected each attribute once"#.to_owned()),
        (&many, "counters: found 65 attributes, expected at most 64".to_owned()),
    ] {
        let text = format!(
            "{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\n[pools.picker.metadata]\ncounters = [{counters}]"
        );
        let messages = messages(&text);
        assert!(messages.len() == 1 && messages[0].ends_with(&format!("metadata.{error}")), "{messages:?}");
    }
}
