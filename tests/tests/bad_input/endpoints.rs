//! Misbehaving endpoints: the client gets a complete error or exactly the message, and the endpoint connection is not reused.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Alphabet, BodyEnd, Plan,
    agent::{TestAgent, builtin_pool},
    client::{Client, Pace, Request},
    content::Fnv,
    eventually,
    model_server::HeadWrites,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::setting::{Setting, echo, error};

const SOON: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
pub(crate) enum Then {
    Keep,
    Close,
    Reset,
}

/// Answers every request with the same bytes. Requests must not have a body.
pub(crate) struct Endpoint {
    pub(crate) addr: SocketAddr,
    accepted: Arc<AtomicU64>,
}

impl Endpoint {
    pub(crate) async fn start(answer: &[u8], then: Then) -> Self {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (addr, accepted) = (listener.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
        let (answer, count) = (answer.to_vec(), Arc::clone(&accepted));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(stream, answer.clone(), then));
            }
        });
        Self { addr, accepted }
    }

    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

async fn serve(mut stream: TcpStream, answer: Vec<u8>, then: Then) {
    while let Some((_, rest)) = head(&mut stream).await {
        assert!(rest.is_empty());
        if stream.write_all(&answer).await.is_err() {
            return;
        }
        match then {
            Then::Keep => {}
            Then::Close => return,
            Then::Reset => return socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap(),
        }
    }
}

