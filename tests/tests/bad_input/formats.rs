//! The agent's error responses in the requested format, each with its reason.

use penstock_agent::config::ErrorFormat;
use penstock_tests::{Request, client::Response};

use crate::setting::{Setting, closed, error, post};

/// A request with malformed JSON.
fn bad(accept: Option<&str>) -> Request {
    let request = Request::post("/test/echo", "{").header("content-type", "application/json");
    accept.into_iter().fold(request, |request, accept| request.header("accept", accept))
}

fn is_plain(response: &Response) -> bool {
    let (kind, text) = (response.header("content-type").unwrap(), response.text());
    let plain = kind == "text/plain; charset=utf-8" && text.ends_with("\nreason: json\n") && text.contains("byte 1");
    assert!(plain || error(response).0 == "json", "{response:?}");
    assert_eq!((response.status(), response.header("x-penstock-reason")), (400, Some("json")));
    plain
}

#[tokio::test]
async fn accept_header_selects_json_or_text() {
    for format in [ErrorFormat::OpenAi, ErrorFormat::Plain] {
        let mut setting = Setting::start(|config| config.errors.format = format).await;
        let default = format == ErrorFormat::Plain;
        for (accept, plain) in [
            (None, default),
            (Some("*/*"), default),
            (Some("text/event-stream"), default),
            (Some("text/plain"), true),
            (Some("text/plain, application/json;q=0.9"), true),
            (Some("text/*;q=0.5, application/json;q=0.4"), true),
            (Some("application/json"), false),
            (Some("application/json, text/plain;q=0.9, */*;q=0.1"), false),
        ] {
            let response = setting.client().await.request(&bad(accept)).await.unwrap();
            assert_eq!(is_plain(&response), plain, "{format:?} {accept:?}");
        }
        setting.unharmed().await;
    }
}

/// An unreadable head carries no Accept.
#[tokio::test]
async fn malformed_head_gets_configured_format() {
    for (format, kind) in [(ErrorFormat::OpenAi, "application/json"), (ErrorFormat::Plain, "text/plain; charset=utf-8")]
    {
        let setting = Setting::start(|config| config.errors.format = format).await;
        let (response, mut client) = setting.answer(b"GET / HTTP/1.1\r\naccept: text/plain\r\n\r\n").await;
        assert_eq!((response.status(), response.header("content-type")), (400, Some(kind)));
        assert_eq!(response.header("x-penstock-reason"), Some("host_missing"));
        assert!(response.text().contains("host_missing"));
        closed(&mut client).await;
    }
}

/// Anthropic clients expect another shape; the reason is in the header.
#[tokio::test]
async fn messages_api_errors_have_anthropic_shape() {
    let setting = Setting::start(|config| config.limits.body_bytes = 100).await;
    for (path, anthropic) in [
        ("/v1/messages", true),
        ("/v1/messages?beta=true", true),
        ("/v1/messages/count_tokens", true),
        ("/tenant/v1/messages", true),
        ("/v1/chat/completions", false),
        ("/v1/threads/1/messages", false),
    ] {
        let post = |body: &'static str| {
            let request = Request::post(path, body).header("content-type", "application/json");
            request.header("x-request-id", "mine")
        };
        let too_large = Request::post(path, vec![b' '; 200]).header("x-request-id", "mine");
        for (request, status, reason, kind) in
            [(post("{"), 400, "json", "invalid_request_error"), (too_large, 413, "body_too_large", "request_too_large")]
        {
            let response = setting.client().await.request(&request).await.unwrap();
            assert_eq!((response.status(), response.header("x-penstock-reason")), (status, Some(reason)), "{path}");
            let body: serde_json::Value = response.json().unwrap();
            if anthropic {
                let shape = (&body["type"], &body["error"]["type"], &body["request_id"]);
                assert_eq!(shape, (&"error".into(), &kind.into(), &"mine".into()), "{path}");
                assert!(body["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{path}");
            } else {
                assert_eq!(body["error"]["code"], reason, "{path}");
            }
        }
        // A rejected head still has a usable path.
        let (response, _) = setting.answer(format!("POST {path} HTTP/1.1\r\n\r\n").as_bytes()).await;
        let body: serde_json::Value = response.json().unwrap();
        assert_eq!((response.header("x-penstock-reason"), body["type"] == "error"), (Some("host_missing"), anthropic));
    }
}

/// An error response to HEAD carries the reason header without a body.
#[tokio::test]
async fn head_request_error_carries_reason_header() {
    let setting = Setting::start(|config| config.limits.body_bytes = 10).await;
    let mut client = setting.client().await;
    let head = Request::new("HEAD", "/test/echo").body(vec![0; 11]);
    client.send(&head).await.unwrap();
    let response = client.response().await.unwrap();
    assert_eq!((response.status(), response.header("x-penstock-reason")), (413, Some("body_too_large")));
    assert!(response.body.is_empty());
    let (response, _) = setting.answer(&post("content-length: 11\r\n", "")).await;
    assert_eq!(response.header("x-penstock-reason"), Some("body_too_large"));
}
