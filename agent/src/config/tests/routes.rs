//! Invalid and unreachable routes.

use super::*;

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn wrong_routes_are_rejected() {
    const HOST: &str = r#"expected a host without port, such as "llm.example.com" or "*.example.com""#;
    let mut cases = vec![
        (
            "host = \"a\"".to_owned(),
            "4:1: routes[0].pool: found nothing, expected the name of a pool, or pools".to_owned(),
        ),
        ("pool = \"b\"".to_owned(), "5:1: routes[0].pool: found \"b\", expected one of a".to_owned()),
    ];
    for host in ["llm:80", "*", "*.", "a.*", "**.a", "*a.b", "*.10.0.0.1", "*.[::1]", "a b"] {
        cases.push((format!("pool = \"a\"\nhost = {host:?}"), format!("6:8: routes[0].host: found {host:?}, {HOST}")));
    }
    let conditions = [
        ("path_prefix = \"v1\"", 15, r#"path_prefix: found "v1", expected a path that starts with "/", without query"#),
        ("path = \"/a?b\"", 8, r#"path: found "/a?b", expected a path that starts with "/", without query"#),
        (
            "path_prefix = \"/a\", path = \"/b\"",
            1,
            "path_prefix: found a second condition on the path, expected path or path_prefix",
        ),
        ("method = \"post\"", 10, r#"method: found "post", expected a method in capital letters, such as "POST""#),
        (
            "method = [\"GET\", \"TRACE\"]",
            18,
            r#"method[1]: found "TRACE", expected a method in capital letters, such as "POST""#,
        ),
        ("method = []", 1, "method: found an empty array, expected at least one value"),
        (
            "headers = [\"a\"]",
            1,
            r#"headers: found "a", expected an array of { name = "x-team", value = "red" }, value optional"#,
        ),
        ("headers = [{ value = \"a\" }]", 12, "headers[0].name: found nothing, expected the name of a header"),
        ("headers = [{ name = \"a b\" }]", 21, "headers[0].name: found \"a b\", expected the name of a header"),
        (
            "headers = [{ name = \"a\", value = \" b\" }]",
            34,
            "headers[0].value: found \" b\", expected a header value without surrounding white space",
        ),
        (
            "model = \"\"",
            9,
            r#"model: found "", expected a model's name that is not empty, in which only the last character may be `*`"#,
        ),
        (
            "model = [\"a\", \"a*b\"]",
            15,
            r#"model[1]: found "a*b", expected a model's name that is not empty, in which only the last character may be `*`"#,
        ),
        (
            "model = \"é*é*\"",
            9,
            r#"model: found "é*é*", expected a model's name that is not empty, in which only the last character may be `*`"#,
        ),
        ("base_model = \"b\"", 1, "base_model: found \"b\", expected a base model of bbr.base_models"),
    ];
    for (conditions, column, expected) in conditions {
        cases.push((
            format!("pool = \"a\"\n{}", conditions.replace(", path =", "\npath =")),
            format!("6:{column}: routes[0].{expected}"),
        ));
    }
    let pools = [
        ("pools = \"a\"", r#"5:1: routes[0].pools: found "a", expected an array of { name = "a", weight = 70 }"#),
        ("pools = []", "5:1: routes[0].pools: found no weight above 0, expected at least one"),
        (
            "pools = [{ name = \"a\", weight = 0 }]",
            "5:1: routes[0].pools: found no weight above 0, expected at least one",
        ),
        ("pools = [{ weight = 1 }]", "5:10: routes[0].pools[0].name: found nothing, expected the name of a pool"),
        ("pools = [{ name = \"b\" }]", "5:12: routes[0].pools[0].name: found \"b\", expected one of a"),
        (
            "pools = [{ name = \"a\" }, { name = \"a\" }]",
            "5:28: routes[0].pools[1].name: found \"a\" again, expected each pool once",
        ),
        (
            "pools = [{ name = \"a\", weight = 1000001 }]",
            "5:33: routes[0].pools[0].weight: found 1000001, expected an integer from 0 to 1000000",
        ),
        (
            "pools = [{ name = \"a\" }]\npool = \"a\"",
            "6:1: routes[0].pool: found both pool and pools, expected one of them",
        ),
    ];
    cases.extend(pools.map(|(pools, expected)| (pools.to_owned(), expected.to_owned())));
    for (route, expected) in cases {
        assert_message(&format!("{POOL}[[routes]]\n{route}"), &format!("p.toml:{expected}"));
    }
}

#[test]
fn contradicting_changes_are_rejected() {
    let cases = [
        (
            "pool = \"a\"\n[routes.redirect]",
            "5:1: routes[0].pool: found a setting of requests that are forwarded, expected redirect alone",
        ),
        (
            "[routes.redirect]\n[routes.rewrite]",
            "6:9: routes[0].rewrite: found a setting of requests that are forwarded, expected redirect alone",
        ),
        (
            "[routes.redirect]\nstatus = 305",
            "6:10: routes[0].redirect.status: found 305, expected 301, 302, 303, 307 or 308",
        ),
        ("[routes.redirect]\nport = 0", "6:8: routes[0].redirect.port: found 0, expected an integer from 1 to 65535"),
        (
            "pool = \"a\"\n[routes.rewrite]\npath_prefix = \"/b\"",
            "7:1: routes[0].rewrite.path_prefix: found a prefix to replace in a route without one, expected path_prefix in the route",
        ),
        (
            "path = \"/a\"\n[routes.redirect]\npath_prefix = \"/b\"",
            "7:1: routes[0].redirect.path_prefix: found a prefix to replace in a route without one, expected path_prefix in the route",
        ),
        (
            "pool = \"a\"\n[routes.rewrite]\npath = \"/b\"\npath_prefix = \"/b\"",
            "8:1: routes[0].rewrite.path_prefix: found a second change of the path, expected path or path_prefix",
        ),
        (
            "pool = \"a\"\n[routes.rewrite]\npath = \"/é\"",
            "7:8: routes[0].rewrite.path: found \"/é\", expected a path of printable ASCII that starts with \"/\", without query",
        ),
        (
            "pool = \"a\"\n[routes.request_headers]\nremove = [\"Host\"]",
            "7:11: routes[0].request_headers.remove[0]: found \"Host\", expected the name of a header that does not frame the message",
        ),
        (
            "pool = \"a\"\n[routes.request_headers]\nset = [{ name = \"x\", value = \" \" }]",
            "7:30: routes[0].request_headers.set[0].value: found \" \", expected a header value without surrounding white space",
        ),
    ];
    for (route, expected) in cases {
        assert_message(&format!("{POOL}[[routes]]\n{route}"), &format!("p.toml:{expected}"));
    }
}

#[test]
fn model_condition_without_bbr_is_rejected() {
    assert_message(
        &format!("[bbr]\nenabled = false\n{POOL}[[routes]]\npool = \"a\"\nmodel = \"m\""),
        "p.toml:8:1: routes[0].model: found a condition that never matches, expected bbr.enabled = true",
    );
}

/// An earlier route and a later one, and whether the later one is out of reach.
#[test]
fn unreachable_route_is_rejected() {
    let rows = [
        ("", "model = \"m\"", true),
        ("model = \"m\"", "", false),
        ("model = \"m\"", "model = \"m\"", true),
        ("model = [\"m\", \"n\"]", "model = \"n\"", true),
        ("model = \"m\"", "model = [\"m\", \"n\"]", false),
        ("model = \"m-*\"", "model = [\"m-1\", \"m-2*\"]", true),
        ("model = \"m-1\"", "model = \"m-*\"", false),
        ("host = \"*.a\"", "host = [\"*.b.a\", \"C.a\"]", true),
        ("host = \"*.a\"", "host = \"a\"", false),
        ("host = \"b.a\"", "host = \"*.a\"", false),
        ("path_prefix = \"/v1\"", "path_prefix = \"/v1/chat\"", true),
        ("path_prefix = \"/v1\"", "path = \"/v1\"", true),
        ("path_prefix = \"/v1\"", "path_prefix = \"/v10\"", false),
        ("path = \"/v1\"", "path_prefix = \"/v1\"", false),
        ("method = \"GET\"", "method = \"GET\"\npath = \"/\"", true),
        ("method = \"GET\"", "method = [\"GET\", \"POST\"]", false),
        ("headers = [{ name = \"a\" }]", "headers = [{ name = \"A\", value = \"1\" }, { name = \"b\" }]", true),
        ("headers = [{ name = \"a\", value = \"1\" }]", "headers = [{ name = \"a\" }]", false),
        ("query = [{ name = \"a\" }]", "query = [{ name = \"a\", value = \"1\" }, { name = \"b\" }]", true),
        ("query = [{ name = \"a\", value = \"1\" }]", "query = [{ name = \"a\" }]", false),
        ("query = [{ name = \"a\" }]", "query = [{ name = \"A\" }]", false),
    ];
    for (earlier, later, unreachable) in rows {
        let text = format!("{POOL}[[routes]]\npool = \"a\"\n{earlier}\n[[routes]]\npool = \"a\"\n{later}");
        let errors = Config::parse(&text, "p.toml").err().map(|errors| errors.to_string());
        let expected = "routes[1].pool: found an unreachable route: routes[0] matches all of its requests, expected the narrower route first";
        assert_eq!(errors.is_some_and(|errors| errors.contains(expected)), unreachable, "{earlier} | {later}");
    }
}
