//! Tests response heads with tables, and with generated heads cut at arbitrary offsets.

use proptest::prelude::*;

use super::*;

const LIMITS: HeadLimits = HeadLimits { bytes: 4096, headers: 32 };
/// Small limits for generated heads.
const CUT: HeadLimits = HeadLimits { bytes: 90, headers: 3 };

fn parse(input: impl AsRef<[u8]>, method: &Method) -> Result<Option<(ResponseHead, usize)>, ResponseError> {
    parse_response(input.as_ref(), &LIMITS, method)
}

fn ok(input: &str) -> ResponseHead {
    parse(input, &Method::GET).expect(input).expect(input).0
}

#[test]
fn malformed_responses_are_refused_by_reason() {
    let long = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "x".repeat(LIMITS.bytes));
    let table: &[(&str, &str, &str)] = &[
        (
            "TE and CL",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            "length_and_encoding",
        ),
        ("two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", "content_length_repeated"),
        ("bad length", "HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\n", "content_length"),
        ("unknown coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "transfer_coding"),
        ("not chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n", "transfer_encoding"),
        ("TE in 1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "transfer_encoding_in_http10"),
        ("two lengths in a list", "HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n", "content_length_repeated"),
        ("a length and nothing", "HTTP/1.1 200 OK\r\nContent-Length: 5,\r\n\r\n", "content_length"),
        ("a length and a word", "HTTP/1.1 200 OK\r\nContent-Length: 5, five\r\n\r\n", "content_length"),
        ("bare LF", "HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\n", "bare_lf"),
        ("folded", "HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n", "folded_line"),
        ("blank before the colon", "HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n", "blank_before_colon"),
        ("NUL", "HTTP/1.1 200 OK\r\na: \0\r\n\r\n", "control_character"),
        ("left over line end", "\r\nHTTP/1.1 200 OK\r\n\r\n", "status_line"),
        ("status 099", "HTTP/1.1 099 OK\r\n\r\n", "status_line"),
        ("status 20", "HTTP/1.1 20 OK\r\n\r\n", "status_line"),
        ("HTTP/2", "HTTP/2.0 200 OK\r\n\r\n", "status_line"),
        ("two-digit version", "HTTP/1.21 200 OK\r\n\r\n", "status_line"),
        ("HTTP/1.2 with bad status", "HTTP/1.2 20 OK\r\n\r\n", "status_line"),
        ("not HTTP", "220 mail ready\r\n\r\n", "status_line"),
        ("a chunk", "5\r\nhello\r\n\r\n", "status_line"),
        ("switches to nothing", "HTTP/1.1 101 Switching Protocols\r\n\r\n", "switching_protocols"),
        ("too long", &long, "head_too_long"),
    ];
    for (trick, input, reason) in table {
        let error = parse(input, &Method::GET).expect_err(trick);
        assert_eq!((error.status(), error.reason()), (StatusCode::BAD_GATEWAY, *reason), "{trick}: {error}");
    }
}

/// The limit of `http`, which `limits.head_bytes` may exceed.
#[test]
fn longer_names_than_can_be_read_are_named() {
    let limits = HeadLimits { bytes: 1 << 20, headers: 32 };
    let named = |length: usize| format!("HTTP/1.1 204 No Content\r\n{}: 1\r\n\r\n", "n".repeat(length));
    let parse = |length: usize| parse_response(named(length).as_bytes(), &limits, &Method::GET);
    assert!(parse(65_535).unwrap().is_some());
    assert_eq!(parse(65_536).unwrap_err().reason(), "head_too_long");
}

#[test]
fn body_framing_follows_rfc_9112() {
    use BodyKind::{Chunked, Length, None, UntilClose};
    let (get, head) = (Method::GET, Method::HEAD);
    let table: &[(&str, &Method, BodyKind, bool)] = &[
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", &get, Length(5), true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", &get, Length(5), false),
        ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", &get, Length(5), false),
        ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n", &get, Length(5), true),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", &get, Chunked, true),
        ("HTTP/1.1 200 OK\r\n\r\n", &get, UntilClose, false),
        ("HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", &get, Length(0), true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", &head, None, true),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", &head, None, true),
        ("HTTP/1.1 200 OK\r\n\r\n", &head, None, true),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", &get, None, true),
        ("HTTP/1.1 204 No Content\r\n\r\n", &get, None, true),
        ("HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", &get, None, true),
        ("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", &get, None, false),
        ("HTTP/1.1 100 Continue\r\n\r\n", &get, None, true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n", &get, Length(5), true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 05,5\r\n\r\n", &get, Length(5), true),
        ("HTTP/1.1 799 Odd\r\nContent-Length: 1\r\n\r\n", &get, Length(1), true),
    ];
    for (input, method, body, keep_alive) in table {
        let (head, length) = parse(input, method).expect(input).expect(input);
        assert_eq!((head.body, head.keep_alive, length), (*body, *keep_alive, input.len()), "{input:?}");
        assert_eq!(head.framing.is_done(), matches!(body, None | Length(0)), "{input:?}");
        assert_eq!(head.framing.is_until_close(), *body == UntilClose, "{input:?}");
        assert_eq!(head.interim, input.contains(" 100 "));
    }
}