/// Reads a request's head and the bytes after it; `None` at the end of the connection.
async fn head(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        if let Some(at) = bytes.windows(4).position(|end| end == b"\r\n\r\n") {
            let rest = bytes.split_off(at + 4);
            return Some((String::from_utf8(bytes).unwrap(), rest));
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

pub(crate) async fn before(endpoint: SocketAddr) -> (TestAgent, Client) {
    let agent = TestAgent::start(builtin_pool(&[endpoint]), SteeringMode::Off, |config| {
        config.limits.head_bytes = 4096;
        config.limits.headers = 32;
    });
    let client = Client::connect(agent.addr).await.unwrap();
    (agent, client)
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
async fn malformed_responses_return_502() {
    let ok = |fields: &str, body: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n{body}");
    let chunked = "5\r\nhello\r\n0\r\n\r\n";
    let rows = [
        ("bad_response", ok("content-length: 5\r\ntransfer-encoding: chunked\r\n", chunked)),
        ("bad_response", ok("transfer-encoding: chunked\r\ncontent-length: 5\r\n", chunked)),
        ("bad_response", ok("content-length: 5\r\ncontent-length: 6\r\n", "hello")),
        ("bad_response", ok("content-length: 5, 6\r\n", "hello")),
        ("bad_response", ok("content-length: 5,\r\n", "hello")),
        ("bad_response", ok("content-length: -5\r\n", "hello")),
        ("bad_response", ok("transfer-encoding: xchunked\r\n", chunked)),
        ("bad_response", ok("transfer-encoding: gzip, chunked\r\n", chunked)),
        ("bad_response", ok("a : b\r\ncontent-length: 5\r\n", "hello")),
        ("bad_response", ok("a: b\r\n c\r\ncontent-length: 5\r\n", "hello")),
        ("bad_response", ok("a: b\nc: d\r\ncontent-length: 5\r\n", "hello")),
        ("bad_response", ok("a: \0\r\ncontent-length: 5\r\n", "hello")),
        ("bad_response", ok("a\0: b\r\ncontent-length: 5\r\n", "hello")),
        ("bad_response", ok("a: b\rc: d\r\ncontent-length: 5\r\n", "hello")),
        ("bad_response", ok("content-length : 5\r\n", "hello")),
        ("bad_response", ok("content-length:\r\n 5\r\n", "hello")),
        ("bad_response", ok("content-length: +5\r\n", "hello")),
        ("bad_response", ok("content-length: 0x5\r\n", "hello")),
        ("bad_response", ok("content-length: 18446744073709551616\r\n", "hello")),
        ("bad_response", ok("transfer-encoding : chunked\r\n", chunked)),
        ("bad_response", ok("transfer-encoding:\r\n chunked\r\n", chunked)),
        ("bad_response", ok("transfer-encoding: chunked\x0b\r\n", chunked)),
        ("bad_response", ok("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", chunked)),
        ("bad_response", ok("transfer-encoding: chunked, identity\r\n", chunked)),
        ("bad_response", ok("transfer-encoding: identity\r\n", "hello")),
        ("bad_response", format!("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunked}")),
        ("bad_response", "HTTP/1.1 200 OK\ncontent-length: 5\n\nhello".to_owned()),
        ("bad_response", "HTTP/1.1  200 OK\r\ncontent-length: 5\r\n\r\nhello".to_owned()),
        ("bad_response", " HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello".to_owned()),
        ("bad_response", ok(&format!("a: {}\r\n", "x".repeat(5000)), "")),
        ("bad_response", ok(&"a: b\r\n".repeat(33), "")),
        ("bad_response", "x".repeat(5000)),
        ("bad_response", "garbage\r\n\r\n".to_owned()),
        ("bad_response", "HTTP/2 200\r\n\r\n".to_owned()),
        ("bad_response", "HTTP/1.1 99 x\r\n\r\n".to_owned()),
        ("bad_response", "HTTP/1.1 2000 x\r\n\r\n".to_owned()),
        ("bad_response", "\r\nHTTP/1.1 200 OK\n\n".to_owned()),
        ("bad_response", "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n".to_owned()),
        ("bad_response", "HTTP/1.1 103 Early Hints\r\ncontent-length: 5\r\n\r\nhello".to_owned()),
        ("endpoint_closed", String::new()),
        ("endpoint_closed", "HTTP/1.1 20".to_owned()),
        ("endpoint_closed", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n".to_owned()),
        ("endpoint_closed", "HTTP/1.1 100 Continue\r\n\r\n".to_owned()),
    ];
    for (code, answer) in rows {
        let shown = answer[..answer.len().min(200)].escape_default().to_string();
        let thens: &[Then] =
            if code == "bad_response" { &[Then::Keep, Then::Close] } else { &[Then::Close, Then::Reset] };
        for &then in thens {
            let endpoint = Endpoint::start(answer.as_bytes(), then).await;
            let (_agent, mut client) = before(endpoint.addr).await;
            // The client connection is kept; the endpoint connection is not.
            for accepted in 1..=2 {
                let response = client.request(&echo()).await.unwrap();
                assert_eq!((response.status(), error(&response).0.as_str()), (502, code), "{shown}");
                assert_eq!((response.header("connection"), endpoint.accepted()), (None, accepted), "{shown}");
            }
            assert_eq!(client.surplus(), b"");
        }
    }
}

/// A valid head with a malformed body: the client sees a broken message, never a complete one, and no byte of it counts as part
/// of the next response.
#[tokio::test]
async fn malformed_response_bodies_are_broken_off() {
    let next = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
    let mut rows: Vec<String> = Vec::new();
    for bad in [
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello!\r\n0\r\n\r\n",
        "0\n\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "10000000000000005\r\nhello\r\n0\r\n\r\n",
        "5;a=\nb\r\nhello\r\n0\r\n\r\n",
        "5;\0\r\nhello\r\n0\r\n\r\n",
        "\r\n",
        "0\r\nx: y\n\n",
        "0\r\nx: \0\r\n\r\n",
    ] {
        rows.push(bad.to_owned());
        rows.push(format!("5\r\nright\r\n{bad}"));
    }
    rows.push(format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(5000)));
    rows.push(format!("0\r\n{}\r\n", "x: yyyyyyyyyyyy\r\n".repeat(1100)));
    for bad in rows {
        let answer = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{bad}{next}");
        let shown = bad[..bad.len().min(100)].escape_default().to_string();
        let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
        let (agent, mut client) = before(endpoint.addr).await;
        for accepted in 1..=2 {
            client.send(&echo()).await.unwrap();
            match client.head().await {
                // What arrived is forwarded or held back; then the connection ends.
                Ok(head) => {
                    assert_eq!(head.status, 200, "{shown}");
                    match client.read_body(Pace::Fast, |_| Ok(())).await {
                        Ok(read) => assert_ne!(read.end, BodyEnd::Complete, "{shown}"),
                        Err(error) => assert!(
                            format!("{error:#}").contains("chunk") || format!("{error:#}").contains("line end"),
                            "{error:#}: {shown}"
                        ),
                    }
                }
                Err(error) => assert!(error.to_string().contains("ended"), "{error:#}: {shown}"),
            }
            assert!(!client.surplus().escape_ascii().to_string().contains("evil"), "{shown}");
            eventually(SOON, || agent.count("penstock_requests_total", &["reason=\"endpoint_broke\""]) == accepted)
                .await;
            assert_eq!(endpoint.accepted(), accepted, "{shown}");
            client = Client::connect(agent.addr).await.unwrap();
        }
    }
}

/// RFC 9110 §6.6.1.
#[tokio::test]
async fn response_without_date_gets_one() {
    for (date, is) in [("", None), ("date: Sun, 06 Nov 1994 08:49:37 GMT\r\n", Some("Sun, 06 Nov 1994 08:49:37 GMT"))] {
        let answer = format!("HTTP/1.1 200 OK\r\n{date}content-length: 0\r\n\r\n");
        let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
        let (_agent, mut client) = before(endpoint.addr).await;
        let response = client.request(&echo()).await.unwrap();
        let found: Vec<_> = response.head.headers.iter().filter(|(name, _)| name == "date").collect();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].1.ends_with(" GMT") && is.is_none_or(|is| is == found[0].1), "{found:?}");
    }
}

/// RFC 9110 §8.6: repeated lengths may be in one field or several.
#[tokio::test]
async fn repeated_equal_content_lengths_are_accepted() {
    for fields in ["content-length: 5, 5\r\n", "content-length: 5\r\nContent-Length: 5,05\r\n"] {
        let answer = format!("HTTP/1.1 200 OK\r\n{fields}\r\nhello");
        let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
        let (_agent, mut client) = before(endpoint.addr).await;
        for _ in 0..2 {
            let response = client.request(&echo()).await.unwrap();
            assert_eq!((response.status(), response.text().as_str()), (200, "hello"), "{fields}");
            assert_eq!(response.header("content-length"), Some("5"), "{fields}");
        }
        assert_eq!(endpoint.accepted(), 1, "{fields}");
    }
}

/// RFC 9110 §2.5: it is read as HTTP/1.1, and its connection is kept.
#[tokio::test]
async fn newer_minor_version_counts_as_http11() {
    let chunked = "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    for (version, rest) in [("HTTP/1.2", "content-length: 5\r\n\r\nhello"), ("HTTP/1.9", chunked)] {
        let endpoint = Endpoint::start(format!("{version} 200 OK\r\n{rest}").as_bytes(), Then::Keep).await;
        let (_agent, mut client) = before(endpoint.addr).await;
        for _ in 0..2 {
            let response = client.request(&echo()).await.unwrap();
            assert_eq!((response.status(), response.text().as_str()), (200, "hello"), "{version}");
        }
        assert_eq!(endpoint.accepted(), 1, "{version}");
    }
}

