//! `response_to_picker = "body"`: the EPP sees the trailers of responses and changes them, over every protocol of client and endpoint;
//! and what happens if it does not reply to them.

use std::time::{Duration, Instant};

use penstock_agent::config::{Config, FailureMode, ResponseToPicker, SteeringMode};
use penstock_proto::{
    core::HeaderMap,
    ext_proc::{
        HeaderMutation, HttpBody, HttpHeaders, HttpTrailers, ProcessingResponse, TrailersResponse,
        processing_response::Response as Reply,
    },
};
use penstock_tests::{
    Alphabet, BodyEnd, Plan, Request, Response, eventually,
    model_server::Framing,
    scripted_epp::{Answer, End, Exchange, Script, StreamEnd, reply},
    stage::epp,
};

use crate::{
    SOON,
    scene::{Back, Front, Scene, WAYS},
};

/// What a picker does with body and trailers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    /// Returns each message of the body, and the change of the trailers.
    Streams,
    /// Returns the body when it has seen the trailers, and never ends it.
    Collects,
    /// Leaves each message as it is.
    Keeps,
    /// Ends the body itself with its last byte.
    EndsTheBody,
    /// Returns the body, changes more of the trailers than is allowed.
    Exceeds,
    /// Returns the body, and says nothing about trailers.
    IsSilent,
    /// Returns the body when it has ended, and says nothing about trailers, as older EPPs do.
    AwaitsTheEnd,
    /// Returns the body, and replies to the trailers after this time.
    RepliesAfter(Duration),
    /// Returns body and trailers this time after the trailers.
    CollectsFor(Duration),
    /// Replies to the trailers alone.
    SkipsTheBody,
    /// Returns the body, and ends the stream at the trailers.
    Closes,
    Fails,
    /// Answers the client's request anew.
    Evicts,
}

struct Picker {
    endpoint: String,
    does: Does,
}

const SIZE: usize = 100_000;

/// A reply to trailers, or, without a change, one that leaves them.
fn replied(header_mutation: Option<HeaderMutation>) -> ProcessingResponse {
    let reply = Reply::ResponseTrailers(TrailersResponse { header_mutation });
    ProcessingResponse { response: Some(reply), ..ProcessingResponse::default() }
}

/// Sets and removes, also what is not allowed in trailers.
fn change() -> HeaderMutation {
    let fields =
        [("x-sum", "new"), ("x-added", "1"), ("content-type", "a/b"), ("set-cookie", "a=b"), (":status", "500")];
    let mut change = reply::mutation(&fields);
    change.remove_headers = vec!["x-drop".to_owned()];
    change
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
        let piece = body.body.clone();
        exchange.held.extend_from_slice(&piece);
        let ends = body.end_of_stream || self.does == Does::EndsTheBody && exchange.held.len() == SIZE;
        match self.does {
            Does::Collects if body.end_of_stream => panic!("the body has trailers"),
            Does::AwaitsTheEnd if ends => {
                let whole = std::mem::take(&mut exchange.held);
                exchange.send(reply::response_body(whole.into(), true)).await
            }
            Does::Collects | Does::CollectsFor(_) | Does::AwaitsTheEnd | Does::SkipsTheBody => Ok(()),
            Does::Keeps => exchange.send(reply::response_body_unchanged()).await,
            _ => exchange.send(reply::response_body(piece, ends)).await,
        }
    }

    async fn response_trailers(&self, exchange: &mut Exchange, _trailers: &HttpTrailers) -> Answer {
        if let Does::RepliesAfter(time) | Does::CollectsFor(time) = self.does {
            tokio::time::sleep(time).await;
        }
        match self.does {
            Does::IsSilent | Does::AwaitsTheEnd => return Ok(()),
            Does::Closes => return Err(End::Close),
            Does::Fails => return Err(End::Status(tonic::Status::internal("gone"))),
            Does::Evicts => return exchange.send(reply::immediate(429, &[], "evicted")).await,
            Does::Exceeds => {
                let many: Vec<String> = (0..2000).map(|n| format!("x-{n}")).collect();
                let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "1")).collect();
                return exchange.send(replied(Some(reply::mutation(&many)))).await;
            }
            Does::Collects | Does::CollectsFor(_) => {
                let whole = std::mem::take(&mut exchange.held);
                for piece in whole.chunks(50_000) {
                    exchange.send(reply::response_body(piece.to_vec().into(), false)).await?;
                }
            }
            _ => {}
        }
        exchange.send(replied(Some(change()))).await
    }
}

