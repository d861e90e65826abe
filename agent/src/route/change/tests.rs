//! Requests before and after the changes of a route, and the locations of redirects.

use http::Request;

use super::*;
use crate::{config::Config, route::Router};

fn parts(target: &str, fields: &[(&str, &str)]) -> request::Parts {
    let mut builder = Request::builder().uri(target);
    for (name, value) in fields {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

fn router(route: &str) -> Router {
    let text = format!("[[pools]]\nname = \"a\"\nendpoints = [\"10.0.0.1:1\"]\n[[routes]]\n{route}");
    Router::new(&Config::parse(&text, "p.toml").unwrap_or_else(|errors| panic!("{errors}")))
}

fn changed(route: &str, mut request: request::Parts) -> request::Parts {
    let router = router(&format!("pool = \"a\"\n{route}"));
    let changes = router.route(&request, |_| 0).unwrap().changes.expect("changes");
    changes.apply(&mut request).unwrap();
    request
}

fn location(route: &str, request: &request::Parts) -> String {
    let router = router(route);
    let Err(super::super::NotRouted::Redirected(to)) = router.route(request, |_| 0) else { panic!("no redirect") };
    to.location(request).to_str().unwrap().to_owned()
}

/// The first rows are those of the Gateway API's `replacePrefixMatch`.
const REPLACED: [(&str, &str, &str, &str); 17] = [
    ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
    ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
    ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
    ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
    ("/foo", "/foo", "/xyz", "/xyz"),
    ("/foo/", "/foo", "/xyz", "/xyz/"),
    ("/foo/bar", "/foo", "/", "/bar"),
    ("/foo/", "/foo", "/", "/"),
    ("/foo", "/foo", "/", "/"),
    ("/foo", "/", "/xyz", "/xyz/foo"),
    ("/", "/", "/xyz", "/xyz/"),
    ("/foo//bar", "/foo", "/x", "/x//bar"),
    ("/foo/%2e%2e/a", "/foo", "/x", "/x/%2e%2e/a"),
    ("/foo/bar?a=/foo&b", "/foo", "/x", "/x/bar?a=/foo&b"),
    ("/foo?", "/foo", "/x", "/x?"),
    ("/foo?q", "/foo", "/", "/?q"),
    ("/foo/foo", "/foo", "/x", "/x/foo"),
];

#[test]
fn prefix_is_replaced_in_whole_segments() {
    for (target, prefix, replacement, expected) in REPLACED {
        let condition = format!("path_prefix = \"{prefix}\"");
        let route = format!("{condition}\n[routes.rewrite]\npath_prefix = \"{replacement}\"");
        assert_eq!(changed(&route, parts(target, &[])).uri.to_string(), expected, "{target} {prefix} {replacement}");
        let route = format!("{condition}\n[routes.redirect]\npath_prefix = \"{replacement}\"");
        let redirected = location(&route, &parts(target, &[("host", "h")]));
        assert_eq!(redirected, format!("http://h{expected}"), "{target} {prefix} {replacement}");
    }
}

#[test]
fn whole_path_is_replaced_and_the_query_stays() {
    let route = "[routes.rewrite]\npath = \"/b/c\"\nhost = \"other\"";
    for (target, expected) in [("/a", "/b/c"), ("/a/?x=1", "/b/c?x=1"), ("*", "*")] {
        let after = changed(route, parts(target, &[("host", "h:1")]));
        assert_eq!(
            (after.uri.to_string().as_str(), after.headers["host"].to_str().unwrap()),
            (expected, "other"),
            "{target}"
        );
    }
}

#[test]
fn fields_are_set_added_and_removed() {
    let route = "[routes.request_headers]\nset = [{ name = \"X-A\", value = \"1\" }, { name = \"x-new\", value = \"2\" }]\n\
                 add = [{ name = \"x-b\", value = \"3\" }]\nremove = [\"x-c\"]";
    let before = [("x-a", "0"), ("x-a", "00"), ("x-b", "0"), ("x-c", "0"), ("x-c", "1"), ("x-d", "0")];
    let after = changed(route, parts("/", &before));
    let all =
        |name: &str| -> Vec<_> { after.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect() };
    assert_eq!(
        ["x-a", "x-new", "x-b", "x-c", "x-d"].map(all),
        [vec!["1"], vec!["2"], vec!["0", "3"], vec![], vec!["0"]]
    );
}

#[test]
fn target_that_becomes_too_long_is_an_error() {
    let route =
        format!("pool = \"a\"\npath_prefix = \"/\"\n[routes.rewrite]\npath_prefix = \"/{}\"", "b".repeat(40_000));
    let router = router(&route);
    let mut request = parts(&format!("/{}", "c".repeat(40_000)), &[]);
    let before = request.uri.clone();
    let changes = router.route(&request, |_| 0).unwrap().changes.unwrap();
    assert_eq!((changes.apply(&mut request), request.uri), (Err(TargetTooLong), before));
}

#[test]
fn route_without_changes_has_none() {
    let router = router("pool = \"a\"");
    assert_eq!(router.route(&parts("/", &[]), |_| 0).unwrap().changes, None);
}

#[test]
fn redirects_name_scheme_host_port_and_path() {
    let rows = [
        ("", "h", "http://h/a?b=c"),
        ("", "h:8080", "http://h:8080/a?b=c"),
        ("", "h:80", "http://h/a?b=c"),
        ("", "[fd00::1]:81", "http://[fd00::1]:81/a?b=c"),
        ("scheme = \"https\"", "h:8080", "https://h/a?b=c"),
        ("scheme = \"https\"\nport = 443", "h", "https://h/a?b=c"),
        ("scheme = \"https\"\nport = 80", "h", "https://h:80/a?b=c"),
        ("scheme = \"http\"\nport = 443", "h", "http://h:443/a?b=c"),
        ("port = 8443", "h:1", "http://h:8443/a?b=c"),
        ("host = \"other\"", "h:81", "http://other:81/a?b=c"),
        ("host = \"other\"\npath = \"/x\"", "", "http://other/x?b=c"),
        ("path = \"//x\"", "", "/x?b=c"),
    ];
    for (settings, host, expected) in rows {
        let fields = [("host", host)];
        let fields = if host.is_empty() { &fields[..0] } else { &fields[..] };
        let request = parts("/a?b=c", fields);
        assert_eq!(location(&format!("[routes.redirect]\n{settings}"), &request), expected, "{settings} {host}");
    }
    let mut request = parts("/a", &[("host", "h:8443")]);
    request.extensions.insert(Scheme::HTTPS);
    assert_eq!(location("[routes.redirect]", &request), "https://h:8443/a");
}
