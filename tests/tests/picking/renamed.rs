//! An EPP that sends a request under another model name: the response carries the client's name again, on every path, in documents
//! and event streams, however the bytes are cut.

use std::{net::SocketAddr, time::Duration};

use penstock_agent::config::FailureMode;
use penstock_agent::config::{ResponseToPicker, SteeringMode};
use penstock_tests::{
    agent::{TestAgent, epp_pool},
    client::{Client, Request, Response},
    eventually,
    http2_client::Http2Client,
    scripted_epp::{Answering, ScriptedEpp, reply},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

const ALIAS: &str = "my-alias";
const INNER: &str = "inner/model-v7";
const MODES: [SteeringMode; 4] = [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto];

/// What the endpoint answers; its text has the inner name.
#[derive(Clone, Copy)]
struct Answer {
    fields: &'static str,
    body: &'static str,
    /// Bytes of each write.
    cut: usize,
    chunked: bool,
}

const DOCUMENT: Answer = Answer {
    fields: "content-type: application/json\r\netag: \"7\"\r\ncontent-digest: sha-256=:x:\r\ncontent-md5: x\r\n",
    body: r#"{"id":"1","model":"inner/model-v7","choices":[{"text":"\"model\":\"inner/model-v7\" is {\"model\":\"inner/model-v7\"}"}],"metadata":{"model":"inner/model-v7"}}"#,
    cut: usize::MAX,
    chunked: false,
};

const CHAT: Answer = Answer {
    fields: "content-type: text/event-stream; charset=utf-8\r\n",
    body: "data: {\"model\":\"inner/model-v7\",\"choices\":[{\"delta\":{\"content\":\"inner/model-v7\"}}]}\n\n\
           data: {\"model\":\"inner/model-v7\",\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}\n\n\
           data: [DONE]\n\n",
    cut: 7,
    chunked: true,
};

const MESSAGES: Answer = Answer {
    fields: "content-type: text/event-stream\r\n",
    body: "event: message_start\r\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"inner/model-v7\",\"usage\":{}}}\r\n\r\n\
           event: content_block_delta\r\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"model\":\"inner/model-v7\"}}\r\n\r\n",
    cut: 11,
    chunked: true,
};

const RESPONSES: Answer = Answer {
    fields: "content-type: text/event-stream\r\n",
    body: "data: {\"type\":\"response.created\",\"response\":{\"id\":\"r\",\"model\":\"inner/model-v7\"}}\n\n\
           data: {\"type\":\"response.completed\",\"response\":{\"model\":\"inner/model-v7\",\"text\":{\"model\":\"inner/model-v7\"}}}\n\n",
    cut: 1,
    chunked: true,
};

/// Neither JSON nor events: passes as it is.
const TEXT: Answer =
    Answer { fields: "content-type: text/plain\r\netag: \"7\"\r\n", body: r#"{"model":"inner/model-v7"}"#, ..DOCUMENT };

impl Answer {
    /// The body that the client has to get: the name's first occurrence in each document or event is the model's.
    fn expected(&self) -> String {
        if self.fields.contains("text/plain") {
            return self.body.to_owned();
        }
        let separator = if self.body.contains("\r\n\r\n") { "\r\n\r\n" } else { "\n\n" };
        let events = self.body.split(separator).map(|event| match event.contains("content_block_delta") {
            true => event.to_owned(),
            false => event.replacen(&format!(r#""model":"{INNER}""#), &format!(r#""model":"{ALIAS}""#), 1),
        });
        events.collect::<Vec<_>>().join(separator)
    }

    /// Answers every request on this connection, which has to be for the inner model.
    async fn serve(self, mut stream: TcpStream) {
        while let Some((head, body)) = request(&mut stream).await {
            assert!(!head.to_ascii_lowercase().contains("\r\naccept-encoding:"), "{head}");
            assert!(body.contains(INNER) && !body.contains(ALIAS), "{body}");
            let framing = match self.chunked {
                true => "transfer-encoding: chunked".to_owned(),
                false => format!("content-length: {}", self.body.len()),
            };
            let head = format!("HTTP/1.1 200 OK\r\n{}{framing}\r\n\r\n", self.fields);
            stream.write_all(head.as_bytes()).await.unwrap();
            for piece in self.body.as_bytes().chunks(self.cut.min(self.body.len())) {
                let wire = match self.chunked {
                    true => [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat(),
                    false => piece.to_vec(),
                };
                stream.write_all(&wire).await.unwrap();
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            if self.chunked {
                stream.write_all(b"0\r\n\r\n").await.unwrap();
            }
        }
    }
}

/// The next request's head and body; `None` once the agent has closed.
async fn request(stream: &mut TcpStream) -> Option<(String, String)> {
    let mut read = Vec::new();
    loop {
        if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8(read[..end + 4].to_vec()).unwrap();
            let length = head
                .to_ascii_lowercase()
                .split_once("content-length: ")
                .map(|(_, rest)| rest.split_once("\r\n").unwrap().0.parse::<usize>().unwrap());
            while read.len() < end + 4 + length.unwrap() {
                assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0);
            }
            return Some((head, String::from_utf8(read.split_off(end + 4)).unwrap()));
        }
        if stream.read_buf(&mut read).await.ok()? == 0 {
            return None;
        }
    }
}

struct Rig {
    agent: TestAgent,
    _epp: ScriptedEpp,
}

impl Rig {
    async fn start(answer: Answer, mode: SteeringMode) -> Self {
        Self::start_told(answer, mode, ResponseToPicker::Usage).await
    }

    async fn start_told(answer: Answer, mode: SteeringMode, told: ResponseToPicker) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let endpoint = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer.serve(stream));
            }
        });
        let epp = ScriptedEpp::start(renaming(endpoint)).await.unwrap();
        let agent = TestAgent::start(epp_pool(&[endpoint], epp.addr, FailureMode::Closed), mode, |config| {
            penstock_tests::stage::epp(config).response_to_picker = told;
        });
        Self { agent, _epp: epp }
    }

    fn renamed(&self) -> u64 {
        self.agent.count("penstock_flows_total", &[r#"reason="model_renamed""#])
    }
}

/// An EPP that renames the model in the request's body, and echoes every field.
fn renaming(endpoint: SocketAddr) -> Answering {
    Answering::new(move |exchange| {
        let fields = exchange.request_headers.iter().filter(|(name, _)| !name.starts_with(':'));
        let fields: Vec<_> = fields.map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let body = String::from_utf8(exchange.request_body.clone()).unwrap().replace(ALIAS, INNER);
        let body = body.into_bytes().into();
        [reply::pick(&endpoint.to_string(), &fields)].into_iter().chain(reply::request_body(&body)).collect()
    })
}

fn ask() -> Request {
    Request::post("/v1/chat/completions", format!(r#"{{"model":"{ALIAS}","prompt":"x"}}"#))
        .header("content-type", "application/json")
        .header("accept-encoding", "gzip, br")
}

fn check(response: &Response, answer: &Answer, what: &str) {
    assert_eq!((response.status(), response.text()), (200, answer.expected()), "{what}");
    if answer.body != answer.expected() {
        for name in ["content-length", "content-digest", "content-md5"] {
            assert_eq!(response.header(name), None, "{what}: {name}");
        }
        assert!(response.header("etag").is_none_or(|tag| tag == "W/\"7\""), "{what}");
    }
}

#[tokio::test]
async fn renamed_model_has_the_clients_name_in_every_answer_on_every_path() {
    for answer in [DOCUMENT, CHAT, MESSAGES, RESPONSES] {
        for mode in MODES {
            let what = format!("{mode:?}, {}", answer.body);
            let rig = Rig::start(answer, mode).await;
            let mut client = Client::connect(rig.agent.addr).await.unwrap();
            for _ in 0..2 {
                check(&client.request(&ask()).await.unwrap(), &answer, &what);
            }
            let mut client = Http2Client::connect(rig.agent.addr).await.unwrap();
            check(&client.request(&ask()).await.unwrap(), &answer, &format!("HTTP/2, {what}"));
            eventually(super::SOON, || rig.renamed() == 3).await;
        }
    }
}

/// An EPP that also returns the body, under the name that it gave the model. The length is that of what goes out.
#[tokio::test]
async fn renamed_model_has_the_clients_name_in_a_body_that_the_picker_returns() {
    for answer in [DOCUMENT, CHAT] {
        let rig = Rig::start_told(answer, SteeringMode::Auto, ResponseToPicker::Body).await;
        let mut client = Client::connect(rig.agent.addr).await.unwrap();
        let response = client.request(&ask()).await.unwrap();
        assert_eq!((response.status(), response.text()), (200, answer.expected()));
        let length = (!answer.chunked).then(|| answer.expected().len().to_string());
        assert_eq!(response.header("content-length"), length.as_deref());
        assert_eq!(response.header("content-digest"), None);
    }
}

#[tokio::test]
async fn answer_that_is_neither_json_nor_events_passes_unchanged() {
    let rig = Rig::start(TEXT, SteeringMode::Off).await;
    let mut client = Client::connect(rig.agent.addr).await.unwrap();
    let response = client.request(&ask()).await.unwrap();
    check(&response, &TEXT, "text");
    assert_eq!(response.header("content-length"), Some(TEXT.body.len().to_string().as_str()));
    assert_eq!(response.header("etag"), Some("\"7\""));
    assert_eq!(rig.renamed(), 0);
}

#[tokio::test]
async fn unchanged_model_leaves_answers_alone() {
    let rig = Rig::start(Answer { chunked: false, ..CHAT }, SteeringMode::Off).await;
    let mut client = Client::connect(rig.agent.addr).await.unwrap();
    let request = Request::post("/v1/chat/completions", format!(r#"{{"model":"{INNER}"}}"#))
        .header("content-type", "application/json");
    let response = client.request(&request).await.unwrap();
    assert_eq!(response.text(), CHAT.body);
    assert_eq!(response.header("content-length"), Some(CHAT.body.len().to_string().as_str()));
    assert_eq!(rig.renamed(), 0);
}