#[test]
fn client_gets_the_same_framing() {
    let (new, old) = (Version::HTTP_11, Version::HTTP_10);
    // (endpoint's headers, client wants keep-alive, client's version, headers after Date, connection stays open)
    let table: &[(&str, bool, Version, &str, bool)] = &[
        ("Content-Length: 05\r\n", true, new, "content-length: 5\r\n", true),
        ("Content-Length: 5\r\nConnection: close\r\n", true, new, "content-length: 5\r\n", true),
        ("Content-Length: 5\r\n", false, new, "content-length: 5\r\nconnection: close\r\n", false),
        ("Content-Length: 5\r\n", true, old, "content-length: 5\r\nconnection: keep-alive\r\n", true),
        ("Transfer-Encoding: Chunked\r\n", true, new, "transfer-encoding: chunked\r\n", true),
        ("Transfer-Encoding: chunked\r\n", true, old, "connection: close\r\n", false),
        ("", true, new, "connection: close\r\n", false),
        ("Keep-Alive: timeout=5\r\nUpgrade: a\r\n", true, new, "connection: close\r\n", false),
    ];
    for (fields, keep, client, expected, stays) in table {
        let head = ok(&format!("HTTP/1.1 200 Fine\r\nDate: now\r\n{fields}\r\n"));
        let mut out = BytesMut::new();
        assert_eq!(head.write_head(&mut out, *keep, *client), *stays, "{fields}");
        let expected = format!("HTTP/1.1 200 Fine\r\ndate: now\r\n{expected}\r\n");
        assert_eq!(out, expected.as_bytes(), "{fields} to {client:?}");
        assert_eq!(head.needs_dechunk(*client), fields.starts_with("Transfer") && *client == old);
    }
}

#[test]
fn bodiless_heads_are_forwarded() {
    let table: &[(&str, Method, &str)] = &[
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Method::HEAD, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"),
        ("HTTP/1.1 304 N\r\nContent-Length: 5\r\n\r\n", Method::GET, "HTTP/1.1 304 N\r\ncontent-length: 5\r\n\r\n"),
        ("HTTP/1.1 204 N\r\nContent-Length: 0\r\n\r\n", Method::GET, "HTTP/1.1 204 N\r\n\r\n"),
        ("HTTP/1.1 103 E\r\nLink: a\r\n\r\n", Method::GET, "HTTP/1.1 103 E\r\nlink: a\r\n\r\n"),
        ("HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n", Method::HEAD, "HTTP/1.1 200 \r\n\r\n"),
    ];
    for (input, method, expected) in table {
        let (head, _) = parse(input, method).unwrap().unwrap();
        let mut out = BytesMut::new();
        assert!(head.write_head(&mut out, true, Version::HTTP_11));
        assert_eq!(out, expected.as_bytes());
    }
    let mut out = BytesMut::new();
    assert!(ok("HTTP/1.1 100 Continue\r\n\r\n").write_head(&mut out, true, Version::HTTP_10));
    assert!(out.is_empty());
}

