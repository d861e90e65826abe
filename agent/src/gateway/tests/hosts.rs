//! Listeners, hosts, and which HTTPRoutes may attach.

use super::*;

fn listener(name: &str, hostname: &str) -> Value {
    json!({ "name": name, "hostname": hostname, "port": 80, "protocol": "HTTP", "allowedRoutes": { "namespaces": { "from": "All" } } })
}

fn for_hosts(name: &str, hosts: &[&str], pool: &str) -> ApiObject {
    route(name, json!({ "hostnames": hosts, "rules": [rule(json!([]), pool)] }))
}

/// Host of the listener, hosts of the route, hosts that are served, hosts that are not.
type HostRow = (&'static str, &'static [&'static str], &'static [&'static str], &'static [&'static str]);

#[test]
fn hosts_of_listener_and_route_intersect() {
    let rows: [HostRow; 10] = [
        ("", &[], &["a.x", "b"], &[]),
        ("", &["a.x"], &["a.x", "A.X:80"], &["b.x", "a.a.x"]),
        ("a.x", &[], &["a.x"], &["b.x"]),
        ("*.x", &["a.x", "a.y"], &["a.x"], &["a.y", "b.x", "x"]),
        ("*.x", &["*.b.x"], &["a.b.x", "c.a.b.x"], &["b.x", "a.x"]),
        ("*.b.x", &["*.x"], &["a.b.x"], &["a.x", "b.x"]),
        ("a.x", &["*.x"], &["a.x"], &["b.x"]),
        ("a.x", &["b.x"], &[], &["a.x", "b.x"]),
        ("*.x", &["x"], &[], &["x", "a.x"]),
        ("*.x", &["*.y"], &[], &["a.x", "a.y"]),
    ];
    for (of_listener, of_route, served, others) in rows {
        let objects = objects(gateway(json!([listener("l", of_listener)])), vec![for_hosts("r", of_route, "a")]);
        let routes = Routes::of(&objects);
        for (hosts, expected) in [(served, "a"), (others, "404")] {
            for host in hosts {
                assert_eq!(routes.ask(&asked("GET", host, "/", &[])), expected, "{of_listener} {of_route:?} {host}");
            }
        }
    }
}

#[test]
fn more_specific_host_takes_precedence_over_a_better_path() {
    let exact = json!([{ "path": { "type": "Exact", "value": "/x" } }]);
    let routes = vec![
        route("all", json!({ "rules": [rule(exact.clone(), "any")] })),
        route("wild", json!({ "hostnames": ["*.x"], "rules": [rule(exact, "wild")] })),
        for_hosts("long", &["*.b.x"], "long"),
        for_hosts("one", &["a.b.x"], "one"),
    ];
    let routes = Routes::of(&objects(open_gateway(), routes));
    for (host, expected) in [("a.b.x", "one"), ("c.b.x", "long"), ("c.x", "wild"), ("y", "any")] {
        assert_eq!(routes.ask(&asked("GET", host, "/x", &[])), expected, "{host}");
    }
    assert_eq!(routes.ask(&asked("GET", "c.x", "/y", &[])), "404");
}

/// A request belongs to the listener with the most specific host, even if no route is attached there.
#[test]
fn listeners_are_isolated_from_each_other() {
    let listeners =
        json!([listener("any", ""), listener("wild", "*.x"), listener("one", "a.x"), listener("empty", "e.x")]);
    let at = |name: &str, section: &str, pool: &str| {
        let parent = json!([{ "name": "g", "namespace": "infra", "sectionName": section }]);
        route(
            name,
            json!({ "parentRefs": parent, "rules": [rule(json!([{ "path": { "value": format!("/{pool}") } }]), pool)] }),
        )
    };
    let routes =
        vec![at("r1", "any", "any"), at("r2", "wild", "wild"), at("r3", "one", "one"), at("r4", "other", "other")];
    let routes = Routes::of(&objects(gateway(listeners), routes));
    let rows = [
        ("y", "/any", "any"),
        ("y", "/wild", "404"),
        ("b.x", "/wild", "wild"),
        ("b.x", "/any", "404"),
        ("a.x", "/one", "one"),
        ("a.x", "/wild", "404"),
        ("e.x", "/wild", "404"),
        ("e.x", "/any", "404"),
        ("y", "/other", "404"),
    ];
    for (host, path, expected) in rows {
        assert_eq!(routes.ask(&asked("GET", host, path, &[])), expected, "{host} {path}");
    }
}

#[test]
fn listeners_that_are_not_http_at_the_port_are_not_served() {
    let with = |name: &str, port: u16, protocol: &str, host: &str| json!({ "name": name, "port": port, "protocol": protocol, "hostname": host, "allowedRoutes": { "namespaces": { "from": "All" } } });
    // Listeners, the port of the settings, and whether the hosts a and b are served.
    let rows = [
        (json!([with("a", 80, "HTTP", "a"), with("b", 443, "HTTPS", "b")]), None, [true, false]),
        (json!([with("b", 443, "HTTPS", "b"), with("a", 80, "HTTP", "a")]), None, [true, false]),
        (json!([with("a", 80, "HTTP", "a"), with("b", 8080, "HTTP", "b")]), None, [true, false]),
        (json!([with("a", 80, "HTTP", "a"), with("b", 8080, "HTTP", "b")]), Some(8080), [false, true]),
        (json!([with("a", 80, "HTTP", "a"), with("b", 80, "HTTP", "b")]), None, [true, true]),
        (json!([with("a", 80, "HTTP", "a"), with("b", 80, "TLS", "b")]), None, [false, false]),
        (
            json!([with("a", 80, "HTTP", "a"), with("c", 80, "HTTP", "a"), with("b", 80, "HTTP", "b")]),
            None,
            [false, true],
        ),
        (json!([with("a", 80, "example.com/x", "a")]), None, [false, false]),
    ];
    for (listeners, port, expected) in rows {
        let objects = objects(gateway(listeners.clone()), vec![for_hosts("r", &[], "p")]);
        let meaning = translate(&GatewayRef { port, ..named() }, &objects);
        let served = ["a", "b"].map(|host| {
            let host = HostPattern::Exact(host.to_owned());
            meaning.routes.iter().any(|route| route.hosts.contains(&host) && route.refused.is_none())
        });
        assert_eq!(served, expected, "{listeners} {port:?}");
    }
}

#[test]
fn only_allowed_namespaces_kinds_and_parents_attach() {
    let labelled = |name: &str, labels: Value| -> ApiObject {
        serde_json::from_value(json!({ "metadata": { "name": name, "labels": labels } })).unwrap()
    };
    let namespaces = vec![labelled("models", json!({ "team": "red" })), labelled("infra", json!({}))];
    let selector = |selector: Value| json!({ "namespaces": { "from": "Selector", "selector": selector } });
    let expression = |operator: &str, values: Value| {
        selector(json!({ "matchExpressions": [{ "key": "team", "operator": operator, "values": values }] }))
    };
    // What the listener allows, and whether routes of the namespaces models and infra attach.
    let rows = [
        (json!({}), [false, true]),
        (json!({ "namespaces": { "from": "Same" } }), [false, true]),
        (json!({ "namespaces": { "from": "All" } }), [true, true]),
        (json!({ "namespaces": { "from": "None" } }), [false, false]),
        (selector(json!({ "matchLabels": { "team": "red" } })), [true, false]),
        (selector(json!({ "matchLabels": { "team": "blue" } })), [false, false]),
        (selector(json!({})), [true, true]),
        (json!({ "namespaces": { "from": "Selector" } }), [false, false]),
        (selector(json!(null)), [false, false]),
        (expression("In", json!(["blue", "red"])), [true, false]),
        (expression("NotIn", json!(["blue"])), [true, true]),
        (expression("NotIn", json!(["red"])), [false, true]),
        (expression("Exists", json!([])), [true, false]),
        (expression("DoesNotExist", json!([])), [false, true]),
        (expression("Like", json!(["red"])), [false, false]),
        (json!({ "namespaces": { "from": "All" }, "kinds": [{ "kind": "HTTPRoute" }] }), [true, true]),
        (json!({ "namespaces": { "from": "All" }, "kinds": [{ "kind": "GRPCRoute" }] }), [false, false]),
        (json!({ "namespaces": { "from": "All" }, "kinds": [{ "group": "x", "kind": "HTTPRoute" }] }), [false, false]),
    ];
    for (allowed, expected) in rows {
        let gateway = gateway(json!([{ "name": "l", "port": 80, "protocol": "HTTP", "allowedRoutes": allowed }]));
        let attached = ["models", "infra"].map(|namespace| {
            let mut one = for_hosts("r", &[], "p");
            one.metadata.namespace = namespace.to_owned();
            let objects = GatewayObjects { namespaces: namespaces.clone(), ..objects(gateway.clone(), vec![one]) };
            Routes::of(&objects).ask(&get("/")) != "404"
        });
        assert_eq!(attached, expected, "{allowed}");
    }
    let parents = [
        (json!({ "name": "g", "namespace": "infra" }), true),
        (json!({ "name": "g", "namespace": "infra", "group": GROUP, "kind": "Gateway", "port": 80 }), true),
        (json!({ "name": "g", "namespace": "infra", "port": 81 }), false),
        (json!({ "name": "g", "namespace": "infra", "sectionName": "http" }), true),
        (json!({ "name": "g", "namespace": "infra", "sectionName": "other" }), false),
        (json!({ "name": "g" }), false),
        (json!({ "name": "other", "namespace": "infra" }), false),
        (json!({ "name": "g", "namespace": "infra", "kind": "Service", "group": "" }), false),
    ];
    for (parent, expected) in parents {
        let one = route("r", json!({ "parentRefs": [parent], "rules": [rule(json!([]), "p")] }));
        assert_eq!(
            attaches(&named(), &one),
            expected || parent["port"] == 81 || parent["sectionName"] == "other",
            "{parent}"
        );
        let attached = Routes::of(&objects(open_gateway(), vec![one])).ask(&get("/")) != "404";
        assert_eq!(attached, expected, "{parent}");
    }
}
