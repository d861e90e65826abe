//! Exchanges that behave the same for every protocol pair.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_agent::config::{BodyToPicker, PathPattern, Route};
use penstock_tests::{
    Alphabet, BodyEnd, Plan, Request,
    client::Piece,
    content::Fnv,
    eventually,
    model_server::{Echo, Fault, FaultKind, Framing, Lengths},
    scripted_epp::{Answering, EvictAfter, Evicting, LlmdRouter, StreamEnd, header, reply},
    stage::{echo, epp, json},
};
use tokio::sync::Notify;

use crate::{
    SOON,
    scene::{Asker, Back, Front, Scene, first},
};

/// Asserts that the payload of a planned response has the planned bytes and length.
fn assert_planned(plan: &Plan, body: &[u8]) {
    let mut checker = plan.checker();
    checker.feed(body).unwrap();
    assert_eq!(checker.offset(), plan.size);
}

/// The host that the endpoint received.
fn host(seen: &Echo) -> &str {
    seen.header(":authority").or(seen.header("host")).unwrap()
}

/// Reads at least this many bytes of a body.
async fn read_at_least(client: &mut Asker, plan: &Plan, bytes: u64) {
    let mut checker = plan.checker();
    while checker.offset() < bytes {
        let Piece::Data(data) = client.piece().await.unwrap() else { panic!("ended at {}", checker.offset()) };
        checker.feed(&data).unwrap();
    }
}

pub(crate) async fn request_without_body_is_served(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let response = scene.request(&Request::get("/test/echo?a=1&b=%20")).await;
    let seen = response.echoed();
    assert_eq!((seen.method.as_str(), seen.target.as_str()), ("GET", "/test/echo?a=1&b=%20"));
    assert_eq!((seen.body_framing.as_str(), seen.body_length), ("none", 0));
    assert_eq!(response.served_by(), Some(scene.endpoint.named()));
    eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
    assert!(!scene.epp.streams()[0].kinds().contains(&"request_body"));
}

/// The picker sees the body and its model and changes it; the endpoint gets the changed body.
pub(crate) async fn json_changed_by_picker_reaches_endpoint(front: Front, back: Back) {
    let rewriting = |all: &[_]| LlmdRouter::new(all).rewriting("a-model-with-a-much-longer-name");
    let scene = Scene::with(front, back, rewriting, |_| {}).await;
    let mut client = scene.client().await;
    for (stream, length) in [10, 300_000, 3_000_000].into_iter().enumerate() {
        let body = json("llama", length);
        let seen = client.request(&echo(body.clone())).await.unwrap().echoed();
        let expected = json_of(&body, "a-model-with-a-much-longer-name");
        assert_eq!((seen.body_length, seen.body_hash), (expected.len() as u64, Fnv::of(&expected).value()));
        assert_eq!(seen.header("content-length"), Some(expected.len().to_string().as_str()));
        assert_eq!(seen.header("x-gateway-model-name"), Some("llama"));
        let told = &scene.epp.streams()[stream];
        assert!(told.request_body() == (body, 1), "{length}");
        assert_eq!(header(&told.request_headers(), ":path"), Some("/test/echo"));
        assert_eq!(header(&told.request_headers(), "x-gateway-model-name"), Some("llama"));
        eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == stream + 1).await;
        assert_eq!(scene.epp.streams()[stream].served(), Some(scene.endpoint.addr().to_string()));
    }
}