#[test]
fn bodiless_response_with_ambiguous_framing_is_forwarded_without_it() {
    let both = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n";
    let lengths = "Content-Length: 5, 6\r\n";
    let coding = "Transfer-Encoding: gzip, chunked\r\n";
    let word = "Content-Length: five\r\n";
    let lines = [("200 OK", Method::HEAD), ("304 N", Method::GET), ("204 N", Method::GET), ("103 E", Method::GET)];
    for fields in [both, lengths, coding, word] {
        for (line, method) in &lines {
            let input = format!("HTTP/1.1 {line}\r\n{fields}etag: a\r\n\r\n");
            let (head, length) = parse(&input, method).expect(&input).expect(&input);
            assert_eq!((length, head.body, head.keep_alive), (input.len(), BodyKind::None, false), "{input}");
            let mut out = BytesMut::new();
            head.write_head(&mut out, true, Version::HTTP_11);
            assert_eq!(out, format!("HTTP/1.1 {line}\r\netag: a\r\n\r\n").as_bytes());
            let frames = head.frames();
            assert_eq!(frames.headers().len(), 1, "{input}");
        }
    }
    for (line, method, kept) in [("200 OK", Method::HEAD, true), ("304 N", Method::GET, true)] {
        let input = format!("HTTP/1.1 {line}\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n");
        let (head, _) = parse(&input, &method).unwrap().unwrap();
        let mut out = BytesMut::new();
        head.write_head(&mut out, true, Version::HTTP_11);
        assert_eq!(out, format!("HTTP/1.1 {line}\r\ncontent-length: 5\r\n\r\n").as_bytes());
        assert_eq!((head.keep_alive, head.headers.get_all("content-length").iter().count()), (kept, 1));
    }
    let switch = "HTTP/1.1 101 A\r\nUpgrade: a\r\nContent-Length: 5\r\n\r\n";
    let (head, _) = parse(switch, &Method::GET).unwrap().unwrap();
    assert!(head.upgrade.is_some() && head.body == BodyKind::None);
    let mut out = BytesMut::new();
    head.write_head(&mut out, true, Version::HTTP_11);
    assert_eq!(out, "HTTP/1.1 101 A\r\nconnection: upgrade\r\nupgrade: a\r\n\r\n".as_bytes());
    let required = ok("HTTP/1.1 426 A\r\nUpgrade: a\r\nContent-Length: 5\r\nUpgrade: b\r\n\r\n");
    let mut out = BytesMut::new();
    required.write_head(&mut out, false, Version::HTTP_11);
    let head =
        "HTTP/1.1 426 A\r\ncontent-length: 5\r\nconnection: close\r\nconnection: upgrade\r\nupgrade: a, b\r\n\r\n";
    assert_eq!(out, head.as_bytes());
}

#[test]
fn mutation_cannot_change_the_framing() {
    let mut head = ok("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n");
    for (name, value) in [("content-length", "6"), ("transfer-encoding", "chunked"), ("connection", "close")] {
        head.headers.insert(name, value.parse().unwrap());
    }
    let mut out = BytesMut::new();
    assert!(head.write_head(&mut out, true, Version::HTTP_11));
    assert_eq!(out, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n".as_bytes());
}

#[test]
fn request_without_host_gets_the_endpoint_address() {
    for (host, endpoint, expected) in [
        (None, "10.0.0.1:8000", "10.0.0.1:8000"),
        (Some(""), "10.0.0.1:8000", "10.0.0.1:8000"),
        (None, "[fd00::1]:8000", "[fd00::1]:8000"),
        (Some("h:1"), "10.0.0.1:8000", "h:1"),
    ] {
        let request = http::Request::get("/a");
        let request = host.into_iter().fold(request, |request, host| request.header("host", host));
        let parts = request.body(()).unwrap().into_parts().0;
        let mut out = BytesMut::new();
        write_request(&parts, endpoint.parse().unwrap(), RequestFraming::None, AfterResponse::Keep, &mut out);
        assert_eq!(out, format!("GET /a HTTP/1.1\r\nhost: {expected}\r\n\r\n").as_bytes());
    }
}

#[test]
fn requests_are_sent_in_origin_form() {
    let request = |method: &str, target: &str| {
        let fields =
            [("accept", "*/*"), ("host", "h"), ("content-length", "9"), ("expect", "100-continue"), ("te", "a")];
        let mut request = http::Request::builder().method(method).uri(target);
        for (name, value) in fields {
            request = request.header(name, value);
        }
        request.body(()).unwrap().into_parts().0
    };
    use RequestFraming::{Chunked, Length, None as NoBody};
    let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from_static("1"))]);
    let table = [
        (
            "POST",
            "/",
            Chunked(&trailers),
            "POST / HTTP/1.1\r\nhost: h\r\naccept: */*\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n",
        ),
        ("GET", "/a?b", NoBody, "GET /a?b HTTP/1.1\r\nhost: h\r\naccept: */*\r\n\r\n"),
        ("GET", "http://h/a", NoBody, "GET /a HTTP/1.1\r\nhost: h\r\naccept: */*\r\n\r\n"),
        ("OPTIONS", "*", NoBody, "OPTIONS * HTTP/1.1\r\nhost: h\r\naccept: */*\r\n\r\n"),
        ("POST", "/", Length(7), "POST / HTTP/1.1\r\nhost: h\r\naccept: */*\r\ncontent-length: 7\r\n\r\n"),
        ("POST", "/", NoBody, "POST / HTTP/1.1\r\nhost: h\r\naccept: */*\r\ncontent-length: 0\r\n\r\n"),
        ("DELETE", "/", Length(0), "DELETE / HTTP/1.1\r\nhost: h\r\naccept: */*\r\ncontent-length: 0\r\n\r\n"),
    ];
    let endpoint = "10.0.0.1:8000".parse().unwrap();
    for (method, target, framing, expected) in table {
        let mut out = BytesMut::new();
        write_request(&request(method, target), endpoint, framing, AfterResponse::Keep, &mut out);
        assert_eq!(out, expected.as_bytes());
    }
}

