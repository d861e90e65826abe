//! The HTTP/1.1 client against the model server.

use std::time::{Duration, Instant};

use super::*;
use crate::client::{self, BodyEnd, Client, ConnectionEnd, Pace, Piece, Request, Response};
use crate::content::Fnv;
use crate::{Alphabet, Checker, eventually};

const SOON: Duration = Duration::from_secs(10);

async fn server() -> ModelServer {
    ModelServer::start(Options::default()).await.unwrap()
}

/// The plan's response, with its payload checked as far as it arrived.
async fn planned(plan: &Plan) -> (Response, Client) {
    let server = server().await;
    let mut client = Client::connect(server.addr).await.unwrap();
    client.record();
    let response = client.request(&plan.request()).await.unwrap();
    plan.checker().feed(&response.body).unwrap();
    assert_eq!(response.header("x-served-by"), Some(server.addr.to_string().as_str()));
    assert_eq!(response.header("x-request-count"), Some("1"));
    (response, client)
}

#[tokio::test]
async fn every_framing_delivers_its_bytes() {
    for framing in [Framing::ContentLength, Framing::Chunked, Framing::UntilClose] {
        for (size, writes) in [
            (0, Lengths::Fixed(10)),
            (1, Lengths::OneByte),
            (5000, Lengths::OneByte),
            (100_000, Lengths::Random { seed: 3, max: 900 }),
            (1_000_000, Lengths::Fixed(64 << 10)),
        ] {
            for with_body in [false, true] {
                let chunks = Lengths::Random { seed: size, max: 3000 };
                let head = HeadWrites { with_body, ..HeadWrites::default() };
                let plan = Plan { framing, size, writes, chunks, head, stream_id: size, ..Plan::default() };
                let (response, _) = planned(&plan).await;
                assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, size), "{plan:?}");
            }
        }
    }
}

#[tokio::test]
async fn planned_framing_is_on_the_wire() {
    let plan = Plan {
        framing: Framing::Chunked,
        size: 5,
        alphabet: Alphabet::Text,
        chunks: Lengths::Fixed(3),
        chunk_extension: Some("a=b".to_owned()),
        trailers: vec![("X-Sum".to_owned(), "1".to_owned())],
        writes: Lengths::OneByte,
        ..Plan::default()
    };
    let (response, client) = planned(&plan).await;
    let text = String::from_utf8(Alphabet::Text.bytes(0, 0, 5)).unwrap();
    let wire = format!("3;a=b\r\n{}\r\n2;a=b\r\n{}\r\n0;a=b\r\nX-Sum: 1\r\n\r\n", &text[..3], &text[3..]);
    assert_eq!(std::str::from_utf8(&client.recorded()[response.head.raw.len()..]).unwrap(), wire);
    assert_eq!(response.read.trailers, [("X-Sum".to_owned(), "1".to_owned())]);
    assert_eq!(response.read.chunks, 2);
}

#[tokio::test]
async fn heads_are_split_and_preceded_by_interim_responses() {
    let head = HeadWrites { split_at: Some(20), pause_us: 20_000, with_body: true };
    let plan = Plan { interim: vec![103, 103], size: 100, head, ..Plan::default() };
    let (response, _) = planned(&plan).await;
    let interim: Vec<u16> = response.interim.iter().map(|head| head.status).collect();
    assert_eq!((interim, response.status(), response.read.len), (vec![103, 103], 200, 100));

    // Only the first piece of the head arrives before the pause.
    let server = server().await;
    let head = HeadWrites { pause_us: 200_000, ..head };
    let mut client = Client::connect(server.addr).await.unwrap();
    client.patience = Duration::from_millis(100);
    client.send(&Plan { head, ..Plan::default() }.request()).await.unwrap();
    assert!(client.head().await.unwrap_err().to_string().contains("timed out"));
    assert_eq!(client.surplus().len(), 20);
}

