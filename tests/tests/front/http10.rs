//! Clients of HTTP/1.0 that keep their connections: such a client waits for the close of a connection unless the answer says that it
//! stays open. The agent's own answers say so as forwarded responses do.

use penstock_agent::config::{Config, Cors, ModelList, OriginPattern, Pool, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Plan, Refusing,
    agent::{TestAgent, builtin_pool},
    client::ConnectionEnd,
    model_server::Options,
    scripted_epp::{Answering, reply},
};

use crate::scene::{Back, Front, Scene};

/// Sends the same request as each version, twice with and once without `keep-alive`, all on one connection each. Asserts what the
/// answers say of it.
async fn tells_what_becomes_of_the_connection(agent: &TestAgent, wire: &str, status: u16) {
    let (line, rest) = wire.split_once("\r\n").unwrap();
    let rows = [
        ("HTTP/1.0", "", "connection: keep-alive\r\n", Some("keep-alive")),
        ("HTTP/1.1", "connection: close\r\n", "", None),
    ];
    for (version, closing, keeping, kept) in rows {
        let request = |fields: &str| format!("{line} {version}\r\nhost: x\r\n{fields}{rest}");
        let mut client = Client::connect(agent.addr).await.unwrap();
        for (fields, said) in [(keeping, kept), (keeping, kept), (closing, Some("close"))] {
            client.send_raw(request(fields).as_bytes()).await.unwrap();
            let response = client.response().await.unwrap();
            assert_eq!((response.status(), response.header("connection")), (status, said), "{version} {wire}");
        }
        assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin, "{version} {wire}");
    }
}

#[tokio::test]
async fn own_answers_say_that_the_connection_stays_open() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let refusing = Refusing::new().unwrap();
    let text = r#"
        [[pools]]
        name = "served"
        endpoints = ["10.0.0.1:1"]
        [[pools]]
        name = "dead"
        endpoints = ["10.0.0.1:1"]
        [[routes]]
        path_prefix = "/dead"
        pool = "dead"
        [[routes]]
        path_prefix = "/old"
        [routes.redirect]
        path_prefix = "/new"
        [[routes]]
        pool = "served"
    "#;
    let routes = Config::parse(text, "test.toml").unwrap_or_else(|errors| panic!("{errors}")).routes;
    let agent = TestAgent::start(builtin_pool(&[]), SteeringMode::Off, |config| {
        let pool = |name: &str, address| Pool { name: name.to_owned(), ..builtin_pool(&[address]) };
        config.pools = vec![pool("served", server.addr), pool("dead", refusing.addr)];
        config.routes = routes;
        config.models.list = ModelList::Merged;
        let allow_origins = vec![OriginPattern::Exact("https://app.example".to_owned())];
        config.listen.cors = Some(Cors { allow_origins, ..Cors::default() });
    });
    let preflight = "OPTIONS /test/echo\r\norigin: https://app.example\r\naccess-control-request-method: POST\r\n\r\n";
    for (wire, status) in [
        ("GET /dead\r\n\r\n", 502),
        ("POST /dead\r\ncontent-length: 5\r\n\r\nhello", 502),
        ("OPTIONS /test/echo\r\nmax-forwards: 0\r\n\r\n", 200),
        (preflight, 204),
        ("GET /old\r\n\r\n", 302),
        ("GET /v1/models\r\n\r\n", 200),
        // Forwarded, for comparison.
        ("GET /test/echo\r\n\r\n", 200),
    ] {
        tells_what_becomes_of_the_connection(&agent, wire, status).await;
    }
}

#[tokio::test]
async fn replies_of_the_epp_say_that_the_connection_stays_open() {
    let busy = |_: &[_]| Answering::new(|_| vec![reply::immediate(429, &[], "busy")]);
    let scene = Scene::with(Front::Http1, Back::Http1, busy, |_| {}).await;
    let plan = Plan { size: 1000, ..Plan::default() };
    let get = format!("GET /test/body\r\nx-test-plan: {}\r\n\r\n", plan.header());
    for wire in [&get, "POST /test/echo\r\ncontent-length: 5\r\n\r\nhello"] {
        tells_what_becomes_of_the_connection(&scene.agent, wire, 429).await;
    }
}
