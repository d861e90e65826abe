//! The usual setup of picking tests: two endpoints, a scripted picker, an agent with one pool that asks the picker and fails
//! closed, and a client.

use std::net::SocketAddr;

use penstock_agent::config::{Config, Epp, FailureMode, Picker, SteeringMode};

use crate::agent::{TestAgent, epp_pool};
use crate::client::{Client, Request, Response};
use crate::content::Alphabet;
use crate::model_server::{Echo, ModelServer, Options};
use crate::scripted_epp::{Script, ScriptedEpp};

pub struct Stage {
    pub client: Client,
    pub agent: TestAgent,
    pub epp: ScriptedEpp,
    pub one: ModelServer,
    pub two: ModelServer,
}

impl Stage {
    /// `script` gets the endpoints' addresses. Bytes are relayed.
    pub async fn new<S: Script>(script: impl FnOnce(&[SocketAddr]) -> S) -> Self {
        Self::with(script, |_| {}).await
    }

    /// `adjust` changes the configuration for the test; steering is off and the pool is the first.
    pub async fn with<S: Script>(script: impl FnOnce(&[SocketAddr]) -> S, adjust: impl FnOnce(&mut Config)) -> Self {
        let one = ModelServer::start(Options::default()).await.expect("could not start an endpoint");
        let two = ModelServer::start(Options::default()).await.expect("could not start an endpoint");
        let epp = ScriptedEpp::start(script(&[one.addr, two.addr])).await.expect("could not start the picker");
        let pool = epp_pool(&[one.addr, two.addr], epp.addr, FailureMode::Closed);
        let agent = TestAgent::start(pool, SteeringMode::Off, adjust);
        let client = Client::connect(agent.addr).await.expect("could not connect to the agent");
        Self { client, agent, epp, one, two }
    }

    pub async fn request(&mut self, request: &Request) -> Response {
        self.client.request(request).await.expect("the request failed")
    }

    /// The agent's workers, each of which has a connection to the picker.
    pub fn workers(&self) -> u64 {
        self.agent.config().listen.workers as u64
    }

    /// Requests that the endpoints have read.
    pub fn requests(&self) -> (u64, u64) {
        (self.one.requests(), self.two.requests())
    }
}

/// The settings of the first pool's EPP.
pub fn epp(config: &mut Config) -> &mut Epp {
    match &mut config.pools[0].picker {
        Picker::Epp(epp) => epp,
        Picker::Builtin => panic!("the pool has no EPP"),
    }
}

/// A JSON body of about `len` bytes, with `model` as its first member.
pub fn json(model: &str, len: usize) -> Vec<u8> {
    let prompt = String::from_utf8(Alphabet::Text.bytes(1, 0, len)).expect("text");
    format!(r#"{{"model":"{model}","prompt":"{prompt}"}}"#).into_bytes()
}

/// A POST whose response reports what the endpoint got.
pub fn echo(body: impl Into<bytes::Bytes>) -> Request {
    Request::post("/test/echo", body).header("content-type", "application/json")
}

/// Like [`echo`], with an idempotent method (RFC 9110 §9.2.2).
pub fn put(body: impl Into<bytes::Bytes>) -> Request {
    Request::new("PUT", "/test/echo").header("content-type", "application/json").body(body)
}

impl Response {
    /// The endpoint that sent the response.
    #[must_use]
    pub fn served_by(&self) -> Option<SocketAddr> {
        self.header("x-served-by")?.parse().ok()
    }

    /// What the endpoint received.
    #[must_use]
    pub fn echoed(&self) -> Echo {
        assert_eq!(self.status(), 200, "{}", self.text());
        self.json().expect("the response is not an echo")
    }

    /// `error.code` of the agent's own error; empty otherwise.
    #[must_use]
    pub fn error_code(&self) -> String {
        let body: serde_json::Value = self.json().unwrap_or_default();
        body["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}
