//! Request smuggling: requests that two parsers might delimit differently, each with the agent's response and what the endpoint
//! received: nothing, or exactly one well-formed request, never the hidden one.

use penstock_tests::{content::Fnv, model_server::Echo};

use crate::setting::{Setting, closed, error, get, post};

/// The request hidden in the test cases.
const HIDDEN: &str = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
const ENCODING: &str = "transfer-encoding: chunked\r\n";

/// The expected result of a trick.
enum Comes {
    /// Rejected with this status and code; nothing is forwarded and the connection closes.
    To(u16, &'static str),
    /// One request with this body; the connection stays usable.
    Whole(Vec<u8>),
    /// One request with this body; then the connection closes without a response to the rest.
    Last(Vec<u8>),
    /// One request with this body, then this error for the rest.
    Then(Vec<u8>, u16, &'static str),
}

use Comes::{Last, Then, To, Whole};

struct Trick {
    name: String,
    wire: Vec<u8>,
    comes: Comes,
}

fn trick(name: impl Into<String>, wire: impl Into<Vec<u8>>, comes: Comes) -> Trick {
    Trick { name: name.into(), wire: wire.into(), comes }
}

fn length(bytes: usize) -> String {
    format!("content-length: {bytes}\r\n")
}

/// The hidden request after the last chunk, for a parser that follows the chunks.
fn after_last() -> String {
    format!("0\r\n\r\n{HIDDEN}")
}

/// The hidden request inside a chunk, for a parser that follows the length.
fn in_chunk() -> String {
    format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len())
}

async fn run(tricks: impl IntoIterator<Item = Trick>) {
    let mut setting = Setting::start(|_| {}).await;
    for Trick { name, wire, comes } in tricks {
        let what = format!("{name}: {}", wire[..wire.len().min(400)].escape_ascii());
        let before = setting.reached();
        let (response, mut client) = setting.answer(&wire).await;
        assert!(response.interim.is_empty(), "{what}");
        let (body, then) = match comes {
            To(status, reason) => {
                assert_eq!((response.status(), error(&response).0.as_str()), (status, reason), "{what}");
                assert_eq!(response.header("connection"), Some("close"), "{what}");
                closed(&mut client).await;
                assert_eq!(setting.reached(), before, "{what}");
                continue;
            }
            Whole(body) => (body, None),
            Last(body) => (body, Some(None)),
            Then(body, status, reason) => (body, Some(Some((status, reason)))),
        };
        assert_eq!(response.status(), 200, "{what}");
        match then {
            None => {
                // The next request is read from its correct start.
                client.send_raw(&post("x-next: 1\r\ncontent-length: 0\r\n", "")).await.unwrap();
                assert_eq!(
                    client.response().await.unwrap().json::<Echo>().unwrap().header("x-next"),
                    Some("1"),
                    "{what}"
                );
            }
            Some(refused) => {
                if let Some((status, reason)) = refused {
                    let response = client.response().await.unwrap();
                    assert_eq!((response.status(), error(&response).0.as_str()), (status, reason), "{what}");
                }
                closed(&mut client).await;
            }
        }
        let (requests, next) = (before.1 as usize, usize::from(then.is_none()));
        assert_eq!(
            (setting.server.requests() as usize, setting.reached().2),
            (requests + 1 + next, before.2),
            "{what}"
        );
        is_well_formed(&setting.server.seen()[requests], &body, &what);
    }
    setting.unharmed().await;
    assert!(setting.server.seen().iter().all(|seen| !seen.target.contains("smuggled")));
}

/// Origin form, one Host, at most one length, no coding, no agent-internal fields from the client, no trailers.
fn is_well_formed(seen: &Echo, body: &[u8], what: &str) {
    assert_eq!(seen.target, "/test/echo", "{what}");
    assert_eq!((seen.body_length, seen.body_hash), (body.len() as u64, Fnv::of(body).value()), "{what}");
    let count = |name: &str| {
        let same = |field: &str| field.replace('_', "-").eq_ignore_ascii_case(name);
        seen.headers.iter().filter(|(field, _)| same(field)).count()
    };
    assert_eq!(count("host"), 1, "{what}");
    assert_eq!(count("content-length"), usize::from(seen.body_framing == "content-length"), "{what}");
    for name in ["transfer-encoding", "connection", "expect", "upgrade", "trailer", "x-gateway-destination-endpoint"] {
        assert_eq!(count(name), 0, "{name} in {what}");
    }
    assert_eq!(seen.trailers, [], "{what}");
}

/// CL.TE, TE.CL and CL.CL, in either field order.
#[tokio::test]
async fn conflicting_lengths_are_rejected() {
    let (n, chunked) = (HIDDEN.len(), after_last().len());
    let heads = [
        (length(chunked) + ENCODING, "length_and_encoding"),
        (ENCODING.to_owned() + &length(4), "length_and_encoding"),
        (ENCODING.to_owned() + &length(0) + ENCODING, "length_and_encoding"),
        (length(0) + "Transfer-Encoding: Chunked\r\n", "length_and_encoding"),
        (length(0) + "transfer-encoding: identity\r\n", "length_and_encoding"),
        (length(0) + "transfer-encoding:\r\n", "length_and_encoding"),
        (length(4) + "transfer-encoding: xchunked\r\n", "length_and_encoding"),
        (length(0) + &length(n), "content_length_repeated"),
        (length(n) + &length(0), "content_length_repeated"),
        (length(n) + &length(n), "content_length_repeated"),
        (length(n) + "Content-Length: 0\r\n", "content_length_repeated"),
        (format!("content-length: 0, {n}\r\n"), "content_length_repeated"),
        (format!("content-length: {n}, {n}\r\n"), "content_length_repeated"),
    ];
    let bodies = [after_last(), in_chunk(), HIDDEN.to_owned()];
    let row = |(head, reason): &(String, &'static str), body: &String| trick(head, post(head, body), To(400, reason));
    run(heads.iter().flat_map(|head| bodies.iter().map(move |body| row(head, body)))).await;
}

/// TE.TE: a coding that only one of two parsers takes for chunked.
#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
async fn obfuscated_chunked_codings_are_rejected() {
    let rows = [
        ("transfer-encoding: xchunked", 400, "transfer_encoding"),
        ("transfer-encoding: chunkedx", 400, "transfer_encoding"),
        ("transfer-encoding: \"chunked\"", 400, "transfer_encoding"),
        ("transfer-encoding: 'chunked'", 400, "transfer_encoding"),
        ("transfer-encoding: chunked;q=1", 400, "transfer_encoding"),
        ("transfer-encoding: chunked,", 400, "transfer_encoding"),
        ("transfer-encoding: ,chunked", 400, "transfer_encoding"),
        ("transfer-encoding: chunked, chunked", 400, "transfer_encoding"),
        ("transfer-encoding: chunked, identity", 400, "transfer_encoding"),
        ("transfer-encoding: identity", 400, "transfer_encoding"),
        ("transfer-encoding:", 400, "transfer_encoding"),
        ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", 400, "transfer_encoding"),
        ("transfer-encoding: chunked\r\ntransfer-encoding: x", 400, "transfer_encoding"),
        ("transfer-encoding: chunked\r\nTransfer-Encoding: identity", 400, "transfer_encoding"),
        ("transfer-encoding: x\r\ntransfer-encoding: chunked", 501, "transfer_coding"),
        ("transfer-encoding: identity, chunked", 501, "transfer_coding"),
        ("transfer-encoding: gzip, chunked", 501, "transfer_coding"),
        ("transfer-encoding : chunked", 400, "blank_before_colon"),
        ("transfer-encoding\t: chunked", 400, "blank_before_colon"),
        ("transfer-encoding: chunked\x0b", 400, "control_character"),
        ("transfer-encoding:\x0bchunked", 400, "control_character"),
        ("transfer-encoding: chunked\0", 400, "control_character"),
        ("transfer\0-encoding: chunked", 400, "control_character"),
        (" transfer-encoding: chunked", 400, "folded_line"),
        ("x: y\r\n transfer-encoding: chunked", 400, "folded_line"),
        ("transfer-encoding:\r\n chunked", 400, "folded_line"),
        ("transfer-encoding: chun\r\n\tked", 400, "folded_line"),
        ("x: y\ntransfer-encoding: chunked", 400, "bare_lf"),
        ("x: y\rtransfer-encoding: chunked", 400, "bare_cr"),
        ("transfer-encoding: chunked\r", 400, "bare_cr"),
        ("transfer encoding: chunked", 400, "field_line"),
        ("transfer-encoding", 400, "field_line"),
        (": chunked", 400, "field_line"),
    ];
    let bodies = [after_last(), in_chunk()];
    let refused = rows.iter().flat_map(|(field, status, reason)| {
        bodies.iter().map(move |body| trick(*field, post(&format!("{field}\r\n"), body), To(*status, reason)))
    });
    let old = format!("POST /test/echo HTTP/1.0\r\nhost: x\r\n{ENCODING}\r\n{}", after_last());
    let old = trick("in HTTP/1.0", old, To(400, "transfer_encoding_in_http10"));
    // Unambiguous: chunked, or a field unknown to HTTP that is not forwarded.
    let chunk = in_chunk();
    let taken = [
        trick("blanks and capitals", post("transfer-encoding: \tCHUNKED \r\n", &chunk), Whole(HIDDEN.into())),
        trick("no blank", post("transfer-encoding:chunked\r\n", &chunk), Whole(HIDDEN.into())),
        trick(
            "named by Connection",
            post(&format!("connection: transfer-encoding\r\n{ENCODING}"), &chunk),
            Whole(HIDDEN.into()),
        ),
        trick(
            "an underscore",
            post(&(length(chunk.len()) + "transfer_encoding: chunked\r\n"), &chunk),
            Whole(chunk.clone().into()),
        ),
        trick(
            "another field",
            post(&(length(chunk.len()) + "x-transfer-encoding: chunked\r\n"), &chunk),
            Whole(chunk.clone().into()),
        ),
    ];
    run(refused.chain([old]).chain(taken)).await;
}

#[tokio::test]
async fn nonnumeric_lengths_are_rejected() {
    let n = HIDDEN.len();
    let mut rows = Vec::new();
    for bad in [
        "18446744073709551616".to_owned(),
        "99999999999999999999".to_owned(),
        "-0".to_owned(),
        "-1".to_owned(),
        format!("+{n}"),
        format!("0x{n:x}"),
        format!("{n} {n}"),
        format!("{n};a"),
        format!("0_{n}"),
        format!("{n}.0"),
        format!("\"{n}\""),
        String::new(),
    ] {
        rows.push(trick(&bad, post(&format!("content-length: {bad}\r\n"), HIDDEN), To(400, "content_length")));
    }
    rows.extend([
        trick("folded", post(&format!("content-length: 0\r\n {n}\r\n"), HIDDEN), To(400, "folded_line")),
        trick(
            "blank before the colon",
            post(&format!("content-length : {n}\r\n"), HIDDEN),
            To(400, "blank_before_colon"),
        ),
        trick("after a bare LF", post(&format!("x: y\ncontent-length: {n}\r\n"), HIDDEN), To(400, "bare_lf")),
        trick("after a bare CR", post(&format!("x: y\rcontent-length: {n}\r\n"), HIDDEN), To(400, "bare_cr")),
        trick("with a NUL", post(&format!("content-length: 0\0{n}\r\n"), HIDDEN), To(400, "control_character")),
        trick("above the limit", post("content-length: 18446744073709551615\r\n", HIDDEN), To(413, "body_too_large")),
        trick("zeros in front", post(&format!("content-length: 00{n}\r\n"), HIDDEN), Whole(HIDDEN.into())),
        trick(
            "named by Connection",
            post(&format!("connection: content-length, host\r\n{}", length(n)), HIDDEN),
            Whole(HIDDEN.into()),
        ),
        trick("an underscore", post(&format!("{}content_length: 0\r\n", length(n)), HIDDEN), Whole(HIDDEN.into())),
        trick("with GET", [get(&length(n)), HIDDEN.into()].concat(), Whole(HIDDEN.into())),
        // Without a length there is no body: the bytes are read as the next request, which is malformed.
        trick("none", post("", format!("x\r\n{HIDDEN}")), Then(Vec::new(), 400, "request_line")),
    ]);
    run(rows).await;
}

/// Chunk sizes, extensions, line ends and trailers.
#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
async fn malformed_chunks_are_rejected() {
    let n = HIDDEN.len();
    let mut rows = Vec::new();
    for (name, body) in [
        ("LF alone", format!("0\n\n{HIDDEN}")),
        ("bare LF after the size", format!("5\nhello\r\n0\r\n\r\n{HIDDEN}")),
        ("bare LF after the data", format!("5\r\nhello\n0\r\n\r\n{HIDDEN}")),
        ("bare CR after the size", format!("5\rhello\r\n0\r\n\r\n{HIDDEN}")),
        ("no line end after the data", format!("5\r\nhello0\r\n\r\n{HIDDEN}")),
        ("data longer than the size", format!("5\r\nhello!\r\n0\r\n\r\n{HIDDEN}")),
        ("a size that overflows to 0", format!("10000000000000000\r\n\r\n{HIDDEN}")),
        ("a size that overflows to 5", format!("10000000000000005\r\nhello\r\n0\r\n\r\n{HIDDEN}")),
        ("zeros before a size that overflows", format!("{}10000000000000000\r\n{HIDDEN}", "0".repeat(16))),
        ("a plus", format!("+0\r\n\r\n{HIDDEN}")),
        ("a minus", format!("-0\r\n\r\n{HIDDEN}")),
        ("a minus before a size", format!("-{n:x}\r\n{HIDDEN}\r\n0\r\n\r\n")),
        ("a blank in front", format!(" 0\r\n\r\n{HIDDEN}")),
        ("a tab in front", format!("\t0\r\n\r\n{HIDDEN}")),
        ("0x", format!("0x0\r\n\r\n{HIDDEN}")),
        ("an underscore", format!("0_0\r\n\r\n{HIDDEN}")),
        ("two sizes", format!("0 5\r\nhello\r\n0\r\n\r\n{HIDDEN}")),
        ("a comma", format!("0,5\r\n\r\n{HIDDEN}")),
        ("no size", format!("\r\n{HIDDEN}")),
        ("an extension without a size", format!(";a=b\r\n{HIDDEN}")),
        ("a NUL for a size", format!("\0\r\n{HIDDEN}")),
        ("bare LF in an extension", format!("2;\n\r\n{HIDDEN}\r\n0\r\n\r\n")),
        ("bare LF after an extension", format!("{n:x};a=b\n{HIDDEN}\r\n0\r\n\r\n")),
        ("bare CR in an extension", format!("2;a\rb\r\nxx\r\n0\r\n\r\n{HIDDEN}")),
        ("a NUL in an extension", format!("2;\0\r\nxx\r\n0\r\n\r\n{HIDDEN}")),
        ("bare LF after a trailer", format!("0\r\nx: y\n\n{HIDDEN}")),
        ("bare CR after a trailer", format!("0\r\nx: y\r\r\n{HIDDEN}")),
        ("a NUL in a trailer", format!("0\r\nx: \0\r\n\r\n{HIDDEN}")),
        ("an extension of 5000 bytes", format!("2;{}\r\nxx\r\n0\r\n\r\n{HIDDEN}", "a".repeat(5000))),
        ("a folded trailer", "0\r\nx: y\r\n transfer-encoding: chunked\r\n\r\n".to_owned()),
        ("a blank before a trailer's colon", "0\r\nx : y\r\n\r\n".to_owned()),
        ("a trailer without a colon", "0\r\na: b\r\nbad trailer\r\n\r\n".to_owned()),
        ("trailers of 17 KiB", format!("0\r\n{}\r\n{HIDDEN}", "x: yyyyyyyyyyyy\r\n".repeat(1100))),
    ] {
        rows.push(trick(name, post(ENCODING, body), To(400, "chunk")));
    }
    let chunk = |extension: &str, trailer: &str| format!("{n:x}{extension}\r\n{HIDDEN}\r\n0\r\n{trailer}\r\n");
    let whole = |name: &str, body: String| trick(name, post(ENCODING, body), Whole(HIDDEN.into()));
    let extensions = format!("1;{}\r\nx\r\n", "a".repeat(4000)).repeat(20);
    rows.extend([
        trick("129 trailers", post(ENCODING, chunk("", &"x: y\r\n".repeat(129))), To(431, "too_many_trailers")),
        trick("extensions that outweigh the payload", post(ENCODING, extensions), To(400, "chunk_overhead")),
        whole("capitals and zeros", format!("000{n:X}\r\n{HIDDEN}\r\n000\r\n\r\n")),
        whole("an extension", chunk(";a=\"0\"", "")),
        whole("an extension that looks like a chunk", chunk(";0", "")),
        whole("blanks after the size", chunk(" \t;a=b", "")),
        whole("an extension of 3 KiB", chunk(&format!(";{}", "a".repeat(3 << 10)), "")),
        whole(
            "trailers that pose as framing",
            chunk("", "content-length: 0\r\ntransfer-encoding: x\r\nconnection: close\r\n"),
        ),
        whole("trailers that pose as Host", chunk("", "host: evil\r\nHost: evil\r\n")),
        whole(
            "trailers that pose as control fields",
            chunk("", "x-gateway-destination-endpoint: 6.6.6.6:6\r\nx-envoy-x: 1\r\n"),
        ),
        whole("trailers that pose as credentials", chunk("", "authorization: Bearer x\r\ncookie: a=b\r\n")),
    ]);
    run(rows).await;
}

/// Conflicting statements of the host.
#[tokio::test]
async fn conflicting_hosts_are_rejected() {
    let request = |target: &str, fields: &str| format!("GET {target} HTTP/1.1\r\n{fields}\r\n");
    let (one, http) = ("host: x\r\n", "http://x/test/echo");
    let whole = |name: &str, target: &str, fields: &str| trick(name, request(target, fields), Whole(Vec::new()));
    let refused = |name: &str, target: &str, fields: &str, reason: &'static str| {
        trick(name, request(target, fields) + HIDDEN, To(400, reason))
    };
    run([
        refused("repeated", "/test/echo", "host: x\r\nhost: x\r\n", "host_repeated"),
        refused("two", "/test/echo", "host: x\r\nHost: evil\r\n", "host_repeated"),
        refused("a list", "/test/echo", "host: x, evil\r\n", "host"),
        refused("with user information", "/test/echo", "host: x@evil\r\n", "host"),
        refused("with a path", "/test/echo", "host: x/evil\r\n", "host"),
        refused("folded", "/test/echo", "host: x\r\n evil\r\n", "folded_line"),
        refused("a blank before the colon", "/test/echo", "host: x\r\nhost : evil\r\n", "blank_before_colon"),
        refused("a NUL", "/test/echo", "host: x\0evil\r\n", "control_character"),
        refused("none", "/test/echo", "", "host_missing"),
        refused("missing, with an absolute target", http, "", "host_missing"),
        refused("different from the target", "http://evil/test/echo", one, "host_mismatch"),
        refused("port different from the target", "http://x:81/test/echo", one, "host_mismatch"),
        refused("user information in the target", "http://x@evil/test/echo", one, "target"),
        refused("another scheme", "file://x/test/echo", one, "target"),
        refused("a target of two words", "/test/echo /smuggled", one, "request_line"),
        whole("the same as in the target", http, one),
        whole("the same in capitals", "http://X/test/echo", one),
        whole("the same with the default port", "http://x:80/test/echo", one),
        whole("a similar name with an underscore", "/test/echo", "host: x\r\nx_host: evil\r\n"),
    ])
    .await;
}

/// Bytes after the end of a request.
#[tokio::test]
async fn trailing_bytes_hide_no_request() {
    let (close, body) = ("connection: close\r\n", "hello");
    let five = length(5);
    let old = |fields: &str, after: &str| format!("GET /test/echo HTTP/1.0\r\nhost: x\r\n{fields}\r\n{after}");
    let followed_by = |rest: &str| post(&five, format!("{body}{rest}"));
    run([
        trick("after the last request", [get(close), HIDDEN.into()].concat(), Last(Vec::new())),
        trick(
            "after the last request, with a body",
            post(&(five.clone() + close), format!("{body}{HIDDEN}")),
            Last(body.into()),
        ),
        trick(
            "after the last request, close in a list",
            [get("connection: x, close\r\n"), HIDDEN.into()].concat(),
            Last(Vec::new()),
        ),
        trick("after the last request in HTTP/1.0", old("", HIDDEN), Last(Vec::new())),
        trick("a prefix of the next request", followed_by("G"), Whole(body.into())),
        trick("a last chunk after the body", followed_by("0\r\n\r\n"), Then(body.into(), 400, "request_line")),
        trick("a chunk after the body", followed_by(&in_chunk()), Then(body.into(), 400, "request_line")),
        trick("a field without a request", followed_by("x: y\r\n\r\n"), Then(body.into(), 400, "request_line")),
        trick("a response", followed_by("HTTP/1.1 200 OK\r\n\r\n"), Then(body.into(), 400, "request_line")),
        trick("many empty lines", followed_by("\r\n\r\n\r\n\r\n\r\n"), Then(body.into(), 400, "blank_lines")),
        trick("HTTP/2", followed_by("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Then(body.into(), 505, "http2_preface")),
        trick(
            "a tunnel",
            followed_by("CONNECT x:443 HTTP/1.1\r\nhost: x:443\r\n\r\n"),
            Then(body.into(), 501, "method"),
        ),
        trick(
            "a request without a Host",
            followed_by("GET /smuggled HTTP/1.1\r\n\r\n"),
            Then(body.into(), 400, "host_missing"),
        ),
    ])
    .await;
}

/// Bodies sent with `Expect`.
#[tokio::test]
async fn unusual_expectations_hide_no_request() {
    let (n, expect) = (HIDDEN.len(), "expect: 100-continue\r\n");
    let with = |fields: &str, body: &str| post(&format!("{expect}{fields}"), body);
    run([
        trick("of two kinds", with(&(length(n) + "expect: x\r\n"), HIDDEN), To(417, "expectation")),
        trick("twice", with(&(length(n) + expect), HIDDEN), Whole(HIDDEN.into())),
        trick("unknown", post(&("expect: 200-ok\r\n".to_owned() + &length(n)), HIDDEN), To(417, "expectation")),
        trick("with two lengths", with(&(length(n) + ENCODING), &after_last()), To(400, "length_and_encoding")),
        trick("of an oversized body", with("content-length: 99999999999\r\n", HIDDEN), To(413, "body_too_large")),
        trick("folded", post(&format!("expect:\r\n 100-continue\r\n{}", length(n)), HIDDEN), To(400, "folded_line")),
        // No 100 is sent: the body is here already or empty, or the client speaks HTTP/1.0.
        trick("with the body sent at once", with(&length(n), HIDDEN), Whole(HIDDEN.into())),
        trick("with the chunked body sent at once", with(ENCODING, &in_chunk()), Whole(HIDDEN.into())),
        trick("of nothing", with(&length(0), ""), Whole(Vec::new())),
        trick("with GET", get(expect), Whole(Vec::new())),
        trick("in capitals", post(&("Expect: 100-CONTINUE\r\n".to_owned() + &length(n)), HIDDEN), Whole(HIDDEN.into())),
        trick(
            "in HTTP/1.0",
            format!(
                "POST /test/echo HTTP/1.0\r\nhost: x\r\nconnection: keep-alive\r\n{expect}{}\r\n{HIDDEN}",
                length(n)
            ),
            Whole(HIDDEN.into()),
        ),
    ])
    .await;
}
