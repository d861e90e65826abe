//! Listeners whose connections begin with a PROXY header.

use std::time::Duration;

use penstock_agent::config::{Config, Forwarding, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, Http2Client, Plan,
    client::Pace,
    eventually,
    model_server::{Echo, Framing},
    stage::{echo, json},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    SOON,
    scene::{Back, Front, Scene, first},
};

const V1: &[u8] = b"PROXY TCP4 192.0.2.7 198.51.100.1 4660 443\r\n";
const V1_OF_6: &[u8] = b"PROXY TCP6 2001:db8::7 2001:db8::1 4660 443\r\n";
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x14\xc0\0\x02\x07\xc6\x33\x64\x01\x12\x34\x01\xbb\x04\0\x05notes";
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

async fn scene(front: Front, mode: SteeringMode, adjust: impl FnOnce(&mut Config)) -> Scene {
    Scene::with(front, Back::Http1, first, |config| {
        config.steering.mode = mode;
        config.headers.x_forwarded = Forwarding::Append;
        config.listen.proxy_protocol = true;
        if let Some(tls) = &mut config.listen.tls {
            tls.proxy_protocol = true;
        }
        adjust(config);
    })
    .await
}

/// A connection on which `bytes` have been sent, in pieces of this size.
async fn begin(scene: &Scene, bytes: &[u8], piece: usize) -> TcpStream {
    let mut stream = TcpStream::connect(scene.addr()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for piece in bytes.chunks(piece) {
        stream.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    stream
}

fn refused(scene: &Scene, reason: &str) -> u64 {
    scene.agent.count("penstock_proxy_headers_refused_total", &[&format!("reason=\"{reason}\"")])
}

async fn asked(scene: &Scene, front: Front, stream: TcpStream) -> Echo {
    let request = echo(json("m", 1000));
    let response = match front {
        Front::Http1 => Client::over(stream, scene.addr()).request(&request).await,
        Front::Http2 => {
            let mut settings = h2::client::Builder::new();
            let mut client = Http2Client::over(stream, "http", "agent.example", &mut settings).await.unwrap();
            client.request(&request).await
        }
        Front::Tls1 | Front::Tls2 => {
            let tls = scene.certificate.over(stream, &["http/1.1"]).await.unwrap();
            Client::over(tls, scene.addr()).request(&request).await
        }
    };
    response.unwrap().echoed()
}

#[tokio::test]
async fn announced_address_is_the_clients() {
    for front in [Front::Http1, Front::Http2, Front::Tls1] {
        let scene = scene(front, SteeringMode::Off, |_| {}).await;
        let rows = [(V1, "192.0.2.7"), (V1_OF_6, "2001:db8::7"), (V2, "192.0.2.7"), (LOCAL, "127.0.0.1")];
        for (header, expected) in rows {
            for piece in [1, 13, header.len()] {
                let stream = begin(&scene, header, piece).await;
                let seen = asked(&scene, front, stream).await;
                assert_eq!(seen.header("x-forwarded-for"), Some(expected), "{front:?} {header:x?} by {piece}");
            }
        }
        assert_eq!(scene.agent.count("penstock_proxy_headers_refused_total", &[]), 0);
    }
}

/// The header and the request may come in one segment; the kernel sees the connection afterwards.
#[tokio::test]
async fn responses_are_steered_after_a_header() {
    for mode in [SteeringMode::Ingress, SteeringMode::Local] {
        let scene = scene(Front::Http1, mode, |_| {}).await;
        let plan = Plan { size: 4 << 20, framing: Framing::Chunked, ..Plan::default() };
        let wire = [V2, &plan.request().wire("agent")].concat();
        let mut client = Client::over(begin(&scene, &wire, wire.len()).await, scene.addr());
        for number in 0..2 {
            if number > 0 {
                client.send(&plan.request()).await.unwrap();
            }
            assert_eq!(client.head().await.unwrap().status, 200);
            let mut checker = plan.checker();
            let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
            assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "{mode:?}");
        }
        assert!(scene.agent.steered() > 0, "{mode:?}");
    }
}

#[tokio::test]
async fn connection_without_a_valid_header_is_closed() {
    let scene = scene(Front::Tls1, SteeringMode::Off, |_| {}).await;
    let request = b"GET / HTTP/1.1\r\nhost: agent\r\n\r\n";
    let long = [b"PROXY UNKNOWN ", &[b'x'; 100][..], b"\r\n"].concat();
    let mut sum = V2.to_vec();
    sum.splice(15..16, [0x13]);
    sum.splice(28.., b"\x03\0\x04none".iter().copied());
    let rows: [(&[u8], &str); 6] = [
        (request, "absent"),
        (b"\x16\x03\x01\0\x05hello", "absent"),
        (b"PROXY TCP4 192.0.2.7 198.51.100.1 4660\r\n", "invalid"),
        (b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\0", "invalid"),
        (&long, "too_long"),
        (&sum, "checksum"),
    ];
    for (number, address) in [scene.agent.addr, scene.addr()].into_iter().enumerate() {
        for (bytes, reason) in rows {
            let before = refused(&scene, reason);
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            let mut got = Vec::new();
            let _ = stream.read_to_end(&mut got).await;
            assert_eq!(got, b"", "{reason}");
            eventually(SOON, || refused(&scene, reason) == before + 1).await;
        }
        let mut stream = begin(&scene, &V1[..20], 20).await;
        stream.shutdown().await.unwrap();
        eventually(SOON, || refused(&scene, "cut") == number as u64 + 1).await;
    }
    // A check of the port, which sends nothing.
    let mut stream = begin(&scene, b"", 1).await;
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(scene.agent.count("penstock_proxy_headers_refused_total", &[]), 14);
    assert_eq!(scene.endpoint.requests(), 0);
}

#[tokio::test]
async fn header_has_the_time_of_a_head() {
    let limit = Duration::from_millis(200);
    let scene = scene(Front::Http1, SteeringMode::Off, |config| config.timeouts.head = Some(limit)).await;
    for begun in [&b""[..], &V2[..15]] {
        let mut stream = begin(&scene, begun, 1).await;
        let mut got = Vec::new();
        let _ = stream.read_to_end(&mut got).await;
        assert_eq!(got, b"");
    }
    assert_eq!(refused(&scene, "timeout"), 2);
}
