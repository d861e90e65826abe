//! Invalid pools, and what pools contain.

use super::*;

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn wrong_pools_are_rejected() {
    let cases = [
        ("", "p.toml:1:1: pools: found none, expected at least one [[pools]] section"),
        ("pools = [1]", "p.toml:1:1: pools: found 1, expected [[pools]] sections"),
        (
            "[[pools]]\nendpoints = [\"127.0.0.1:8000\"]",
            "p.toml:1:1: pools[0].name: found nothing, expected the name of the pool",
        ),
        (
            "[[pools]]\nname = \"a b\"\nendpoints = [\"127.0.0.1:8000\"]",
            r#"p.toml:2:8: pools[0].name: found "a b", expected 1 to 253 letters, digits or any of . _ - /"#,
        ),
        (
            "[[pools]]\nname = \"a\"",
            r#"p.toml:1:1: pools[0].endpoints: found none, expected at least one, endpoints_dns, endpoints_file, or picker.kind = "epp" with passthrough = true"#,
        ),
        (
            "[[pools]]\nname = \"a\"\npassthrough = true",
            r#"p.toml:1:1: pools[0].endpoints: found none, expected at least one, endpoints_dns, endpoints_file, or picker.kind = "epp" with passthrough = true"#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = \"127.0.0.1:8000\"",
            r#"p.toml:3:1: pools[0].endpoints: found "127.0.0.1:8000", expected an array of ip:port"#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\"localhost:8000\"]",
            r#"p.toml:3:14: pools[0].endpoints[0]: found "localhost:8000", expected ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\n  \"127.0.0.1:8000\",\n  \"127.0.0.1:0\",\n]",
            r#"p.toml:5:3: pools[0].endpoints[1]: found "127.0.0.1:0", expected ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:8000\",\n\"127.0.0.1:8000\"]",
            r#"p.toml:4:1: pools[0].endpoints[1]: found "127.0.0.1:8000" again, expected each endpoint once"#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:8080\"]",
            r#"p.toml:3:14: pools[0].endpoints[0]: found "127.0.0.1:8080", expected another server than listen.address (0.0.0.0:8080)"#,
        ),
    ];
    for (text, expected) in cases {
        assert_message(text, expected);
    }
    let cases = [
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:8001\"]",
            r#"p.toml:5:1: pools[1].name: found "a" again, expected a name that no other pool has"#,
        ),
        (
            "default_upstream = \"127.0.0.1:1\"",
            r#"p.toml:4:1: pools[0].default_upstream: found failure_mode "closed", which never uses it, expected failure_mode = "open""#,
        ),
        ("failure_mode = \"ajar\"", r#"p.toml:4:16: pools[0].failure_mode: found "ajar", expected "open" or "closed""#),
        (
            "picker.kind = \"random\"",
            r#"p.toml:4:15: pools[0].picker.kind: found "random", expected "builtin" or "epp""#,
        ),
        ("picker = \"epp\"", r#"p.toml:4:1: pools[0].picker: found "epp", expected a section"#),
        (
            "[pools.picker]\naddress = \"epp:9002\"",
            r#"p.toml:5:1: pools[0].picker.address: found a setting of an EPP, expected kind = "epp""#,
        ),
        (
            "[pools.picker]\nkind = \"epp\"",
            "p.toml:4:1: pools[0].picker.address: found nothing, expected host:port of the EPP",
        ),
    ];
    for (more, expected) in cases {
        assert_message(&format!("{POOL}{more}"), expected);
    }
}

#[test]
fn settings_that_an_inference_pool_determines_are_rejected() {
    const DISCOVERED: &str =
        "[[pools]]\nname = \"a\"\ninference_pool = { namespace = \"n\", name = \"p\" }\nfailure_mode = \"open\"\n";
    assert_message(
        DISCOVERED,
        "p.toml:4:1: pools[0].failure_mode: found a setting that the InferencePool determines, expected inference_pool alone",
    );
    let closed = DISCOVERED.replace("failure_mode = \"open\"", "picker = { kind = \"epp\", address = \"e:1\" }");
    assert_message(
        &closed,
        "p.toml:4:26: pools[0].picker.address: found an address in a pool with inference_pool, expected no address: the \
         endpointPickerRef of the InferencePool names the EPP",
    );
    assert_message(
        "[[pools]]\nname = \"a\"\ninference_pool = { namespace = \"n\", name = \"P\" }",
        "p.toml:3:44: pools[0].inference_pool.name: found \"P\", expected the name of a Kubernetes object: lower-case \
         letters, digits, - and .",
    );
    let with_settings = DISCOVERED.replace("failure_mode = \"open\"", "default_upstream = \"10.0.0.1:80\"");
    let config = Config::parse(&with_settings, "p.toml").unwrap();
    assert_eq!(config.pools[0].inference_pool.as_ref().unwrap().to_string(), "n/p");
}

#[test]
fn wrong_sources_of_endpoints_are_rejected() {
    const ENTRY: &str =
        r#"expected { address = "ip:port", node = "n1", zone = "a", draining = false }, all but address optional"#;
    let cases = [
        ("ports = [0]", "p.toml:4:10: pools[0].ports[0]: found 0, expected an integer from 1 to 65535".to_owned()),
        ("ports = [1, 2, 1]", "p.toml:4:16: pools[0].ports[2]: found 1 again, expected each port once".to_owned()),
        ("ports = [1,2,3,4,5,6,7,8,9]", "p.toml:4:1: pools[0].ports: found 9 ports, expected at most 8".to_owned()),
        (
            "endpoints_dns = \"models\"",
            r#"p.toml:4:1: pools[0].endpoints_dns: found "models" without ports, expected ports in the same section"#
                .to_owned(),
        ),
        (
            "endpoints_file = \"\"",
            r#"p.toml:4:18: pools[0].endpoints_file: found "", expected the path of a file"#.to_owned(),
        ),
    ];
    for (more, expected) in cases {
        assert_message(&format!("{POOL}{more}"), &expected);
    }
    let cases = [
        (
            "\"10.0.0.1\"",
            r#"found "10.0.0.1", expected ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#,
        ),
        (
            "{ address = \"10.0.0.1:0\" }",
            r#"found a table, expected ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#,
        ),
        ("{ node = \"a\" }", ENTRY),
        ("{ address = \"10.0.0.1:1\", weight = 1 }", ENTRY),
    ];
    for (element, expected) in cases {
        let messages = messages(&format!("[[pools]]\nname = \"a\"\nendpoints = [\"10.0.0.9:1\", {element}]"));
        assert!(messages.len() == 1 && messages[0].ends_with(expected), "{element}: {messages:?}");
        assert!(messages[0].starts_with("p.toml:3:28: pools[0].endpoints[1]: "), "{messages:?}");
    }
}

#[test]
fn wrong_subsets_and_checks_are_rejected() {
    let cases = [
        (
            "[pools.subset]\nprefer = [\"node\"]",
            r#"p.toml:5:11: pools[0].subset.prefer[0]: found "node" without node.name, expected node.name, --node or PENSTOCK_NODE"#,
        ),
        (
            "[pools.subset]\nprefer = [\"zone\"]\nendpoints = [\"10.0.0.1:1\"]\n[node]\nzone = \"a\"",
            "p.toml:6:1: pools[0].subset.endpoints: found a second way to choose the subset, expected prefer or endpoints",
        ),
        (
            "[pools.subset]\nendpoints = [\"127.0.0.1:8000\", \"10.0.0.1:1\"]",
            r#"p.toml:5:32: pools[0].subset.endpoints[1]: found "10.0.0.1:1", expected one of the pool's endpoints"#,
        ),
        (
            "[pools.subset]\nempty = \"none\"",
            r#"p.toml:5:9: pools[0].subset.empty: found "none", expected "all" or "fail""#,
        ),
        (
            "[pools.retry]\nmethods = [\"post\"]",
            r#"p.toml:5:12: pools[0].retry.methods[0]: found "post", expected a method in capital letters, such as "POST""#,
        ),
        (
            "[pools.retry]\nbudget_percent = 101",
            "p.toml:5:18: pools[0].retry.budget_percent: found 101, expected an integer from 0 to 100",
        ),
        (
            "[pools.ejection]\nbase = \"2m\"",
            "p.toml:5:1: pools[0].ejection.base: found a base above max, expected base up to max",
        ),
        (
            "[pools.health]\ninterval = \"1s\"",
            r#"p.toml:4:1: pools[0].health.path: found nothing, expected the path to ask for, such as "/health""#,
        ),
        (
            "[pools.health]\npath = \"health\"",
            r#"p.toml:5:8: pools[0].health.path: found "health", expected a path that starts with "/""#,
        ),
        (
            "[dns]\nmin_ttl = \"1h\"",
            "p.toml:5:1: dns.min_ttl: found a min_ttl above max_ttl, expected min_ttl up to max_ttl",
        ),
        (
            "passthrough = [\"10.0.0.0/8\", \"10.0.0.1/8\"]",
            r#"p.toml:4:30: pools[0].passthrough[1]: found "10.0.0.1/8", expected a network such as "10.0.0.0/8", whose address has no bits after the prefix, or an IP address"#,
        ),
        (
            "passthrough = \"10.0.0.0/8\"",
            r#"p.toml:4:15: pools[0].passthrough: found "10.0.0.0/8", expected true, false, or an array of networks such as ["10.0.0.0/8"]"#,
        ),
        (
            "passthrough = []",
            r#"p.toml:4:1: pools[0].passthrough: found an empty array, expected true, false, or an array of networks such as ["10.0.0.0/8"]"#,
        ),
    ];
    for (more, expected) in cases {
        assert_message(&format!("{POOL}{more}"), expected);
    }
}

#[test]
fn fail_open_without_endpoints_is_rejected() {
    assert_message(
        "[[pools]]\nname = \"a\"\nfailure_mode = \"open\"\npassthrough = true\npicker = { kind = \"epp\", address = \"e:1\" }",
        r#"p.toml:3:1: pools[0].failure_mode: found "open" without a destination, expected endpoints or default_upstream"#,
    );
}

#[test]
fn wrong_session_headers_are_rejected() {
    assert_message(
        &format!("{POOL}picker.session_header = [\"x-a\", \"content-length\"]"),
        "p.toml:4:33: pools[0].picker.session_header[1]: found \"content-length\", expected the name of a header that does not frame the message",
    );
}

#[test]
fn sections_of_inference_pools_do_not_contradict() {
    let gateway = "[kubernetes.gateway]\nnamespace = \"n\"\nname = \"g\"\n";
    let section = |text: &str| format!("[[pools]]\nname = \"a\"\n[pools.inference_pools]\n{text}\n");
    let labels = section("from = \"labels\"");
    let cases = [
        (
            section("from = \"gateway\""),
            "inference_pools.from: found no Gateway to take them from, expected kubernetes.gateway",
        ),
        (
            format!("{gateway}{}", section("labels = \"a=b\"")),
            "labels: found a setting of from = \"labels\", expected from = \"labels\"",
        ),
        (
            format!("{labels}{}", labels.replace("\"a\"", "\"b\"")),
            "pools[1].inference_pools: found a second section for the same InferencePools, expected one section",
        ),
        (format!("{labels}[[routes]]\npool = \"unknown\""), "routes[0].pool: found \"unknown\", expected one of "),
    ];
    for (text, expected) in cases {
        let found = Config::parse(&text, "p.toml").unwrap_err().to_string();
        assert!(found.contains(expected), "{text}: {found}");
    }
    Config::parse(&format!("{labels}[[routes]]\npool = \"n/p\""), "p.toml").unwrap();
}
