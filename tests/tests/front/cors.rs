//! Requests of browsers for web pages of other origins.

use penstock_agent::config::{Cors, OriginPattern};
use penstock_tests::{
    Plan, Request, Response, eventually,
    scripted_epp::{Answering, reply},
    stage::{echo, json},
};

use crate::{
    SOON,
    scene::{Back, Front, Scene, first},
};

const PAGE: &str = "https://app.example";

fn cors() -> Cors {
    Cors {
        allow_origins: vec![OriginPattern::Exact(PAGE.to_owned())],
        expose_headers: vec![http::HeaderName::from_static("x-request-id")],
        allow_credentials: true,
        ..Cors::default()
    }
}

async fn scene(front: Front) -> Scene {
    Scene::with(front, Back::Http1, first, |config| config.listen.cors = Some(cors())).await
}

fn preflight(origin: &str) -> Request {
    Request::new("OPTIONS", "/v1/chat/completions")
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type")
}

/// The fields that tell a page whether it may read the response.
fn granted(response: &Response) -> [Option<&str>; 4] {
    ["access-control-allow-origin", "access-control-allow-credentials", "access-control-expose-headers", "vary"]
        .map(|name| response.header(name))
}

const TO_THE_PAGE: [Option<&str>; 4] = [Some(PAGE), Some("true"), Some("x-request-id"), Some("origin")];
const TO_NO_PAGE: [Option<&str>; 4] = [None, None, None, Some("origin")];

#[tokio::test]
async fn preflight_is_answered_by_the_agent() {
    for front in [Front::Http1, Front::Http2] {
        let scene = scene(front).await;
        let mut client = scene.client().await;
        for _ in 0..2 {
            let response = client.request(&preflight(PAGE)).await.unwrap();
            assert_eq!((response.status(), response.body.len()), (204, 0));
            assert_eq!(response.header("access-control-allow-origin"), Some(PAGE));
            assert_eq!(response.header("access-control-allow-methods"), Some("GET, HEAD, POST"));
            assert_eq!(response.header("access-control-allow-headers"), Some("authorization, content-type"));
            assert_eq!(response.header("access-control-max-age"), Some("600"));
        }
        let refused = client.request(&preflight("https://evil.example")).await.unwrap();
        assert_eq!((refused.status(), refused.header("access-control-allow-origin")), (204, None));
        assert_eq!(refused.header("access-control-allow-methods"), None);
        // With a body, which is not read as the next request.
        let body = "GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n";
        assert_eq!(client.request(&preflight(PAGE).body(body)).await.unwrap().status(), 204);
        assert_eq!(scene.endpoint.requests(), 0);
        let answered = || scene.agent.count("penstock_requests_total", &["reason=\"cors_preflight\""]);
        eventually(SOON, || answered() == 4).await;
        assert_eq!(scene.epp.streams().len(), 0);
        // Any other OPTIONS is forwarded.
        let options = Request::new("OPTIONS", "/test/echo").header("origin", PAGE);
        assert_eq!(scene.request(&options).await.echoed().method, "OPTIONS");
    }
}

/// Responses of endpoints, of the EPP and of the agent.
#[tokio::test]
async fn every_response_has_the_fields_of_its_origin() {
    for front in [Front::Http1, Front::Http2] {
        let refusing = |_: &[_]| Answering::new(|_| vec![reply::immediate(429, &[], "busy")]);
        let epps = Scene::with(front, Back::Http1, refusing, |config| config.listen.cors = Some(cors())).await;
        let scene = scene(front).await;
        let mine = ["access-control-allow-origin", "access-control-allow-headers"];
        let headers = mine.map(|name| (name.to_owned(), "*".to_owned())).into();
        let plan = Plan { size: 1000, headers, ..Plan::default() };
        for (origin, expected) in [(PAGE, TO_THE_PAGE), ("https://evil.example", TO_NO_PAGE), ("null", TO_NO_PAGE)] {
            let asked = |request: Request| request.header("origin", origin);
            let response = scene.request(&asked(plan.request())).await;
            assert_eq!((response.status(), granted(&response)), (200, expected), "{front:?} {origin}");
            assert_eq!(response.header("access-control-allow-headers"), None);
            let response = epps.request(&asked(echo(json("m", 10)))).await;
            assert_eq!((response.status(), granted(&response)), (429, expected), "{front:?} {origin}");
            let invalid = asked(echo("{"));
            let response = scene.request(&invalid).await;
            assert_eq!((response.status(), granted(&response)), (400, expected), "{front:?} {origin}");
        }
        let response = scene.request(&plan.request()).await;
        assert_eq!(granted(&response), TO_NO_PAGE);
    }
}

#[tokio::test]
async fn fields_and_preflights_pass_without_the_section() {
    let scene = Scene::with(Front::Http1, Back::Http1, first, |_| {}).await;
    let headers = vec![("access-control-allow-origin".to_owned(), "*".to_owned())];
    let plan = Plan { size: 10, headers, ..Plan::default() };
    let response = scene.request(&plan.request().header("origin", PAGE)).await;
    assert_eq!(granted(&response), [Some("*"), None, None, None]);
    assert_ne!(scene.request(&preflight(PAGE)).await.status(), 204);
    assert_eq!(scene.endpoint.requests(), 2);
}
