//! Which match of which rule takes a request.

use super::*;

fn path(kind: &str, value: &str) -> Value {
    json!({ "path": { "type": kind, "value": value } })
}

fn header(name: &str, value: &str) -> Value {
    json!({ "name": name, "value": value })
}

/// An HTTPRoute with a rule for each match, to the pool of that name.
fn rules(name: &str, matches: &[(Value, &str)]) -> ApiObject {
    let rules: Vec<_> = matches.iter().map(|(one, pool)| rule(json!([one]), pool)).collect();
    route(name, json!({ "rules": rules }))
}

#[test]
fn conditions_of_a_match_all_hold() {
    let all = json!({
        "path": { "type": "PathPrefix", "value": "/v1" },
        "method": "POST",
        "headers": [{ "name": "X-Team", "type": "Exact", "value": "red" }, { "name": "x-team", "value": "ignored" }],
        "queryParams": [{ "name": "beta", "value": "1" }, { "name": "beta", "value": "ignored" }],
    });
    let routes = Routes::of(&objects(open_gateway(), vec![rules("r", &[(all, "a")])]));
    let rows = [
        ("POST", "/v1/x?beta=1", "red", "a"),
        ("POST", "/v1?x=y&beta=1", "red", "a"),
        ("GET", "/v1/x?beta=1", "red", "404"),
        ("POST", "/v10/x?beta=1", "red", "404"),
        ("POST", "/v1/x?beta=2", "red", "404"),
        ("POST", "/v1/x", "red", "404"),
        ("POST", "/v1/x?beta=1", "Red", "404"),
    ];
    for (method, target, team, expected) in rows {
        assert_eq!(routes.ask(&asked(method, "h", target, &[("x-team", team)])), expected, "{method} {target} {team}");
    }
}

#[test]
fn matches_of_a_rule_are_alternatives_and_none_matches_all() {
    let several = rule(json!([path("Exact", "/a"), path("PathPrefix", "/b/")]), "one");
    let routes = Routes::of(&objects(open_gateway(), vec![route("r", json!({ "rules": [several] }))]));
    for (target, expected) in [("/a", "one"), ("/a/", "404"), ("/b", "one"), ("/b/c", "one"), ("/bc", "404")] {
        assert_eq!(routes.ask(&get(target)), expected, "{target}");
    }
    for none in [json!({ "backendRefs": [to("all")] }), rule(json!([]), "all"), rule(json!([{}]), "all")] {
        let routes = Routes::of(&objects(open_gateway(), vec![route("r", json!({ "rules": [none] }))]));
        assert_eq!(routes.ask(&get("/anything?x")), "all", "{none}");
    }
}

/// Each row has matches from the least to the most precedence.
#[test]
fn precedence_is_that_of_the_gateway_api() {
    let with = |base: Value, more: Value| {
        let mut whole = base;
        whole.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        whole
    };
    let two = json!({ "headers": [header("a", "1"), header("b", "1")] });
    let ascending = [
        path("PathPrefix", "/"),
        with(path("PathPrefix", "/"), json!({ "queryParams": [header("q", "1")] })),
        with(path("PathPrefix", "/"), json!({ "queryParams": [header("q", "1"), header("r", "1")] })),
        with(path("PathPrefix", "/"), json!({ "headers": [header("a", "1")] })),
        with(path("PathPrefix", "/"), two.clone()),
        with(path("PathPrefix", "/"), json!({ "method": "GET" })),
        with(path("PathPrefix", "/"), json!({ "method": "GET", "headers": [header("a", "1")] })),
        path("PathPrefix", "/x"),
        with(path("PathPrefix", "/x"), two),
        path("PathPrefix", "/x/yy"),
        path("Exact", "/x/yy"),
        with(path("Exact", "/x/yy"), json!({ "method": "GET" })),
    ];
    let request = asked("GET", "h", "/x/yy?q=1&r=1", &[("a", "1"), ("b", "1")]);
    for (index, winner) in ascending.iter().enumerate().skip(1) {
        // In both orders, in one route and in two.
        let (lower, higher) = ((ascending[index - 1].clone(), "lower"), (winner.clone(), "higher"));
        let both = [[lower.clone(), higher.clone()], [higher.clone(), lower.clone()]];
        for pair in both {
            let one = objects(open_gateway(), vec![rules("r", &pair)]);
            let two = objects(open_gateway(), vec![rules("a", &pair[..1]), rules("b", &pair[1..])]);
            for objects in [one, two] {
                assert_eq!(Routes::of(&objects).ask(&request), "higher", "{winner} over {}", ascending[index - 1]);
            }
        }
    }
}

#[test]
fn ties_go_to_the_older_route_then_to_its_name_then_to_the_first_rule() {
    let aged = |name: &str, created: &str, pool: &str| {
        let mut route = rules(name, &[(path("PathPrefix", "/"), pool)]);
        route.metadata.creation_timestamp = created.to_owned();
        route
    };
    let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z");
    let rows = [
        (vec![aged("a", late, "late"), aged("b", early, "early")], "early"),
        (vec![aged("b", early, "b"), aged("a", early, "a")], "a"),
        (vec![rules("r", &[(path("PathPrefix", "/"), "first"), (path("PathPrefix", "/"), "second")])], "first"),
    ];
    for (routes, expected) in rows {
        assert_eq!(Routes::of(&objects(open_gateway(), routes)).ask(&get("/")), expected);
    }
}

/// Whatever such a match could take is refused, unless another route takes it.
#[test]
fn matches_that_are_not_implemented_are_refused() {
    let rows = [
        (path("RegularExpression", "/v[12]"), "matches.path of type RegularExpression is not implemented"),
        (
            json!({ "headers": [{ "name": "a", "type": "RegularExpression", "value": ".*" }] }),
            "matches.headers of type RegularExpression",
        ),
        (
            json!({ "queryParams": [{ "name": "q", "type": "RegularExpression", "value": "." }] }),
            "matches.queryParams of type RegularExpression",
        ),
        (json!({ "cookies": [] }), "matches.cookies is not implemented"),
        (path("Suffix", "/x"), "matches.path of type Suffix"),
        (json!({ "path": { "type": "PathPrefix", "value": "x" } }), "found the path \"x\""),
        (json!({ "headers": "all" }), "invalid type"),
    ];
    for (one, expected) in rows {
        let other = rules("other", &[(path("PathPrefix", "/other/deep"), "other")]);
        let routes = Routes::of(&objects(open_gateway(), vec![rules("r", &[(one.clone(), "a")]), other]));
        let refused = routes.ask(&asked("GET", "h", "/v1?q=1", &[("a", "b")]));
        assert!(
            refused.starts_with("500 the HTTPRoute models/r, rule 0: ") && refused.contains(expected),
            "{one}: {refused}"
        );
        if one["headers"].is_null() && one["queryParams"].is_null() {
            assert_eq!(routes.ask(&get("/other/deep/x")), "other", "{one}");
        }
    }
    // The condition that is implemented still has to hold.
    let both = json!({ "method": "PUT", "path": { "type": "RegularExpression", "value": ".*" } });
    let routes = Routes::of(&objects(open_gateway(), vec![rules("r", &[(both, "a")])]));
    assert_eq!(routes.ask(&get("/")), "404");
}
