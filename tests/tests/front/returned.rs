//! `response_to_picker = "body"`: what the EPP returns for the body of a response is what goes out, in every framing and for clients of
//! every protocol; and what happens if the EPP fails in the middle.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use penstock_agent::config::{Config, FailureMode, ResponseToPicker, SteeringMode};
use penstock_proto::ext_proc::{
    BodyMutation, BodyResponse, CommonResponse, HttpBody, HttpHeaders, ProcessingResponse, body_mutation::Mutation,
    processing_response::Response as Reply,
};
use penstock_tests::{
    Alphabet, BodyEnd, Client, Plan, Request, Response,
    client::Piece,
    eventually,
    model_server::{Fault, FaultKind, Framing, Lengths, Pauses},
    scripted_epp::{Answer, End, Exchange, Script, StreamEnd, reply},
    stage::epp,
};

use crate::{
    SOON,
    scene::{Back, FRAMINGS, Front, Scene, WAYS},
};

/// What a picker does with the messages of a response's body.
#[derive(Clone)]
enum Does {
    /// Returns each message in upper case.
    Shouts,
    /// Returns the whole body in upper case at the end.
    ShoutsAtTheEnd,
    /// Answers each message with nothing.
    Keeps,
    /// Replaces each message by a text, without streaming.
    Replaces(&'static str),
    /// Drops every message.
    Clears,
    /// Ends the body with this after the first message.
    Ends(&'static str),
    /// Gives the model another name; after so many messages the stream ends.
    Dies(usize, Death),
    /// Answers nothing.
    IsSilent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    Close,
    Status,
    Connection,
}

struct Picker {
    endpoint: String,
    does: Does,
    /// Messages of bodies so far.
    messages: AtomicUsize,
}

fn of(mutation: Option<Mutation>) -> ProcessingResponse {
    let body_mutation = mutation.map(|mutation| BodyMutation { mutation: Some(mutation) });
    let response = Some(CommonResponse { body_mutation, ..CommonResponse::default() });
    ProcessingResponse {
        response: Some(Reply::ResponseBody(BodyResponse { response })),
        ..ProcessingResponse::default()
    }
}

/// Each event of [`events`] with another model.
fn renamed(body: &[u8]) -> Bytes {
    String::from_utf8_lossy(body).replace(SERVED, ASKED).into()
}

fn shouted(body: &[u8]) -> Bytes {
    body.to_ascii_uppercase().into()
}

#[tonic::async_trait]
impl Script for Picker {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream { exchange.send(reply::pick(&self.endpoint, &[])).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if body.end_of_stream {
            exchange.send(reply::pick(&self.endpoint, &[])).await?;
        }
        exchange.send(reply::request_body_unchanged()).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        let number = self.messages.fetch_add(1, Ordering::Relaxed);
        let (piece, end) = (body.body.clone(), body.end_of_stream);
        match &self.does {
            Does::Shouts => exchange.send(reply::response_body(shouted(&piece), end)).await?,
            Does::ShoutsAtTheEnd => {
                exchange.held.extend_from_slice(&piece);
                if end {
                    let whole = shouted(&std::mem::take(&mut exchange.held));
                    for message in reply::response_bodies(&whole) {
                        exchange.send(message).await?;
                    }
                }
            }
            Does::Keeps => exchange.send(reply::response_body_unchanged()).await?,
            Does::Replaces(text) => {
                exchange.send(of(Some(Mutation::Body(Bytes::from_static(text.as_bytes()))))).await?;
            }
            Does::Clears => exchange.send(of(Some(Mutation::ClearBody(true)))).await?,
            Does::Ends(text) if number == 0 => exchange.send(reply::response_body((*text).into(), true)).await?,
            Does::Ends(_) | Does::IsSilent => {}
            Does::Dies(after, death) if number >= *after => {
                return match death {
                    Death::Close => Err(End::Close),
                    Death::Status => Err(End::Status(tonic::Status::internal("gone"))),
                    Death::Connection => Err(End::ResetConnection),
                };
            }
            Does::Dies(..) => exchange.send(reply::response_body(renamed(&piece), end)).await?,
        }
        Ok(())
    }
}

fn picker(does: Does) -> impl FnOnce(&[std::net::SocketAddr]) -> Picker {
    move |all| Picker { endpoint: all[0].to_string(), does, messages: AtomicUsize::new(0) }
}

async fn scene(way: (Front, SteeringMode), does: Does, adjust: impl FnOnce(&mut Config)) -> Scene {
    scene_before(Back::Http1, way, does, adjust).await
}

async fn scene_before(back: Back, way: (Front, SteeringMode), does: Does, adjust: impl FnOnce(&mut Config)) -> Scene {
    Scene::with(way.0, back, picker(does), |config| {
        config.steering.mode = way.1;
        epp(config).response_to_picker = ResponseToPicker::Body;
        adjust(config);
    })
    .await
}

const SERVED: &str = "\"model\": \"served\"";
const ASKED: &str = "\"model\": \"asked-for\"";

/// A stream of events with lower-case text.
fn events(count: usize) -> String {
    (0..count).map(|n| format!("event: e\ndata: {{\"n\": {n}, {SERVED}, \"text\": \"word word\"}}\n\n")).collect()
}

/// A request that is answered with this text.
fn said(text: &str, kind: &str, framing: Framing) -> Request {
    let fields = [("content-type", kind), ("etag", "\"7\""), ("content-digest", "sha-256=:x:")];
    let plan = Plan {
        framing,
        says: true,
        headers: fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        chunks: Lengths::Random { seed: 2, max: 300 },
        writes: Lengths::Random { seed: 3, max: 2000 },
        pauses: Some(Pauses { seed: 4, every: 3, up_to_us: 500 }),
        ..Plan::default()
    };
    let body = serde_json::json!({"model": "m", "stream": true, "x-test-says": text}).to_string();
    Request::post("/v1/completions", body)
        .header("content-type", "application/json")
        .header("x-test-plan", plan.header())
}

/// A changed body has its own length or none, and nothing that describes the endpoint's.
fn assert_changed(response: &Response, expected: &str, what: &str) {
    assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{what}");
    assert_eq!(response.text(), expected, "{what}");
    assert!(response.header("content-length").is_none_or(|length| length == expected.len().to_string()), "{what}");
    assert_eq!((response.header("content-digest"), response.header("etag")), (None, Some("W/\"7\"")), "{what}");
}

#[tokio::test]
async fn what_the_picker_returns_is_what_goes_out_everywhere() {
    let stream = events(100);
    let document = format!("{{\"text\": \"{}\"}}", "word ".repeat(2000));
    for way in WAYS {
        for does in [Does::Shouts, Does::ShoutsAtTheEnd] {
            let scene = scene(way, does, |_| {}).await;
            let mut responses = 0;
            for framing in FRAMINGS {
                for (text, kind) in [(&stream, "text/event-stream"), (&document, "application/json")] {
                    let response = scene.request(&said(text, kind, framing)).await;
                    let what = format!("{way:?} {framing:?} {kind}");
                    assert_changed(&response, &text.to_ascii_uppercase(), &what);
                    let has_length = response.header("content-length").is_some();
                    assert_eq!(has_length, framing == Framing::ContentLength && kind != "text/event-stream", "{what}");
                    responses += 1;
                }
            }
            eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == responses).await;
            let flows = || scene.agent.count("penstock_flows_total", &["reason=\"picker_body\"", "path=\"relay\""]);
            eventually(SOON, || flows() == responses as u64).await;
            assert_eq!(scene.agent.steered(), 0);
        }
    }
}

#[tokio::test]
async fn body_of_http2_endpoint_is_what_the_picker_returns() {
    for front in [Front::Http1, Front::Http2, Front::Tls2] {
        for does in [Does::Shouts, Does::ShoutsAtTheEnd] {
            for framing in [Framing::ContentLength, Framing::Chunked] {
                let scene = scene_before(Back::Http2, (front, SteeringMode::Auto), does.clone(), |_| {}).await;
                let plan = Plan { size: 200_000, framing, alphabet: Alphabet::Text, ..Plan::default() };
                let response = scene.request(&plan.request()).await;
                let expected = shouted(&plan.alphabet.bytes(plan.stream_id, 0, 200_000));
                assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{front:?}");
                assert!(response.body == expected, "{front:?}");
                let length = (framing == Framing::ContentLength).then_some("200000");
                assert_eq!(response.header("content-length"), length, "{front:?}");
            }
        }
    }
}

/// A picker that changes nothing leaves the head as it was, if that can be known in time.
#[tokio::test]
async fn unchanged_body_keeps_its_length_digest_and_tag() {
    let document = format!("{{\"text\": \"{}\"}}", "WORD ".repeat(20_000));
    // Returns the same bytes.
    let same = document.to_ascii_uppercase();
    for way in WAYS {
        for (does, text) in [(Does::Keeps, &document), (Does::ShoutsAtTheEnd, &same)] {
            let scene = scene(way, does, |_| {}).await;
            let response = scene.request(&said(text, "application/octet-stream", Framing::ContentLength)).await;
            assert_eq!((response.text().as_str(), response.read.end), (text.as_str(), BodyEnd::Complete), "{way:?}");
            let length = text.len().to_string();
            assert_eq!(response.header("content-length"), Some(length.as_str()), "{way:?}");
            assert_eq!(response.header("content-digest"), Some("sha-256=:x:"), "{way:?}");
            assert_eq!(response.header("etag"), Some("\"7\""), "{way:?}");
        }
    }
}

#[tokio::test]
async fn every_kind_of_mutation_is_obeyed() {
    let stream = events(50);
    let way = WAYS[0];
    for framing in FRAMINGS {
        let what = format!("{framing:?}");
        let request = said(&stream, "text/event-stream", framing);
        let response = scene(way, Does::Keeps, |_| {}).await.request(&request).await;
        assert_eq!((response.text().as_str(), response.read.end), (stream.as_str(), BodyEnd::Complete), "{what}");
        let response = scene(way, Does::Clears, |_| {}).await.request(&request).await;
        assert_changed(&response, "", &what);
        // The rest of the endpoint's body is not wanted.
        let response = scene(way, Does::Ends("the end"), |_| {}).await.request(&request).await;
        assert_changed(&response, "the end", &what);
        let response = scene(way, Does::Replaces("x"), |_| {}).await.request(&request).await;
        assert!(!response.body.is_empty() && response.body.iter().all(|byte| *byte == b'x'), "{what}");
        assert_eq!(response.read.end, BodyEnd::Complete, "{what}");
    }
}

/// The endpoint sends one event after the other, each after the picker has answered for the one before.
#[tokio::test]
async fn events_pass_one_by_one() {
    let plan = Plan {
        framing: Framing::Chunked,
        says: true,
        headers: vec![("content-type".to_owned(), "text/event-stream".to_owned())],
        chunks: Lengths::Fixed(100),
        writes: Lengths::Fixed(100),
        pauses: Some(Pauses { seed: 4, every: 1, up_to_us: 30_000 }),
        ..Plan::default()
    };
    let text = events(200);
    let body = serde_json::json!({"model": "m", "x-test-says": text}).to_string();
    let request = Request::post("/v1/completions", body).header("content-type", "application/json");
    let scene = scene(WAYS[0], Does::Shouts, |_| {}).await;
    let mut client = scene.client().await;
    client.send(&request.header("x-test-plan", plan.header())).await.unwrap();
    client.head().await.unwrap();
    let mut pieces = 0;
    while let Piece::Data(_) = client.piece().await.unwrap() {
        pieces += 1;
    }
    assert!(pieces > 20, "{pieces} pieces");
}

/// The body after the picker's death: what it answered, and the rest as the endpoint sent it. Returns whether it answered anything.
fn partly_renamed(text: &str, out: &str) -> bool {
    let rest = out.rfind(ASKED).map_or(out, |last| &out[last..]);
    assert_eq!(out.matches(SERVED).count(), rest.matches(SERVED).count(), "an event was passed by");
    assert!(out.replace(ASKED, SERVED) == text, "{} bytes {:?}", out.len(), out.get(..300));
    out.contains(ASKED)
}

#[tokio::test]
async fn death_of_the_picker_in_the_middle_follows_failure_mode() {
    let stream = events(400);
    let request = said(&stream, "text/event-stream", Framing::Chunked);
    for (front, mode) in [WAYS[0], WAYS[3], WAYS[4]] {
        for death in [Death::Close, Death::Status, Death::Connection] {
            for after in [0, 3] {
                for failure_mode in [FailureMode::Open, FailureMode::Closed] {
                    let what = format!("{front:?} {mode:?} {death:?} after {after}, {failure_mode:?}");
                    let scene = scene((front, mode), Does::Dies(after, death), |config| {
                        config.pools[0].failure_mode = failure_mode;
                    })
                    .await;
                    let mut client = scene.client().await;
                    client.send(&request).await.unwrap();
                    assert_eq!(client.head().await.unwrap().status, 200, "{what}");
                    let mut body = Vec::new();
                    let read = client.read_body(|bytes| {
                        body.extend_from_slice(bytes);
                        Ok(())
                    });
                    let end = read.await.unwrap().end;
                    let (text, counted) = (String::from_utf8(body).unwrap(), |outcome| {
                        let labels = [format!("reason=\"{outcome}\"")];
                        scene.agent.count("penstock_epp_bodies_unanswered_total", &[&labels[0]])
                    });
                    // A picker that closes in order wants no more of it.
                    if failure_mode == FailureMode::Open || death == Death::Close {
                        assert_eq!(end, BodyEnd::Complete, "{what}");
                        let answered = partly_renamed(&stream, &text);
                        // A reset discards answers on their way.
                        assert!(answered == (after > 0) || !answered && death == Death::Connection, "{what}");
                        assert!(text.ends_with("word word\"}\n\n"), "{what}");
                        assert_eq!((counted("continued"), counted("broken_off")), (1, 0), "{what}");
                    } else {
                        assert_ne!(end, BodyEnd::Complete, "{what}");
                        assert_eq!((counted("continued"), counted("broken_off")), (0, 1), "{what}");
                        let reason = || scene.agent.count("penstock_requests_total", &["reason=\"picker_failed\""]);
                        eventually(SOON, || reason() == 1).await;
                    }
                }
            }
        }
    }
}

/// The client of an endpoint that breaks off gets what came before, as the EPP answers for it.
#[tokio::test]
async fn everything_before_a_break_is_answered_and_delivered() {
    for way in WAYS {
        for does in [Does::Keeps, Does::Shouts] {
            for after in [100, 30_000] {
                let scene = scene(way, does.clone(), |_| {}).await;
                let fault = Some(Fault { after, kind: FaultKind::Close });
                let plan = Plan {
                    size: 1 << 20,
                    framing: Framing::Chunked,
                    alphabet: Alphabet::Text,
                    fault,
                    ..Plan::default()
                };
                let response = scene.request(&plan.request()).await;
                // A part of them is chunk syntax.
                let mut direct = Client::connect(scene.endpoint.addr()).await.unwrap();
                let sent = direct.request(&plan.request()).await.unwrap().body.to_vec();
                assert!(sent.len() as u64 > after / 2);
                let expected = if matches!(does, Does::Shouts) { shouted(&sent).to_vec() } else { sent };
                assert_ne!(response.read.end, BodyEnd::Complete, "{way:?}");
                assert!(response.body == expected, "{way:?} {after}: {} bytes", response.body.len());
            }
        }
    }
}

/// Nothing was sent to the client, which gets an error.
#[tokio::test]
async fn death_of_the_picker_while_a_document_is_held_is_answered() {
    let document = "{\"text\": \"word\"}".to_owned() + &" ".repeat(100_000);
    let request = said(&document, "application/json", Framing::ContentLength);
    for way in WAYS {
        for (failure_mode, status) in [(FailureMode::Closed, 503), (FailureMode::Open, 200)] {
            let scene = scene(way, Does::Dies(0, Death::Status), |config| {
                config.pools[0].failure_mode = failure_mode;
            })
            .await;
            let response = scene.request(&request).await;
            assert_eq!((response.status(), response.read.end), (status, BodyEnd::Complete), "{way:?}");
            if failure_mode == FailureMode::Closed {
                assert_eq!(response.error_code(), "picker_failed", "{way:?}");
            } else {
                assert_eq!(response.text(), document, "{way:?}");
                assert_eq!(response.header("etag"), Some("\"7\""), "{way:?}");
            }
        }
    }
}

/// Beyond the limit the copy is dropped, not the response; only a picker that fails then breaks it off.
#[tokio::test]
async fn copy_beyond_the_limit_is_dropped_and_the_response_is_not() {
    let stream = events(10_000);
    let request = said(&stream, "text/plain", Framing::Chunked);
    let small = |config: &mut Config| {
        epp(config).response_queue_bytes = 64 << 10;
        config.pools[0].failure_mode = FailureMode::Open;
        config.timeouts.idle = Some(Duration::from_secs(2));
    };
    for way in [WAYS[0], WAYS[4]] {
        let scene_of = scene(way, Does::ShoutsAtTheEnd, small).await;
        let response = scene_of.request(&request).await;
        assert_changed(&response, &stream.to_ascii_uppercase(), &format!("{way:?}"));
        assert_eq!(scene_of.agent.count("penstock_epp_body_copies_dropped_total", &["reason=\"limit\""]), 1);

        let scene_of = scene(way, Does::IsSilent, small).await;
        let mut client = scene_of.client().await;
        client.send(&request).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        assert_ne!(client.read_body(|_| Ok(())).await.unwrap().end, BodyEnd::Complete, "{way:?}");
        let unanswered = || scene_of.agent.count("penstock_epp_bodies_unanswered_total", &["reason=\"broken_off\""]);
        eventually(SOON, || unanswered() == 1).await;
    }
}

/// A picker that says nothing holds a response back for the idle time; then the failure mode decides.
#[tokio::test]
async fn silent_picker_holds_a_response_for_the_idle_time() {
    let stream = events(20);
    for (failure_mode, complete) in [(FailureMode::Open, true), (FailureMode::Closed, false)] {
        let scene = scene(WAYS[3], Does::IsSilent, |config| {
            config.pools[0].failure_mode = failure_mode;
            config.timeouts.idle = Some(Duration::from_secs(1));
        })
        .await;
        let mut client = scene.client().await;
        client.send(&said(&stream, "text/event-stream", Framing::Chunked)).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut body = Vec::new();
        let read = client.read_body(|bytes| {
            body.extend_from_slice(bytes);
            Ok(())
        });
        assert_eq!(read.await.unwrap().end == BodyEnd::Complete, complete);
        assert_eq!(body, if complete { stream.as_bytes() } else { b"" });
        eventually(SOON, || scene.epp.streams_open() == 0).await;
    }
}

/// Whatever the client reads slowly waits in the endpoint and the picker, not in the agent.
#[tokio::test]
async fn slow_client_holds_up_endpoint_and_picker() {
    let scene = scene(WAYS[0], Does::Keeps, |_| {}).await;
    let plan = Plan { size: 64 << 20, framing: Framing::Chunked, ..Plan::default() };
    let mut client = scene.client().await;
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    // Until nothing moves any more.
    let mut before = 0;
    eventually(SOON, || {
        let now = scene.endpoint.written();
        std::mem::replace(&mut before, now) == now && now > 0
    })
    .await;
    assert!(scene.endpoint.written() < 48 << 20, "{} bytes were read", scene.endpoint.written());
    let mut checker = plan.checker();
    let read = client.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!((read.end, checker.offset()), (BodyEnd::Complete, plan.size));
}
