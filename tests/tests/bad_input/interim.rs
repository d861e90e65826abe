//! Interim responses (1xx) of endpoints: clients get them as they come, bounded in number, in size and in time.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Http2Client, Namespace,
    agent::{TestAgent, builtin_pool},
    client::{Client, Head},
    eventually,
    http2_frames::{END_STREAM, Frame, Http2Frames, kind},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::{
    endpoints::{Endpoint, Then, before},
    setting::{echo, error},
};

const SOON: Duration = Duration::from_secs(10);

/// RFC 9110 §15.2: to HTTP/1.1 and HTTP/2, and not to HTTP/1.0. `100 Continue` is not for the client, whose body the agent has asked for itself.
#[tokio::test]
async fn interim_responses_are_forwarded() {
    let interim = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\nconnection: x-hop\r\nx-hop: 1\r\nx-penstock-reason: no\r\n\r\n\
                   HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\ncontent-length: 0\r\n\r\n";
    let answer = format!("{interim}HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello");
    let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
    let (agent, mut client) = before(endpoint.addr).await;
    for _ in 0..2 {
        let response = client.request(&echo()).await.unwrap();
        assert_eq!((response.status(), response.text().as_str()), (200, "hello"));
        assert_hints(&response.interim);
    }
    client.send_raw(b"GET /test/echo HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").await.unwrap();
    let response = client.response().await.unwrap();
    assert_eq!((response.status(), response.text().as_str(), response.interim.len()), (200, "hello", 0));
    assert_eq!(endpoint.accepted(), 1);
    let mut client2 = Http2Client::connect(agent.addr).await.unwrap();
    for _ in 0..2 {
        let response = client2.request(&echo()).await.unwrap();
        assert_eq!((response.status(), response.text().as_str()), (200, "hello"));
        assert_hints(&response.interim);
    }
}

fn assert_hints(interim: &[Head]) {
    let statuses: Vec<_> = interim.iter().map(|head| head.status).collect();
    assert_eq!(statuses, [103, 102]);
    assert_eq!((interim[0].header("link"), interim[0].header("via")), (Some("</a>"), Some("1.1 penstock")));
    for head in interim {
        for name in ["x-hop", "connection", "x-penstock-reason", "content-length", "date"] {
            assert_eq!(head.header(name), None, "{name}");
        }
    }
}

/// Many of them, and then the response.
#[tokio::test]
async fn many_interim_responses_are_forwarded() {
    let interim = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(500);
    let answer = format!("{interim}HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello");
    let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
    let (agent, mut client) = before(endpoint.addr).await;
    let response = client.request(&echo()).await.unwrap();
    assert_eq!((response.status(), response.text().as_str(), response.interim.len()), (200, "hello", 500));
    let response = Http2Client::connect(agent.addr).await.unwrap().request(&echo()).await.unwrap();
    assert_eq!((response.status(), response.text().as_str(), response.interim.len()), (200, "hello", 500));
}

/// Answers each request with the same interim head again and again, with a pause between them if one is given.
async fn endless(head: &'static str, pause: Option<Duration>) -> SocketAddr {
    let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 1];
                stream.read_exact(&mut request).await.unwrap();
                while stream.write_all(head.as_bytes()).await.is_ok() {
                    if let Some(pause) = pause {
                        tokio::time::sleep(pause).await;
                    }
                }
            });
        }
    });
    addr
}

/// Whether or not the client is told of them: their number and their size are bounded, and the worker serves others meanwhile.
#[tokio::test]
async fn endless_interim_responses_return_502() {
    for head in ["HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 103 Early Hints\r\n\r\n"] {
        let (agent, mut client) = before(endless(head, None).await).await;
        let response = client.request(&echo()).await.unwrap();
        assert_eq!((response.status(), error(&response).0.as_str()), (502, "bad_response"), "{head}");
        assert!(response.interim.len() <= 1024, "{}", response.interim.len());
        let counted = || agent.count("penstock_requests_total", &["reason=\"bad_response\""]) == 1;
        eventually(SOON, counted).await;
    }
    let long: &str = Box::leak(format!("HTTP/1.1 103 E\r\na: {}\r\n\r\n", "x".repeat(4000)).into_boxed_str());
    let (_agent, mut client) = before(endless(long, None).await).await;
    let response = client.request(&echo()).await.unwrap();
    assert_eq!((response.status(), error(&response).0.as_str()), (502, "bad_response"));
    assert!(response.interim.len() <= 16, "{}", response.interim.len());
}

