//! `GET /v1/models` for all pools at once.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue, header::AUTHORIZATION};
use penstock_agent::config::{Config, ModelList, ModelPattern, Pool, Route, SetField, SteeringMode};
use penstock_tests::{
    Client, Deaf, Http2Client, Http2Options, Http2Server, ModelServer, Refusing, Request, Response,
    agent::{TestAgent, builtin_pool},
    eventually,
    model_server::Options,
};

use crate::SOON;

async fn server(model: &str) -> ModelServer {
    ModelServer::start(Options { model: model.to_owned(), ..Options::default() }).await.unwrap()
}

fn pool(name: &str, addresses: &[SocketAddr]) -> Pool {
    Pool { name: name.to_owned(), ..builtin_pool(addresses) }
}

fn agent(pools: Vec<Pool>, adjust: impl FnOnce(&mut Config)) -> TestAgent {
    TestAgent::start(builtin_pool(&[]), SteeringMode::Off, |config| {
        config.models.list = ModelList::Merged;
        config.pools = pools;
        adjust(config);
    })
}

async fn ask(agent: &TestAgent) -> Response {
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.request(&Request::get("/v1/models").header("authorization", "Bearer secret")).await.unwrap()
}

fn ids(response: &Response) -> Vec<String> {
    assert_eq!(response.status(), 200, "{}", response.text());
    let list: serde_json::Value = response.json().unwrap();
    assert_eq!(list["object"], "list");
    list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn merged_list_has_the_models_of_every_pool_that_answers() {
    let (a, b, again) = (server("model-a").await, server("model-b").await, server("model-a").await);
    let (refusing, deaf) = (Refusing::new().unwrap(), Deaf::new().unwrap());
    let pools = vec![
        pool("a", &[a.addr]),
        pool("refusing", &[refusing.addr]),
        pool("b", &[b.addr]),
        pool("deaf", &[deaf.addr]),
        pool("again", &[again.addr]),
        pool("empty-but-for-dead", &[refusing.addr, deaf.addr]),
    ];
    let limit = Duration::from_millis(500);
    let agent = agent(pools, |config| {
        config.models.timeout = limit;
        let named = |name: &str| ModelPattern::Exact(name.to_owned());
        let models = vec![named("alias"), named("model-b"), ModelPattern::Prefix("x-".to_owned())];
        config.routes = vec![Route { models, ..Route::to("a") }, Route::to("b")];
        config.bbr.base_models.insert("adapter".to_owned(), "model-a".to_owned());
    });
    let begin = Instant::now();
    let response = ask(&agent).await;
    assert_eq!(ids(&response), ["model-a", "model-b", "alias", "adapter"]);
    // The endpoint that does not answer has half of the time, so that another one could be asked.
    assert!(begin.elapsed() >= limit / 2 && begin.elapsed() < 20 * limit, "{:?}", begin.elapsed());
    for server in [&a, &b, &again] {
        let [seen] = &server.seen()[..] else { panic!("{:?}", server.seen()) };
        assert_eq!((seen.target.as_str(), seen.header("authorization")), ("/v1/models", Some("Bearer secret")));
        assert!(seen.header("x-penstock-hop").is_some());
    }
    let mut http2 = Http2Client::connect(agent.addr).await.unwrap();
    assert_eq!(ids(&http2.request(&Request::get("/v1/models")).await.unwrap()).len(), 4);
    let answered = || agent.count("penstock_requests_total", &["reason=\"models\""]);
    eventually(SOON, || answered() == 2).await;
    // Other paths and methods are routed.
    let mut client = Client::connect(agent.addr).await.unwrap();
    let one = client.request(&Request::get("/v1/models/")).await.unwrap();
    assert_eq!(one.served_by(), Some(b.addr));
}

#[tokio::test]
async fn changes_of_a_route_do_not_reach_other_pools() {
    let (a, b) = (server("model-a").await, server("model-b").await);
    let agent = agent(vec![pool("a", &[a.addr]), pool("b", &[b.addr])], |config| {
        let mut route = Route::to("a");
        let value = |text: &'static str| HeaderValue::from_static(text);
        route.request_headers.set = vec![
            SetField { name: AUTHORIZATION, value: value("Bearer of-pool-a") },
            SetField { name: HeaderName::from_static("x-of-pool-a"), value: value("1") },
        ];
        config.routes = vec![route];
    });
    assert_eq!(ids(&ask(&agent).await), ["model-a", "model-b"]);
    for server in [&a, &b] {
        let [seen] = &server.seen()[..] else { panic!("{:?}", server.seen()) };
        assert_eq!((seen.header("authorization"), seen.header("x-of-pool-a")), (Some("Bearer secret"), None));
    }
}

#[tokio::test]
async fn list_is_that_of_one_pool_by_default() {
    let (a, b) = (server("model-a").await, server("model-b").await);
    let agent = agent(vec![pool("a", &[a.addr]), pool("b", &[b.addr])], |config| config.models = Default::default());
    assert_eq!(ids(&ask(&agent).await), ["model-a"]);
}

#[tokio::test]
async fn without_any_list_the_answer_says_so() {
    let refusing = Refusing::new().unwrap();
    let nobody = agent(vec![pool("a", &[refusing.addr])], |_| {});
    let response = ask(&nobody).await;
    assert_eq!((response.status(), response.error_code().as_str()), (503, "no_endpoint"));
    // This server has no list: its own answer is passed on.
    let server = Http2Server::start(Http2Options::default()).await.unwrap();
    let other = Pool { app_protocol: penstock_agent::config::AppProtocol::H2c, ..pool("a", &[server.addr]) };
    let response = ask(&agent(vec![other], |_| {})).await;
    assert!(response.status() >= 400, "{}", response.text());
}

/// Sends `answer` to each request.
fn answering(answer: &'static [u8]) -> SocketAddr {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).and_then(|_| stream.write_all(answer));
        }
    });
    addr
}