/// RFC 9112 §6.3, rule 1: a response without a body needs no framing, so invalid framing fields are dropped.
#[tokio::test]
async fn bodiless_response_with_unclear_framing_is_forwarded() {
    let fields = [
        "content-length: 5\r\ntransfer-encoding: chunked\r\n",
        "content-length: 5, 6\r\n",
        "content-length: five\r\n",
        "transfer-encoding: gzip, chunked\r\n",
    ];
    for fields in fields {
        for (method, status) in [("HEAD", "200 OK"), ("GET", "304 Not Modified"), ("GET", "204 No Content")] {
            let answer = format!("HTTP/1.1 {status}\r\netag: \"a\"\r\n{fields}\r\n");
            let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
            let (_agent, mut client) = before(endpoint.addr).await;
            // The endpoint connection is not reused.
            for accepted in 1..=2 {
                let response = client.request(&Request::new(method, "/test/echo")).await.unwrap();
                assert_eq!((response.read.len, response.header("etag")), (0, Some("\"a\"")), "{answer}");
                assert!(status.starts_with(&response.status().to_string()), "{answer}");
                let framing = (response.header("content-length"), response.header("transfer-encoding"));
                assert_eq!((framing, endpoint.accepted()), ((None, None), accepted), "{answer}");
            }
            assert_eq!(client.surplus(), b"");
        }
    }
}

/// A response to HEAD has no body, whatever its head says and whatever bytes follow.
#[tokio::test]
async fn bytes_after_head_response_are_dropped() {
    for fields in ["content-length: 5\r\n", "transfer-encoding: chunked\r\n", ""] {
        let answer = format!("HTTP/1.1 200 OK\r\n{fields}\r\nHTTP/1.1 200 OK\r\n\r\n");
        let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
        let (_agent, mut client) = before(endpoint.addr).await;
        for accepted in 1..=2 {
            let response = client.request(&Request::new("HEAD", "/test/echo")).await.unwrap();
            assert_eq!((response.status(), response.read.len, endpoint.accepted()), (200, 0, accepted), "{fields}");
            assert_eq!(client.surplus(), b"");
        }
    }
}

