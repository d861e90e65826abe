//! Connections to endpoints that end at once, and what ends none of them.

use super::*;

/// An endpoint that answers each connection with these bytes, and then closes it or not. Counts the connections.
async fn answering(bytes: Vec<u8>, is_closed: bool) -> (std::net::SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::<AtomicU64>::default());
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut tcp, _)) = listener.accept().await {
            counted.fetch_add(1, Relaxed);
            let mut preface = [0; 24];
            let _ = tcp.read_exact(&mut preface).await;
            let _ = tcp.write_all(&bytes).await;
            if !is_closed {
                open.push(tcp);
            }
        }
    });
    (address, count)
}

#[tokio::test]
async fn endpoint_that_ends_new_connections_is_not_dialled_forever() {
    let settings = Frame::new(kind::SETTINGS, 0, 0, []).wire();
    let going = |error| [&settings[..], &Frame::new(kind::GOAWAY, 0, 0, [0, 0, 0, 0, 0, 0, 0, error]).wire()].concat();
    let rows = [
        ("draining", going(0), true),
        ("draining, still open", going(0), false),
        ("ENHANCE_YOUR_CALM", going(11), true),
        ("closed", settings.clone(), true),
    ];
    for (what, bytes, is_closed) in rows {
        let (address, connections) = answering(bytes, is_closed).await;
        let alone = agent(address, |config| config.pools[0].ejection.failures = 0);
        let response = Client::connect(alone.addr).await.unwrap().request(&plain("x")).await.unwrap();
        assert_eq!(response.status(), 502, "{what}: {}", response.text());
        assert!((1..=3).contains(&connections.load(Relaxed)), "{what}: {connections:?} connections");
        // Another endpoint of the pool answers, and this one is ejected.
        let good = server(Http2Options::default()).await;
        let pool = Pool { app_protocol: AppProtocol::H2c, ..builtin_pool(&[address, good.addr]) };
        let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
        for _ in 0..12 {
            let response = Client::connect(agent.addr).await.unwrap().request(&plain("x")).await.unwrap();
            assert_eq!(response.status(), 200, "{what}: {}", response.text());
        }
        assert_eq!(good.requests(), 12, "{what}");
        assert!(agent.count("penstock_ejections_total", &[]) >= 1, "{what}");
    }
}

/// What is wrong with one response ends its stream, however many there are on a connection.
#[tokio::test]
async fn malformed_responses_never_end_their_connection() {
    const WRONG: usize = 1200;
    let addr = scripted_endpoint(move |_, mut frames| async move {
        let mut seen = 0;
        while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
            seen += 1;
            // Less than the declared length.
            let block: &[u8] = if seen <= WRONG { &[0x88, 0x5c, 1, b'5'] } else { &[0x88] };
            frames.send(&Frame::new(kind::HEADERS, END_HEADERS | END_STREAM, head.stream, block)).await?;
        }
        Ok(())
    })
    .await;
    let agent = agent(addr, |config| config.pools[0].ejection.failures = 0);
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    for number in 0..WRONG {
        let response = client.request(&Request::get("/")).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (502, "bad_response"), "{number}");
    }
    assert_eq!(client.request(&Request::get("/")).await.unwrap().status(), 200);
    assert_eq!(agent.count("penstock_endpoint_connections_total", &["result=\"new\""]), 1);
}

/// Servers send one for each empty piece of a body.
#[tokio::test]
async fn empty_frames_within_responses_are_ignored() {
    let addr = scripted_endpoint(move |_, mut frames| async move {
        while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
            frames.send(&Frame::new(kind::HEADERS, END_HEADERS, head.stream, [0x88])).await?;
            for _ in 0..150 {
                frames.send(&Frame::new(kind::DATA, 0, head.stream, [])).await?;
                frames.send(&Frame::new(kind::DATA, 0, head.stream, *b"xy")).await?;
            }
            frames.send(&Frame::new(kind::DATA, END_STREAM, head.stream, [])).await?;
        }
        Ok(())
    })
    .await;
    let agent = agent(addr, |_| {});
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    for _ in 0..3 {
        let response = client.request(&Request::get("/")).await.unwrap();
        assert_eq!((response.status(), response.read.end, response.read.len), (200, BodyEnd::Complete, 300));
    }
    assert_eq!(agent.count("penstock_endpoint_connections_total", &["result=\"new\""]), 1);
}
