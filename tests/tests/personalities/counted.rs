//! What a picker counts of responses: its books are the same whether it is told every byte or only what `response_to_picker = "usage"`
//! tells, on every path.

use penstock_agent::config::{ResponseToPicker, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, Plan, Request, Stage,
    client::{Pace, Piece},
    eventually,
    model_server::{Fault, FaultKind, Framing, Lengths, Pauses},
    scripted_epp::{Books, LlmdRouter, StreamEnd, Tokens},
    stage::epp,
};
use serde_json::{Value, json};

use crate::SOON;

const MODES: [SteeringMode; 4] = [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto];

/// One response of an API, as a model server sends it.
struct Answer {
    name: &'static str,
    path: &'static str,
    kind: &'static str,
    text: String,
    /// What its usage says: prompt, completion and cached tokens.
    tokens: (Option<u64>, Option<u64>, Option<u64>),
}

fn data(event: &Value) -> String {
    format!("data: {event}\n\n")
}

fn named(event: &Value) -> String {
    format!("event: {}\r\ndata: {event}\r\n\r\n", event["type"].as_str().unwrap())
}

/// OpenAI's chat completions and completions, with `include_usage` or without.
fn completions(chat: bool, include_usage: bool) -> Answer {
    let part = |n: u64| {
        let choice = if chat {
            json!({"delta": {"content": format!("word {n} ")}})
        } else {
            json!({"text": format!("word {n} ")})
        };
        let null = if include_usage {
            json!({"id": "c", "choices": [choice], "usage": null})
        } else {
            json!({"id": "c", "choices": [choice]})
        };
        data(&null)
    };
    let mut text: String = (0..150).map(part).collect();
    if include_usage {
        let usage = json!({"prompt_tokens": 11, "completion_tokens": 150, "total_tokens": 161, "prompt_tokens_details": {"cached_tokens": 3}});
        text += &data(&json!({"id": "c", "choices": [], "usage": usage}));
    }
    text += "data: [DONE]\n\n";
    let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
    let tokens = if include_usage { (Some(11), Some(150), Some(3)) } else { (None, None, None) };
    Answer {
        name: if include_usage { "with usage" } else { "without usage" },
        path,
        kind: "text/event-stream",
        text,
        tokens,
    }
}

