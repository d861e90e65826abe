//! Rejected request heads. The connection closes, because the start of the next request is unknown.

use crate::setting::{Setting, get, post, refused};

#[tokio::test]
async fn malformed_request_lines_are_rejected() {
    let line = |line: &str| format!("{line}\r\nhost: x\r\n\r\n");
    let mut rows = Vec::new();
    for bad in [
        "GET / HTTP/1.1 x",
        "GET /a b HTTP/1.1",
        "GET /",
        "GET  / HTTP/1.1",
        "GET\t/ HTTP/1.1",
        " GET / HTTP/1.1",
        "G@T / HTTP/1.1",
        "GET / http/1.1",
        "GET / HTTP/11",
        "GET / HTTP/1.1x",
        "GET / HTTP/1.2x",
        "GET / HTTP/1.10",
        "GET / x HTTP/1.2",
        "/ HTTP/1.1",
        "GET",
        "{\"model\": \"m\"}",
    ] {
        rows.push(refused(400, "request_line", line(bad)));
    }
    for bad in ["GET x HTTP/1.1", "GET /#x HTTP/1.1", "GET ftp://x/ HTTP/1.1", "GET http://u@x/ HTTP/1.1"] {
        rows.push(refused(400, "target", line(bad)));
    }
    for version in ["HTTP/2.0", "HTTP/2.1", "HTTP/0.9", "HTTP/3.0"] {
        rows.push(refused(505, "version", line(&format!("GET / {version}"))).says(version));
    }
    rows.extend([
        refused(501, "method", line("CONNECT x:443 HTTP/1.1")),
        refused(501, "method", line("TRACE / HTTP/1.1")),
        refused(400, "asterisk_target", line("GET * HTTP/1.1")),
        refused(400, "host_mismatch", line("GET http://other/ HTTP/1.1")).says("other"),
        refused(400, "host_mismatch", line("GET http://x:81/ HTTP/1.1")),
        refused(400, "blank_lines", "\r\n".repeat(5)),
        // A TLS client on the plain port.
        refused(400, "control_character", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ]);
    Setting::start(|_| {}).await.refuses(rows).await;
}

#[tokio::test]
async fn malformed_header_lines_are_rejected() {
    let rows = [
        refused(400, "bare_lf", "GET / HTTP/1.1\nhost: x\n\n"),
        refused(400, "bare_lf", get("a: b\nc: d\r\n")),
        refused(400, "bare_lf", "\nGET / HTTP/1.1\r\nhost: x\r\n\r\n"),
        refused(400, "bare_cr", get("a: b\rc: d\r\n")),
        refused(400, "bare_cr", "GET / HTTP/1.1\rhost: x\r\n\r\n"),
        refused(400, "folded_line", get("a: b\r\n c\r\n")),
        refused(400, "folded_line", get("a: b\r\n\tc: d\r\n")),
        refused(400, "folded_line", "GET / HTTP/1.1\r\n host: x\r\n\r\n"),
        refused(400, "control_character", get("a: b\0c\r\n")),
        refused(400, "control_character", get("a\0: b\r\n")),
        refused(400, "control_character", get("a: \x7f\r\n")),
        refused(400, "blank_before_colon", get("a : b\r\n")),
        refused(400, "blank_before_colon", get("a\t: b\r\n")),
        refused(400, "field_line", get("a\r\n")),
        refused(400, "field_line", get(": b\r\n")),
        refused(400, "field_line", get("a b: c\r\n")),
        refused(400, "field_line", get("a\u{e9}: c\r\n")),
        refused(417, "expectation", post("expect: 200-ok\r\ncontent-length: 2\r\n", "")),
        refused(417, "expectation", post("expect: 100-continue, x\r\ncontent-length: 2\r\n", "")),
        refused(400, "head_cut", "GET / HTTP/1.1\r\nhost: x\r\n").finish(),
        refused(400, "head_cut", "G").finish(),
    ];
    Setting::start(|_| {}).await.refuses(rows).await;
}

#[tokio::test]
async fn invalid_hosts_are_rejected() {
    let host = |fields: &str| format!("GET / HTTP/1.1\r\n{fields}\r\n");
    let mut rows = vec![
        refused(400, "host_missing", host("")),
        refused(400, "host_missing", host("hosts: x\r\n")),
        refused(400, "host_repeated", host("host: x\r\nhost: x\r\n")),
        refused(400, "host_repeated", host("host: x\r\nHOST: y\r\n")),
        refused(400, "host_repeated", "GET / HTTP/1.0\r\nhost: x\r\nhost: y\r\n\r\n"),
    ];
    for bad in ["", "a b", "u@x", "x:y", "x:99999", "x:-1", "[::1", "[x]", "a/b", "a?b", "x, y", "a\u{e9}"] {
        rows.push(refused(400, "host", host(&format!("host: {bad}\r\n"))));
    }
    Setting::start(|_| {}).await.refuses(rows).await;
}

#[tokio::test]
async fn oversized_heads_are_rejected() {
    let setting = Setting::start(|config| {
        config.limits.head_bytes = 4096;
        config.limits.headers = 32;
    });
    let mut setting = setting.await;
    let long = "x".repeat(5000);
    let rows = [
        refused(431, "head_too_long", get(&format!("a: {long}\r\n"))).says("4096"),
        refused(431, "head_too_long", format!("GET / HTTP/1.1\r\nhost: x\r\na: {long}")),
        refused(431, "head_too_long", get(&"a: b\r\n".repeat(1000))),
        refused(431, "too_many_fields", get(&"a: b\r\n".repeat(32))).says("32"),
        refused(414, "request_line_too_long", format!("GET /{long} HTTP/1.1\r\nhost: x\r\n\r\n")),
        refused(414, "request_line_too_long", long),
    ];
    setting.refuses(rows).await;
    let (response, _) = setting.answer(&get(&"a: b\r\n".repeat(31))).await;
    assert_eq!(response.status(), 200);
}

/// Even if `limits.head_bytes` allows more.
#[tokio::test]
async fn targets_and_names_beyond_64_kib_are_rejected_as_too_long() {
    let mut setting = Setting::start(|config| config.limits.head_bytes = 1 << 20).await;
    let long = "x".repeat(70_000);
    let line = |target: &str| format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n");
    let rows = [
        refused(414, "request_line_too_long", line(&format!("/{long}"))).says("65534"),
        refused(414, "request_line_too_long", line(&format!("/?{long}"))).says("65534"),
        refused(414, "request_line_too_long", line(&format!("http://x/{long}"))).says("65534"),
        refused(414, "request_line_too_long", line(&format!("http://x?{long}"))).says("65534"),
        refused(431, "head_too_long", get(&format!("{long}: a\r\n"))).says("65535"),
    ];
    setting.refuses(rows).await;
}
