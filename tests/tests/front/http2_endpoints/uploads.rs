//! Request bodies and trailers to HTTP/2 endpoints, and responses that do not wait for them.

use super::*;

/// The trailers that the endpoint is told to expect, each name once.
fn announced(echo: &Echo) -> Vec<&str> {
    let mut names: Vec<_> = echo.headers.iter().filter(|(name, _)| name == "trailer").collect();
    names.sort_unstable();
    names.into_iter().map(|(_, value)| value.as_str()).collect()
}

/// Client trailers reach the endpoint for every protocol pair, except those not allowed after a body. They are announced, whatever the
/// client said, because servers such as Go's drop others.
#[tokio::test]
async fn request_trailers_reach_endpoint() {
    let fields = [
        ("x-checksum", "1"),
        ("authorization", "evil"),
        ("x-checksum", "2"),
        ("x-gateway-destination-endpoint", "6.6.6.6:6"),
        ("x-size", "3"),
    ];
    let passed = [("x-checksum", "1"), ("x-checksum", "2"), ("x-size", "3")];
    let passed = passed.map(|(name, value)| (name.to_owned(), value.to_owned()));
    for back in [Back::Http1, Back::Http2] {
        let scene = Scene::with(Front::Http2, back, first, |_| {}).await;
        let mut client = Http2Client::connect(scene.agent.addr).await.unwrap();
        for length in [3, 200_000] {
            let head =
                client.head(&Request::new("POST", "/test/echo").header("trailer", "authorization, x-none")).unwrap();
            let mut stream = client.open(head, false).await.unwrap();
            let body = vec![b'a'; length];
            stream.data(body.clone()).await.unwrap();
            let trailers = fields.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            stream.finish(HeaderMap::from_iter(trailers)).unwrap();
            let seen = stream.response().await.unwrap().echoed();
            assert_eq!((seen.body_length, seen.body_hash), (length as u64, Fnv::of(&body).value()));
            assert_eq!((&seen.trailers[..], announced(&seen)), (&passed[..], vec!["x-checksum", "x-size"]), "{back:?}");
        }
        let request = plain("abc").header("trailer", "x-none");
        assert_eq!(announced(&client.request(&request).await.unwrap().echoed()), [""; 0], "{back:?}");
    }
    let scene = Scene::with(Front::Http1, Back::Http2, first, |_| {}).await;
    let mut client = Client::connect(scene.agent.addr).await.unwrap();
    let head = "POST /test/echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n";
    let trailers: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    client.send_raw(format!("{head}{trailers}\r\n").as_bytes()).await.unwrap();
    let seen = client.response().await.unwrap().echoed();
    assert_eq!((seen.body_length, announced(&seen)), (3, vec!["x-checksum", "x-size"]));
    assert_eq!(seen.trailers, passed);
}

/// The response is complete before the request: the rest of the request is not awaited.
#[tokio::test]
async fn early_response_does_not_wait_for_upload() {
    let addr = scripted_endpoint(|_, mut frames| async move {
        while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
            frames.send(&ok_head(head.stream)).await?;
            frames.send(&Frame::new(kind::RST_STREAM, 0, head.stream, [0; 4])).await?;
        }
        Ok(())
    })
    .await;
    let agent = agent(addr, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    for _ in 0..3 {
        // Larger than the endpoint's window.
        let response = client.request(&plain(vec![b'x'; 1 << 20])).await.unwrap();
        assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete));
    }
}

/// What an endpoint sees of the streams of its one connection: which are open, and with what error others were reset.
#[derive(Default)]
struct Seen {
    open: BTreeSet<u32>,
    resets: Vec<(u32, Option<u32>)>,
}

