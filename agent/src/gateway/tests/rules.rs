//! Filters, timeouts and references of rules.

use std::time::Duration;

use super::*;

fn with(filters: impl Into<Value>, path: &str) -> Routes {
    let filters = filters.into();
    let rule = json!({ "matches": [{ "path": { "value": path } }], "filters": filters, "backendRefs": [to("a")] });
    Routes::of(&objects(open_gateway(), vec![route("r", json!({ "rules": [rule] }))]))
}

/// The request as the endpoint of the rule gets it.
fn changed(filters: Value, path: &str, mut request: request::Parts) -> request::Parts {
    let routes = with(filters, path);
    let routed = routes.router.route(&request, |_| 0).unwrap();
    routed.changes.expect("changes").apply(&mut request).unwrap();
    request
}

#[test]
fn header_modifier_and_url_rewrite_change_the_request() {
    let filters = json!([
        { "type": "RequestHeaderModifier", "requestHeaderModifier": {
            "set": [{ "name": "X-Set", "value": "1" }, { "name": "x-set", "value": "ignored" }],
            "add": [{ "name": "x-add", "value": "2" }],
            "remove": ["x-remove"],
        } },
        { "type": "URLRewrite", "urlRewrite": {
            "hostname": "internal", "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/v1" },
        } },
    ]);
    let fields = [("x-set", "0"), ("x-add", "0"), ("x-remove", "0")];
    let after = changed(filters, "/team/", asked("GET", "h", "/team/models?x=1", &fields));
    let all =
        |name: &str| -> Vec<_> { after.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect() };
    assert_eq!(["host", "x-set", "x-add", "x-remove"].map(all), [vec!["internal"], vec!["1"], vec!["0", "2"], vec![]]);
    assert_eq!(after.uri, "/v1/models?x=1");
    let whole = json!([{ "type": "URLRewrite", "urlRewrite": { "path": { "type": "ReplaceFullPath", "replaceFullPath": "/one" } } }]);
    assert_eq!(changed(whole, "/team", get("/team/models")).uri, "/one");
    let empty = json!([{ "type": "URLRewrite", "urlRewrite": { "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "" } } }]);
    assert_eq!(changed(empty, "/foo", get("/foo")).uri, "/");
}

#[test]
fn redirects_use_the_port_of_the_listener() {
    let listener = |port: u16| {
        gateway(
            json!([{ "name": "l", "port": port, "protocol": "HTTP", "allowedRoutes": { "namespaces": { "from": "All" } } }]),
        )
    };
    let rows = [
        (80, json!({}), "302 http://h/x?q"),
        (8080, json!({}), "302 http://h:8080/x?q"),
        (8080, json!({ "scheme": "https" }), "302 https://h/x?q"),
        (8080, json!({ "scheme": "http" }), "302 http://h/x?q"),
        (80, json!({ "port": 8443, "statusCode": 308, "hostname": "other" }), "308 http://other:8443/x?q"),
        (
            80,
            json!({ "statusCode": 301, "path": { "type": "ReplaceFullPath", "replaceFullPath": "/y" } }),
            "301 http://h/y?q",
        ),
        (80, json!({ "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/y" } }), "302 http://h/y/x?q"),
    ];
    for (port, redirect, expected) in rows {
        let rule = json!({ "filters": [{ "type": "RequestRedirect", "requestRedirect": redirect }] });
        let objects = objects(listener(port), vec![route("r", json!({ "rules": [rule] }))]);
        assert_eq!(Routes::of(&objects).ask(&asked("GET", "h:1234", "/x?q", &[])), expected, "{port} {redirect}");
    }
}

#[test]
fn filters_that_are_not_implemented_or_contradict_are_refused() {
    let redirect = json!({ "type": "RequestRedirect", "requestRedirect": {} });
    let rewrite = json!({ "type": "URLRewrite", "urlRewrite": {} });
    let modifier = |field: &str, value: Value| json!({ "type": "RequestHeaderModifier", "requestHeaderModifier": { field: value } });
    let to_path = |kind: &str, field: &str, value: &str| json!({ "type": "URLRewrite", "urlRewrite": { "path": { "type": kind, field: value } } });
    let rows = [
        (
            json!([{ "type": "RequestMirror", "requestMirror": {} }]),
            "filters of type RequestMirror are not implemented",
        ),
        (
            json!([{ "type": "ResponseHeaderModifier", "responseHeaderModifier": {} }]),
            "filters of type ResponseHeaderModifier",
        ),
        (
            json!([{ "type": "ExtensionRef", "extensionRef": { "group": "x", "kind": "Y", "name": "z" } }]),
            "filters of type ExtensionRef",
        ),
        (json!([{ "type": "CORS", "cors": {} }]), "filters of type CORS"),
        (json!([{ "type": "URLRewrite" }]), "filters of type URLRewrite are not implemented"),
        (json!([redirect, rewrite]), "has both URLRewrite and RequestRedirect"),
        (json!([rewrite, rewrite]), "has two filters of type URLRewrite"),
        (json!([modifier("set", json!([{ "name": "Host", "value": "x" }]))]), "found \"Host\""),
        (json!([modifier("remove", json!(["content-length"]))]), "found \"content-length\""),
        (json!([modifier("add", json!([{ "name": "x", "value": "a\nb" }]))]), "found the value"),
        (json!([modifier("merge", json!([]))]), "requestHeaderModifier.merge is not implemented"),
        (json!([to_path("ReplaceFullPath", "replaceFullPath", "/a?b")]), "found the new path \"/a?b\""),
        (json!([to_path("ReplacePrefixMatch", "replacePrefixMatch", "a")]), "found the new path \"a\""),
        (json!([to_path("ReplaceRegex", "replaceRegex", "a")]), "a path modifier of type ReplaceRegex"),
        (
            json!([{ "type": "RequestRedirect", "requestRedirect": { "scheme": "ftp" } }]),
            "requestRedirect.scheme: found \"ftp\"",
        ),
        (
            json!([{ "type": "RequestRedirect", "requestRedirect": { "statusCode": 300 } }]),
            "requestRedirect.statusCode: found 300",
        ),
    ];
    for (filters, expected) in rows {
        let refused = with(filters.clone(), "/x").ask(&get("/x"));
        assert!(
            refused.starts_with("500 the HTTPRoute models/r, rule 0: ") && refused.contains(expected),
            "{filters}: {refused}"
        );
        assert_eq!(with(filters, "/x").ask(&get("/y")), "404", "only requests of the rule are refused");
    }
    // A prefix cannot be replaced where the match has none.
    let prefix = to_path("ReplacePrefixMatch", "replacePrefixMatch", "/b");
    let rule = json!({ "matches": [{ "path": { "type": "Exact", "value": "/a" } }], "filters": [prefix], "backendRefs": [to("a")] });
    let refused = Routes::of(&objects(open_gateway(), vec![route("r", json!({ "rules": [rule] }))])).ask(&get("/a"));
    assert!(refused.contains("replacePrefixMatch needs a match of type PathPrefix"), "{refused}");
}

#[test]
fn timeouts_become_those_of_the_route() {
    let timed = |timeouts: Value| {
        let rule = json!({ "timeouts": timeouts, "backendRefs": [to("a")] });
        objects(open_gateway(), vec![route("r", json!({ "rules": [rule] }))])
    };
    let meaning = meaning(&timed(json!({ "request": "1m30s", "backendRequest": "0s" })));
    let timeouts = meaning.routes[0].timeouts;
    assert_eq!((timeouts.request, timeouts.dispatch), (Some(Some(Duration::from_secs(90))), Some(None)));
    for (wrong, expected) in [
        (json!({ "request": "soon" }), "found the timeout \"soon\""),
        (json!({ "idle": "1s" }), "timeouts.idle is not"),
    ] {
        let refused = Routes::of(&timed(wrong)).ask(&get("/"));
        assert!(refused.contains(expected), "{refused}");
    }
}

#[test]
fn fields_of_a_rule_that_nothing_reads_refuse_it() {
    for (field, value) in [("sessionPersistence", json!({ "type": "Cookie" })), ("retry", json!({ "attempts": 2 }))] {
        let rule = json!({ "name": "named", "backendRefs": [to("a")], field: value });
        let refused = Routes::of(&objects(open_gateway(), vec![route("r", json!({ "rules": [rule] }))])).ask(&get("/"));
        assert!(refused.contains(&format!("rules.{field} is not implemented")), "{refused}");
    }
}

/// Shares of a rule, what each number that can be drawn leads to.
#[test]
fn weights_divide_requests_and_refuse_the_share_of_invalid_references() {
    let weighted = |mut backend: Value, weight: u64| {
        backend["weight"] = weight.into();
        backend
    };
    let service = json!({ "name": "s", "port": 80 });
    let rows: [(Value, &[&str]); 7] = [
        (json!([weighted(to("a"), 2), weighted(to("b"), 1)]), &["a", "a", "b"]),
        (json!([weighted(to("a"), 0), weighted(to("b"), 1)]), &["b"]),
        (json!([to("a"), service]), &["a", "500 backendRefs of kind Service of group \"\" are not implemented"]),
        (json!([weighted(to("a"), 1), weighted(service.clone(), 0)]), &["a"]),
        (json!([weighted(to("a"), 0), weighted(to("b"), 0)]), &["500 no weight of its backendRefs is above 0"]),
        (json!([service]), &["500 backendRefs of kind Service"]),
        (json!([]), &["500 has no backendRefs"]),
    ];
    for (backends, expected) in rows {
        let rule = json!({ "backendRefs": backends });
        let routes = Routes::of(&objects(open_gateway(), vec![route("r", json!({ "rules": [rule] }))]));
        for (roll, expected) in (0..).zip(expected) {
            let found = routes.roll(&get("/"), roll);
            match expected.strip_prefix("500 ") {
                Some(why) => assert!(
                    found.starts_with(&format!("500 the HTTPRoute models/r, rule 0: {why}")),
                    "{backends}: {found}"
                ),
                None => assert_eq!(found, *expected, "{backends} {roll}"),
            }
        }
    }
    let filtered = json!({ "filters": [{ "type": "URLRewrite" }], "group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "a" });
    let routes =
        Routes::of(&objects(open_gateway(), vec![route("r", json!({ "rules": [{ "backendRefs": [filtered] }] }))]));
    assert!(routes.ask(&get("/")).ends_with("backendRefs.filters is not implemented"));
}

#[test]
fn references_to_other_namespaces_need_a_grant() {
    let mut backend = to("a");
    backend["namespace"] = "gpu".into();
    let one = route("r", json!({ "rules": [{ "backendRefs": [backend] }] }));
    assert!(crosses_namespaces(&one) && !crosses_namespaces(&route("r", json!({ "rules": [rule(json!([]), "a")] }))));
    let from = json!({ "group": GROUP, "kind": "HTTPRoute", "namespace": "models" });
    let to_pools = json!({ "group": "inference.networking.k8s.io", "kind": "InferencePool" });
    let changed = |base: &Value, field: &str, value: &str| {
        let mut changed = base.clone();
        changed[field] = value.into();
        changed
    };
    // Namespace of the grant, from, to, and whether the reference is permitted.
    let rows = [
        ("gpu", from.clone(), to_pools.clone(), true),
        ("gpu", from.clone(), changed(&to_pools, "name", "a"), true),
        ("gpu", from.clone(), changed(&to_pools, "name", "b"), false),
        ("gpu", from.clone(), changed(&to_pools, "kind", "Service"), false),
        ("gpu", from.clone(), changed(&to_pools, "group", "inference.networking.x-k8s.io"), false),
        ("gpu", changed(&from, "namespace", "infra"), to_pools.clone(), false),
        ("gpu", changed(&from, "kind", "GRPCRoute"), to_pools.clone(), false),
        ("models", from.clone(), to_pools.clone(), false),
    ];
    for (namespace, from, to, permitted) in rows {
        let grant = object(namespace, "g", json!({ "from": [from], "to": [to] }));
        let objects = GatewayObjects { grants: vec![grant], ..objects(open_gateway(), vec![one.clone()]) };
        let found = Routes::of(&objects).ask(&get("/"));
        let refused = "500 the HTTPRoute models/r, rule 0: no ReferenceGrant in gpu permits the reference to the InferencePool gpu/a";
        assert_eq!(found, if permitted { "gpu/a" } else { refused }, "{namespace} {from} {to}");
    }
}

#[test]
fn pools_of_both_versions_are_found_once_each_up_to_the_limit() {
    let old = json!({ "group": "inference.networking.x-k8s.io", "kind": "InferencePool", "name": "a" });
    let rules = json!([{ "backendRefs": [to("a"), old] }, { "matches": [{ "path": { "value": "/x" } }], "backendRefs": [to("a")] }]);
    let found = meaning(&objects(open_gateway(), vec![route("r", json!({ "rules": rules }))]));
    let names: Vec<_> = found.pools.iter().map(pool_name).collect();
    assert_eq!(names, ["models/a", "models/a/v1alpha2"]);
    let many: Vec<_> =
        (0..=MAX_POOLS).map(|n| rule(json!([{ "path": { "value": format!("/{n:03}") } }]), &format!("p{n}"))).collect();
    let routes = Routes::of(&objects(open_gateway(), vec![route("r", json!({ "rules": many }))]));
    assert_eq!(routes.ask(&get("/255")), "p255");
    assert!(routes.ask(&get("/256")).ends_with("HTTPRoutes refer to more than 256 InferencePools"));
}
