//! Rejected request bodies: ambiguous or broken framing, oversized, truncated, or invalid JSON.

use crate::setting::{Setting, post, refused};

#[tokio::test]
async fn invalid_framing_headers_are_rejected() {
    let mut rows = Vec::new();
    for bad in ["-1", "+5", "", "0x5", "5 5", "5;", "1e3", "\"5\"", "99999999999999999999", "18446744073709551616"] {
        rows.push(refused(400, "content_length", post(&format!("content-length: {bad}\r\n"), "hello")));
    }
    for bad in ["5\r\ncontent-length: 5", "5\r\nContent-Length: 6", "5, 5", "5,6", "5,"] {
        rows.push(refused(400, "content_length_repeated", post(&format!("content-length: {bad}\r\n"), "hello")));
    }
    let chunked = "5\r\nhello\r\n0\r\n\r\n";
    let (length, encoding) = ("content-length: 5\r\n", "transfer-encoding: chunked\r\n");
    for fields in [format!("{length}{encoding}"), format!("{encoding}{length}"), format!("{length}{encoding}{length}")]
    {
        rows.push(refused(400, "length_and_encoding", post(&fields, chunked)));
    }
    rows.push(refused(
        400,
        "length_and_encoding",
        post("transfer-encoding: identity\r\ncontent-length: 5\r\n", "hello"),
    ));
    for bad in [
        "chunked, chunked",
        "chunked\r\ntransfer-encoding: chunked",
        "chunked\r\ntransfer-encoding: identity",
        "xchunked",
        "chunkedx",
        "identity",
        "chunked, identity",
        "chunked;a=b",
        "\"chunked\"",
        "chunked,",
        ", chunked",
        "",
    ] {
        rows.push(refused(400, "transfer_encoding", post(&format!("transfer-encoding: {bad}\r\n"), chunked)));
    }
    rows.extend([
        refused(501, "transfer_coding", post("transfer-encoding: gzip, chunked\r\n", chunked)),
        refused(501, "transfer_coding", post("transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", chunked)),
        refused(400, "control_character", post("transfer-encoding: chunked\x0b\r\n", chunked)),
        refused(400, "control_character", post("transfer-encoding: \x0bchunked\r\n", chunked)),
        refused(400, "blank_before_colon", post("transfer-encoding : chunked\r\n", chunked)),
        refused(400, "folded_line", post("transfer-encoding:\r\n chunked\r\n", chunked)),
        refused(400, "transfer_encoding_in_http10", format!("POST / HTTP/1.0\r\nhost: x\r\n{encoding}\r\n{chunked}")),
    ]);
    Setting::start(|_| {}).await.refuses(rows).await;
}

#[tokio::test]
async fn oversized_bodies_return_413() {
    let chunks = "1000\r\n".to_owned() + &"x".repeat(0x1000) + "\r\n";
    let rows = [
        refused(413, "body_too_large", post("content-length: 10001\r\n", "")).says("10000"),
        refused(413, "body_too_large", post("content-length: 18446744073709551615\r\n", "")),
        // Rejected instead of invited with 100.
        refused(413, "body_too_large", post("expect: 100-continue\r\ncontent-length: 10001\r\n", "")),
        refused(413, "body_too_large", post("transfer-encoding: chunked\r\n", chunks.repeat(3))),
    ];
    Setting::start(|config| config.limits.body_bytes = 10_000).await.refuses(rows).await;
}

#[tokio::test]
async fn malformed_chunks_return_400() {
    let chunked = |body: &str| post("transfer-encoding: chunked\r\n", body);
    let mut rows = Vec::new();
    for bad in [
        "10000000000000000\r\nx",
        "fffffffffffffffff\r\nx",
        "x\r\n",
        "5g\r\nhello\r\n",
        "0x5\r\nhello\r\n",
        "-5\r\nhello\r\n",
        "+5\r\nhello\r\n",
        " 5\r\nhello\r\n",
        "\r\n",
        ";a=b\r\n",
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello\r0\r\n\r\n",
        "5\r\nhello!\r\n0\r\n\r\n",
        "5;a=\nb\r\nhello\r\n",
        "5;a=\rb\r\nhello\r\n",
        "0\r\na: b\nc: d\r\n\r\n",
    ] {
        rows.push(refused(400, "chunk", chunked(bad)));
    }
    rows.extend([
        refused(400, "chunk", chunked(&format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(5000)))),
        refused(400, "chunk", chunked(&format!("0\r\na: {}\r\n\r\n", "x".repeat(17 << 10)))),
        refused(400, "chunk_overhead", chunked(&format!("1;{}\r\nx\r\n", "x".repeat(4000)).repeat(20))),
    ]);
    Setting::start(|_| {}).await.refuses(rows).await;
}

#[tokio::test]
async fn truncated_bodies_return_400() {
    let rows = [
        refused(400, "body_cut", post("content-length: 10\r\n", "hello")).says("after 5 bytes").finish(),
        refused(400, "body_cut", post("content-length: 10\r\n", "")).finish(),
        refused(400, "body_cut", post("transfer-encoding: chunked\r\n", "5\r\nhel")).finish(),
        refused(400, "body_cut", post("transfer-encoding: chunked\r\n", "5\r\nhello\r\n")).finish(),
        refused(400, "body_cut", post("transfer-encoding: chunked\r\n", "5\r\nhello\r\n0\r\n")).finish(),
        refused(400, "body_cut", post("content-type: application/json\r\ncontent-length: 99\r\n", r#"{"model":"m","#))
            .finish(),
    ];
    Setting::start(|_| {}).await.refuses(rows).await;
}

#[tokio::test]
async fn invalid_json_bodies_return_400() {
    let json =
        |body: &[u8]| post(&format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len()), body);
    let refused_at = |at, body: &[u8]| refused(400, "json", json(body)).says(at);
    let deep = [r#"{"model":"m","a":"#.to_owned(), "[".repeat(130), "]".repeat(130), "}".to_owned()].concat();
    let chunked = "content-type: application/problem+json; charset=utf-8\r\ntransfer-encoding: chunked\r\n";
    let rows = [
        refused_at("byte 0: found `x`", b"x"),
        refused_at("byte 11: found `}`", br#"{"model": "}"#).says("the end of the body"),
        refused_at("byte 9: found `m`", br#"{"model":m}"#),
        refused_at("byte 13: found `}`", br#"{"model":"m",}"#),
        refused_at("byte 14: found `x`", br#"{"model":"m"} x"#),
        refused_at("byte 13: found `{`", br#"{"model":"m"}{"model":"n"}"#),
        refused_at("byte 13: found a second top-level key", br#"{"model":"m","model":"n"}"#),
        refused_at("byte 13: found a second top-level key", br#"{"model":"m","\u006dodel":"n"}"#),
        refused_at("byte 18: found byte 0xff", b"{\"model\":\"m\",\"a\":\"\xff\"}"),
        refused_at("byte 11: found `(`", b"{\"model\":\"\xc3\x28\"}"),
        refused_at("one more level of nesting", deep.as_bytes()),
        refused(400, "json", post(chunked, "3\r\n{\"m\r\n2\r\n\"}\r\n0\r\n\r\n")).says("byte 4: found `}`"),
    ];
    Setting::start(|_| {}).await.refuses(rows).await;
}