/// The endpoint's answer; the status, some fields (empty if there must be none) and the body that the client gets.
type Refusal = (&'static [u8], u16, &'static [(&'static str, &'static str)], &'static [u8]);

#[tokio::test]
async fn refusal_of_an_endpoint_keeps_its_fields_and_its_body() {
    let rows: [Refusal; 5] = [
        (
            b"HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Bearer\r\ncontent-type: text/plain\r\ncontent-length: 4\r\n\r\nnope",
            401,
            &[("www-authenticate", "Bearer"), ("content-type", "text/plain")],
            b"nope",
        ),
        (
            b"HTTP/1.1 403 Forbidden\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\nx-penstock-reason: x\r\n\r\n\x1f\x8b\x08\x00",
            403,
            &[("content-encoding", "gzip"), ("x-penstock-reason", "")],
            b"\x1f\x8b\x08\x00",
        ),
        (
            b"HTTP/1.1 404 Not Found\r\ncontent-type: text/html\r\ntransfer-encoding: chunked\r\n\r\n6\r\n<html>\r\n0\r\n\r\n",
            404,
            &[("content-type", "text/html"), ("content-length", "6"), ("transfer-encoding", "")],
            b"<html>",
        ),
        (
            b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 30\r\nconnection: x-own\r\nx-own: 1\r\n\r\n",
            503,
            &[("retry-after", "30"), ("x-own", ""), ("content-length", "0")],
            b"",
        ),
        (
            b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /v1/models/\r\ncontent-length: 0\r\n\r\n",
            307,
            &[("location", "/v1/models/")],
            b"",
        ),
    ];
    for (answer, status, fields, body) in rows {
        let agent = agent(vec![pool("a", &[answering(answer)])], |_| {});
        let response = ask(&agent).await;
        assert_eq!((response.status(), response.body.as_slice()), (status, body));
        for (name, value) in fields {
            assert_eq!(response.header(name).unwrap_or_default(), *value, "{status} {name}");
        }
    }
}

#[tokio::test]
async fn answer_that_is_no_list_is_the_fault_of_the_endpoint() {
    let rows: [&[u8]; 4] = [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
    ];
    for answer in rows {
        let response = ask(&agent(vec![pool("a", &[answering(answer)])], |_| {})).await;
        let found = (response.status(), response.header("x-penstock-reason"), response.error_code());
        assert_eq!(
            found,
            (502, Some("bad_response"), "bad_response".to_owned()),
            "{}",
            String::from_utf8_lossy(answer)
        );
    }
}

/// An agent behind the agent would otherwise ask it again, and so on.
#[tokio::test]
async fn agents_in_a_circle_end() {
    let a = server("model-a").await;
    let first = agent(vec![pool("a", &[a.addr])], |_| {});
    let second = agent(vec![pool("first", &[first.addr])], |_| {});
    assert_eq!(ids(&ask(&second).await), ["model-a"]);
    let itself = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let alone = agent(vec![pool("a", &[a.addr]), pool("itself", &[itself])], |config| config.listen.address = itself);
    assert_eq!(ids(&ask(&alone).await), ["model-a"]);
}
