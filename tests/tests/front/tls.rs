//! TLS clients: handshake, protocol negotiation and certificate reloads.

use std::{pin::pin, time::Duration};

use penstock_agent::config::{Config, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, Http2Client, Plan, Request,
    client::ConnectionEnd,
    eventually,
    model_server::{Framing, Lengths, Pauses},
    stage::{echo, json},
    tls::Certificate,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    SOON,
    scene::{Back, Front, Scene, first},
};

async fn scene() -> Scene {
    Scene::new(Front::Tls1, Back::Http1).await
}

fn agreed(tls: &penstock_tests::tls::TlsStream<TcpStream>) -> Option<&[u8]> {
    tls.get_ref().1.alpn_protocol()
}

/// The server prefers HTTP/2; a client without ALPN speaks HTTP/1.1.
#[tokio::test]
async fn alpn_selects_protocol() {
    let scene = scene().await;
    let rows: [(&[&str], Option<&str>); 4] =
        [(&["http/1.1", "h2"], Some("h2")), (&["h2"], Some("h2")), (&["http/1.1"], Some("http/1.1")), (&[], None)];
    for (offered, expected) in rows {
        let tls = scene.certificate.connect(scene.addr(), offered).await.unwrap();
        assert_eq!(agreed(&tls), expected.map(str::as_bytes));
        let request = echo(json("m", 1000));
        let response = if expected == Some("h2") {
            let mut settings = h2::client::Builder::new();
            let mut client = Http2Client::over(tls, "https", "agent.example", &mut settings).await.unwrap();
            client.request(&request).await.unwrap()
        } else {
            Client::over(tls, scene.addr()).request(&request).await.unwrap()
        };
        assert_eq!(response.echoed().header("x-forwarded-proto"), Some("https"));
    }
    assert!(scene.certificate.connect(scene.addr(), &["spdy/3"]).await.is_err());
    eventually(SOON, || scene.agent.count("penstock_tls_handshakes_failed_total", &["reason=\"refused\""]) == 1).await;
}

#[tokio::test]
async fn alpn_with_http2_disabled_omits_http2() {
    let off = |config: &mut Config| config.listen.http2_max_streams = 0;
    let scene = Scene::with(Front::Tls1, Back::Http1, first, off).await;
    let tls = scene.certificate.connect(scene.addr(), &["h2", "http/1.1"]).await.unwrap();
    assert_eq!(agreed(&tls), Some(&b"http/1.1"[..]));
    assert!(scene.certificate.connect(scene.addr(), &["h2"]).await.is_err());
}

/// HTTP/2 needs ALPN: a preface without it is rejected.
#[tokio::test]
async fn preface_after_http1_alpn_is_rejected() {
    let scene = scene().await;
    let tls = scene.certificate.connect(scene.addr(), &["http/1.1"]).await.unwrap();
    let mut client = Client::over(tls, scene.addr());
    client.send_raw(penstock_tests::http2_frames::PREFACE).await.unwrap();
    assert_eq!(client.response().await.unwrap().status(), 505);
}

/// Every client gets the one certificate, with any server name or none.
#[tokio::test]
async fn any_server_name_gets_the_certificate() {
    let scene = scene().await;
    for name in ["agent.example", "other.example", "127.0.0.1"] {
        let tls = scene.certificate.connect_as(scene.addr(), name, &[]).await.unwrap();
        let mut client = Client::over(tls, scene.addr());
        assert_eq!(client.request(&echo(json("m", 10))).await.unwrap().status(), 200);
    }
}

/// New connections get the new certificate; existing ones are unaffected.
#[tokio::test]
async fn changed_certificate_is_reloaded() {
    let scene = scene().await;
    let mut old = scene.client().await;
    let plan = Plan { size: 16 << 20, ..Plan::default() };
    old.send(&plan.request()).await.unwrap();
    assert_eq!(old.head().await.unwrap().status, 200);
    // A half-written change is ignored.
    let (cert, key) = (scene.folder().join("cert.pem"), scene.folder().join("key.pem"));
    let before = std::fs::read(&cert).unwrap();
    std::fs::write(&cert, "no certificate").unwrap();
    std::fs::remove_file(&key).unwrap();
    scene.certificate.connect(scene.addr(), &[]).await.unwrap();
    let new = Certificate::new("agent.example").unwrap();
    new.write(scene.folder()).unwrap();
    assert_ne!(std::fs::read(&cert).unwrap(), before);
    let begin = std::time::Instant::now();
    while new.connect(scene.addr(), &[]).await.is_err() {
        assert!(begin.elapsed() < SOON, "the new certificate was not presented");
    }
    assert!(scene.certificate.connect(scene.addr(), &[]).await.is_err());
    let mut checker = plan.checker();
    let read = old.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    assert_eq!(old.request(&echo(json("m", 10))).await.unwrap().status(), 200);
}