/// The picker gets the beginning of a long body; the endpoint gets all of it, under the picker's model.
pub(crate) async fn model_is_changed_in_body_that_picker_got_abridged(front: Front, back: Back) {
    const LIMIT: usize = 64 << 10;
    let rewriting = |all: &[_]| LlmdRouter::new(all).rewriting("a-model-with-a-much-longer-name");
    let scene = Scene::with(front, back, rewriting, |config| epp(config).body_to_picker = BodyToPicker::Abridged).await;
    let mut client = scene.client().await;
    for (stream, length) in [10, 300_000, 3_000_000].into_iter().enumerate() {
        let body = json("llama", length);
        let seen = client.request(&echo(body.clone())).await.unwrap().echoed();
        let expected = json_of(&body, "a-model-with-a-much-longer-name");
        assert_eq!((seen.body_length, seen.body_hash), (expected.len() as u64, Fnv::of(&expected).value()));
        assert_eq!(seen.header("content-length"), Some(expected.len().to_string().as_str()));
        assert_eq!(seen.header("x-penstock-body-length"), None);
        let told = &scene.epp.streams()[stream];
        let (text, ends) = told.request_body();
        assert!(body.starts_with(&text[..text.len() - 2]) && ends == 1, "{length}");
        assert!(text.len() == body.len() || (LIMIT..LIMIT + 200).contains(&text.len()), "{}", text.len());
        let whole = header(&told.request_headers(), "x-penstock-body-length").map(str::to_owned);
        assert_eq!(whole, (body.len() > LIMIT).then(|| body.len().to_string()));
    }
    assert_eq!(scene.epp.streams_started(), 3);
}

fn json_of(body: &[u8], model: &str) -> Vec<u8> {
    let mut body: serde_json::Value = serde_json::from_slice(body).unwrap();
    body["model"] = model.into();
    body.to_string().into_bytes()
}

pub(crate) async fn twenty_mebibytes_pass_each_way(front: Front, back: Back) {
    let scene = Scene::with(front, back, first, |_| {}).await;
    let mut client = scene.client().await;
    let body = Alphabet::Binary.bytes(3, 0, 20 << 20);
    let hash = Fnv::of(&body).value();
    let kind = "application/octet-stream";
    let seen = client.request(&Request::post("/test/echo", body).header("content-type", kind)).await.unwrap().echoed();
    assert_eq!((seen.body_length, seen.body_hash), (20 << 20, hash));
    for framing in [Framing::ContentLength, Framing::Chunked] {
        let chunks = Lengths::Random { seed: 1, max: 40_000 };
        let plan = Plan { size: 20 << 20, stream_id: 4, framing, chunks, ..Plan::default() };
        let response = client.request(&plan.request()).await.unwrap();
        assert_eq!(response.read.end, BodyEnd::Complete);
        assert_planned(&plan, &response.body);
    }
}

/// An upload of unknown length with pauses: the endpoint gets it with a Content-Length.
pub(crate) async fn upload_in_pieces_arrives_with_length(front: Front, back: Back) {
    let scene = Scene::with(front, back, first, |_| {}).await;
    let mut client = scene.client().await;
    let body = Alphabet::Binary.bytes(5, 0, 100_000);
    let hash = Fnv::of(&body).value();
    let request = Request::new("POST", "/test/echo").chunked(body, 7000).piecewise(9000, Duration::from_millis(1));
    let seen = client.request(&request).await.unwrap().echoed();
    assert_eq!((seen.body_length, seen.body_hash), (100_000, hash));
    assert_eq!((seen.body_framing.as_str(), seen.header("content-length")), ("content-length", Some("100000")));
    let empty = client.request(&Request::post("/test/echo", "")).await.unwrap().echoed();
    assert_eq!(empty.body_length, 0);
}

/// Nothing is held back: the endpoint sends no more until the client has received everything sent so far.
pub(crate) async fn events_arrive_as_they_are_sent(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let mut client = scene.client().await;
    // Chunk-size lines count too.
    let fault = Some(Fault { after: 1500, kind: FaultKind::Stall });
    let headers = vec![("content-type".to_owned(), "text/event-stream".to_owned())];
    let plan = Plan {
        framing: Framing::Chunked,
        size: 1 << 30,
        chunks: Lengths::Fixed(100),
        headers,
        fault,
        ..Plan::default()
    };
    client.send(&plan.request()).await.unwrap();
    let head = client.head().await.unwrap();
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    assert_eq!(head.header("content-length"), None);
    read_at_least(&mut client, &plan, 1300).await;
    assert_eq!(scene.endpoint.aborted(), 0);
}

