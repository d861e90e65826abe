//! An agent in front of one model server, with two bystander clients connected beforehand: one in the middle of an endless
//! response, one idle on a kept connection.

use penstock_agent::config::{Config, SteeringMode};
use penstock_tests::{
    Checker, Plan,
    agent::{TestAgent, builtin_pool},
    client::{Client, ConnectionEnd, Piece, Request, Response},
    model_server::{Framing, Lengths, ModelServer, Options, Pauses},
};

pub(crate) struct Setting {
    pub(crate) server: ModelServer,
    pub(crate) agent: TestAgent,
    stream: Client,
    checker: Checker,
    kept: Client,
}

/// A request that the agent rejects.
pub(crate) struct Refused {
    wire: Vec<u8>,
    status: u16,
    code: &'static str,
    /// Expected part of the error message.
    says: &'static str,
    /// The client shuts down its sending side after the request.
    finish: bool,
}

pub(crate) fn refused(status: u16, code: &'static str, wire: impl Into<Vec<u8>>) -> Refused {
    Refused { wire: wire.into(), status, code, says: "", finish: false }
}

impl Refused {
    pub(crate) fn says(self, says: &'static str) -> Self {
        Self { says, ..self }
    }

    pub(crate) fn finish(self) -> Self {
        Self { finish: true, ..self }
    }
}

/// A GET with these fields after its Host.
pub(crate) fn get(fields: &str) -> Vec<u8> {
    format!("GET /test/echo HTTP/1.1\r\nhost: x\r\n{fields}\r\n").into_bytes()
}

/// A POST with these fields after its Host, followed by `body`.
pub(crate) fn post(fields: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let mut wire = format!("POST /test/echo HTTP/1.1\r\nhost: x\r\n{fields}\r\n").into_bytes();
    wire.extend_from_slice(body.as_ref());
    wire
}

/// The `code` and message of an error in OpenAI's shape.
pub(crate) fn error(response: &Response) -> (String, String) {
    assert_eq!(response.header("content-type"), Some("application/json"), "{response:?}");
    let body: serde_json::Value = response.json().unwrap();
    let kind = if response.status() < 500 { "invalid_request_error" } else { "server_error" };
    assert_eq!(body["error"]["type"], kind, "{body}");
    let text = |field: &str| body["error"][field].as_str().unwrap_or_default().to_owned();
    (text("code"), text("message"))
}

/// Asserts that the connection ends with an orderly close and no further bytes.
pub(crate) async fn closed(client: &mut Client) {
    assert_eq!(client.until_end().await.unwrap(), ConnectionEnd::Fin);
    assert!(client.surplus().is_empty(), "{}", client.surplus().escape_ascii());
}

impl Setting {
    pub(crate) async fn start(adjust: impl FnOnce(&mut Config)) -> Self {
        let server = ModelServer::start(Options::default()).await.unwrap();
        let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, adjust);
        let plan = Plan {
            framing: Framing::Chunked,
            size: 1 << 40,
            stream_id: 1,
            writes: Lengths::Random { seed: 1, max: 3000 },
            pauses: Some(Pauses { seed: 1, every: 1, up_to_us: 4000 }),
            ..Plan::default()
        };
        let mut stream = Client::connect(agent.addr).await.unwrap();
        stream.send(&plan.request()).await.unwrap();
        assert_eq!(stream.head().await.unwrap().status, 200);
        let kept = Client::connect(agent.addr).await.unwrap();
        let mut setting = Self { server, agent, stream, checker: plan.checker(), kept };
        setting.unharmed().await;
        setting
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(self.agent.addr).await.unwrap()
    }

    /// Asserts that both bystanders are served normally.
    pub(crate) async fn unharmed(&mut self) {
        let Piece::Data(data) = self.stream.piece(usize::MAX).await.unwrap() else { panic!("the stream ended") };
        self.checker.feed(&data).unwrap();
        let plan = Plan { size: 3000, stream_id: 2, ..Plan::default() };
        let response = self.kept.request(&plan.request()).await.unwrap();
        assert_eq!((response.status(), response.read.len), (200, 3000));
        plan.checker().feed(&response.body).unwrap();
    }

    /// What the endpoint has seen: connections, requests, and bytes that formed no request.
    pub(crate) fn reached(&self) -> (u64, u64, u64) {
        (self.server.connections_accepted(), self.server.requests(), self.server.uploads_broken())
    }

    /// Sends each request: each gets its error and a close, nothing is forwarded, and the bystanders are unaffected.
    pub(crate) async fn refuses(&mut self, rows: impl IntoIterator<Item = Refused>) {
        for row in rows {
            let shown = row.wire[..row.wire.len().min(300)].escape_ascii().to_string();
            let before = self.reached();
            let mut client = self.client().await;
            client.send_raw(&row.wire).await.unwrap();
            if row.finish {
                client.finish().await.unwrap();
            }
            let response = client.response().await.unwrap_or_else(|error| panic!("{error:#} for {shown}"));
            let (code, message) = error(&response);
            assert_eq!((response.status(), code.as_str()), (row.status, row.code), "{message:?} for {shown}");
            assert!(message.contains(row.says), "{message:?} for {shown}");
            assert_eq!(response.header("x-penstock-reason"), Some(row.code), "{shown}");
            assert_eq!(response.header("connection"), Some("close"), "{shown}");
            assert!(response.interim.is_empty(), "{shown}");
            closed(&mut client).await;
            assert_eq!(self.reached(), before, "{shown}");
            self.unharmed().await;
        }
    }

    /// Sends valid but unusual bytes and returns the response with the connection.
    pub(crate) async fn answer(&self, wire: &[u8]) -> (Response, Client) {
        let mut client = self.client().await;
        client.send_raw(wire).await.unwrap();
        let response = client.response().await.unwrap();
        (response, client)
    }
}

/// `GET /test/echo`
pub(crate) fn echo() -> Request {
    Request::get("/test/echo")
}
