//! How a switched connection ends other than by an orderly close: resets, evictions, the idle timeout, and the agent's drain.

use super::*;

/// A reset is not an orderly close: the other side sees a reset too.
#[tokio::test]
async fn reset_is_forwarded() {
    for mode in MODES {
        resets(&scene((Front::Http1, mode)).await).await;
    }
}

async fn resets(scene: &Scene) {
    let fault = Some(Fault { after: 500, kind: FaultKind::Reset });
    let plan = Plan { size: 1000, stream_id: 1, fault, ..Plan::switching("websocket", Upgraded::Send) };
    let (mut client, _) = Switched::new(scene, &switch(&plan), b"").await;
    assert_eq!(client.rest().await.1, ConnectionEnd::Reset);
    eventually(SOON, || scene.agent.count("penstock_requests_total", &["reason=\"endpoint_broke\""]) == 1).await;
    eventually(SOON, || scene.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
    eventually(SOON, || server(scene).connections_open() == 0).await;
    // Whether the endpoint has started reading by then is not determined.
    let (before, aborted) = (server(scene).received().len(), server(scene).aborted());

    let plan = Plan::switching("websocket", Upgraded::Echo);
    let mut client = Client::connect(scene.agent.addr).await.unwrap();
    client.send(&switch(&plan)).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 101);
    client.reset().unwrap();
    eventually(SOON, || server(scene).aborted() > aborted).await;
    assert!(server(scene).received()[before..].iter().all(|received| received.end == ConnectionEnd::Reset));
    eventually(SOON, || scene.agent.count("penstock_client_aborts_total", &[]) == 1).await;
    eventually(SOON, || server(scene).connections_open() == 0).await;
    eventually(SOON, || scene.epp.streams_ended(StreamEnd::Cancelled) == 2).await;
}

/// TLS cut off without close_notify is not an orderly close.
#[tokio::test]
async fn tls_cut_without_close_notify_is_a_reset() {
    let scene = scene((Front::Tls1, SteeringMode::Auto)).await;
    let (client, _) = Switched::new(&scene, &switch(&Plan::switching("websocket", Upgraded::Echo)), b"").await;
    drop(client);
    eventually(SOON, || server(&scene).received().len() == 1).await;
    assert_eq!(server(&scene).received()[0].end, ConnectionEnd::Reset);
    let fault = Some(Fault { after: 500, kind: FaultKind::Reset });
    let plan = Plan { size: 1000, fault, ..Plan::switching("websocket", Upgraded::Send) };
    let (mut client, _) = Switched::new(&scene, &switch(&plan), b"").await;
    assert_eq!(client.rest().await.1, ConnectionEnd::Reset);
}

/// The eviction breaks off both sides, and what had passed until then is booked.
#[tokio::test]
async fn eviction_breaks_off_both_sides() {
    for way in WAYS {
        let now = Arc::new(Notify::new());
        let script = |all: &[_]| Evicting {
            inner: LlmdRouter::new(all),
            after: EvictAfter::ResponseHead,
            now: Arc::clone(&now),
        };
        let scene = Scene::with(way.0, Back::Http1, script, |config| config.steering.mode = way.1).await;
        let plan = Plan::switching("websocket", Upgraded::Echo);
        let (mut client, _) = Switched::new(&scene, &switch(&plan), b"").await;
        for number in 0..50 {
            let bytes = Alphabet::Binary.bytes(number, 0, 1000);
            client.send(&bytes).await;
            assert_eq!(client.read(1000).await, bytes);
        }
        now.notify_one();
        let end = client.rest().await.1;
        assert!(end == ConnectionEnd::Reset || way.0 == Front::Tls1, "{way:?}: {end:?}");
        eventually(SOON, || server(&scene).received().len() == 1).await;
        assert_eq!(server(&scene).received()[0].end, ConnectionEnd::Reset, "{way:?}");
        assert_eq!(scene.agent.metric("penstock_evictions_total", &[]), 1.0);
        eventually(SOON, || scene.agent.count("penstock_requests_total", &["reason=\"evicted\""]) == 1).await;
        assert_eq!(scene.agent.count("penstock_upstream_bytes_total", &[]), 50_000, "{way:?}");
        assert_eq!(scene.agent.count("penstock_body_bytes_total", &[]), 50_000, "{way:?}");
    }
}

/// The idle timeout covers both directions; the total timeout does not apply.
#[tokio::test]
async fn tunnel_closes_after_idle_timeout() {
    for mode in MODES {
        check_idle_timeout(mode).await;
    }
}

async fn check_idle_timeout(mode: SteeringMode) {
    let scene = Scene::with(Front::Http1, Back::Http1, first, |config| {
        config.steering.mode = mode;
        config.timeouts.idle = Some(Duration::from_secs(2));
        config.timeouts.request = Some(Duration::from_millis(500));
    })
    .await;
    // Only the endpoint sends.
    let pauses = Some(Pauses { seed: 1, every: 1, up_to_us: 100_000 });
    let plan =
        Plan { size: 20_000, writes: Lengths::Fixed(1000), pauses, ..Plan::switching("websocket", Upgraded::Send) };
    let (mut client, early) = Switched::new(&scene, &switch(&plan), b"").await;
    let (rest, end) = client.rest().await;
    assert_eq!((early.len() + rest.len(), end), (20_000, ConnectionEnd::Fin));
    drop(client);
    // Both sides send, then neither.
    let (mut client, _) = Switched::new(&scene, &switch(&Plan::switching("websocket", Upgraded::Echo)), b"").await;
    for _ in 0..3 {
        client.send(b"x").await;
        assert_eq!(client.read(1).await, b"x");
    }
    assert_eq!(client.rest().await.1, ConnectionEnd::Reset);
    eventually(SOON, || scene.agent.count("penstock_requests_total", &["reason=\"idle_timeout\""]) == 1).await;
    eventually(SOON, || server(&scene).connections_open() == 0).await;
}

/// The drain leaves the tunnel open until the drain timeout.
#[tokio::test]
async fn drain_waits_for_tunnel_and_force_ends_it() {
    let scene = scene(STEERED).await;
    let plan = Plan::switching("websocket", Upgraded::Echo);
    let (mut one, _) = Switched::new(&scene, &switch(&plan), b"").await;
    let (mut two, _) = Switched::new(&scene, &switch(&plan), b"").await;
    scene.agent.agent.drain();
    eventually(SOON, || std::net::TcpStream::connect(scene.agent.addr).is_err()).await;
    for client in [&mut one, &mut two] {
        client.send(b"still here").await;
        assert_eq!(client.read(10).await, b"still here");
    }
    one.to.shutdown().await.unwrap();
    assert_eq!(one.rest().await, (Vec::new(), ConnectionEnd::Fin));
    assert!(!scene.agent.agent.is_done());
    scene.agent.agent.force();
    assert_eq!(two.rest().await.1, ConnectionEnd::Reset);
    eventually(SOON, || scene.agent.agent.is_done()).await;
    eventually(SOON, || server(&scene).connections_open() == 0).await;
}