#[tokio::test]
async fn silent_endpoint_returns_504() {
    let mut setting = Setting::start(|config| config.timeouts.first_byte = Some(Duration::from_millis(300))).await;
    let pause = |split_at| HeadWrites { split_at: Some(split_at), pause_us: 60_000_000, ..HeadWrites::default() };
    let mut client = setting.client().await;
    for (aborted, split_at) in [(1, 0), (2, 20)] {
        let response = client.request(&Plan { head: pause(split_at), ..Plan::default() }.request()).await.unwrap();
        assert_eq!((response.status(), error(&response).0.as_str()), (504, "first_byte_timeout"));
        eventually(SOON, || setting.server.aborted() == aborted).await;
    }
    assert_eq!(client.request(&echo()).await.unwrap().status(), 200);
    setting.unharmed().await;
}

#[tokio::test]
async fn bytes_after_message_are_dropped() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello!",
    ] {
        let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
        let (_agent, mut client) = before(endpoint.addr).await;
        for accepted in 1..=3 {
            let response = client.request(&echo()).await.unwrap();
            assert_eq!((response.status(), response.text().as_str()), (200, "hello"), "{answer}");
            assert_eq!(endpoint.accepted(), accepted, "{answer}");
        }
        assert_eq!(client.surplus(), b"");
    }
    // A bodiless response: the surplus follows the head directly.
    for answer in ["HTTP/1.1 204 No Content\r\n\r\nevil", "HTTP/1.1 304 Not Modified\r\ncontent-length: 4\r\n\r\nevil"]
    {
        let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
        let (_agent, mut client) = before(endpoint.addr).await;
        for accepted in 1..=2 {
            assert_eq!(client.request(&echo()).await.unwrap().read.len, 0);
            assert_eq!((endpoint.accepted(), client.surplus()), (accepted, &b""[..]), "{answer}");
        }
    }
}

/// The endpoint closes a kept connection under the next request: the agent sends the whole body again from the spill file.
#[tokio::test]
async fn spilled_body_is_retried_whole() {
    let body = Alphabet::Binary.bytes(4, 0, 3 << 20);
    let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let endpoint = tokio::spawn(async move {
        let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let (mut first, _) = listener.accept().await.unwrap();
        head(&mut first).await.unwrap();
        first.write_all(ok).await.unwrap();
        let (_, begun) = head(&mut first).await.unwrap();
        drop(first);
        let (mut second, _) = listener.accept().await.unwrap();
        let (head, mut body) = head(&mut second).await.unwrap();
        assert!(head.contains("\r\ncontent-length: 3145728\r\n"), "{head}");
        while body.len() < 3 << 20 {
            assert_ne!(second.read_buf(&mut body).await.unwrap(), 0);
        }
        second.write_all(ok).await.unwrap();
        (begun.len(), Fnv::of(&body).value(), second)
    });
    let agent =
        TestAgent::start(builtin_pool(&[addr]), SteeringMode::Off, |config| config.limits.body_memory_bytes = 64 << 10);
    let mut client = Client::connect(agent.addr).await.unwrap();
    assert_eq!(client.request(&echo()).await.unwrap().status(), 200);
    let response = client.request(&Request::new("PUT", "/test/echo").body(body.clone())).await.unwrap();
    let (begun, hash, _second) = endpoint.await.unwrap();
    assert_eq!((response.status(), hash), (200, Fnv::of(&body).value()));
    assert!(begun < 3 << 20);
    assert_eq!(agent.metric("penstock_endpoint_retries_total", &[]), 1.0);
}

/// The client sees a body that ends too early, and no byte that is no part of one.
#[tokio::test]
async fn wrong_byte_of_a_chunked_body_is_not_forwarded() {
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunk = format!("186a0\r\n{}", "x".repeat(100_000));
    let rows = [("", "w"), ("\r", "w"), ("\r\n", "g"), ("\r\n5", "\n"), ("\r\n5\r", "5"), ("\r\n0\r\n", "\n")];
    for mode in [SteeringMode::Off, SteeringMode::Ingress] {
        for (more, wrong) in rows {
            let valid = format!("{chunk}{more}");
            let endpoint = Endpoint::start(format!("{head}{valid}{wrong}").as_bytes(), Then::Keep).await;
            let agent = TestAgent::start(builtin_pool(&[endpoint.addr]), mode, |_| {});
            let mut client = Client::connect(agent.addr).await.unwrap();
            client.send(&Request::get("/test/echo")).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            client.until_end().await.unwrap();
            let read = client.surplus();
            assert!(valid.as_bytes().starts_with(read), "{mode:?} {more:?}: {} of {} bytes", read.len(), valid.len());
            eventually(SOON, || agent.count("penstock_requests_total", &["reason=\"endpoint_broke\""]) == 1).await;
        }
    }
}
