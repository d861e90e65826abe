//! What routes change in requests, and redirects: as the EPP, the endpoint and the client see them.

use std::time::Duration;

use penstock_agent::config::{Config, FailureMode, PickPer, Pool, Route, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Plan, Request, ScriptedEpp, Stage,
    agent::{TestAgent, builtin_pool, epp_pool},
    eventually,
    model_server::HeadWrites,
    scripted_epp::{Answering, Production, reply},
    stage::{echo, json},
};

use crate::SOON;

/// The routes of this text, to the pool `default`.
fn routes(text: &str) -> Vec<Route> {
    let pools = "[[pools]]\nname = \"default\"\nendpoints = [\"10.0.0.1:1\"]\n";
    Config::parse(&format!("{pools}{text}"), "test.toml").unwrap_or_else(|errors| panic!("{errors}")).routes
}

#[tokio::test]
async fn rewritten_request_reaches_epp_and_endpoint() {
    let text = r#"
        [[routes]]
        path_prefix = "/team"
        pool = "default"
        [routes.rewrite]
        host = "models.internal"
        path_prefix = "/test"
        [routes.request_headers]
        set = [{ name = "x-team", value = "red" }]
        add = [{ name = "x-seen", value = "agent" }]
        remove = ["x-debug"]
    "#;
    let mut stage = Stage::with(Production::new, |config| config.routes = routes(text)).await;
    let request = Request::post("/team/echo?a=%2F", json("m", 10)).header("content-type", "application/json");
    let request = request.header("host", "llm.example:8080").header("x-team", "blue").header("x-team", "green");
    let request = request.header("x-seen", "client").header("x-debug", "1");
    // The second request of the connection is the client's own again.
    for _ in 0..2 {
        let echoed = stage.request(&request).await.echoed();
        assert_eq!(echoed.target, "/test/echo?a=%2F");
        let all = |name: &str| -> Vec<_> {
            let named = echoed.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
            named.map(|(_, value)| value.as_str()).collect()
        };
        assert_eq!(all("host"), ["models.internal"]);
        assert_eq!((all("x-team"), all("x-debug").len()), (vec!["red"], 0));
        assert_eq!(all("x-seen"), ["client", "agent"]);
        assert_eq!(all("x-forwarded-host"), ["llm.example:8080"], "the client's host is kept");
        assert_eq!(all("x-gateway-model-name"), ["m"], "the model is still read");
    }
    for stream in stage.epp.streams() {
        let told = stream.request_headers();
        let value = |name: &str| told.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        assert_eq!((value(":path"), value("x-team")), (Some("/test/echo?a=%2F"), Some("red")), "{told:?}");
    }
}

/// A change that is not possible is the client's error, and the connection of others stays usable.
#[tokio::test]
async fn target_that_becomes_too_long_returns_414() {
    let long = format!("/{}", "p".repeat(60_000));
    let text =
        format!("[[routes]]\npath_prefix = \"/\"\npool = \"default\"\n[routes.rewrite]\npath_prefix = \"{long}\"");
    let mut stage = Stage::with(Production::new, |config| config.routes = routes(&text)).await;
    let response = stage.request(&Request::get(&format!("/{}", "q".repeat(8000)))).await;
    assert_eq!((response.status(), response.error_code().as_str()), (414, "request_line_too_long"));
    assert_eq!(stage.requests(), (0, 0));
}

#[tokio::test]
async fn redirect_answers_without_endpoint_and_keeps_the_connection() {
    let text = r#"
        [[routes]]
        path_prefix = "/old"
        [routes.redirect]
        scheme = "https"
        path_prefix = "/new"
        status = 308
        [[routes]]
        query = [{ name = "beta", value = "1" }]
        [routes.redirect]
        host = "beta.example"
        port = 8443
    "#;
    let mut stage = Stage::with(Production::new, |config| config.routes = routes(text)).await;
    let rows = [
        ("/old/chat?x=1", 308, "https://llm.example/new/chat?x=1"),
        ("/v1?beta=1", 302, "http://beta.example:8443/v1?beta=1"),
    ];
    for (target, status, location) in rows {
        for method in ["GET", "HEAD", "DELETE"] {
            let request = Request::new(method, target).header("host", "llm.example:80");
            let response = stage.request(&request).await;
            assert_eq!((response.status(), response.header("location")), (status, Some(location)));
            assert_eq!((response.body.len(), response.header("connection")), (0, None), "{method}");
        }
    }
    // A request with a body is answered before its body was read, so its connection ends.
    let response = stage.request(&Request::post("/old", json("m", 10)).header("host", "h")).await;
    assert_eq!((response.status(), response.header("connection")), (308, Some("close")));
    assert_eq!((stage.requests(), stage.epp.streams_started()), ((0, 0), 0));
    let counted = || stage.agent.count("penstock_requests_total", &[r#"reason="redirected""#]);
    eventually(SOON, || counted() == 7).await;
}

/// A pinned connection relays bytes without parsing them, so it could not change the later requests.
#[tokio::test]
async fn connection_is_not_pinned_if_the_route_changes_requests() {
    let server = ModelServer::start(Default::default()).await.unwrap();
    let picked = server.addr.to_string();
    let epp = ScriptedEpp::start(Answering::new(move |_| vec![reply::pick(&picked, &[])])).await.unwrap();
    let pool = epp_pool(&[server.addr], epp.addr, FailureMode::Closed);
    let text =
        "[[routes]]\npool = \"default\"\n[routes.request_headers]\nset = [{ name = \"x-team\", value = \"red\" }]";
    let agent = TestAgent::start(Pool { pick_per: PickPer::Connection, ..pool }, SteeringMode::Off, |config| {
        config.routes = routes(text);
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    for _ in 0..3 {
        let echoed = client.request(&echo("{}").header("x-team", "blue")).await.unwrap().echoed();
        assert_eq!(echoed.header("x-team"), Some("red"));
    }
    assert_eq!((epp.streams_started(), agent.metric("penstock_pinned_connections", &[])), (3, 0.0));
}

/// `timeouts.dispatch` counts from the dispatch, so the time that an upload takes does not count.
#[tokio::test]
async fn dispatch_timeout_begins_after_the_upload() {
    let server = ModelServer::start(Default::default()).await.unwrap();
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |config| {
        config.timeouts.dispatch = Some(Duration::from_millis(600));
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    let slow = echo(json("any", 3000)).piecewise(2000, Duration::from_millis(900));
    assert_eq!(client.request(&slow).await.unwrap().status(), 200);
    let head = HeadWrites { split_at: Some(0), pause_us: 1_500_000, ..HeadWrites::default() };
    let response = client.request(&Plan { head, ..Plan::default() }.request()).await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (504, "request_timeout"));
}
