//! Routing follows the pick.

use penstock_agent::config::{FailureMode, SteeringMode};
use penstock_tests::{
    agent::{TestAgent, epp_pool},
    client::{Client, Request},
    model_server::{ModelServer, Options},
    scripted_epp::{Endpoints, Production, ScriptedEpp},
};

#[tokio::test]
async fn a_request_goes_where_the_picker_says() {
    let (one, two) =
        (ModelServer::start(Options::default()).await.unwrap(), ModelServer::start(Options::default()).await.unwrap());
    let epp = ScriptedEpp::start(Production::over(Endpoints::new(&[two.addr]))).await.unwrap();
    let pool = epp_pool(&[one.addr, two.addr], epp.addr, FailureMode::Closed);
    let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
    let mut client = Client::connect(agent.addr).await.unwrap();
    let chat = Request::post("/v1/chat/completions", r#"{"model":"m"}"#).header("content-type", "application/json");
    for _ in 0..3 {
        let response = client.request(&chat).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.header("x-served-by"), Some(two.addr.to_string().as_str()));
    }
    assert_eq!((one.requests(), two.requests()), (0, 3));
}