/// A model may take long before its first byte; the response head is forwarded at once.
pub(crate) async fn response_head_does_not_wait_for_body(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let fault = Some(Fault { after: 0, kind: FaultKind::Stall });
    for framing in [Framing::ContentLength, Framing::Chunked] {
        let plan = Plan { framing, size: 1000, fault, ..Plan::default() };
        let mut client = scene.client().await;
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200, "{framing:?}");
    }
}

pub(crate) async fn lengths_and_trailers_are_kept(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let mut client = scene.client().await;
    let plan = Plan { size: 12_345, ..Plan::default() };
    let response = client.request(&plan.request()).await.unwrap();
    assert_eq!(response.header("content-length"), Some("12345"));
    assert_planned(&plan, &response.body);

    let trailers = [("x-checksum", "abc"), ("x-twice", "1"), ("x-twice", "2")];
    let trailers: Vec<_> = trailers.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let hidden = [("content-length", "5"), ("host", "elsewhere")];
    let sent = match back {
        // Fields that would change the message's meaning are not allowed as trailers.
        Back::Http1 | Back::Https => {
            trailers.iter().cloned().chain(hidden.map(|(n, v)| (n.to_owned(), v.to_owned()))).collect()
        }
        Back::Http2 => trailers.clone(),
    };
    for size in [0, 3000] {
        let plan = Plan { framing: Framing::Chunked, size, trailers: sent.clone(), ..Plan::default() };
        let response = client.request(&plan.request()).await.unwrap();
        assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete));
        assert_planned(&plan, &response.body);
        // HTTP/1.1 on both sides: bytes are forwarded unchanged.
        if front.is_http2() || back == Back::Http2 {
            assert_eq!(response.read.trailers, trailers);
        }
    }
    eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 3).await;
}

pub(crate) async fn bodiless_heads_keep_their_length(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let mut client = scene.client().await;
    let plan = Plan { size: 5000, ..Plan::default() };
    let head = Request::new("HEAD", "/test/body").header("x-test-plan", plan.header());
    let response = client.request(&head).await.unwrap();
    assert_eq!((response.status(), response.header("content-length")), (200, Some("5000")));
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, 0));
    // Lengths of: a HEAD response without one, a HEAD response with that of the GET, and statuses that never have a body.
    let unknown = Plan { framing: Framing::Chunked, ..plan };
    let head = Request::new("HEAD", "/test/body").header("x-test-plan", unknown.header());
    let response = client.request(&head).await.unwrap();
    assert_eq!((response.status(), response.header("content-length")), (200, None));
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, 0));
    let headers = vec![("content-length".to_owned(), "5000".to_owned())];
    let described = Plan { status: 304, framing: Framing::None, headers, ..Plan::default() };
    let response = client.request(&described.request()).await.unwrap();
    assert_eq!((response.status(), response.header("content-length")), (304, Some("5000")));
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, 0));
    for status in [204, 304] {
        let headers = vec![("etag".to_owned(), "\"v\"".to_owned())];
        let plan = Plan { status, framing: Framing::None, headers, ..Plan::default() };
        let response = client.request(&plan.request()).await.unwrap();
        assert_eq!((response.status(), response.header("etag")), (status, Some("\"v\"")));
        assert_eq!((response.header("content-length"), response.header("transfer-encoding")), (None, None));
        assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, 0));
    }
    // An empty body has length 0.
    let response = client.request(&Plan::default().request()).await.unwrap();
    assert_eq!((response.status(), response.header("content-length")), (200, Some("0")));
    assert_eq!(client.request(&echo(json("m", 10))).await.unwrap().status(), 200);
}

/// With HTTP/1.1, only the endpoint's close ends such a body.
pub(crate) async fn body_without_length_is_delivered(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    for size in [0, 100_000] {
        let plan = Plan { framing: Framing::UntilClose, size, ..Plan::default() };
        let response = scene.request(&plan.request()).await;
        assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{size}");
        assert_planned(&plan, &response.body);
    }
    eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 2).await;
}

