//! Unusual but valid requests: answered, and forwarded byte for byte.

use http::HeaderMap;
use penstock_tests::{
    Alphabet, BodyEnd, Http2Client, Plan,
    client::{Client, Request},
    content::Fnv,
    eventually,
    http2_frames::{END_STREAM, Frame, Http2Frames, kind},
    model_server::{After, Echo, Framing},
};

use crate::setting::{Setting, closed, echo, error, get, post};

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let mut setting = Setting::start(|_| {}).await;
    let json = "content-type: application/json\r\ncontent-length: 13\r\nx-id: 2\r\n";
    let wire = [
        post("content-length: 5\r\nx-id: 1\r\n", "hello"),
        post(json, r#"{"model":"m"}"#),
        post("transfer-encoding: chunked\r\nx-id: 3\r\n", "5\r\nhello\r\n0\r\n\r\n"),
        get("x-id: 4\r\n"),
    ];
    let (mut response, mut client) = setting.answer(&wire.concat()).await;
    for (id, length) in [("1", 5), ("2", 13), ("3", 5), ("4", 0)] {
        if id != "1" {
            response = client.response().await.unwrap();
        }
        let seen: Echo = response.json().unwrap();
        assert_eq!((seen.header("x-id"), seen.body_length), (Some(id), length));
    }

    let (response, mut client) = setting.answer(&[wire[0].clone(), b"GET /\r\n\r\n".to_vec()].concat()).await;
    assert_eq!(response.status(), 200);
    let response = client.response().await.unwrap();
    assert_eq!((response.status(), error(&response).0.as_str()), (400, "request_line"));
    closed(&mut client).await;

    // The last request asks for close: bytes after it are not answered.
    let (response, mut client) = setting.answer(&[get("connection: close\r\n"), get("")].concat()).await;
    assert_eq!((response.status(), response.header("connection")), (200, Some("close")));
    closed(&mut client).await;
    setting.unharmed().await;
}

#[tokio::test]
async fn expect_100_continue_gets_continue() {
    let setting = Setting::start(|_| {}).await;
    for (framing, body) in [("content-length: 5", "hello"), ("transfer-encoding: chunked", "5\r\nhello\r\n0\r\n\r\n")] {
        let mut client = setting.client().await;
        client.send_raw(&post(&format!("Expect: 100-Continue\r\n{framing}\r\n"), "")).await.unwrap();
        assert_eq!(client.head().await.unwrap().raw, &b"HTTP/1.1 100 Continue\r\n\r\n"[..]);
        client.send_raw(body.as_bytes()).await.unwrap();
        let response = client.response().await.unwrap();
        let seen: Echo = response.json().unwrap();
        assert_eq!((response.interim.len(), seen.body_length, seen.header("expect")), (0, 5, None));
    }
    // No wait needed: the body is empty or already here, or the client speaks HTTP/1.0.
    for wire in [
        get("expect: 100-continue\r\n"),
        post("expect: 100-continue\r\ncontent-length: 0\r\n", ""),
        post("expect: 100-continue\r\ncontent-length: 5\r\n", "hello"),
        b"POST /test/echo HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\nhello".to_vec(),
    ] {
        let (response, _) = setting.answer(&wire).await;
        assert_eq!((response.status(), response.interim.len()), (200, 0), "{}", wire.escape_ascii());
    }
}