/// Heads near the edge of validity.
fn heads() -> impl Strategy<Value = Vec<u8>> {
    let version = prop::sample::select(vec!["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0"]);
    let status =
        prop::sample::select(vec!["200 OK", "200", "204 ", "304 Not Modified", "100 Continue", "99 x", "404 a\tb"]);
    let field = prop::sample::select(vec![
        "Content-Length: 5",
        "content-length: 5, 5",
        "Transfer-Encoding: chunked",
        "transfer-encoding: gzip, chunked",
        "Connection: close",
        "X-A: b",
        " folded",
        "a: \u{ff}",
        "a",
    ]);
    let end = || prop::sample::select(vec!["\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r"]);
    (version, status, end(), prop::collection::vec((field, end()), 0..4)).prop_map(|(version, status, end, fields)| {
        let fields: String = fields.into_iter().map(|(field, end)| format!("{field}{end}")).collect();
        format!("{version} {status}{end}{fields}\r\nrest").into_bytes()
    })
}

fn outcome(input: &[u8]) -> Result<Option<(String, usize)>, ResponseError> {
    parse_response(input, &CUT, &Method::GET).map(|head| head.map(|(head, length)| (format!("{head:?}"), length)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn parser_never_panics(input in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = outcome(&input);
    }

    #[test]
    fn result_does_not_depend_on_cuts(input in heads()) {
        let whole = outcome(&input);
        let first = (0..=input.len()).map(|end| outcome(&input[..end])).find(|o| !matches!(o, Ok(None)));
        prop_assert_eq!(&first.unwrap_or(Ok(None)), &whole);
        let mut parser = ResponseParser::default();
        let mut next = |end| parser.parse(&input[..end], &CUT, &Method::GET).map(|head| head.map(|(head, length)| (format!("{head:?}"), length)));
        let first = (0..=input.len()).map(&mut next).find(|o| !matches!(o, Ok(None)));
        prop_assert_eq!(first.unwrap_or(Ok(None)), whole);
    }

    /// An accepted head is forwarded so that another parser, and this one, read the same response.
    #[test]
    fn forwarded_response_has_the_same_meaning(input in heads()) {
        let Ok(Some((head, _))) = parse(&input, &Method::GET) else { return Ok(()) };
        let mut out = BytesMut::new();
        let stays = head.write_head(&mut out, true, Version::HTTP_11);

        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut again = httparse::Response::new(&mut fields);
        prop_assert_eq!(again.parse(&out), Ok(httparse::Status::Complete(out.len())));
        prop_assert_eq!(again.code, Some(head.status.as_u16()));

        let (same, length) = parse(&out, &Method::GET).expect("strict").expect("complete");
        prop_assert_eq!(length, out.len());
        prop_assert_eq!((same.body, same.reason, same.interim), (head.body, head.reason, head.interim));
        prop_assert_eq!(same.keep_alive, stays);
    }
}

#[test]
fn head_in_single_bytes_is_scanned_once() {
    let limits = HeadLimits { bytes: 64 << 10, headers: 32 };
    let begin = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\na: ";
    let wire = format!("{begin}{}\r\n\r\n", "x".repeat(limits.bytes - begin.len() - 4));
    let _ = super::head::tests::looked_at();
    let mut parser = ResponseParser::default();
    for end in 0..wire.len() {
        assert!(parser.parse(&wire.as_bytes()[..end], &limits, &Method::GET).unwrap().is_none());
    }
    let (_, length) = parser.parse(wire.as_bytes(), &limits, &Method::GET).unwrap().unwrap();
    assert_eq!(length, limits.bytes);
    let looked_at = super::head::tests::looked_at();
    assert!(looked_at <= limits.bytes, "{looked_at}");
}
