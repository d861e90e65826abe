//! The form of the answer to a refused head: it depends on the method and on fields that were read before the fault was found.

use penstock_agent::config::Config;
use penstock_tests::{Client, Http2Client, Request};

use crate::setting::{Setting, closed};

/// Requests whose heads are refused in both protocols, with the status.
fn faults(method: &str) -> Vec<(u16, Request)> {
    let request = || Request::new(method, "/refused");
    let many = (0..200).fold(request(), |request, number| request.header(&format!("x-{number}"), "1"));
    vec![
        (417, request().header("expect", "the unexpected")),
        (400, request().header("host", "user@host")),
        (431, request().header("x-large", "x".repeat(10_000))),
        (431, many),
    ]
}

async fn start(configure: impl FnOnce(&mut Config)) -> Setting {
    Setting::start(|config| {
        config.limits.head_bytes = 8192;
        configure(config);
    })
    .await
}

/// RFC 9110 §9.3.2: otherwise HTTP/2 clients see a malformed response, and HTTP/1.1 clients bytes after it.
#[tokio::test]
async fn refused_head_of_head_request_is_answered_without_content() {
    let mut setting = start(|_| {}).await;
    for method in ["HEAD", "GET"] {
        for (status, request) in faults(method) {
            let mut http2 = Http2Client::connect(setting.agent.addr).await.unwrap();
            let response = http2.request(&request).await.unwrap();
            assert_eq!((response.status(), response.body.is_empty()), (status, method == "HEAD"), "{response:?}");
            // The connection serves other requests.
            assert_eq!(http2.request(&Request::get("/test/echo")).await.unwrap().status(), 200);

            let mut client = Client::connect(setting.agent.addr).await.unwrap();
            let response = client.request(&request).await.unwrap();
            assert_eq!((response.status(), response.body.is_empty()), (status, method == "HEAD"), "{response:?}");
            let length = response.header("content-length").unwrap().parse::<usize>().unwrap();
            assert!(length > 50, "{response:?}");
            closed(&mut client).await;
        }
    }
    setting.unharmed().await;
}

#[tokio::test]
async fn refused_head_is_answered_with_request_id() {
    let mut setting = start(|config| config.headers.request_id_to_client = true).await;
    for (status, request) in faults("POST") {
        let mut http2 = Http2Client::connect(setting.agent.addr).await.unwrap();
        let response = http2.request(&request).await.unwrap();
        assert_eq!((response.status(), response.header("x-request-id").map(str::len)), (status, Some(36)));
        let response = http2.request(&request.clone().header("x-request-id", "mine")).await.unwrap();
        assert_eq!((response.status(), response.header("x-request-id")), (status, Some("mine")));

        let response = Client::connect(setting.agent.addr).await.unwrap().request(&request).await.unwrap();
        assert_eq!((response.status(), response.header("x-request-id").map(str::len)), (status, Some(36)));
    }
    setting.unharmed().await;
}

#[tokio::test]
async fn refused_head_of_grpc_request_is_answered_in_grpc() {
    let mut setting = start(|_| {}).await;
    let mut http2 = Http2Client::connect(setting.agent.addr).await.unwrap();
    for (_, request) in faults("POST") {
        let response = http2.request(&request.header("content-type", "application/grpc")).await.unwrap();
        assert_eq!((response.status(), response.header("content-type")), (200, Some("application/grpc")));
        assert!(response.header("grpc-status").is_some_and(|status| status != "0") && response.body.is_empty());
    }
    setting.unharmed().await;
}
