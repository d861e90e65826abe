//! Kept endpoint connections, and requests whose connection closes under them.

use std::{net::SocketAddr, time::Duration};

use penstock_agent::config::{SteeringMode, Timeouts};
use penstock_tests::{
    Client, ModelServer, Plan, Request, ScriptedEpp, Stage,
    agent::{TestAgent, builtin_pool, epp_pool},
    content::Fnv,
    eventually,
    model_server::{After, Options},
    scripted_epp::Production,
    stage::{echo, json},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::watch,
};

use crate::SOON;

#[tokio::test]
async fn connection_closed_between_requests_is_replaced() {
    let mut stage = Stage::new(|all| Production::new(&all[..1])).await;
    let silent = Plan { size: 100, after: After::SilentClose, ..Plan::default() };
    let body = json("m", 200_000);
    for _ in 0..3 {
        assert_eq!(stage.request(&silent.request()).await.status(), 200);
        assert_eq!(stage.request(&echo(body.clone())).await.echoed().body_hash, Fnv::of(&body).value());
        assert_eq!(stage.request(&silent.request()).await.header("x-request-count"), Some("2"));
    }
}

#[tokio::test]
async fn connection_with_close_header_is_not_kept() {
    let mut stage = Stage::new(|all| Production::new(&all[..1])).await;
    let closing = Plan { size: 100, after: After::Close, ..Plan::default() };
    for _ in 0..3 {
        let response = stage.request(&closing.request()).await;
        assert_eq!((response.header("x-request-count"), response.header("connection")), (Some("1"), None));
    }
    assert_eq!(stage.agent.metric("penstock_endpoint_retries_total", &[]), 0.0);
}

/// D4: uvicorn closes after five seconds, so the agent's own limit is lower and must hold.
#[tokio::test]
async fn idle_connection_is_closed_before_endpoint_closes() {
    let uvicorn = Duration::from_secs(5);
    assert!(Timeouts::default().endpoint_keep_alive <= uvicorn - Duration::from_secs(1));
    let patient = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
    let agent = TestAgent::start(builtin_pool(&[patient.addr]), SteeringMode::Off, |config| {
        config.timeouts.endpoint_keep_alive = Duration::from_millis(200);
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    for connection in 1..=2 {
        assert_eq!(client.request(&echo("{}")).await.unwrap().echoed().count, 1);
        eventually(SOON, || patient.connections_open() == 0).await;
        assert_eq!(patient.connections_accepted(), connection);
    }
    assert_eq!(agent.count("penstock_endpoint_retries_total", &[]), 0);
}

/// Answers the first request of each connection; answers the second with `last_words` and closes. Counts connections.
async fn one_request_each(last_words: &'static [u8]) -> (SocketAddr, watch::Receiver<u64>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (accepted, connections) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            accepted.send_modify(|accepted| *accepted += 1);
            tokio::spawn(async move {
                for answer in [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".as_slice(), last_words] {
                    let mut request = Vec::new();
                    while !request.ends_with(b"END\"}") {
                        if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let _ = stream.write_all(answer).await;
                }
            });
        }
    });
    (addr, connections)
}

/// Sends two POSTs on one client connection; the second meets the end of the kept connection.
async fn second_of_two(method: &str, last_words: &'static [u8]) -> (penstock_tests::Response, u64) {
    let (endpoint, connections) = one_request_each(last_words).await;
    let epp = ScriptedEpp::start(Production::new(&[endpoint])).await.unwrap();
    let pool = epp_pool(&[endpoint], epp.addr, penstock_agent::config::FailureMode::Closed);
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    let body = r#"{"model":"m","prompt":"END"}"#;
    let request = Request::new(method, "/v1/completions").header("content-type", "application/json").body(body);
    assert_eq!(client.request(&request).await.unwrap().text(), "ok");
    let response = client.request(&request).await.unwrap();
    drop(agent);
    let connections = *connections.borrow();
    (response, connections)
}

/// The endpoint has read the request: an idempotent one is retried on another connection, a POST is not.
#[tokio::test]
async fn acknowledged_request_on_kept_connection_is_retried_if_idempotent() {
    let (response, connections) = second_of_two("PUT", b"").await;
    assert_eq!((response.status(), response.text().as_str(), connections), (200, "ok", 2));
    let (response, connections) = second_of_two("POST", b"").await;
    assert_eq!((response.status(), response.error_code().as_str(), connections), (502, "endpoint_closed", 1));
}

#[tokio::test]
async fn response_after_first_byte_is_not_retried() {
    for method in ["PUT", "POST"] {
        let (response, connections) = second_of_two(method, b"H").await;
        assert_eq!((response.status(), response.error_code().as_str(), connections), (502, "endpoint_closed", 1));
    }
}
