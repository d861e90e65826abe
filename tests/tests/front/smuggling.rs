//! HTTP/2 requests that could become several when written as HTTP/1.1: the endpoint sees one request or none, never the hidden
//! one.

use penstock_tests::{
    Http2Client, Request,
    content::Fnv,
    eventually,
    http2_frames::{END_STREAM, Frame, Http2Frames, kind},
};

use crate::{
    SOON,
    scene::{Back, Front, Scene, first},
};

const HIDDEN: &str = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";

/// The fields of a POST, with the given fields replacing or following its own.
fn post<'a>(given: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut fields = vec![(":method", "POST"), (":scheme", "http"), (":path", "/test/echo"), (":authority", "x")];
    for field in given {
        match fields.iter_mut().find(|(name, _)| *name == field.0 && name.starts_with(':')) {
            Some(own) => *own = *field,
            None => fields.push(*field),
        }
    }
    fields
}

/// Sends the request with a body; returns the status, or `None` if the stream or connection was reset.
async fn answer(scene: &Scene, fields: &[(&str, &str)], body: &[u8]) -> Option<u16> {
    let mut frames = Http2Frames::connect(scene.agent.addr).await.unwrap();
    frames.send(&Frame::headers(1, false, fields)).await.unwrap();
    // The connection may be closed already.
    let _ = frames.send(&Frame::new(kind::DATA, END_STREAM, 1, body)).await;
    let answers = [kind::HEADERS, kind::RST_STREAM, kind::GOAWAY];
    frames.find(|frame| answers.contains(&frame.kind)).await.unwrap()?.status()
}

/// Fields and pseudo-fields that HTTP/2 forbids, or that would become more than one line of HTTP/1.1.
#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
async fn http2_smuggling_is_rejected() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |_| {}).await;
    let path = format!("/test/echo HTTP/1.1\r\nhost: x\r\n\r\n{HIDDEN}");
    let value = format!("1\r\ncontent-length: 0\r\n\r\n{HIDDEN}");
    let name = format!("x: 1\r\n\r\n{HIDDEN}x");
    let rows: &[&[(&str, &str)]] = &[
        // Line ends and NUL.
        &[(":path", &path)],
        &[(":path", "/test/echo\r\nx: y")],
        &[(":path", "/test/echo\n")],
        &[(":method", "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\nPOST")],
        &[(":method", "POST /smuggled")],
        &[(":authority", "x\r\ny: z")],
        &[(":scheme", "http\r\n")],
        &[("x-own", &value)],
        &[("x-own", "a\nb")],
        &[("x-own", "a\rb")],
        &[("x-own", "a\0b")],
        &[(&name, "1")],
        &[("x-own:", "1")],
        &[("x own", "1")],
        &[("", "1")],
        &[("X-Own", "1")],
        // Connection-specific HTTP/1.1 fields, and lengths that differ from the body's.
        &[("transfer-encoding", "chunked")],
        &[("connection", "close")],
        &[("connection", "content-length")],
        &[("keep-alive", "1")],
        &[("proxy-connection", "close")],
        &[("upgrade", "websocket")],
        &[("te", "gzip")],
        &[("content-length", "0")],
        &[("content-length", "5")],
        &[("content-length", "40"), ("content-length", "5")],
        &[("content-length", "x")],
        &[("content-length", "+36")],
        // Targets that HTTP/1.1 cannot express.
        &[(":path", "/test/echo /smuggled")],
        &[(":path", "/test/\u{e4}")],
        &[(":path", "")],
        &[(":path", "test/echo")],
        &[(":path", "*")],
        &[(":path", "http://elsewhere/test/echo")],
        &[(":authority", "user@x")],
        &[(":authority", "user:secret@x")],
        &[(":authority", "x, y")],
        &[(":authority", "x/y")],
        &[(":authority", "x"), ("host", "y")],
        &[("host", "y")],
        &[("host", "x"), ("host", "x")],
        // Repeated and misplaced pseudo-fields.
        &[("x-own", "1"), (":path2", "/smuggled")],
        &[(":status", "200")],
        &[(":protocol", "websocket")],
    ];
    for row in rows {
        let status = answer(&scene, &post(row), HIDDEN.as_bytes()).await;
        assert!(matches!(status, None | Some(400)), "{status:?} for {row:?}");
        assert_eq!(scene.endpoint.requests(), 0, "{row:?}");
    }
    let twice = |name| [&post(&[])[..], &[(name, "/smuggled")]].concat();
    for fields in
        [twice(":path"), twice(":method"), twice(":authority"), post(&[])[1..].to_vec(), post(&[])[..2].to_vec()]
    {
        let status = answer(&scene, &fields, HIDDEN.as_bytes()).await;
        assert!(matches!(status, None | Some(400)), "{status:?} for {fields:?}");
        assert_eq!(scene.endpoint.requests(), 0, "{fields:?}");
    }
    assert_eq!(scene.endpoint.connections_accepted(), 0);
    for method in ["CONNECT", "TRACE"] {
        answer(&scene, &post(&[(":method", method)]), b"").await;
    }
    assert_eq!(scene.endpoint.requests(), 0);
    // Other requests are unaffected.
    let mut client = Http2Client::connect(scene.agent.addr).await.unwrap();
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
}

/// A lookalike is one request with its body.
#[tokio::test]
async fn harmless_lookalike_is_forwarded_as_one_request() {
    let scene = Scene::with(Front::Http2, Back::Http1, first, |_| {}).await;
    let length = HIDDEN.len().to_string();
    let rows: &[&[(&str, &str)]] = &[
        &[],
        &[("content-length", &length)],
        &[("host", "x")],
        &[("host", "X:80")],
        &[("te", "trailers")],
        &[("x-own", "a: b; c, \u{e4}")],
        &[(":path", "/test/echo?x=%0d%0a%20HTTP/1.1")],
        // The response was cut off, which affects only this client.
        &[(":path", "/test/echo#/smuggled")],
        &[("expect", "100-continue")],
    ];
    for (number, row) in rows.iter().enumerate() {
        let status = answer(&scene, &post(row), HIDDEN.as_bytes()).await;
        assert_eq!(status, Some(200), "{row:?}");
        eventually(SOON, || scene.endpoint.requests() == number as u64 + 1).await;
        let seen = scene.endpoint.seen().pop().unwrap();
        assert!(seen.target.starts_with("/test/echo") && !seen.target.contains("smuggled"), "{row:?}");
        assert_eq!((seen.body_framing.as_str(), seen.body_length), ("content-length", HIDDEN.len() as u64), "{row:?}");
        assert_eq!(seen.body_hash, Fnv::of(HIDDEN.as_bytes()).value(), "{row:?}");
        let all = |name: &str| seen.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).count();
        assert_eq!((all("host"), all("content-length"), all("transfer-encoding"), all("te")), (1, 1, 0, 0), "{row:?}");
    }
}