/// The responses API. The last event has the whole answer in it; `words` says how long that is.
fn responses(words: u64) -> Answer {
    let mut text = named(&json!({"type": "response.created", "response": {"id": "r", "usage": null}}));
    let mut answer = String::new();
    for n in 0..words {
        let word = format!("\"word\" {n} ");
        text += &named(&json!({"type": "response.output_text.delta", "sequence_number": n, "delta": word}));
        answer += &word;
    }
    let usage = json!({"input_tokens": 21, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": words, "total_tokens": 21 + words});
    let output = json!([{"type": "message", "content": [{"type": "output_text", "text": answer}]}]);
    // In the order of a server's fields.
    let response = format!(r#"{{"id":"r","output":{output},"usage":{usage},"user":null,"metadata":{{}}}}"#);
    let completed = format!(r#"{{"type":"response.completed","sequence_number":{words},"response":{response}}}"#);
    text += &format!("event: response.completed\r\ndata: {completed}\r\n\r\n");
    let tokens = (Some(21), Some(words), Some(4));
    Answer { name: "responses", path: "/v1/responses", kind: "text/event-stream; charset=utf-8", text, tokens }
}

/// Anthropic's messages: the prompt's part of the usage comes first.
fn messages() -> Answer {
    let usage = json!({"input_tokens": 31, "cache_read_input_tokens": 5, "output_tokens": 1});
    let mut text = named(&json!({"type": "message_start", "message": {"id": "m", "model": "m", "usage": usage}}));
    text += ": keep-alive\n\n";
    for n in 0..150 {
        text += &named(
            &json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": format!("word {n} ")}}),
        );
    }
    text += &named(
        &json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 150}}),
    );
    text += &named(&json!({"type": "message_stop"}));
    let tokens = (Some(31), Some(150), Some(5));
    Answer { name: "messages", path: "/v1/messages", kind: "text/event-stream", text, tokens }
}

fn document() -> Answer {
    let text = json!({"id": "c", "choices": [{"text": "word ".repeat(2000)}], "usage": {"prompt_tokens": 41, "completion_tokens": 2000}}).to_string();
    Answer {
        name: "document",
        path: "/v1/completions",
        kind: "application/json",
        text,
        tokens: (Some(41), Some(2000), None),
    }
}

/// Longer than what is kept of a document.
fn long_document() -> Answer {
    let text = json!({"text": "word ".repeat(60_000), "usage": {"prompt_tokens": 41}}).to_string();
    Answer {
        name: "long document",
        path: "/v1/completions",
        kind: "application/json",
        text,
        tokens: (None, None, None),
    }
}

fn answers() -> Vec<Answer> {
    let mut all: Vec<_> = [(true, true), (true, false), (false, true), (false, false)]
        .map(|(chat, usage)| completions(chat, usage))
        .into();
    // A last event that fits the tail, and one that does not.
    all.extend([responses(40), responses(600), messages(), document()]);
    all
}

impl Answer {
    fn streams(&self) -> bool {
        self.kind.starts_with("text/event-stream")
    }

    fn request(&self, plan: &Plan) -> Request {
        let body = json!({"model": "m", "stream": self.streams(), "prompt": "p", "x-test-says": self.text}).to_string();
        let plan =
            Plan { says: true, headers: vec![("content-type".to_owned(), self.kind.to_owned())], ..plan.clone() };
        Request::post(self.path, body).header("content-type", "application/json").header("x-test-plan", plan.header())
    }

    /// Where the first event ends.
    fn first_event(&self) -> usize {
        let end = |blank: &str| self.text.find(blank).map(|at| at + blank.len());
        end("\n\n").into_iter().chain(end("\r\n\r\n")).min().unwrap()
    }
}

async fn stage(told: ResponseToPicker, mode: SteeringMode) -> Stage {
    Stage::with(LlmdRouter::new, |config| {
        config.steering.mode = mode;
        epp(config).response_to_picker = told;
    })
    .await
}

/// Sends the answer in pieces of random lengths. Returns the picker's books after the response.
async fn counted(stage: &Stage, answer: &Answer, framing: Framing, seed: u64) -> Books {
    let plan = Plan {
        framing,
        chunks: Lengths::Random { seed, max: 400 },
        writes: Lengths::Random { seed: seed + 1, max: 500 },
        pauses: Some(Pauses { seed, every: 3, up_to_us: 500 }),
        ..Plan::default()
    };
    let before = stage.epp.streams_started();
    let mut client = Client::connect(stage.agent.addr).await.unwrap();
    let response = client.request(&answer.request(&plan)).await.unwrap();
    assert_eq!((response.read.end, response.text()), (BodyEnd::Complete, answer.text.clone()), "{}", answer.name);
    eventually(SOON, || stage.epp.books()[before].complete).await;
    stage.epp.books()[before].clone()
}

/// E7: prefill, tokens and the end.
#[tokio::test]
async fn books_of_picker_are_same_with_usage_and_body() {
    for mode in MODES {
        let (usage, body) = (stage(ResponseToPicker::Usage, mode).await, stage(ResponseToPicker::Body, mode).await);
        for (number, answer) in (0..).zip(answers()) {
            let framing = [Framing::Chunked, Framing::UntilClose, Framing::ContentLength][number as usize % 3];
            let told = counted(&usage, &answer, framing, number).await;
            let all = counted(&body, &answer, framing, number).await;
            let what = format!("{mode:?} {framing:?} {} of {} bytes: {told:?}", answer.name, answer.text.len());
            let (prompt, completion, cached) = answer.tokens;
            assert_eq!(told.tokens, Tokens { prompt, completion, cached }, "{what}");
            assert_eq!(told.malformed, Vec::<String>::new(), "{what}");
            assert!(told.ttft.is_some(), "{what}");
            assert_eq!(told.messages, if answer.streams() { 2 } else { 1 }, "{what}");
            assert_eq!(told.numbers(), all.numbers(), "{what}");
        }
        let steers = mode != SteeringMode::Off;
        assert_eq!(usage.agent.steered() > 0, steers, "{mode:?}");
    }
}

/// A document that is not kept whole is told as its end alone.
#[tokio::test]
async fn fragment_of_document_is_never_told() {
    for told in [ResponseToPicker::Headers, ResponseToPicker::Usage] {
        let stage = stage(told, SteeringMode::Auto).await;
        for (number, answer) in (0..).zip([long_document(), document()]) {
            for framing in [Framing::ContentLength, Framing::Chunked] {
                let books = counted(&stage, &answer, framing, number).await;
                let whole = told == ResponseToPicker::Usage && number == 1;
                assert_eq!(
                    (books.malformed.len(), books.messages, books.complete),
                    (0, 1, true),
                    "{told:?} {}",
                    answer.name
                );
                assert_eq!(books.tokens.prompt.is_some(), whole, "{told:?} {}", answer.name);
            }
        }
    }
}

/// Sends the answer up to `after` bytes on the wire. Returns the client, and the picker's books once the prompt counts as processed.
async fn begun(stage: &Stage, answer: &Answer, after: u64, kind: FaultKind) -> (Client, Books) {
    let fault = Some(Fault { after, kind });
    let plan = Plan { framing: Framing::UntilClose, writes: Lengths::Fixed(100), fault, ..Plan::default() };
    let before = stage.epp.streams_started();
    let mut client = Client::connect(stage.agent.addr).await.unwrap();
    client.send(&answer.request(&plan)).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    eventually(SOON, || stage.epp.books().get(before).is_some_and(|books| !books.prefilling)).await;
    (client, stage.epp.books()[before].clone())
}

/// E7: the end of the prefill is told when the first event arrives, not at the end of the stream.
#[tokio::test]
async fn first_event_is_told_while_stream_goes_on() {
    for mode in MODES {
        for told in [ResponseToPicker::Headers, ResponseToPicker::Usage, ResponseToPicker::Body] {
            let stage = stage(told, mode).await;
            let answer = messages();
            let first = answer.first_event() as u64;
            let (mut client, books) = begun(&stage, &answer, first, FaultKind::UntilTold).await;
            assert!(books.running && !books.complete && books.ttft.is_some(), "{mode:?} {told:?} {books:?}");
            assert_eq!(books.tokens.prompt, Some(31));
            stage.one.resume();
            stage.two.resume();
            let mut body = Vec::new();
            let read = client.read_body(Pace::Fast, |bytes| {
                body.extend_from_slice(bytes);
                Ok(())
            });
            assert_eq!(read.await.unwrap().len, answer.text.len() as u64, "{mode:?} {told:?}");
            assert_eq!(body, answer.text.as_bytes(), "{mode:?} {told:?}");
            eventually(SOON, || stage.epp.books()[0].complete).await;
        }
    }
}

/// One byte less than the first event: nothing is told, and the rest arrives all the same.
#[tokio::test]
async fn incomplete_first_event_is_not_told() {
    for mode in MODES {
        let stage = stage(ResponseToPicker::Usage, mode).await;
        let answer = messages();
        let incomplete = answer.first_event() - 1;
        let fault = Some(Fault { after: incomplete as u64, kind: FaultKind::UntilTold });
        let plan = Plan { framing: Framing::UntilClose, fault, ..Plan::default() };
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        client.send(&answer.request(&plan)).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut body = Vec::new();
        while body.len() < incomplete {
            let Piece::Data(bytes) = client.piece(1000).await.unwrap() else { panic!("the body ended") };
            body.extend_from_slice(&bytes);
        }
        assert!(stage.epp.books()[0].prefilling, "{mode:?}");
        stage.one.resume();
        stage.two.resume();
        let read = client.read_body(Pace::Fast, |bytes| {
            body.extend_from_slice(bytes);
            Ok(())
        });
        assert_eq!(read.await.unwrap().end, BodyEnd::Complete, "{mode:?}");
        assert_eq!(body, answer.text.as_bytes(), "{mode:?}");
        eventually(SOON, || stage.epp.books()[0].complete).await;
        assert_eq!(stage.epp.books()[0].tokens.prompt, Some(31), "{mode:?}");
    }
}

/// E7, E18: a client that leaves, or an endpoint that breaks, in the middle of a stream.
#[tokio::test]
async fn books_of_broken_responses_are_same_with_usage_and_body() {
    for mode in MODES {
        let (usage, body) = (stage(ResponseToPicker::Usage, mode).await, stage(ResponseToPicker::Body, mode).await);
        for answer in [messages(), completions(true, true), responses(600)] {
            let (told, all) = (left(&usage, &answer).await, left(&body, &answer).await);
            assert!(!told.complete && told.malformed.is_empty(), "{mode:?} {told:?}");
            assert_eq!(told.numbers(), all.numbers(), "{mode:?} {}", answer.name);
        }
        let answer = messages();
        let (told, all) = (broken_off(&usage, &answer).await, broken_off(&body, &answer).await);
        assert_eq!((told.complete, told.tokens.prompt), (false, Some(31)), "{mode:?} {told:?}");
        assert_eq!(told.numbers(), all.numbers(), "{mode:?}");
    }
}

/// The picker's books of a response whose client leaves in the middle.
async fn left(stage: &Stage, answer: &Answer) -> Books {
    let before = stage.one.aborted() + stage.two.aborted();
    let (client, _) = begun(stage, answer, answer.text.len() as u64 / 2, FaultKind::Stall).await;
    client.reset().unwrap();
    eventually(SOON, || stage.one.aborted() + stage.two.aborted() == before + 1).await;
    last(stage).await
}

/// The picker's books of a response that its endpoint breaks off in the middle.
async fn broken_off(stage: &Stage, answer: &Answer) -> Books {
    let (mut client, _) = begun(stage, answer, answer.text.len() as u64 / 2, FaultKind::ResetWhenTold).await;
    stage.one.resume();
    stage.two.resume();
    assert_ne!(client.read_body(Pace::Fast, |_| Ok(())).await.unwrap().end, BodyEnd::Complete);
    last(stage).await
}

/// The picker's books of the last request, after its end.
async fn last(stage: &Stage) -> Books {
    eventually(SOON, || stage.epp.books().last().is_some_and(|books| !books.running)).await;
    stage.epp.books().pop().expect("a stream")
}

/// With `off`, the picker's stream ends orderly with the response and nothing of the response is told.
#[tokio::test]
async fn nothing_is_told_of_responses_when_off() {
    for mode in [SteeringMode::Off, SteeringMode::Auto] {
        let stage = stage(ResponseToPicker::Off, mode).await;
        let answer = completions(true, true);
        let plan = Plan {
            framing: Framing::Chunked,
            fault: Some(Fault { after: 2000, kind: FaultKind::UntilTold }),
            ..Plan::default()
        };
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        client.send(&answer.request(&plan)).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        assert!(stage.epp.books()[0].running, "the stream to the picker lives as long as the response");
        stage.one.resume();
        stage.two.resume();
        let read = client.read_body(Pace::Fast, |_| Ok(())).await.unwrap();
        assert_eq!(read.end, BodyEnd::Complete);
        eventually(SOON, || stage.epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
        assert!(stage.epp.streams()[0].kinds().iter().all(|kind| kind.starts_with("request_")), "{mode:?}");
    }
}
