//! The parser of heads that the kernel passes on, against tables. Against user space's own parser it is held in the agent
//! (`agent/src/http/response/tests.rs`).

#[path = "support/head_walk.rs"]
mod head_walk;

use penstock_common::{
    framing::Framing,
    head::{EVENT_STREAM, MAX_FIELDS, MAX_HEAD},
};

/// What is kept of the head, and the framing behind it.
fn passed(head: &[u8]) -> Option<(u32, Framing)> {
    let mut framing = Framing::head();
    let passed = head_walk::head(&mut framing, head);
    (passed != 0).then_some((passed, framing))
}

fn with(fields: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n").into_bytes()
}

#[test]
fn plain_heads_are_passed_with_their_framing() {
    let rows = [
        ("content-length: 7", Framing::length(7), 0),
        ("Content-Length:7", Framing::length(7), 0),
        ("CONTENT-LENGTH: \t 007", Framing::length(7), 0),
        ("content-length: 0", Framing::none(), 0),
        ("content-length: 999999999999999999", Framing::length(999_999_999_999_999_999), 0),
        ("transfer-encoding: chunked", Framing::chunked(), 0),
        ("Transfer-Encoding:CHUNKED", Framing::chunked(), 0),
        (
            "date: today\r\nserver: uvicorn\r\ncontent-length: 7\r\ncontent-type: application/json",
            Framing::length(7),
            0,
        ),
        ("content-type: text/event-stream\r\ntransfer-encoding: chunked", Framing::chunked(), EVENT_STREAM),
        ("content-type: Text/Event-Stream; charset=utf-8\r\ncontent-length: 7", Framing::length(7), EVENT_STREAM),
        ("content-type: text/event-streak\r\ncontent-length: 7", Framing::length(7), 0),
        ("content-type: xtext/event-stream\r\ncontent-length: 7", Framing::length(7), 0),
        ("x-empty:\r\nx-blank: \r\ncontent-length: 7", Framing::length(7), 0),
        ("content-type:\r\ncontent-length: 7", Framing::length(7), 0),
        ("x: a:b\tc d\u{fc}\r\ncontent-length: 7", Framing::length(7), 0),
        ("content_length: 8\r\ncontent-length: 7", Framing::length(7), 0),
        ("xcontent-length: 8\r\ncontent-length: 7", Framing::length(7), 0),
        ("a-very-long-name-that-ends-in-content-length: 8\r\ncontent-length: 7", Framing::length(7), 0),
        ("connections: close\r\nte-x: y\r\ncontent-length: 7", Framing::length(7), 0),
    ];
    for (fields, framing, flags) in rows {
        let head = with(fields);
        assert_eq!(passed(&head), Some((head.len() as u32 | flags, framing)), "{fields}");
        // What comes behind is not looked at.
        let len = head.len() as u32;
        assert_eq!(passed(&[&head[..], b"\r\nHTTP"].concat()), Some((len | flags, framing)), "{fields}");
        for cut in 0..head.len() {
            assert_eq!(passed(&head[..cut]), None, "{fields} cut at {cut}");
        }
    }
}

#[test]
fn other_heads_are_left_to_user_space() {
    let fields = [
        "server: no length",
        "content-length: 7\r\nconnection: keep-alive",
        "content-length: 7\r\nConnection: close",
        "content-length: 7\r\nkeep-alive: timeout=5",
        "content-length: 7\r\nproxy-connection: close",
        "content-length: 7\r\nproxy-authenticate: basic",
        "content-length: 7\r\nproxy-authorization: basic",
        "content-length: 7\r\nte: trailers",
        "content-length: 7\r\nupgrade: h2c",
        "content-length: 7\r\nx-penstock-reason: none",
        "content-length: 7\r\ncontent-length: 7",
        "content-length: 7\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 7",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        "transfer-encoding: gzip, chunked",
        "transfer-encoding: chunked ",
        "transfer-encoding:",
        "transfer-encoding: identity",
        "content-length:",
        "content-length: +7",
        "content-length: 7 ",
        "content-length: 7,7",
        "content-length: 1000000000000000000",
        "content-length: 0x7",
        "content-length: 7\r\n folded: line",
        "content-length: 7\r\n\tfolded: line",
        "content-length : 7",
        "content-length: 7\r\nno colon",
        "content-length: 7\r\n: no name",
        "content-length: 7\r\nx(y): 1",
        "content-length: 7\r\nx\u{e9}: 1",
        "content-length: 7\r\nx: a\nb",
        "content-length: 7\r\nx: a\rb",
        "content-length: 7\r\nx: a\0b",
        "content-length: 7\r\nx: a\u{7f}b",
        "content-length: 7\nx: a",
    ];
    for fields in fields {
        assert_eq!(passed(&with(fields)), None, "{fields:?}");
    }
    let lines = [
        "HTTP/1.0 200 OK",
        "HTTP/1.1 201 Created",
        "HTTP/1.1 100 Continue",
        "HTTP/1.1 204 No Content",
        "HTTP/1.1 2000 OK",
        "HTTP/1.1 200",
        "HTTP/1.1  200 OK",
        "http/1.1 200 OK",
        "HTTP/1.1 200 O\nK",
        "HTTP/1.1 503 Service Unavailable",
        "\r\nHTTP/1.1 200 OK",
        "",
    ];
    for line in lines {
        let head = format!("{line}\r\ncontent-length: 7\r\n\r\n").into_bytes();
        assert_eq!(passed(&head), None, "{line:?}");
    }
}

#[test]
fn heads_have_limits() {
    let fields = |count: u32| with(&format!("content-length: 7{}", "\r\na: b".repeat(count as usize - 1)));
    assert!(passed(&fields(MAX_FIELDS)).is_some());
    assert_eq!(passed(&fields(MAX_FIELDS + 1)), None);
    let long = |bytes: u32| {
        let rest = with("content-length: 7\r\nx: ").len();
        with(&format!("content-length: 7\r\nx: {}", "y".repeat(bytes as usize - rest)))
    };
    assert_eq!(passed(&long(MAX_HEAD)), Some((MAX_HEAD, Framing::length(7))));
    assert_eq!(passed(&long(MAX_HEAD + 1)), None);
}