/// TLS on the plain port and plain bytes on the TLS port end only their own connection.
#[tokio::test]
async fn protocol_mismatch_ends_only_its_connection() {
    let scene = scene().await;
    let mut running = scene.client().await;
    let plan = Plan { size: 16 << 20, ..Plan::default() };
    running.send(&plan.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    let wires: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        penstock_tests::http2_frames::PREFACE,
        &[0; 64],
        b"\x16\x03\x01\xff\xff",
    ];
    for wire in wires {
        let mut client = Client::connect(scene.addr()).await.unwrap();
        client.send_raw(wire).await.unwrap();
        client.finish().await.unwrap();
        client.until_end().await.unwrap();
        assert!(!client.surplus().starts_with(b"HTTP/"));
    }
    eventually(SOON, || scene.agent.count("penstock_tls_handshakes_failed_total", &[]) == 4).await;
    assert!(scene.certificate.connect(scene.agent.addr, &[]).await.is_err());
    let mut checker = plan.checker();
    let read = running.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size));
    assert_eq!(scene.endpoint.requests(), 1);
}

#[tokio::test]
async fn stalled_handshake_is_closed() {
    let soon = |config: &mut Config| config.timeouts.head = Some(Duration::from_secs(1));
    let scene = Scene::with(Front::Tls1, Back::Http1, first, soon).await;
    for begin in [&b""[..], b"\x16\x03\x01\x02\x00\x01"] {
        let mut client = Client::connect(scene.addr()).await.unwrap();
        client.send_raw(begin).await.unwrap();
        client.until_end().await.unwrap();
    }
    let timed_out = || scene.agent.count("penstock_tls_handshakes_failed_total", &["reason=\"timeout\""]);
    eventually(SOON, || timed_out() == 2).await;
    // A slow head over TLS times out too.
    let tls = scene.certificate.connect(scene.addr(), &[]).await.unwrap();
    let mut client = Client::over(tls, scene.addr());
    client.send_raw(b"GET / HTTP/1.1\r\n").await.unwrap();
    assert_eq!(client.response().await.unwrap().status(), 408);
}

/// close_notify lets the client tell the end from a truncation attack.
#[tokio::test]
async fn connections_end_with_close_notify() {
    let soon = |config: &mut Config| config.timeouts.keep_alive = Some(Duration::from_secs(1));
    let scene = Scene::with(Front::Tls1, Back::Http1, first, soon).await;
    for request in [Request::get("/test/echo"), Request::get("/test/echo").header("connection", "close")] {
        let tls = scene.certificate.connect(scene.addr(), &[]).await.unwrap();
        let mut client = Client::over(tls, scene.addr());
        assert_eq!(client.request(&request).await.unwrap().status(), 200);
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    }
}

/// A body delimited by close must not look complete.
#[tokio::test]
async fn forced_shutdown_sends_no_close_notify() {
    let scene = scene().await;
    let pauses = Some(Pauses { seed: 1, every: 1, up_to_us: 1000 });
    let plan =
        Plan { framing: Framing::UntilClose, size: 1 << 30, writes: Lengths::Fixed(1000), pauses, ..Plan::default() };
    let mut client = scene.client().await;
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    client.piece().await.unwrap();
    scene.agent.agent.force();
    assert_eq!(client.read_body(|_| Ok(())).await.unwrap().end, BodyEnd::Reset);
}

/// The drain closes both listeners.
#[tokio::test]
async fn drain_closes_tls_port() {
    let scene = scene().await;
    let mut tls = scene.certificate.connect(scene.addr(), &["http/1.1"]).await.unwrap();
    scene.agent.agent.drain();
    let mut rest = Vec::new();
    timeout(SOON, tls.read_to_end(&mut rest)).await.expect("timed out").unwrap();
    assert!(rest.is_empty());
    eventually(SOON, || std::net::TcpStream::connect(scene.addr()).is_err()).await;
    eventually(SOON, || scene.agent.agent.is_done()).await;
}

