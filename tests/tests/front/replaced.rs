//! `response_to_picker = "body"`: a body in the EPP's reply to the head of a response is the whole body; changes of the head in replies
//! to the body have no effect.

use bytes::Bytes;
use penstock_agent::config::{Config, ResponseToPicker};
use penstock_proto::ext_proc::{
    BodyMutation, CommonResponse, HeadersResponse, HttpBody, HttpHeaders, ProcessingResponse, body_mutation::Mutation,
    common_response::ResponseStatus, processing_response::Response as Reply,
};
use penstock_tests::{
    BodyEnd, Plan, Request, Response, eventually,
    model_server::Framing,
    scripted_epp::{Answer, End, Exchange, Script, StreamEnd, reply},
    stage::epp,
};

use crate::{
    SOON,
    scene::{Back, FRAMINGS, Front, Scene, WAYS},
};

/// A picker that replaces the body with `text` in its reply to the head, and closes the stream or not.
struct Replacing {
    endpoint: String,
    text: &'static str,
    closes: bool,
}

#[tonic::async_trait]
impl Script for Replacing {
    async fn request_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        exchange.send(reply::pick(&self.endpoint, &[])).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        let body = Bytes::from_static(self.text.as_bytes());
        let response = CommonResponse {
            status: ResponseStatus::ContinueAndReplace.into(),
            header_mutation: Some(reply::mutation(&[("x-replaced", "1")])),
            body_mutation: Some(BodyMutation { mutation: Some(Mutation::Body(body)) }),
            ..CommonResponse::default()
        };
        let message = Reply::ResponseHeaders(HeadersResponse { response: Some(response) });
        exchange.send(ProcessingResponse { response: Some(message), ..ProcessingResponse::default() }).await?;
        if self.closes { Err(End::Close) } else { Ok(()) }
    }

    /// Replies to a body are not asked for any more.
    async fn response_body(&self, exchange: &mut Exchange, _body: &HttpBody) -> Answer {
        exchange.send(reply::response_body("more".into(), true)).await
    }
}

fn by_body(config: &mut Config) {
    epp(config).response_to_picker = ResponseToPicker::Body;
}

async fn scene(
    back: Back,
    way: (Front, penstock_agent::config::SteeringMode),
    text: &'static str,
    closes: bool,
) -> Scene {
    let picker = |all: &[std::net::SocketAddr]| Replacing { endpoint: all[0].to_string(), text, closes };
    Scene::with(way.0, back, picker, |config| {
        config.steering.mode = way.1;
        by_body(config);
    })
    .await
}

fn request(method: &str, plan: &Plan) -> Request {
    Request::new(method, "/").header("x-test-plan", plan.header())
}

fn plan(framing: Framing, size: u64) -> Plan {
    let fields = [("content-type", "text/plain"), ("etag", "\"7\""), ("content-digest", "sha-256=:x:")];
    let headers = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Plan { size, framing, headers, ..Plan::default() }
}

fn assert_replaced(response: &Response, text: &str, what: &str) {
    assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete), "{what}");
    assert_eq!((response.text().as_str(), response.header("x-replaced")), (text, Some("1")), "{what}");
    assert!(response.header("content-length").is_none_or(|length| length == text.len().to_string()), "{what}");
    assert_eq!((response.header("content-digest"), response.header("etag")), (None, Some("W/\"7\"")), "{what}");
}

#[tokio::test]
async fn body_in_the_reply_to_the_head_replaces_the_endpoints() {
    for way in WAYS {
        for (text, closes) in [("the whole body", false), ("the whole body", true), ("", false)] {
            let scene = scene(Back::Http1, way, text, closes).await;
            let mut requests = 0;
            for framing in FRAMINGS {
                for size in [1, 300_000, 3_000_000] {
                    let what = format!("{way:?} {framing:?} {size} {text:?} {closes}");
                    let response = scene.request(&request("GET", &plan(framing, size))).await;
                    assert_replaced(&response, text, &what);
                    requests += 1;
                }
            }
            let end = if closes { StreamEnd::Script } else { StreamEnd::HalfClosed };
            eventually(SOON, || scene.epp.streams_ended(end) == requests).await;
            if !closes {
                let told = |stream: &penstock_tests::scripted_epp::StreamRecord| stream.response_body().1;
                assert!(scene.epp.streams().iter().all(|stream| told(stream) == 0), "{way:?}");
            }
        }
    }
}

#[tokio::test]
async fn replaced_body_of_http2_endpoint_keeps_its_trailers() {
    for front in [Front::Http1, Front::Http2, Front::Tls2] {
        let scene = scene(Back::Http2, (front, WAYS[0].1), "the whole body", false).await;
        let trailers = vec![("x-last".to_owned(), "1".to_owned())];
        let plan = Plan { trailers: trailers.clone(), ..plan(Framing::Chunked, 100_000) };
        let response = scene.request(&request("GET", &plan)).await;
        assert_replaced(&response, "the whole body", &format!("{front:?}"));
        assert_eq!(response.read.trailers, trailers, "{front:?}");
    }
}

/// An empty body is a body; a response to HEAD has none.
#[tokio::test]
async fn empty_body_is_replaced_and_no_body_is_not() {
    for (back, way) in [(Back::Http1, WAYS[3]), (Back::Http1, WAYS[4]), (Back::Http2, WAYS[3]), (Back::Http2, WAYS[4])]
    {
        let scene = scene(back, way, "the whole body", false).await;
        let empty = plan(Framing::ContentLength, 0);
        let what = format!("{back:?} {way:?}");
        assert_replaced(&scene.request(&request("GET", &empty)).await, "the whole body", &what);
        for (method, status) in [("HEAD", 200), ("GET", 204), ("GET", 304)] {
            let response = scene.request(&request(method, &Plan { status, ..empty.clone() })).await;
            assert_eq!((response.status(), response.read.end), (status, BodyEnd::Complete), "{what}");
            assert_eq!((response.text().as_str(), response.header("x-replaced")), ("", Some("1")), "{what} {method}");
        }
    }
}

/// A picker that changes the head in its replies to the body.
struct Late(String);

#[tonic::async_trait]
impl Script for Late {
    async fn request_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        exchange.send(reply::pick(&self.0, &[])).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        let mut message = reply::response_body(body.body.clone(), body.end_of_stream);
        if let Some(Reply::ResponseBody(body)) = &mut message.response
            && let Some(response) = &mut body.response
        {
            response.header_mutation = Some(reply::mutation(&[("x-late", "1"), ("content-type", "a/b")]));
        }
        exchange.send(message).await
    }
}

/// The protocol says so for bodies in full duplex, also where the head still waits.
#[tokio::test]
async fn change_of_the_head_in_a_reply_to_the_body_has_no_effect() {
    for way in [WAYS[0], WAYS[4]] {
        let late = |all: &[std::net::SocketAddr]| Late(all[0].to_string());
        let scene = Scene::with(way.0, Back::Http1, late, by_body).await;
        for framing in FRAMINGS {
            let response = scene.request(&request("GET", &plan(framing, 1000))).await;
            assert_eq!((response.status(), response.read.end, response.body.len()), (200, BodyEnd::Complete, 1000));
            assert_eq!((response.header("x-late"), response.header("content-type")), (None, Some("text/plain")));
        }
    }
}