pub(crate) async fn endpoint_break_never_ends_cleanly(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let mut broken = 0.0;
    for framing in [Framing::ContentLength, Framing::Chunked, Framing::UntilClose] {
        for kind in [FaultKind::Reset, FaultKind::Close] {
            if (framing, kind) == (Framing::UntilClose, FaultKind::Close) && back != Back::Http2 {
                continue;
            }
            for after in [0, 70_000] {
                let case = format!("{framing:?} {kind:?} after {after}");
                let fault = Some(Fault { after, kind });
                let plan = Plan { framing, size: 100_000, fault, ..Plan::default() };
                let mut client = scene.client().await;
                client.send(&plan.request()).await.unwrap();
                match client.head().await {
                    Ok(head) if head.status == 200 => {
                        let mut checker = plan.checker();
                        let end = client.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap().end;
                        assert_ne!(end, BodyEnd::Complete, "{case}");
                        assert!(!front.is_http2() || end == BodyEnd::Reset, "{case}: {end:?}");
                    }
                    // The endpoint's reset overtook its head; this is the agent's response.
                    Ok(head) if after == 0 => {
                        assert_eq!(head.status, 502, "{case}");
                        continue;
                    }
                    Ok(head) => panic!("{case}: {head:?}"),
                    // The agent's reset overtook the head, or there was nothing to send with the head: a reset discards what
                    // is still in flight on the stream.
                    Err(error) => assert!(after == 0 || back == Back::Http2, "{case}: {error:#}"),
                }
                broken += 1.0;
            }
        }
    }
    let told = || scene.agent.metric("penstock_requests_total", &["reason=\"endpoint_broke\""]);
    eventually(SOON, || told() == broken).await;
    assert!(broken > 0.0);
    assert_eq!(scene.request(&echo(json("m", 10))).await.status(), 200);
}

/// Before the pick, while the endpoint works, and during the response: endpoint and picker are notified at once.
pub(crate) async fn client_disconnect_ends_request_everywhere(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let mut thinking = Plan::default();
    (thinking.head.split_at, thinking.head.pause_us) = (Some(0), 3_600_000_000);
    let stall = Some(Fault { after: 500, kind: FaultKind::Stall });
    let stalled = Plan { size: 1000, fault: stall, ..Plan::default() };
    let large = Plan { size: 256 << 20, ..Plan::default() };
    for (number, (plan, begun)) in (1..).zip([(thinking, false), (stalled, true), (large, true)]) {
        let mut client = scene.client().await;
        let before = scene.endpoint.requests();
        client.send(&plan.request()).await.unwrap();
        if begun {
            assert_eq!(client.head().await.unwrap().status, 200);
            read_at_least(&mut client, &plan, 400).await;
        }
        eventually(SOON, || scene.endpoint.requests() == before + 1).await;
        assert_eq!(scene.endpoint.aborted(), number - 1);
        let connection = client.leave();
        eventually(SOON, || scene.endpoint.aborted() == number).await;
        eventually(SOON, || scene.epp.streams_ended(StreamEnd::Cancelled) == number as usize).await;
        let aborts = || scene.agent.metric("penstock_client_aborts_total", &[]);
        eventually(SOON, || aborts() == number as f64).await;
        // The other streams of an HTTP/2 connection continue.
        if let Some(mut connection) = connection {
            let plan = Plan { size: 100_000, ..Plan::default() };
            let response = connection.request(&plan.request()).await.unwrap();
            assert_planned(&plan, &response.body);
        }
    }
}

/// The client's window fills up, and the bytes held for it are bounded.
pub(crate) async fn unread_response_is_bounded(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let mut client = scene.client().await;
    let plan = Plan { size: 512 << 20, ..Plan::default() };
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let held = until_still(|| scene.endpoint.written()).await;
    // What this machine's kernel buffers for TCP connections, or what the stream windows let through.
    let bound = if front.is_http2() && back == Back::Http2 { 2 << 20 } else { 64 << 20 };
    assert!(held < bound, "{held} bytes are in flight");
    assert_eq!(scene.request(&echo(json("m", 10))).await.status(), 200);
    read_at_least(&mut client, &plan, held + (1 << 20)).await;
}