/// The kernel would send plain bytes, so TLS responses are relayed while plain ones are steered.
#[tokio::test]
async fn tls_responses_are_relayed() {
    let ingress = |config: &mut Config| config.steering.mode = SteeringMode::Ingress;
    let scene = Scene::with(Front::Tls1, Back::Http1, first, ingress).await;
    let pauses = Some(Pauses { seed: 1, every: 5, up_to_us: 2000 });
    let plan = Plan { size: 500_000, writes: Lengths::Fixed(10_000), pauses, ..Plan::default() };
    let mut clients = (scene.client().await, Client::connect(scene.agent.addr).await.unwrap());
    for _ in 0..3 {
        for response in
            [clients.0.request(&plan.request()).await.unwrap(), clients.1.request(&plan.request()).await.unwrap()]
        {
            plan.checker().feed(&response.body).unwrap();
            assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, plan.size));
        }
    }
    let flows = |labels: &[&str]| scene.agent.count("penstock_flows_total", labels);
    eventually(SOON, || flows(&["path=\"relay\"", "reason=\"tls\""]) == 3).await;
    eventually(SOON, || scene.agent.steered() > 0).await;
}

/// One of two places is held by a client that stops within its handshake. Silent clients hold no place, and further clients
/// wait for at most the handshake timeout.
#[tokio::test]
async fn handshakes_over_limit_wait_for_a_place() {
    let scene = Scene::with(Front::Tls1, Back::Http1, first, |config: &mut Config| {
        config.listen.tls_handshakes = 2;
        config.timeouts.head = Some(Duration::from_secs(60));
    })
    .await;
    let active = || scene.agent.metric("penstock_tls_handshakes_active", &[]);
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(TcpStream::connect(scene.addr()).await.unwrap());
    }
    let mut half = Vec::new();
    for places in [1.0, 2.0] {
        let mut stream = TcpStream::connect(scene.addr()).await.unwrap();
        // The head of a record without the rest.
        stream.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
        eventually(SOON, || active() == places).await;
        half.push(stream);
        if places == 1.0 {
            let mut client = Client::over(scene.certificate.connect(scene.addr(), &[]).await.unwrap(), scene.addr());
            assert_eq!(client.request(&echo(json("m", 10))).await.unwrap().status(), 200);
        }
    }
    let mut waits = pin!(scene.certificate.connect(scene.addr(), &[]));
    assert!(timeout(Duration::from_millis(200), waits.as_mut()).await.is_err(), "it got a third place");
    // One client leaves.
    drop(half.pop());
    let mut client = Client::over(timeout(SOON, waits).await.expect("timed out").unwrap(), scene.addr());
    assert_eq!(client.request(&echo(json("m", 10))).await.unwrap().status(), 200);
}

/// The handshake timeout runs from the connect; the only place is held by a client that connected later.
#[tokio::test]
async fn handshake_without_place_in_time_is_closed_as_busy() {
    let scene = Scene::with(Front::Tls1, Back::Http1, first, |config: &mut Config| {
        config.listen.workers = 1;
        config.listen.tls_handshakes = 1;
        config.timeouts.head = Some(Duration::from_secs(3));
    })
    .await;
    let failed = |reason| scene.agent.count("penstock_tls_handshakes_failed_total", &[reason]);
    let mut early = TcpStream::connect(scene.addr()).await.unwrap();
    eventually(SOON, || scene.agent.metric("penstock_client_connections", &[]) == 1.0).await;
    // The handshake that holds the place times out this much later.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut late = TcpStream::connect(scene.addr()).await.unwrap();
    late.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
    eventually(SOON, || scene.agent.metric("penstock_tls_handshakes_active", &[]) == 1.0).await;
    early.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
    eventually(SOON, || failed("reason=\"busy\"") == 1).await;
    let end = timeout(SOON, early.read(&mut [0; 64])).await.expect("timed out");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    // The place is free once the other handshake is over.
    let mut client = Client::over(scene.certificate.connect(scene.addr(), &[]).await.unwrap(), scene.addr());
    assert_eq!(client.request(&echo(json("m", 10))).await.unwrap().status(), 200);
    assert_eq!((failed("reason=\"busy\""), failed("reason=\"timeout\"")), (1, 1));
}

/// A silent client, and one that stops within its handshake.
#[tokio::test]
async fn handshakes_over_timeout_are_closed() {
    let soon = |config: &mut Config| config.timeouts.head = Some(Duration::from_millis(300));
    let scene = Scene::with(Front::Tls1, Back::Http1, first, soon).await;
    let mut streams = Vec::new();
    for said in [&[][..], &[22, 3, 1, 2, 0, 1]] {
        let mut stream = TcpStream::connect(scene.addr()).await.unwrap();
        stream.write_all(said).await.unwrap();
        streams.push(stream);
    }
    let failed = || scene.agent.count("penstock_tls_handshakes_failed_total", &["reason=\"timeout\""]);
    eventually(SOON, || failed() == 2).await;
    for mut stream in streams {
        let end = timeout(SOON, stream.read(&mut [0; 64])).await.expect("timed out");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
    assert_eq!(scene.agent.metric("penstock_tls_handshakes_active", &[]), 0.0);
}