/// The same over HTTP/2.
#[tokio::test]
async fn expect_100_continue_over_http2_gets_continue() {
    let setting = Setting::start(|_| {}).await;
    let mut client = Http2Client::connect(setting.agent.addr).await.unwrap();
    let waiting = |length: Option<&str>| {
        let request = Request::new("POST", "/test/echo").header("expect", "100-Continue");
        length.map_or(request.clone(), |length| request.header("content-length", length))
    };
    for length in [None, Some("5")] {
        let head = client.head(&waiting(length)).unwrap();
        let mut stream = client.open(head, false).await.unwrap();
        let interim = stream.interim().await.unwrap().expect("no interim head");
        assert_eq!((interim.status, interim.headers.len()), (100, 0), "{:?}", interim.headers);
        stream.data("hello").await.unwrap();
        stream.finish(HeaderMap::new()).unwrap();
        let response = stream.response().await.unwrap();
        let seen = response.echoed();
        assert_eq!((response.interim.len(), seen.body_length, seen.header("expect")), (0, 5, None));
    }
    // The client has nothing to wait for: it sends no body, or an empty one.
    for (length, ends) in [(None, true), (Some("0"), true), (Some("0"), false)] {
        let head = client.head(&waiting(length)).unwrap();
        let mut stream = client.open(head, ends).await.unwrap();
        if !ends {
            stream.finish(HeaderMap::new()).unwrap();
        }
        let response = stream.response().await.unwrap();
        assert_eq!((response.status(), response.interim.len()), (200, 0), "{length:?} {ends}");
    }
    // The body comes in the same segment as the head.
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/test/echo"),
        (":authority", "x"),
        ("expect", "100-continue"),
    ];
    let mut frames = Http2Frames::connect(setting.agent.addr).await.unwrap();
    let body = Frame::new(kind::DATA, END_STREAM, 1, *b"hello");
    frames.send_raw(&[Frame::headers(1, false, &fields).wire(), body.wire()].concat()).await.unwrap();
    let head = frames.find(|frame| frame.kind == kind::HEADERS).await.unwrap().expect("no answer");
    assert_eq!(head.status(), Some(200));
}

#[tokio::test]
async fn unusual_request_lines_are_accepted() {
    let setting = Setting::start(|_| {}).await;
    for (line, target) in [
        ("\r\n\r\nGET /test/echo HTTP/1.1", "/test/echo"),
        ("GET http://X/test/echo?a=http://y HTTP/1.1", "/test/echo?a=http://y"),
        ("GET http://x:80/test/echo HTTP/1.1", "/test/echo"),
        // RFC 9110 §2.5: a newer minor version counts as the newest known one, keep-alive included.
        ("GET /test/echo HTTP/1.2", "/test/echo"),
        ("GET /test/echo HTTP/1.9", "/test/echo"),
    ] {
        let (response, mut client) = setting.answer(format!("{line}\r\nhost: x\r\n\r\n").as_bytes()).await;
        assert_eq!(response.json::<Echo>().unwrap().target, target);
        assert_eq!(client.request(&echo()).await.unwrap().status(), 200);
    }
}

/// RFC 9110 §6.5: trailers follow the body, except those that are invalid or misleading there.
#[tokio::test]
async fn request_trailers_are_forwarded() {
    let setting = Setting::start(|_| {}).await;
    let trailers = "x-sum: 1\r\nDigest: a=b\r\nx-sum: 2\r\nhost: evil\r\ncontent-length: 9\r\nauthorization: evil\r\n\
                    x-gateway-destination-endpoint: 6.6.6.6:6\r\nx_gateway_model_name: evil\r\ncontent-type: evil\r\n";
    let wire =
        post("transfer-encoding: chunked\r\ntrailer: x-sum\r\n", format!("3\r\nabc\r\n2\r\nde\r\n0\r\n{trailers}\r\n"));
    let (response, mut client) = setting.answer(&wire).await;
    let seen: Echo = response.json().unwrap();
    assert_eq!((seen.body_framing.as_str(), seen.body_length), ("chunked", 5));
    let pairs = [("x-sum", "1"), ("x-sum", "2"), ("digest", "a=b")];
    assert_eq!(seen.trailers, pairs.map(|(name, value)| (name.to_owned(), value.to_owned())));
    assert_eq!((seen.header("content-length"), seen.header("authorization")), (None, None));
    // The connection stays usable.
    assert_eq!(client.request(&echo()).await.unwrap().status(), 200);
    // Without trailers, the agent declares the body's length.
    let wire = post("transfer-encoding: chunked\r\n", "3\r\nabc\r\n0\r\nhost: evil\r\n\r\n");
    let (response, _) = setting.answer(&wire).await;
    let seen: Echo = response.json().unwrap();
    assert_eq!((seen.body_framing.as_str(), seen.trailers.len()), ("content-length", 0));
}