#[tokio::test]
async fn bodiless_response_keeps_connection_usable() {
    let server = server().await;
    let mut client = Client::connect(server.addr).await.unwrap();
    for (count, status) in [(1, 204), (2, 304)] {
        let headers = vec![("etag".to_owned(), "\"x\"".to_owned())];
        let plan = Plan { status, headers, framing: Framing::None, ..Plan::default() };
        let response = client.request(&plan.request()).await.unwrap();
        assert_eq!((response.status(), response.header("etag")), (status, Some("\"x\"")));
        assert_eq!(response.header("x-request-count"), Some(count.to_string().as_str()));
    }
    let plan = Plan { size: 1000, ..Plan::default() };
    let head = Request::new("HEAD", "/test/body").header("x-test-plan", plan.header());
    let response = client.request(&head).await.unwrap();
    assert_eq!((response.header("content-length"), response.body.len()), (Some("1000"), 0));
    assert_eq!(client.request(&plan.request()).await.unwrap().body.len(), 1000);
    assert_eq!((server.connections_accepted(), server.connections_open(), server.requests()), (1, 1, 4));
    drop(client);
    eventually(SOON, || server.connections_open() == 0).await;
    assert_eq!(server.aborted(), 0);
}

#[tokio::test]
async fn planned_misbehaviour_is_detected_by_client() {
    use {BodyEnd::*, FaultKind::*};
    for (framing, kind, end, len) in [
        (Framing::ContentLength, Close, Truncated, 300),
        (Framing::Chunked, Close, Truncated, 295),
        (Framing::UntilClose, Close, Complete, 300),
        (Framing::ContentLength, FaultKind::Reset, BodyEnd::Reset, 300),
        (Framing::Chunked, FaultKind::Reset, BodyEnd::Reset, 295),
        (Framing::UntilClose, FaultKind::Reset, BodyEnd::Reset, 300),
        (Framing::ContentLength, StallMs(20), Complete, 1000),
        (Framing::Chunked, StallMs(20), Complete, 1000),
    ] {
        let fault = Some(Fault { after: 300, kind });
        let plan = Plan { framing, size: 1000, fault, ..Plan::default() };
        let begin = Instant::now();
        let (response, _) = planned(&plan).await;
        assert_eq!((response.read.end, response.read.len), (end, len), "{plan:?}");
        assert!(!matches!(kind, StallMs(_)) || begin.elapsed() >= Duration::from_millis(20));
    }
}

#[tokio::test]
async fn faults_at_body_edges_strike_exactly() {
    let fault = |after, kind| Some(Fault { after, kind });
    let plan = Plan { size: 10, fault: fault(0, FaultKind::Reset), ..Plan::default() };
    let (response, _) = planned(&plan).await;
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Reset, 0));
    let plan = Plan { size: 10, fault: fault(10, FaultKind::Close), ..Plan::default() };
    let (response, mut client) = planned(&plan).await;
    assert_eq!((response.read.end, response.read.len), (BodyEnd::Complete, 10));
    assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
}

#[tokio::test]
async fn wrong_content_lengths_are_sent_as_planned() {
    let plan = Plan { size: 100, length_error: 7, after: After::SilentClose, ..Plan::default() };
    let (response, _) = planned(&plan).await;
    assert_eq!((response.header("content-length"), response.read.end), (Some("107"), BodyEnd::Truncated));
    let plan = Plan { length_error: -7, ..plan };
    let (response, mut client) = planned(&plan).await;
    assert_eq!((response.header("content-length"), response.read.len), (Some("93"), 93));
    assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    assert_eq!(client.surplus(), Alphabet::Binary.bytes(0, 93, 7));
}

#[tokio::test]
async fn connections_end_as_planned() {
    for (after, announced) in [(After::Close, Some("close")), (After::SilentClose, None)] {
        let (response, mut client) = planned(&Plan { after, size: 3, ..Plan::default() }).await;
        assert_eq!(response.header("connection"), announced);
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    }
    let options = Options { idle_close: Some(Duration::from_millis(30)), ..Options::default() };
    let server = ModelServer::start(options).await.unwrap();
    let mut client = Client::connect(server.addr).await.unwrap();
    client.request(&Request::get("/health")).await.unwrap();
    assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
}