/// Waits until a growing number stops growing.
async fn until_still(number: impl Fn() -> u64) -> u64 {
    let (mut last, mut since) = (0, Instant::now());
    eventually(SOON, || {
        let now = number();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        last > 0 && since.elapsed() > Duration::from_millis(300)
    })
    .await;
    number()
}

pub(crate) async fn errors_have_openai_shape(front: Front, back: Back) {
    let route = Route { path: Some(PathPattern::Prefix("/test".to_owned())), ..Route::to("default") };
    let mut scene = Scene::with(front, back, LlmdRouter::new, |config| {
        config.routes = vec![route];
        config.limits.body_bytes = 50_000;
    })
    .await;
    let chunked = Request::new("POST", "/test/echo").chunked(vec![b'x'; 60_000], 10_000);
    let rows = [
        (Request::get("/elsewhere"), 404, "no_route"),
        (echo(json("m", 60_000)), 413, "body_too_large"),
        (chunked, 413, "body_too_large"),
        (echo(r#"{"model":"#), 400, "json"),
        (echo(r#"{"model":"m"}}"#), 400, "json"),
        (Request::new("TRACE", "/test/echo"), 501, "method"),
    ];
    let mut connection = scene.client().await;
    for (request, status, code) in rows {
        if !front.is_http2() {
            connection = scene.client().await;
        }
        let response = connection.request(&request).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (status, code), "{request:?}");
        assert_eq!(response.header("content-type"), Some("application/json"));
        assert_eq!(response.read.end, BodyEnd::Complete);
    }
    // All on one connection, as long as it stays usable.
    assert_eq!(scene.client().await.request(&echo(json("m", 10))).await.unwrap().status(), 200);
    assert_eq!(scene.endpoint.requests(), 1);
    scene.epp.stop();
    let response = scene.request(&echo(json("m", 10))).await;
    assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
    assert_eq!(response.header("retry-after"), Some("1"));
    assert_eq!(scene.endpoint.requests(), 1);
}

pub(crate) async fn immediate_reply_reaches_client(front: Front, back: Back) {
    let fields = [("retry-after", "7"), ("x-why", "queue full"), ("content-type", "application/json")];
    let answering =
        move |_: &[_]| Answering::new(move |_| vec![reply::immediate(429, &fields, r#"{"error":"later"}"#)]);
    let scene = Scene::with(front, back, answering, |_| {}).await;
    let mut client = scene.client().await;
    for _ in 0..2 {
        let response = client.request(&echo(json("m", 1000))).await.unwrap();
        assert_eq!((response.status(), response.text().as_str()), (429, r#"{"error":"later"}"#));
        assert_eq!(response.header("content-length"), Some("17"));
        for (name, value) in fields {
            assert_eq!(response.header(name), Some(value));
        }
    }
    assert_eq!(scene.endpoint.requests(), 0);
}

/// Before the response it becomes the response; during the response it breaks the stream off.
pub(crate) async fn eviction_ends_request(front: Front, back: Back) {
    let mut thinking = Plan::default();
    (thinking.head.split_at, thinking.head.pause_us) = (Some(0), 3_600_000_000);
    let stall = Some(Fault { after: 500, kind: FaultKind::Stall });
    let stalled = Plan { size: 1000, fault: stall, ..Plan::default() };
    for (after, plan) in [(EvictAfter::Pick, thinking), (EvictAfter::ResponseHead, stalled)] {
        let now = Arc::new(Notify::new());
        let evicting = |all: &[_]| Evicting { inner: LlmdRouter::new(all), after, now: Arc::clone(&now) };
        let scene = Scene::with(front, back, evicting, |_| {}).await;
        let mut client = scene.client().await;
        client.send(&plan.request()).await.unwrap();
        eventually(SOON, || scene.endpoint.requests() == 1).await;
        if after == EvictAfter::ResponseHead {
            assert_eq!(client.head().await.unwrap().status, 200);
            read_at_least(&mut client, &plan, 400).await;
            now.notify_one();
            assert_ne!(client.read_body(|_| Ok(())).await.unwrap().end, BodyEnd::Complete);
        } else {
            now.notify_one();
            assert_eq!(client.head().await.unwrap().status, 429);
            assert_eq!(client.read_body(|_| Ok(())).await.unwrap().end, BodyEnd::Complete);
        }
        eventually(SOON, || scene.endpoint.aborted() == 1).await;
        assert_eq!(scene.agent.metric("penstock_evictions_total", &[]), 1.0);
    }
}

pub(crate) async fn fields_are_translated_between_protocols(front: Front, back: Back) {
    let scene = Scene::new(front, back).await;
    let request = echo(json("m", 10))
        .header("x-own", "a")
        .header("x-own", "b")
        .header("x-empty", "")
        .header("authorization", "Bearer secret")
        .header("x-gateway-destination-endpoint", "192.0.2.1:80")
        .header("te", "trailers")
        .header("accept", "*/*");
    let request = if front.is_http2() {
        request.header(":authority", "llm.example").header("cookie", "a=1").header("cookie", "b=2")
    } else {
        request
            .header("host", "llm.example")
            .header("connection", "x-hop")
            .header("x-hop", "1")
            .header("cookie", "a=1; b=2")
    };
    let response = scene.request(&request).await;
    let seen = response.echoed();
    let all = |name: &str| -> Vec<&str> {
        seen.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
    };
    assert_eq!(host(&seen), "llm.example");
    assert_eq!((all("x-own"), all("x-empty")), (vec!["a", "b"], vec![""]));
    assert_eq!((all("cookie"), all("authorization")), (vec!["a=1; b=2"], vec!["Bearer secret"]));
    assert_eq!((all("x-hop"), all("connection")), (vec![], vec![]));
    assert_eq!(all("x-forwarded-for"), ["127.0.0.1"]);
    let tls = matches!(front, Front::Tls1 | Front::Tls2);
    assert_eq!(all("x-forwarded-proto"), [if tls { "https" } else { "http" }]);
    assert_eq!(all("via"), [if front.is_http2() { "2 penstock" } else { "1.1 penstock" }]);
    assert_eq!(all("x-request-id").len(), 1);
    assert!(!all("x-gateway-destination-endpoint").contains(&"192.0.2.1:80"));
    if back == Back::Http2 {
        assert_eq!((all("host"), all(":scheme")), (vec![], vec!["http"]));
        assert_eq!(all("transfer-encoding"), Vec::<&str>::new());
    }
    let via = if back == Back::Http2 { "2 penstock" } else { "1.1 penstock" };
    assert_eq!(response.header("via"), Some(via));
    for name in ["connection", "transfer-encoding", "keep-alive"] {
        assert!(!front.is_http2() || response.header(name).is_none(), "{name}");
    }
    let told = scene.epp.streams()[0].request_headers();
    assert_eq!(header(&told, ":authority"), Some("llm.example"));
    assert_eq!(header(&told, ":scheme"), Some(if tls { "https" } else { "http" }));
}

pub(crate) async fn idle_timeout_breaks_response(front: Front, back: Back) {
    let idle = |config: &mut penstock_agent::config::Config| config.timeouts.idle = Some(Duration::from_millis(200));
    let scene = Scene::with(front, back, LlmdRouter::new, idle).await;
    let mut client = scene.client().await;
    let fault = Some(Fault { after: 500, kind: FaultKind::Stall });
    let plan = Plan { size: 1000, fault, ..Plan::default() };
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let read = client.read_body(|_| Ok(())).await.unwrap();
    assert_ne!(read.end, BodyEnd::Complete);
    assert!(read.len <= 500);
    eventually(SOON, || scene.endpoint.aborted() == 1).await;
    eventually(SOON, || scene.agent.metric("penstock_requests_total", &["reason=\"idle_timeout\""]) == 1.0).await;
}
