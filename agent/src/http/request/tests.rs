//! Tests request heads with tables, and with generated heads cut at arbitrary offsets.

use http::StatusCode;
use proptest::prelude::*;

use super::*;
use crate::http::response::{AfterResponse, RequestFraming, write_request};

const LIMITS: HeadLimits = HeadLimits { bytes: 4096, headers: 32 };
/// Small limits for generated heads.
const CUT: HeadLimits = HeadLimits { bytes: 120, headers: 5 };

fn parse(input: impl AsRef<[u8]>) -> Result<Option<(RequestHead, usize)>, RequestError> {
    parse_request(input.as_ref(), &LIMITS)
}

/// A request with a Host and the given fields.
fn with(fields: &str) -> String {
    format!("POST /v1/completions HTTP/1.1\r\nHost: h\r\n{fields}\r\n")
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn malformed_requests_are_refused_by_reason() {
    let long_target = format!("GET /{} HTTP/1.1\r\n", "x".repeat(LIMITS.bytes));
    let long_field = format!("GET / HTTP/1.1\r\nHost: h\r\na: {}\r\n\r\n", "x".repeat(LIMITS.bytes));
    let many_fields = with(&"a: b\r\n".repeat(32));
    let table: &[(&str, &str, u16, &str)] = &[
        // Lines.
        ("LF after the request line", "GET / HTTP/1.1\nHost: h\r\n\r\n", 400, "bare_lf"),
        ("LF after a field", "GET / HTTP/1.1\r\nHost: h\n\r\n", 400, "bare_lf"),
        ("LF as the blank line", "GET / HTTP/1.1\r\nHost: h\r\n\n", 400, "bare_lf"),
        ("LF hides a field", "GET / HTTP/1.1\r\nHost: h\r\na: b\nContent-Length: 5\r\n\r\n", 400, "bare_lf"),
        ("LF before the request", "\nGET / HTTP/1.1\r\n", 400, "bare_lf"),
        ("CR in a value", "GET / HTTP/1.1\r\nHost: h\r\na: b\rc: d\r\n\r\n", 400, "bare_cr"),
        ("CR CR LF", "GET / HTTP/1.1\r\r\nHost: h\r\n\r\n", 400, "bare_cr"),
        ("five empty lines", "\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\n", 400, "blank_lines"),
        ("folded field", "GET / HTTP/1.1\r\nHost: h\r\na: b\r\n c\r\n\r\n", 400, "folded_line"),
        ("folded with a tab", "GET / HTTP/1.1\r\nHost: h\r\na: b\r\n\tc\r\n\r\n", 400, "folded_line"),
        ("blank before the first field", "GET / HTTP/1.1\r\n Host: h\r\n\r\n", 400, "folded_line"),
        ("blank before the colon", &with("Content-Length : 5\r\n"), 400, "blank_before_colon"),
        ("tab before the colon", &with("Transfer-Encoding\t: chunked\r\n"), 400, "blank_before_colon"),
        ("no colon", &with("chunked\r\n"), 400, "field_line"),
        ("no name", &with(": b\r\n"), 400, "field_line"),
        ("blank in a name", &with("a b: c\r\n"), 400, "field_line"),
        ("not a token as name", &with("a(b: c\r\n"), 400, "field_line"),
        ("name beyond ASCII", &with("é: c\r\n"), 400, "field_line"),
        ("NUL in a value", &with("a: b\0c\r\n"), 400, "control_character"),
        ("NUL in a name", &with("a\0: c\r\n"), 400, "control_character"),
        ("vertical tab before chunked", &with("Transfer-Encoding: \x0bchunked\r\n"), 400, "control_character"),
        ("DEL in a value", &with("a: \x7f\r\n"), 400, "control_character"),
        ("a TLS handshake", "\x16\x03\x01\x02", 400, "control_character"),
        // Sizes.
        ("long target", &long_target, 414, "request_line_too_long"),
        ("long field", &long_field, 431, "head_too_long"),
        ("many fields", &many_fields, 431, "too_many_fields"),
        // Content-Length.
        ("two lengths", &with("Content-Length: 5\r\nContent-Length: 6\r\n"), 400, "content_length_repeated"),
        ("the same length twice", &with("Content-Length: 5\r\nContent-Length: 5\r\n"), 400, "content_length_repeated"),
        ("list of lengths", &with("Content-Length: 5, 5\r\n"), 400, "content_length_repeated"),
        ("plus sign", &with("Content-Length: +5\r\n"), 400, "content_length"),
        ("minus sign", &with("Content-Length: -5\r\n"), 400, "content_length"),
        ("hexadecimal", &with("Content-Length: 0x5\r\n"), 400, "content_length"),
        ("blank inside", &with("Content-Length: 1 5\r\n"), 400, "content_length"),
        ("empty length", &with("Content-Length:\r\n"), 400, "content_length"),
        ("digits beyond ASCII", &with("Content-Length: ٥\r\n"), 400, "content_length"),
        ("2^64", &with("Content-Length: 18446744073709551616\r\n"), 400, "content_length"),
        // Transfer-Encoding.
        ("CL.TE", &with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), 400, "length_and_encoding"),
        ("TE.CL", &with("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"), 400, "length_and_encoding"),
        ("TE.CL, unknown coding", &with("Transfer-Encoding: x\r\nContent-Length: 5\r\n"), 400, "length_and_encoding"),
        ("identity", &with("Transfer-Encoding: identity\r\n"), 400, "transfer_encoding"),
        ("xchunked", &with("Transfer-Encoding: xchunked\r\n"), 400, "transfer_encoding"),
        ("quoted", &with("Transfer-Encoding: \"chunked\"\r\n"), 400, "transfer_encoding"),
        ("with a parameter", &with("Transfer-Encoding: chunked;q=1\r\n"), 400, "transfer_encoding"),
        ("chunked not last", &with("Transfer-Encoding: chunked, gzip\r\n"), 400, "transfer_encoding"),
        ("chunked twice", &with("Transfer-Encoding: chunked, chunked\r\n"), 400, "transfer_encoding"),
        (
            "twice, two fields",
            &with("Transfer-Encoding: chunked\r\ntransfer-encoding: chunked\r\n"),
            400,
            "transfer_encoding",
        ),
        ("empty element", &with("Transfer-Encoding: chunked,\r\n"), 400, "transfer_encoding"),
        ("empty encoding", &with("Transfer-Encoding:\r\n"), 400, "transfer_encoding"),
        ("coding we lack", &with("Transfer-Encoding: gzip, chunked\r\n"), 501, "transfer_coding"),
        (
            "the same in two fields",
            &with("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"),
            501,
            "transfer_coding",
        ),
        ("in 1.0", "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "transfer_encoding_in_http10"),
        // Host.
        ("no Host", "GET / HTTP/1.1\r\n\r\n", 400, "host_missing"),
        ("two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400, "host_repeated"),
        ("two Hosts in 1.0", "GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400, "host_repeated"),
        ("empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400, "host"),
        ("Host with a path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "host"),
        ("Host with a user", "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400, "host"),
        ("list of Hosts", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "host"),
        ("port not a number", "GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400, "host"),
        ("port too large", "GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n", 400, "host"),
        ("open bracket", "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400, "host"),
        ("target for another host", "GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n", 400, "host_mismatch"),
        ("target for another port", "GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "host_mismatch"),
        // Request line.
        ("two blanks", "GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400, "request_line"),
        ("blank first", " GET / HTTP/1.1\r\nHost: h\r\n\r\n", 400, "request_line"),
        ("blank last", "GET / HTTP/1.1 \r\nHost: h\r\n\r\n", 400, "request_line"),
        ("tabs", "GET\t/\tHTTP/1.1\r\nHost: h\r\n\r\n", 400, "request_line"),
        ("HTTP/0.9", "GET /\r\n\r\n", 400, "request_line"),
        ("not a token as method", "G(T / HTTP/1.1\r\nHost: h\r\n\r\n", 400, "request_line"),
        ("lower-case version", "GET / http/1.1\r\nHost: h\r\n\r\n", 400, "request_line"),
        ("two-digit version", "GET / HTTP/1.10\r\nHost: h\r\n\r\n", 400, "request_line"),
        ("two-digit version above 1.1", "GET / HTTP/1.21\r\nHost: h\r\n\r\n", 400, "request_line"),
        ("HTTP/1.2 after a word", "GET / x HTTP/1.2\r\nHost: h\r\n\r\n", 400, "request_line"),
        ("HTTP/1.2 without Host", "GET / HTTP/1.2\r\n\r\n", 400, "host_missing"),
        ("HTTP/1.2 with a folded line", "GET / HTTP/1.2\r\nHost: h\r\n b\r\n\r\n", 400, "folded_line"),
        ("HTTP/3.0", "GET / HTTP/3.0\r\nHost: h\r\n\r\n", 505, "version"),
        ("HTTP/2.0", "GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505, "version"),
        ("preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http2_preface"),
        ("CONNECT", "CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", 501, "method"),
        ("TRACE", "TRACE / HTTP/1.1\r\nHost: h\r\n\r\n", 501, "method"),
        ("authority form", "GET h:443 HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("relative path", "GET v1 HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("fragment", "GET /#a HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("raw UTF-8", "GET /é HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("raw UTF-8 in the query", "GET /?é HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("angle bracket", "GET /< HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("angle bracket in the query", "GET /?a=> HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("angle bracket in an absolute target", "GET http://h/< HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("backtick in the path", "GET /` HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("quotation mark in the query", "GET /?\" HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("other scheme", "GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("user in the target", "GET http://u@h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("no host in the target", "GET http:///a HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"),
        ("asterisk with GET", "GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400, "asterisk_target"),
        // Expect.
        ("unknown expectation", &with("Content-Length: 5\r\nExpect: a\r\n"), 417, "expectation"),
        ("one known of two", &with("Content-Length: 5\r\nExpect: 100-continue, a\r\n"), 417, "expectation"),
    ];
    for (trick, input, status, reason) in table {
        let error = parse(input).expect_err(trick);
        assert_eq!((error.status().as_u16(), error.reason()), (*status, *reason), "{trick}: {error}");
        let message = error.to_string();
        assert!(message.len() < 300 && message.bytes().all(|b| matches!(b, b' '..=b'~')), "{trick}: {message:?}");
    }
}

#[test]
fn unambiguous_requests_are_accepted() {
    use RequestBody::{Chunked, Length, None as NoBody};
    let table: &[(&str, &str, RequestBody, bool)] = &[
        ("GET / HTTP/1.1\r\nHost: h\r\n\r\n", "/", NoBody, true),
        ("\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", "/", NoBody, true),
        ("GET / HTTP/1.1\r\nHost: h\r\nConnection: a, Close\r\n\r\n", "/", NoBody, false),
        ("GET / HTTP/1.0\r\n\r\n", "/", NoBody, false),
        ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "/", NoBody, true),
        ("POST /a%20?b={c}|d HTTP/1.1\r\nHost: h\r\nContent-Length: 07\r\n\r\n", "/a%20?b={c}|d", Length(7), true),
        ("GET /\"^{}|\\?^{}|\\` HTTP/1.1\r\nHost: h\r\n\r\n", "/\"^{}|\\?^{}|\\`", NoBody, true),
        ("POST // HTTP/1.1\r\nHost: h_1.x:8080\r\nTransfer-Encoding: Chunked\r\n\r\n", "//", Chunked, true),
        ("GET http://H:80/a?b HTTP/1.1\r\nHost: h\r\n\r\n", "/a?b", NoBody, true),
        ("GET https://h HTTP/1.1\r\nHost: h:443\r\n\r\n", "/", NoBody, true),
        ("GET http://h?b HTTP/1.1\r\nHost: h\r\n\r\n", "/?b", NoBody, true),
        ("GET http://[::1]:9/a HTTP/1.1\r\nHost: [::1]:9\r\n\r\n", "/a", NoBody, true),
        ("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", "*", NoBody, true),
        ("OPTIONS http://h HTTP/1.1\r\nHost: h\r\n\r\n", "*", NoBody, true),
        ("GET / HTTP/1.1\r\nHost: h\r\na: \u{e9}\tb \r\nempty:\r\n\r\n", "/", NoBody, true),
    ];
    for (input, target, body, keep_alive) in table {
        let (head, length) = parse(input).expect(input).expect(input);
        assert_eq!(length, input.len(), "{input:?}");
        assert_eq!((head.parts.uri.to_string().as_str(), head.body), (*target, *body), "{input:?}");
        assert_eq!(head.keep_alive, *keep_alive, "{input:?}");
    }
}

#[test]
fn host_of_an_absolute_target_replaces_a_missing_one() {
    for input in [
        "GET http://h:81/ HTTP/1.0\r\n\r\n",
        "GET http://h:81/ HTTP/1.0\r\nHost:\r\n\r\n",
        "GET http://h:81/ HTTP/1.1\r\nHost: \r\n\r\n",
    ] {
        let (head, _) = parse(input).unwrap().unwrap();
        assert_eq!(head.parts.headers[header::HOST], "h:81", "{input:?}");
    }
    assert!(parse("GET http://h:81/ HTTP/1.1\r\n\r\n").is_err());
}

#[test]
fn empty_host_in_http10_is_removed() {
    let (head, _) = parse("GET / HTTP/1.0\r\nHost:\r\n\r\n").unwrap().unwrap();
    assert!(!head.parts.headers.contains_key(header::HOST));
}

#[test]
fn continue_is_expected_only_if_the_client_waits() {
    let expects = |input: &str| parse(input).unwrap().unwrap().0.expect_continue;
    assert!(expects(&with("Expect: 100-Continue\r\nContent-Length: 5\r\n")));
    assert!(expects(&with("Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n")));
    assert!(expects(&with("Expect: , 100-continue,100-Continue\r\nContent-Length: 5\r\n")));
    assert!(!expects(&with("Expect:\r\nContent-Length: 5\r\n")));
    assert!(!expects(&with("Expect: 100-continue\r\n")));
    assert!(!expects(&with("Content-Length: 5\r\n")));
    assert!(!expects("POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"));
}

#[test]
fn continue_is_expected_over_http2_only_if_the_client_waits() {
    let expects = |fields: &[(&'static str, &'static str)], ended: bool| {
        let mut request = http::Request::post("http://h/v1");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        let head = from_http2(&mut parts, ended, &LIMITS).unwrap();
        assert!(!head.parts.headers.contains_key(header::EXPECT));
        head.expect_continue
    };
    let expected = ("expect", "100-Continue");
    assert!(expects(&[expected], false));
    assert!(expects(&[expected, ("content-length", "5")], false));
    assert!(!expects(&[expected, ("content-length", "0")], false));
    assert!(!expects(&[expected], true));
    assert!(!expects(&[("content-length", "5")], false));
}

/// The limits of `http`, which `limits.head_bytes` may exceed.
#[test]
fn longest_targets_and_names_are_read_and_longer_ones_named() {
    let limits = HeadLimits { bytes: 1 << 20, headers: 32 };
    let parse = |input: &str| parse_request(input.as_bytes(), &limits);
    let path = |length: usize| format!("/{}", "x".repeat(length - 1));
    let query = |length: usize| format!("/?{}", "x".repeat(length - 2));
    for origin in [path, query] {
        for before in ["", "http://h", "https://h"] {
            let request = |length: usize| format!("GET {before}{} HTTP/1.1\r\nHost: h\r\n\r\n", origin(length));
            let (head, _) = parse(&request(LONGEST_TARGET)).unwrap().unwrap();
            assert_eq!(head.parts.uri.to_string(), origin(LONGEST_TARGET));
            for length in [LONGEST_TARGET + 1, LONGEST_TARGET + 2, 100_000] {
                let error = parse(&request(length)).unwrap_err();
                assert_eq!((error.status().as_u16(), error.reason()), (414, "request_line_too_long"), "{length}");
            }
        }
    }
    let named = |length: usize, rest: &str| with(&format!("{}: 1\r\n{rest}", "n".repeat(length)));
    assert!(parse(&named(65_535, "")).unwrap().is_some());
    // Also if httparse refuses a later line.
    for rest in ["", "a b: c\r\n"] {
        let error = parse(&named(65_536, rest)).unwrap_err();
        assert_eq!((error.status().as_u16(), error.reason()), (431, "head_too_long"));
    }
    let error = parse(&with(&format!("{}\r\n", "n".repeat(65_536)))).unwrap_err();
    assert_eq!(error.reason(), "field_line", "a line without a colon has no name");
}

#[test]
fn parser_takes_nothing_beyond_the_head() {
    let (_, length) = parse(with("Content-Length: 5\r\n") + "hello").unwrap().unwrap();
    assert_eq!(length, with("Content-Length: 5\r\n").len());
}

/// Usually one of `usual`, sometimes one of `odd`.
fn mostly(usual: &[&'static str], odd: &[&'static str]) -> impl Strategy<Value = &'static str> + use<> {
    prop_oneof![12 => prop::sample::select(usual.to_vec()), 1 => prop::sample::select(odd.to_vec())]
}

/// Heads near the edge of validity: plausible parts, some of them wrong, and line ends that parsers disagree about.
fn heads() -> impl Strategy<Value = Vec<u8>> {
    let method = mostly(&["GET", "POST", "OPTIONS", "M-SEARCH"], &["CONNECT", "PRI", "g@t", ""]);
    let known = mostly(&["/", "/v1/completions?a=b", "http://h/a", "http://H:80"], &["*", "h:1", "/a#b", "http://i"]);
    let target = prop_oneof![known.prop_map(String::from), "/[!-~]{0,3}", "/[a-z%/?=]{0,12}"];
    let version = mostly(&["HTTP/1.1", "HTTP/1.0"], &["HTTP/2.0", "HTTP/1.2", "http/1.1"]);
    let host = mostly(&["Host: h", "host: h:80"], &["Host:", "Host: i", "a: b"]);
    let framing = mostly(
        &["x-b: c", "Content-Length: 5", "Transfer-Encoding: chunked"],
        &["content-length: 5, 5", "transfer-encoding: gzip, chunked", "Transfer-Encoding : chunked"],
    );
    let other = mostly(
        &["Connection: close, x-a", "X-A: b", "Expect: 100-continue", "a: \u{ff}", "te: trailers"],
        &["Content-Length: 5", "Host: h", " folded", "a"],
    );
    let end = || prop_oneof![40 => Just("\r\n"), 1 => prop::sample::select(vec!["\n", "\r", "\r\r\n"])];
    let fields = (host, framing, prop::collection::vec((other, end()), 0..4));
    (mostly(&["", "\r\n"], &["\n"]), method, target, version, end(), fields).prop_map(
        |(lead, method, target, version, end, (host, framing, others))| {
            let others: String = others.into_iter().map(|(field, end)| format!("{field}{end}")).collect();
            format!("{lead}{method} {target} {version}{end}{host}\r\n{framing}\r\n{others}\r\nrest").into_bytes()
        },
    )
}

fn outcome(input: &[u8]) -> Result<Option<(String, usize)>, RequestError> {
    parse_request(input, &CUT).map(|head| head.map(|(head, length)| (format!("{head:?}"), length)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn parser_never_panics(input in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = outcome(&input);
    }

    /// However the bytes are cut into reads, the first result other than `None` is the same.
    #[test]
    fn result_does_not_depend_on_cuts(input in heads()) {
        let whole = outcome(&input);
        let first = (0..=input.len()).map(|end| outcome(&input[..end])).find(|o| !matches!(o, Ok(None)));
        prop_assert_eq!(&first.unwrap_or(Ok(None)), &whole);
        let mut parser = RequestParser::default();
        let mut next = |end| parser.parse(&input[..end], &CUT).map(|head| head.map(|(head, length)| (format!("{head:?}"), length)));
        let first = (0..=input.len()).map(&mut next).find(|o| !matches!(o, Ok(None)));
        prop_assert_eq!(first.unwrap_or(Ok(None)), whole);
    }

    /// An accepted head is written so that another parser reads the same request with one framing.
    #[test]
    fn forwarded_request_has_the_same_meaning(input in heads()) {
        let Ok(Some((head, _))) = parse(&input) else { return Ok(()) };
        let body_len = match head.body {
            RequestBody::None => None,
            RequestBody::Length(bytes) => Some(bytes),
            RequestBody::Chunked => Some(7),
            RequestBody::Frames(_) => unreachable!("HTTP/1.1 has no frames"),
        };
        let mut out = bytes::BytesMut::new();
        let framing = body_len.map_or(RequestFraming::None, RequestFraming::Length);
        write_request(&head.parts, "10.0.0.1:8000".parse().unwrap(), framing, AfterResponse::Keep, &mut out);

        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut again = httparse::Request::new(&mut fields);
        prop_assert_eq!(again.parse(&out), Ok(httparse::Status::Complete(out.len())));
        prop_assert_eq!(again.method, Some(head.parts.method.as_str()));
        prop_assert_eq!(again.path.map(str::to_owned), Some(head.parts.uri.to_string()));
        prop_assert_eq!(again.version, Some(1));
        let values = |name: &str| -> Vec<&[u8]> {
            again.headers.iter().filter(|f| f.name.eq_ignore_ascii_case(name)).map(|f| f.value).collect()
        };
        prop_assert_eq!(values("host").len(), 1);
        prop_assert!(values("transfer-encoding").is_empty() && values("expect").is_empty());
        let length = body_len.or((head.parts.method == Method::POST).then_some(0)).map(|n| n.to_string());
        prop_assert_eq!(values("content-length"), length.iter().map(String::as_bytes).collect::<Vec<_>>());

        let (same, length) = parse(&out).expect("strict").expect("complete");
        prop_assert_eq!((same.parts.uri, length), (head.parts.uri, out.len()));
    }
}

#[test]
fn request_error_names_found_and_expected() {
    let error = parse(with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n")).unwrap_err();
    assert_eq!(error.status(), StatusCode::BAD_REQUEST);
    assert_eq!(
        error.to_string(),
        "found Transfer-Encoding \"chunked\" together with Content-Length, expected only one of them"
    );
}

#[test]
fn head_in_single_bytes_is_scanned_once() {
    let limits = HeadLimits { bytes: 64 << 10, headers: 32 };
    let field = "x".repeat(limits.bytes - with("").len() - "a: \r\n".len());
    for wire in [with(&format!("a: {field}\r\n")), format!("\r\n\r\n{}", with(&format!("a: {}\r\n", &field[4..])))] {
        assert_eq!(wire.len(), limits.bytes);
        let _ = super::head::tests::looked_at();
        let mut parser = RequestParser::default();
        for end in 0..wire.len() {
            assert!(parser.parse(&wire.as_bytes()[..end], &limits).unwrap().is_none());
        }
        let (_, length) = parser.parse(wire.as_bytes(), &limits).unwrap().unwrap();
        assert_eq!(length, wire.len());
        let looked_at = super::head::tests::looked_at();
        assert!(looked_at <= wire.len(), "{looked_at} of {}", wire.len());
    }
}

/// As such it reaches HTTP/2 endpoints.
#[test]
fn every_valid_host_can_be_an_authority() {
    let fixed = ["[::1]", "[::1]:80", "[::ffff:10.0.0.1]:", "a:", "a:0080", "10.0.0.1:65535"].map(str::to_owned);
    let with =
        |byte: u8| [format!("a{0}b", byte as char), format!("{0}a:80", byte as char), format!("a{0}41", byte as char)];
    let mut valid = 0;
    for host in (0..128).flat_map(with).chain(fixed) {
        if parse_host(host.as_bytes()).is_some() {
            let uri = http::Uri::builder().scheme("http").authority(host.as_str()).path_and_query("/").build();
            assert!(uri.is_ok(), "{host:?}: {uri:?}");
            valid += 1;
        }
    }
    assert!(valid > 200, "{valid}");
}