async fn scene(back: Back, way: (Front, SteeringMode), does: Does, adjust: impl FnOnce(&mut Config)) -> Scene {
    let picker = |all: &[std::net::SocketAddr]| Picker { endpoint: all[0].to_string(), does };
    Scene::with(way.0, back, picker, |config| {
        config.steering.mode = way.1;
        epp(config).response_to_picker = ResponseToPicker::Body;
        adjust(config);
    })
    .await
}

fn pairs(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// What the endpoint sends.
const TRAILERS: [(&str, &str); 4] = [("x-sum", "old"), ("x-drop", "1"), ("x-twice", "1"), ("x-twice", "2")];

fn plan() -> Plan {
    Plan {
        size: SIZE as u64,
        framing: Framing::Chunked,
        alphabet: Alphabet::Text,
        trailers: pairs(&TRAILERS),
        headers: pairs(&[("content-type", "text/plain")]),
        ..Plan::default()
    }
}

fn request() -> Request {
    plan().request().header("te", "trailers")
}

fn sorted(fields: &[(String, String)]) -> Vec<(String, String)> {
    let mut fields = fields.to_vec();
    fields.sort();
    fields
}

fn assert_body(response: &Response, what: &str) {
    assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{what}");
    assert!(response.body == plan().alphabet.bytes(0, 0, SIZE), "{what}: {} bytes", response.body.len());
}

/// The trailers that the picker was sent, if they were the last message.
fn shown(scene: &Scene) -> Vec<(String, String)> {
    use penstock_proto::ext_proc::processing_request::Request as Sent;
    let streams = scene.epp.streams();
    let (body, ends) = streams[0].response_body();
    assert_eq!((body.len(), ends), (SIZE, 0), "an end of the body before the trailers");
    let Some(Some(Sent::ResponseTrailers(last))) = streams[0].messages.last().map(|last| last.request.clone()) else {
        panic!("the last message is not the trailers: {:?}", streams[0].kinds());
    };
    let HeaderMap { headers } = last.trailers.unwrap();
    let text = |value: &[u8]| String::from_utf8(value.to_vec()).unwrap();
    headers.iter().map(|field| (field.key.clone(), text(&field.raw_value))).collect()
}

/// What the client gets if the picker's change applies.
const CHANGED: [(&str, &str); 4] = [("x-added", "1"), ("x-sum", "new"), ("x-twice", "1"), ("x-twice", "2")];

#[tokio::test]
async fn picker_sees_trailers_and_its_changes_apply_everywhere() {
    let changed = pairs(&CHANGED);
    for back in [Back::Http1, Back::Http2] {
        for way in WAYS {
            for does in [Does::Streams, Does::Collects, Does::Keeps, Does::EndsTheBody] {
                let what = format!("{back:?} {way:?} {does:?}");
                let scene = scene(back, way, does, |_| {}).await;
                let response = scene.request(&request()).await;
                assert_body(&response, &what);
                assert_eq!(sorted(&response.read.trailers), changed, "{what}");
                assert_eq!((response.header("x-added"), response.header("content-type")), (None, Some("text/plain")));
                assert_eq!(sorted(&shown(&scene)), sorted(&pairs(&TRAILERS)), "{what}");
                eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
            }
        }
    }
}

#[tokio::test]
async fn excessive_change_of_trailers_is_not_applied() {
    let scene = scene(Back::Http1, WAYS[0], Does::Exceeds, |_| {}).await;
    let response = scene.request(&request()).await;
    assert_body(&response, "");
    assert_eq!(sorted(&response.read.trailers), sorted(&pairs(&TRAILERS)));
    let counted = || scene.agent.count("penstock_epp_failures_total", &["reason=\"mutation_too_large\""]);
    assert_eq!(counted(), 1);
}

/// The endpoint's own trailers, or a broken response.
#[tokio::test]
async fn missing_reply_to_trailers_follows_failure_mode() {
    for (back, way) in [(Back::Http1, WAYS[3]), (Back::Http2, WAYS[4])] {
        for does in [Does::IsSilent, Does::SkipsTheBody, Does::Closes, Does::Fails] {
            for failure_mode in [FailureMode::Open, FailureMode::Closed] {
                let what = format!("{back:?} {way:?} {does:?} {failure_mode:?}");
                let scene = scene(back, way, does, |config| {
                    config.pools[0].failure_mode = failure_mode;
                    config.timeouts.idle = Some(Duration::from_secs(1));
                })
                .await;
                let mut client = scene.client().await;
                client.send(&request()).await.unwrap();
                assert_eq!(client.head().await.unwrap().status, 200, "{what}");
                let mut body = Vec::new();
                let read = client.read_body(|bytes| {
                    body.extend_from_slice(bytes);
                    Ok(())
                });
                let read = read.await.unwrap();
                let own = [Does::Closes, Does::IsSilent, Does::SkipsTheBody].contains(&does)
                    || failure_mode == FailureMode::Open;
                assert_eq!(read.end == BodyEnd::Complete, own, "{what}");
                if own {
                    assert_eq!(body.len(), SIZE, "{what}");
                    let left = match does {
                        Does::SkipsTheBody => &CHANGED,
                        _ => &TRAILERS,
                    };
                    assert_eq!(sorted(&read.trailers), sorted(&pairs(left)), "{what}");
                }
                eventually(SOON, || scene.epp.streams_open() == 0).await;
            }
        }
    }
}

/// Sends a request after another. Each gets the whole body, and these trailers. Returns how long each took.
async fn in_turn<const N: usize>(scene: &Scene, trailers: [&[(&str, &str)]; N]) -> [Duration; N] {
    let mut took = [Duration::ZERO; N];
    for (number, (took, trailers)) in took.iter_mut().zip(trailers).enumerate() {
        let begin = Instant::now();
        let response = scene.request(&request()).await;
        *took = begin.elapsed();
        assert_body(&response, &format!("response {number}"));
        assert_eq!(sorted(&response.read.trailers), sorted(&pairs(trailers)), "response {number}");
    }
    took
}

/// Ends of the body and messages with trailers that the picker was sent, by stream.
fn ends(scene: &Scene) -> Vec<(usize, usize)> {
    let streams = scene.epp.streams();
    let trailers = |kinds: Vec<&str>| kinds.iter().filter(|kind| **kind == "response_trailers").count();
    streams.iter().map(|stream| (stream.response_body().1, trailers(stream.kinds()))).collect()
}

#[tokio::test]
async fn picker_that_never_replies_to_trailers_delays_one_response() {
    for (back, way) in [(Back::Http1, WAYS[3]), (Back::Http2, WAYS[4])] {
        // The pool fails closed, and the idle time is the default of minutes.
        let scene = scene(back, way, Does::IsSilent, |config| config.listen.workers = 1).await;
        let [first, second, third] = in_turn(&scene, [&TRAILERS; 3]).await;
        assert!(first >= Duration::from_secs(1) && first < Duration::from_secs(20), "{first:?}");
        assert!(second < first && third < first, "{first:?} {second:?} {third:?}");
        assert_eq!(ends(&scene), [(0, 1), (1, 0), (1, 0)], "{back:?}: only the first saw trailers");
        eventually(SOON, || scene.epp.streams_ended(StreamEnd::HalfClosed) == 3).await;
        assert_eq!(scene.agent.count("penstock_epp_failures_total", &[]), 0);
    }
}

#[tokio::test]
async fn picker_that_awaits_the_end_of_the_body_gets_it_after_one_response() {
    let scene = scene(Back::Http1, WAYS[3], Does::AwaitsTheEnd, |config| {
        config.listen.workers = 1;
        config.pools[0].failure_mode = FailureMode::Open;
        config.timeouts.idle = Some(Duration::from_secs(2));
    })
    .await;
    let [first, second] = in_turn(&scene, [&TRAILERS; 2]).await;
    assert!(first >= Duration::from_secs(2) && second < first, "{first:?} {second:?}");
    assert_eq!(ends(&scene), [(0, 1), (1, 0)]);
}

#[tokio::test]
async fn late_reply_to_trailers_applies_unless_the_response_has_ended() {
    for (does, expected) in [
        (Does::RepliesAfter(Duration::from_millis(300)), [&CHANGED, &CHANGED]),
        // A picker that has not answered for the body has the idle time.
        (Does::CollectsFor(Duration::from_millis(1500)), [&CHANGED, &CHANGED]),
        (Does::RepliesAfter(Duration::from_millis(2500)), [&TRAILERS, &TRAILERS]),
    ] {
        let scene = scene(Back::Http2, WAYS[4], does, |config| config.listen.workers = 1).await;
        in_turn(&scene, expected.map(|trailers| &trailers[..])).await;
        let second = if expected[1] == &CHANGED { (0, 1) } else { (1, 0) };
        assert_eq!(ends(&scene), [(0, 1), second], "{does:?}");
        eventually(SOON, || scene.epp.streams_open() == 0).await;
    }
}

#[tokio::test]
async fn eviction_at_the_trailers_breaks_the_response() {
    for way in [WAYS[0], WAYS[4]] {
        let scene = scene(Back::Http2, way, Does::Evicts, |_| {}).await;
        let mut client = scene.client().await;
        client.send(&request()).await.unwrap();
        client.head().await.unwrap();
        assert_ne!(client.read_body(|_| Ok(())).await.unwrap().end, BodyEnd::Complete, "{way:?}");
        eventually(SOON, || scene.agent.count("penstock_requests_total", &["reason=\"evicted\""]) == 1).await;
    }
}