/// The time runs to the head of the final response.
#[tokio::test]
async fn interim_responses_do_not_extend_first_byte_timeout() {
    let addr = endless("HTTP/1.1 103 Early Hints\r\n\r\n", Some(Duration::from_millis(20))).await;
    let agent = TestAgent::start(builtin_pool(&[addr]), SteeringMode::Off, |config| {
        config.timeouts.first_byte = Some(Duration::from_millis(500));
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&echo()).await.unwrap();
    assert_eq!((response.status(), error(&response).0.as_str()), (504, "first_byte_timeout"));
    assert!(!response.interim.is_empty());
    let response = Http2Client::connect(agent.addr).await.unwrap().request(&echo()).await.unwrap();
    assert_eq!((response.status(), error(&response).0.as_str()), (504, "first_byte_timeout"));
    assert!(!response.interim.is_empty());
}

/// More than the sockets between take. A client of HTTP/2 that reads nothing is sent no more, and loses its request.
#[tokio::test]
async fn untaken_interim_responses_end_http2_request() {
    let interim = format!("HTTP/1.1 103 Early Hints\r\nlink: {}\r\n\r\n", "x".repeat(15_000)).repeat(1000);
    let answer = format!("{interim}HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello");
    let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
    let agent = TestAgent::start(builtin_pool(&[endpoint.addr]), SteeringMode::Off, |config| {
        config.limits.head_bytes = 1 << 20;
        config.timeouts.idle = Some(Duration::from_millis(500));
    });
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", "/test/echo"), (":authority", "x")];
    let mut client = Http2Frames::connect(agent.addr).await.unwrap();
    client.send(&Frame::headers(1, true, &fields)).await.unwrap();
    eventually(SOON, || agent.count("penstock_requests_total", &["reason=\"client_gone\""]) == 1).await;
    // The same for a client that reads: all of it comes.
    let mut client = Http2Frames::connect(agent.addr).await.unwrap();
    client.send(&Frame::headers(1, true, &fields)).await.unwrap();
    let mut heads = 0;
    loop {
        let frame = client.find(|frame| frame.stream == 1).await.unwrap().expect("a frame of the stream");
        assert_ne!(frame.kind, kind::RST_STREAM);
        heads += u32::from(frame.kind == kind::HEADERS);
        if frame.flags & END_STREAM != 0 {
            break;
        }
    }
    assert_eq!(heads, 1001);
}

/// More than the sockets between take: the wait for room is longer than the idle timeout, and a client that reads slowly gets every head.
/// One that reads nothing loses its request.
#[tokio::test]
async fn slow_reader_of_interim_responses_gets_all_of_them() {
    const IDLE: Duration = Duration::from_secs(1);
    const HEADS: usize = 1000;
    let interim = format!("HTTP/1.1 103 Early Hints\r\nlink: {}\r\n\r\n", "x".repeat(15_000)).repeat(HEADS);
    let answer = format!("{interim}HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello");
    let endpoint = Endpoint::start(answer.as_bytes(), Then::Keep).await;
    let agent = TestAgent::start(builtin_pool(&[endpoint.addr]), SteeringMode::Off, |config| {
        config.limits.head_bytes = 1 << 20;
        config.timeouts.idle = Some(IDLE);
    });
    let connect = async || {
        let mut client = Client::connect_with(agent.addr, Some(16 << 10)).await.unwrap();
        client.send_raw(b"GET /test/echo HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        client.into_parts().0
    };
    let mut stream = connect().await;
    let (mut read, mut piece, begin) = (Vec::new(), [0; 3000], Instant::now());
    while begin.elapsed() < 5 * IDLE {
        let bytes = stream.read(&mut piece).await.unwrap();
        assert_ne!(bytes, 0, "cut after {} bytes and {:?}", read.len(), begin.elapsed());
        read.extend_from_slice(&piece[..bytes]);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    while !read.ends_with(b"hello") {
        assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0, "cut after {} bytes", read.len());
    }
    assert_eq!(String::from_utf8(read).unwrap().matches("HTTP/1.1 103 ").count(), HEADS);
    drop(stream);
    let _unread = connect().await;
    eventually(SOON, || agent.count("penstock_requests_total", &["reason=\"client_gone\""]) == 1).await;
    eventually(SOON, || agent.count("penstock_client_stalls_total", &[]) == 1).await;
}

/// While the client is waited for, the endpoint's time does not run.
#[tokio::test]
async fn slow_reader_of_interim_responses_does_not_exhaust_first_byte() {
    const LIMIT: Duration = Duration::from_secs(1);
    const HEADS: usize = 20;
    // Few heads fit into the send buffers.
    let namespace = Namespace::new().unwrap();
    namespace.set("net/ipv4/tcp_wmem", "4096 16384 16384").unwrap();
    let listener = namespace.run(|| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let endpoint = listener.local_addr().unwrap();
    let interim = format!("HTTP/1.1 103 Early Hints\r\nlink: {}\r\n\r\n", "x".repeat(15_000)).repeat(HEADS);
    let answer = format!("{interim}HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        std::io::Write::write_all(&mut stream, answer.as_bytes())?;
        std::io::copy(&mut stream, &mut std::io::sink())
    });
    let begin = || {
        TestAgent::start(builtin_pool(&[endpoint]), SteeringMode::Off, |config| {
            config.timeouts.first_byte = Some(LIMIT);
        })
    };
    let agent = namespace.run(begin).unwrap();
    let stream = namespace.run(|| std::net::TcpStream::connect(agent.addr)).unwrap().unwrap();
    socket2::SockRef::from(&stream).set_recv_buffer_size(8 << 10).unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut stream = tokio::net::TcpStream::from_std(stream).unwrap();
    stream.write_all(b"GET /test/echo HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let (mut read, mut piece, begin) = (Vec::new(), [0; 3000], Instant::now());
    while !read.ends_with(b"hello") {
        let bytes = stream.read(&mut piece).await.unwrap();
        assert_ne!(bytes, 0, "cut after {} bytes", read.len());
        read.extend_from_slice(&piece[..bytes]);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(begin.elapsed() > 3 * LIMIT, "not slow: {:?}", begin.elapsed());
    let text = String::from_utf8(read).unwrap();
    assert_eq!((text.matches("HTTP/1.1 103 ").count(), text.matches("HTTP/1.1 200 ").count()), (HEADS, 1));
}

/// The deadline may pass while a head is being written. Nothing may follow a part of a head: the connection ends instead.
#[tokio::test]
async fn deadline_inside_an_interim_response_ends_the_connection() {
    let interim = format!("HTTP/1.1 103 Early Hints\r\nlink: {}\r\n\r\n", "x".repeat(15_000)).repeat(1000);
    let endpoint = Endpoint::start(interim.as_bytes(), Then::Keep).await;
    let agent = TestAgent::start(builtin_pool(&[endpoint.addr]), SteeringMode::Off, |config| {
        config.limits.head_bytes = 1 << 20;
        // By then the client's buffers are full, also on a busy machine.
        config.timeouts.request = Some(Duration::from_secs(4));
    });
    let mut client = Client::connect_with(agent.addr, Some(2048)).await.unwrap();
    client.send_raw(b"GET /test/echo HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    eventually(SOON, || agent.count("penstock_requests_total", &["reason=\"request_timeout\""]) == 1).await;
    client.until_end().await.expect("the connection stays open");
    let read = client.surplus();
    let text = String::from_utf8_lossy(read);
    assert!(!text.contains("HTTP/1.1 504"), "a head inside another one");
}