/// Whatever becomes of its request, a stream ends: the endpoint need not make room for it.
#[tokio::test]
async fn upload_that_gets_no_window_is_reset() {
    const NO_ERROR: u32 = 0;
    const CANCEL: u32 = 8;
    let seen = Arc::<Mutex<Seen>>::default();
    let shared = Arc::clone(&seen);
    let accepted = Arc::<AtomicU64>::default();
    let connections = Arc::clone(&accepted);
    // Opens no window. Answers what has no body, and the fourth upload at once.
    let addr = scripted_endpoint(move |_, mut frames| {
        let seen = Arc::clone(&shared);
        connections.fetch_add(1, Relaxed);
        async move {
            while let Some(frame) = frames.next().await? {
                match frame.kind {
                    kind::HEADERS if frame.flags & END_STREAM != 0 => frames.send(&ok_head(frame.stream)).await?,
                    kind::HEADERS => {
                        seen.lock().open.insert(frame.stream);
                        if frame.stream == 7 {
                            frames.send(&ok_head(frame.stream)).await?;
                        }
                    }
                    kind::RST_STREAM => {
                        let mut seen = seen.lock();
                        seen.open.remove(&frame.stream);
                        seen.resets.push((frame.stream, frame.error()));
                    }
                    _ => {}
                }
            }
            Ok(())
        }
    })
    .await;
    let agent = agent(addr, |config| {
        config.listen.workers = 1;
        config.timeouts.idle = Some(Duration::from_millis(400));
        config.pools[0].ejection.failures = 0;
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    // More than the windows of stream and connection take.
    let upload = echo(json("m", 200_000));
    for streams in 1..=3 {
        let response = client.request(&upload).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (504, "request_stalled"));
        eventually(SOON, || seen.lock().resets.len() == streams).await;
    }
    assert_eq!(client.request(&upload).await.unwrap().status(), 200);
    eventually(SOON, || seen.lock().resets.len() == 4).await;
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
    let seen = seen.lock();
    let resets = [1, 3, 5].map(|stream| (stream, Some(CANCEL)));
    assert_eq!(seen.resets, [&resets[..], &[(7, Some(NO_ERROR))]].concat());
    assert!(seen.open.is_empty(), "{:?}", seen.open);
    assert_eq!(accepted.load(Relaxed), 1);
}

/// RST_STREAM with NO_ERROR ends a request whose response is complete (RFC 9113 §8.1). Before the end of the response it cuts it, like
/// any reset.
#[tokio::test]
async fn response_reset_without_error_before_its_end_is_broken() {
    const NO_ERROR: u32 = 0;
    for length in [None, Some("10")] {
        let addr = scripted_endpoint(move |_, mut frames| async move {
            while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
                let mut fields = vec![(":status", "200")];
                fields.extend(length.map(|length| ("content-length", length)));
                frames.send(&Frame::headers(head.stream, false, &fields)).await?;
                frames.send(&Frame::new(kind::DATA, 0, head.stream, *b"hello")).await?;
                frames.send(&Frame::reset(head.stream, NO_ERROR)).await?;
            }
            Ok(())
        })
        .await;
        let agent = agent(addr, |_| {});
        let mut client = Client::connect(agent.addr).await.unwrap();
        let end = client.request(&Request::get("/test/echo")).await.map(|response| response.read.end);
        assert!(!matches!(end, Ok(BodyEnd::Complete)), "HTTP/1.1, {length:?}");
        let mut client = Http2Client::connect(agent.addr).await.unwrap();
        let end = client.request(&Request::get("/test/echo")).await.map(|response| response.read.end);
        assert!(!matches!(end, Ok(BodyEnd::Complete)), "HTTP/2, {length:?}");
    }
}

/// The request is not sent whole, and the response is: as over HTTP/1.1.
#[tokio::test]
async fn response_continues_when_its_upload_stalls() {
    const PIECES: u8 = 8;
    let addr = scripted_endpoint(|_, mut frames| async move {
        // Opens no window for the upload.
        while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
            frames.send(&Frame::headers(head.stream, false, &[(":status", "200")])).await?;
            for number in 1..=PIECES {
                tokio::time::sleep(Duration::from_millis(150)).await;
                let flags = if number == PIECES { END_STREAM } else { 0 };
                frames.send(&Frame::new(kind::DATA, flags, head.stream, [number])).await?;
            }
        }
        Ok(())
    })
    .await;
    let agent = agent(addr, |config| config.timeouts.idle = Some(Duration::from_millis(400)));
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&echo(json("m", 200_000))).await.unwrap();
    assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete));
    assert_eq!(response.body, (1..=PIECES).collect::<Vec<_>>());
}