#[tokio::test]
async fn departed_peer_is_noticed_at_once() {
    let mut server = server().await;
    let stalled = Plan { size: 100, fault: Some(Fault { after: 50, kind: FaultKind::Stall }), ..Plan::default() };
    let endless = Plan { size: 1 << 40, framing: Framing::Chunked, ..Plan::default() };
    for (aborted, plan) in [(1, &stalled), (2, &endless)] {
        let mut client = Client::connect(server.addr).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        drop(client);
        eventually(SOON, || server.aborted() == aborted).await;
    }
    let mut client = Client::connect(server.addr).await.unwrap();
    client.send(&stalled.request()).await.unwrap();
    client.head().await.unwrap();
    client.reset().unwrap();
    eventually(SOON, || server.aborted() == 3 && server.connections_open() == 0).await;

    let mut client = Client::connect(server.addr).await.unwrap();
    client.send_raw(b"POST /test/echo HTTP/1.1\r\ncontent-length: 5\r\n\r\nabc").await.unwrap();
    drop(client);
    eventually(SOON, || server.uploads_broken() == 1).await;

    let mut client = Client::connect(server.addr).await.unwrap();
    client.send(&stalled.request()).await.unwrap();
    client.head().await.unwrap();
    server.stop();
    client.until_end().await.unwrap();
    assert!(Client::connect(server.addr).await.is_err());
}

#[tokio::test]
async fn echo_reports_received_request() {
    let server = server().await;
    let mut client = Client::connect(server.addr).await.unwrap();
    let body = Alphabet::Binary.bytes(9, 0, 70_000);
    let request = Request::post("/test/echo?q=1", body.clone()).header("X-Mixed-Case", "a").header("x-mixed-case", "b");
    let echo: Echo = client.request(&request).await.unwrap().json().unwrap();
    let headers: Vec<_> = echo.headers.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let host = format!("host={}", server.addr);
    assert_eq!(headers, [host.as_str(), "X-Mixed-Case=a", "x-mixed-case=b", "content-length=70000"]);
    assert_eq!((echo.method.as_str(), echo.target.as_str()), ("POST", "/test/echo?q=1"));
    assert_eq!((echo.body_framing.as_str(), echo.body_length), ("content-length", 70_000));
    assert_eq!(echo.body_hash, Fnv::of(&body).value());

    let request = Request::new("PUT", "/test/echo").chunked(body.clone(), 999).piecewise(9000, Duration::ZERO);
    let echo: Echo = client.request(&request).await.unwrap().json().unwrap();
    assert_eq!((echo.body_framing.as_str(), echo.body_length, echo.count), ("chunked", 70_000, 2));
    assert_eq!(echo.body_hash, Fnv::of(&body).value());
    let echo: Echo = client.request(&Request::get("/test/echo")).await.unwrap().json().unwrap();
    assert_eq!((echo.body_framing.as_str(), echo.body_hash), ("none", Fnv::default().value()));
    assert_eq!(server.seen().len(), 3);
    assert_eq!(server.seen()[2], echo);

    client.send_raw(b"GET /\r\n\r\n").await.unwrap();
    assert_eq!(client.response().await.unwrap().status(), 400);
}

#[tokio::test]
async fn expect_100_request_gets_continue() {
    let server = server().await;
    let mut client = Client::connect(server.addr).await.unwrap();
    client
        .send_raw(b"POST /test/echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(client.head().await.unwrap().status, 100);
    client.send_raw(b"ab").await.unwrap();
    let echo: Echo = client.response().await.unwrap().json().unwrap();
    assert_eq!(echo.body_length, 2);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let server = server().await;
    let mut client = Client::connect(server.addr).await.unwrap();
    let pauses = Some(Pauses { seed: 1, every: 1, up_to_us: 500 });
    for id in 0..5 {
        let plan = Plan { stream_id: id, size: 1000, writes: Lengths::Fixed(100), pauses, ..Plan::default() };
        client.send(&plan.request()).await.unwrap();
    }
    for id in 0..5 {
        Checker::new(id).feed(&client.response().await.unwrap().body).unwrap();
    }
}

#[tokio::test]
async fn slow_reader_gets_every_byte() {
    let server = server().await;
    let mut client = Client::connect_with(server.addr, Some(4096)).await.unwrap();
    let plan = Plan { size: 200_000, framing: Framing::Chunked, ..Plan::default() };
    client.send(&plan.request()).await.unwrap();
    client.head().await.unwrap();
    let mut checker = plan.checker();
    let Piece::Data(first) = client.piece(10).await.unwrap() else { panic!("no data") };
    assert!(first.len() <= 10);
    checker.feed(&first).unwrap();
    let pace = Pace::Slow { bytes: 8000, tick: Duration::from_millis(1) };
    let read = client.read_body(pace, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, 200_000 - first.len() as u64));
    assert!(read.arrivals.iter().all(|arrival| arrival.len <= 8000));
}