/// RFC 9110 §7.6.2.
#[tokio::test]
async fn options_max_forwards_is_decremented() {
    let setting = Setting::start(|_| {}).await;
    let options = |fields: &str| format!("OPTIONS /test/echo HTTP/1.1\r\nhost: x\r\n{fields}\r\n").into_bytes();
    for (given, seen) in [("1", "0"), ("10", "9"), ("x", "x"), ("1, 2", "1, 2")] {
        let (response, _) = setting.answer(&options(&format!("max-forwards: {given}\r\n"))).await;
        assert_eq!(response.json::<Echo>().unwrap().header("max-forwards"), Some(seen));
    }
    let before = setting.reached();
    let (response, mut client) = setting.answer(&options("max-forwards: 0\r\n")).await;
    assert_eq!((response.status(), response.read.len, response.header("content-length")), (200, 0, Some("0")));
    assert_eq!(setting.reached(), before);
    let counted = || setting.agent.count("penstock_requests_total", &["reason=\"max_forwards\""]);
    eventually(std::time::Duration::from_secs(10), || counted() == 1).await;
    assert_eq!(client.request(&echo()).await.unwrap().status(), 200);
    // Other methods ignore the field.
    let (response, _) = setting.answer(&get("max-forwards: 0\r\n")).await;
    assert_eq!(response.json::<Echo>().unwrap().header("max-forwards"), Some("0"));
}

/// RFC 9112 §3.2.2: the target names the host.
#[tokio::test]
async fn absolute_target_replaces_empty_host() {
    let setting = Setting::start(|_| {}).await;
    let (response, _) = setting.answer(b"GET http://x:81/test/echo HTTP/1.1\r\nhost:\r\n\r\n").await;
    let seen: Echo = response.json().unwrap();
    assert_eq!((seen.target.as_str(), seen.header("host")), ("/test/echo", Some("x:81")));
}

#[tokio::test]
async fn http10_requests_are_served() {
    let mut setting = Setting::start(|_| {}).await;
    let old = |plan: &Plan, fields: &str| {
        format!("GET /test/body HTTP/1.0\r\n{fields}x-test-plan: {}\r\n\r\n", plan.header()).into_bytes()
    };
    // The request has no host, and HTTP/1.1 servers reject an empty one.
    let address = setting.server.addr.to_string();
    for host in ["", "host:\r\n", "host: \r\n"] {
        let (response, _) = setting.answer(format!("GET /test/echo HTTP/1.0\r\n{host}\r\n").as_bytes()).await;
        assert_eq!(response.json::<Echo>().unwrap().header("host"), Some(address.as_str()), "{host}");
    }

    let plan = Plan { size: 5000, stream_id: 7, ..Plan::default() };
    let (response, mut client) = setting.answer(&old(&plan, "")).await;
    assert_eq!((response.header("connection"), response.read.len), (Some("close"), 5000));
    closed(&mut client).await;

    let kept = old(&plan, "connection: keep-alive\r\n");
    let (response, mut client) = setting.answer(&kept).await;
    assert_eq!((response.header("connection"), response.read.len), (Some("keep-alive"), 5000));
    client.send_raw(&kept).await.unwrap();
    plan.checker().feed(&client.response().await.unwrap().body).unwrap();

    // HTTP/1.0 has no chunks: the body is decoded and ended by the close, whatever the request asked for.
    let trailers = vec![("x-trailer".to_owned(), "1".to_owned())];
    let chunked = Plan { framing: Framing::Chunked, size: 100_000, trailers, ..plan };
    let (response, mut client) = setting.answer(&old(&chunked, "connection: keep-alive\r\n")).await;
    assert_eq!((response.header("transfer-encoding"), response.header("content-length")), (None, None));
    assert_eq!((response.header("connection"), response.read.len), (Some("close"), 100_000));
    chunked.checker().feed(&response.body).unwrap();
    closed(&mut client).await;
    setting.unharmed().await;
}

