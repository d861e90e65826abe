//! Runs Python's `openai` package against the agent with a picker and steering on.

use std::{path::Path, process::Command, time::Duration};

use penstock_agent::config::{FailureMode, ModelPattern, PathPattern, Pool, Route, SteeringMode};
use penstock_tests::{
    Process,
    agent::{TestAgent, epp_pool},
    eventually,
    model_server::{ModelServer, Options},
    scripted_epp::{Endpoints, Production, ScriptedEpp},
};

/// The steps of `client.py`, in order.
const STEPS: [&str; 8] =
    ["chat", "chat streamed", "text", "models", "errors", "kept connection", "abandoned", "20 streams at once"];

#[tokio::test]
async fn openai_python_package_works() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let python = root.join("target/venv/bin/python");
    assert!(python.is_file(), "{} not found: run `cargo xtask setup --tests`", python.display());

    let (one, two) =
        (ModelServer::start(Options::default()).await.unwrap(), ModelServer::start(Options::default()).await.unwrap());
    let endpoints = [one.addr, two.addr];
    let epp = ScriptedEpp::start(Production::over(Endpoints::new(&endpoints))).await.unwrap();
    // A port that was free a moment ago: connections to it are refused.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let agent = TestAgent::start(epp_pool(&endpoints, epp.addr, FailureMode::Closed), SteeringMode::Auto, |config| {
        let unpickable = epp_pool(&endpoints, gone, FailureMode::Closed);
        config.pools.push(Pool { name: "unpickable".to_owned(), ..unpickable });
        let model =
            |model: &str, pool: &str| Route { models: vec![ModelPattern::Exact(model.to_owned())], ..Route::to(pool) };
        let below = |path: &str| Route { path: Some(PathPattern::Prefix(path.to_owned())), ..Route::to("default") };
        config.routes = vec![
            model("sample", "default"),
            model("unpickable", "unpickable"),
            below("/v1/models"),
            below("/v1/nothing"),
        ];
    });

    let mut command = Command::new(&python);
    command.arg(root.join("tests/tests/openai/client.py")).arg(format!("http://{}/v1", agent.addr));
    // Proxy settings of the environment must not apply to loopback.
    command.env("NO_PROXY", "*");
    let mut client = Process::spawn(command).unwrap();
    let summary = client.line("all steps passed", Duration::from_secs(60)).await.unwrap();
    assert!(client.ended(Duration::from_secs(10)).await.unwrap().success(), "{:?}", client.output());
    let passed: Vec<String> =
        client.output().iter().filter_map(|line| line.strip_prefix("ok ").map(str::to_owned)).collect();
    assert_eq!(passed, STEPS, "{summary}");

    // Both endpoints served streams and some were steered. How many depends on the machine: on a busy one, a short stream arrives
    // whole before it can be steered. The agent counts a stream after it reclaims the flow, which may be after the client is done.
    let streams = || agent.metric("penstock_flows_total", &["path=\"local\"", "reason=\"event_stream\""]);
    eventually(Duration::from_secs(10), || streams() >= 1.0).await;
    assert!(one.requests() > 0 && two.requests() > 0, "{} and {}", one.requests(), two.requests());
}