#[tokio::test]
async fn raw_exchange_returns_wire_bytes() {
    let server = server().await;
    let plan = Plan { size: 10, after: After::Close, ..Plan::default() };
    let (bytes, end) = client::exchange_raw(server.addr, &plan.request().wire("x")).await.unwrap();
    assert!(bytes.starts_with(b"HTTP/1.1 200 OK\r\n") && bytes.ends_with(&Alphabet::Binary.bytes(0, 0, 10)));
    assert_eq!(end, ConnectionEnd::Fin);
}

#[tokio::test]
async fn completions_match_openai_format() {
    use serde_json::{Value, json};
    let server = server().await;
    let mut client = Client::connect(server.addr).await.unwrap();
    let post = |target: &str, body: Value| Request::post(target, body.to_string());
    let messages = json!([{"role": "user", "content": "how much water"}]);
    let chat = json!({"model": "m", "messages": messages, "max_tokens": 3});
    let whole: Value = client.request(&post("/v1/chat/completions", chat)).await.unwrap().json().unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "Water turns the ");
    assert_eq!(whole["usage"], json!({"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}));

    let options = json!({"include_usage": true});
    let chat = json!({"model": "m", "messages": messages, "stream": true, "stream_options": options, "max_tokens": 3,
        "x-test-interval-us": 2000});
    let begin = Instant::now();
    let response = client.request(&post("/v1/chat/completions", chat)).await.unwrap();
    let events = response.events();
    assert_eq!((events.len(), events[6].as_str()), (7, "[DONE]"));
    let parts: Vec<Value> = events[..6].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert_eq!(parts[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(parts[3]["choices"][0]["delta"]["content"], "the ");
    assert_eq!(parts[4]["choices"][0]["finish_reason"], "length");
    assert_eq!((&parts[5]["choices"], &parts[5]["usage"]["total_tokens"]), (&json!([]), &json!(6)));
    assert!(response.read.arrivals.last().unwrap().at - begin >= Duration::from_millis(6));

    let text = json!({"model": "m", "prompt": "a b", "stream": true});
    let events = client.request(&post("/v1/completions", text)).await.unwrap().events();
    assert_eq!(events.len(), 18);
    assert_eq!(serde_json::from_str::<Value>(&events[0]).unwrap()["choices"][0]["text"], "Water ");

    let response = client.request(&Request::post("/v1/completions", "{")).await.unwrap();
    assert_eq!(response.status(), 400);
    assert_eq!(client.request(&Request::get("/v1/none")).await.unwrap().status(), 404);
    let models: Value = client.request(&Request::get("/v1/models")).await.unwrap().json().unwrap();
    assert_eq!(models["data"][0]["id"], "sample");
}

#[tokio::test]
async fn state_endpoint_reports_counters() {
    let server = server().await;
    let mut client = Client::connect(server.addr).await.unwrap();
    assert_eq!(client.request(&Request::get("/health")).await.unwrap().status(), 200);
    server.set_healthy(false);
    assert_eq!(client.request(&Request::get("/health")).await.unwrap().status(), 503);
    server.set_waiting(3);
    server.set_kv_cache_usage(0.25);
    let body = r#"{"model": "m", "prompt": "", "stream": true, "x-test-interval-us": 60000000}"#;
    let mut busy = Client::connect(server.addr).await.unwrap();
    busy.send(&Request::post("/v1/completions", body)).await.unwrap();
    busy.head().await.unwrap();
    let text = client.request(&Request::get("/metrics")).await.unwrap().text();
    for (name, value) in
        [("num_requests_running", "1.0"), ("num_requests_waiting", "3.0"), ("kv_cache_usage_perc", "0.25")]
    {
        assert!(text.contains(&format!("vllm:{name}{{engine=\"0\",model_name=\"sample\"}} {value}\n")), "{text}");
    }
    drop(busy);
    eventually(SOON, || server.running() == 0 && server.aborted() == 1).await;
}