#[tokio::test]
async fn bodiless_responses_are_forwarded() {
    let mut setting = Setting::start(|_| {}).await;
    let mut client = setting.client().await;
    for status in [204, 304] {
        let headers = vec![("etag".to_owned(), "\"x\"".to_owned())];
        let plan = Plan { status, headers, framing: Framing::None, ..Plan::default() };
        let response = client.request(&plan.request()).await.unwrap();
        assert_eq!(
            (response.status(), response.header("etag"), response.header("connection")),
            (status, Some("\"x\""), None)
        );
    }
    for (framing, length) in [(Framing::ContentLength, Some("1000")), (Framing::Chunked, None)] {
        let plan = Plan { size: 1000, framing, ..Plan::default() };
        let head = Request::new("HEAD", "/test/body").header("x-test-plan", plan.header());
        let response = client.request(&head).await.unwrap();
        assert_eq!((response.status(), response.header("content-length")), (200, length));
    }
    let plan = Plan { size: 1000, interim: vec![103, 100, 103], ..Plan::default() };
    let response = client.request(&plan.request()).await.unwrap();
    // The agent requests the body itself, so the client gets no 100.
    assert_eq!((response.status(), response.interim.len(), response.read.len), (200, 2, 1000));
    let response =
        client.request(&Plan { framing: Framing::UntilClose, after: After::KeepAlive, ..plan }.request()).await;
    let response = response.unwrap();
    assert_eq!((response.header("connection"), response.read.len), (Some("close"), 1000));
    assert_eq!(response.read.end, BodyEnd::Complete);
    closed(&mut client).await;
    setting.unharmed().await;
}

async fn arrives(client: &mut Client, request: Request, body: &[u8]) -> Echo {
    let seen: Echo = client.request(&request).await.unwrap().json().unwrap();
    assert_eq!((seen.body_framing.as_str(), seen.body_length), ("content-length", body.len() as u64));
    assert_eq!(seen.body_hash, Fnv::of(body).value());
    seen
}

#[tokio::test]
async fn request_bodies_are_forwarded_unchanged() {
    let mut setting = Setting::start(|config| config.limits.body_memory_bytes = 64 << 10).await;
    let mut client = setting.client().await;
    let binary = Alphabet::Binary.bytes(9, 0, 70_000);
    let multipart =
        b"--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n\x00\xff{\r\n--b--\r\n".to_vec();
    let json = b" {\"a\" : \"\\ud83d\",\r\n\t\"model\":\"\\u006d\" , \"n\":1.0e+2}\n".to_vec();
    for (kind, body) in [
        ("multipart/form-data; boundary=b", &multipart),
        ("application/octet-stream", &binary),
        ("audio/wav", &binary),
        ("text/plain", &b"{\"model\":".to_vec()),
        ("application/jsonl", &b"{}\n{}\n".to_vec()),
        ("application/json", &json),
    ] {
        for chunked in [false, true] {
            let request = Request::post("/test/echo", body.clone()).header("content-type", kind);
            let request = if chunked { request.chunked(body.clone(), 777) } else { request };
            let seen = arrives(&mut client, request, body).await;
            assert_eq!((seen.header("content-type"), seen.header("transfer-encoding")), (Some(kind), None));
        }
    }
    // Larger than the in-memory limit.
    let large = Alphabet::Binary.bytes(3, 0, 3 << 20);
    arrives(&mut client, Request::post("/test/echo", large.clone()), &large).await;
    arrives(&mut client, Request::new("PUT", "/test/echo").chunked(large.clone(), 5000), &large).await;
    setting.unharmed().await;
}
