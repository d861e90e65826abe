//! What a production picker (llm-d's router) learns from the messages about one response: when the prompt was processed, the token
//! counts, and the end. It reads each message of a stream by itself, and a document after its last message.

use std::time::{Duration, Instant};

use penstock_proto::ext_proc::{HttpBody, processing_request::Request};
use serde_json::Value;

use super::{StreamEnd, StreamRecord, header};

/// A picker's account of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// The prompt counts as load of the endpoint: no body message has arrived.
    pub prefilling: bool,
    /// The request counts as load: neither the response nor the picker's stream has ended.
    pub running: bool,
    /// From the last message about the request to the first body message that has bytes.
    pub ttft: Option<Duration>,
    pub tokens: Tokens,
    /// Whether the end of the response was told.
    pub complete: bool,
    /// Body messages about the response.
    pub messages: usize,
    /// `data:` lines that are no whole JSON text, and documents that are none.
    pub malformed: Vec<String>,
}

/// The token counts that a response has reported. A later count replaces an earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    pub prompt: Option<u64>,
    pub completion: Option<u64>,
    pub cached: Option<u64>,
}

impl Books {
    /// The account after the messages so far.
    #[must_use]
    pub fn of(stream: &StreamRecord) -> Self {
        let mut books = Self { prefilling: true, running: true, ..Self::default() };
        let request: Value = serde_json::from_slice(&stream.request_body().0).unwrap_or_default();
        let mut events = request["stream"] == true;
        let (mut asked, mut document): (Option<Instant>, Vec<u8>) = (None, Vec::new());
        for (message, &at) in stream.messages.iter().zip(&stream.taken) {
            match &message.request {
                Some(Request::RequestHeaders(_) | Request::RequestBody(_)) => asked = Some(at),
                Some(Request::ResponseHeaders(head)) => {
                    let kind = super::record::pairs(head.headers.as_ref());
                    events |= header(&kind, "content-type").is_some_and(|kind| kind.contains("text/event-stream"));
                    books.end_if(head.end_of_stream);
                }
                Some(Request::ResponseBody(body)) => {
                    if !body.body.is_empty() {
                        books.ttft = books.ttft.or(asked.map(|asked| at.duration_since(asked)));
                    }
                    if events {
                        books.read_events(body);
                    } else {
                        document.extend_from_slice(&body.body);
                    }
                    books.prefilling = false;
                    books.messages += 1;
                    books.end_if(body.end_of_stream);
                }
                Some(Request::ResponseTrailers(_)) => books.end_if(true),
                _ => {}
            }
        }
        if books.complete && !document.is_empty() {
            books.read_json(&document);
        }
        if stream.end.is_some_and(|end| end != StreamEnd::Killed) {
            (books.prefilling, books.running) = (false, false);
        }
        books
    }

    fn end_if(&mut self, end: bool) {
        if end {
            (self.complete, self.prefilling, self.running) = (true, false, false);
        }
    }

    fn read_events(&mut self, body: &HttpBody) {
        let lines = body.body.split(|&byte| byte == b'\n' || byte == b'\r');
        for data in lines.filter_map(|line| line.strip_prefix(b"data:")) {
            if data.trim_ascii() != b"[DONE]" {
                self.read_json(data);
            }
        }
    }

    fn read_json(&mut self, text: &[u8]) {
        let Ok(value) = serde_json::from_slice::<Value>(text) else {
            self.malformed.push(String::from_utf8_lossy(text).into_owned());
            return;
        };
        let usage = match value["type"].as_str() {
            Some("response.completed") => &value["response"]["usage"],
            Some("message_start") => &value["message"]["usage"],
            _ => &value["usage"],
        };
        let first = |paths: [&str; 2]| paths.iter().find_map(|path| usage.pointer(path)?.as_u64());
        let counts = Tokens {
            prompt: first(["/prompt_tokens", "/input_tokens"]),
            completion: first(["/completion_tokens", "/output_tokens"]),
            cached: first(["/prompt_tokens_details/cached_tokens", "/input_tokens_details/cached_tokens"])
                .or(usage["cache_read_input_tokens"].as_u64()),
        };
        self.tokens = Tokens {
            prompt: counts.prompt.or(self.tokens.prompt),
            completion: counts.completion.or(self.tokens.completion),
            cached: counts.cached.or(self.tokens.cached),
        };
    }

    /// Everything but the time and the number of messages, which depend on how much the picker is told.
    #[must_use]
    pub fn numbers(self) -> Self {
        Self { ttft: None, messages: 0, ..self }
    }
}

#[cfg(test)]
mod tests {
    use penstock_proto::core::{HeaderMap, HeaderValue};
    use penstock_proto::ext_proc::{HttpHeaders, ProcessingRequest};

    use super::*;

    fn stream(request: &str, kind: &str, bodies: &[(&str, bool)]) -> StreamRecord {
        let mut stream = StreamRecord::new(1);
        let mut at = Instant::now();
        let mut took = |request| {
            stream.took(ProcessingRequest { request: Some(request), ..ProcessingRequest::default() }, at);
            at += Duration::from_millis(10);
        };
        took(Request::RequestBody(HttpBody { body: request.to_owned().into(), end_of_stream: true }));
        let kind = HeaderValue { key: "content-type".to_owned(), value: kind.to_owned(), ..HeaderValue::default() };
        let headers = Some(HeaderMap { headers: vec![kind] });
        took(Request::ResponseHeaders(HttpHeaders { headers, end_of_stream: false }));
        for (body, end_of_stream) in bodies {
            let body = (*body).to_owned().into();
            took(Request::ResponseBody(HttpBody { body, end_of_stream: *end_of_stream }));
        }
        stream
    }

    #[test]
    fn first_body_message_ends_prefill_and_last_one_the_request() {
        let states = |bodies: &[_]| {
            let books = Books::of(&stream("{}", "text/event-stream", bodies));
            (books.prefilling, books.running, books.ttft.map(|ttft| ttft.as_millis()), books.complete)
        };
        assert_eq!(states(&[]), (true, true, None, false));
        assert_eq!(states(&[("data: {}\n\n", false)]), (false, true, Some(20), false));
        assert_eq!(states(&[("", false), ("data: {}\n\n", true)]), (false, false, Some(30), true));
        assert_eq!(states(&[("", true)]), (false, false, None, true));
        let mut cancelled = stream("{}", "text/event-stream", &[]);
        cancelled.end = Some(StreamEnd::Cancelled);
        assert!(!Books::of(&cancelled).running && !Books::of(&cancelled).complete);
    }

    #[test]
    fn usage_is_read_from_each_message_and_merged_by_field() {
        let tokens = |kind, bodies: &[_]| {
            let books = Books::of(&stream("{}", kind, bodies));
            assert_eq!(books.malformed, Vec::<String>::new());
            (books.tokens.prompt, books.tokens.completion, books.tokens.cached)
        };
        let anthropic = [
            (
                r#"data: {"type":"message_start","message":{"usage":{"input_tokens":5,"output_tokens":1,"cache_read_input_tokens":2}}}"#,
                false,
            ),
            (r#"data: {"type":"message_delta","usage":{"output_tokens":9}}"#, true),
        ];
        assert_eq!(tokens("text/event-stream", &anthropic), (Some(5), Some(9), Some(2)));
        let completed = r#"data: {"type":"response.completed","response":{"usage":{"input_tokens":3,"output_tokens":4,"input_tokens_details":{"cached_tokens":1}}}}"#;
        assert_eq!(tokens("text/event-stream", &[(completed, true)]), (Some(3), Some(4), Some(1)));
        let document = [(r#"{"usage":{"prompt_tok"#, false), (r#"ens":7,"completion_tokens":8}}"#, true)];
        assert_eq!(tokens("application/json", &document), (Some(7), Some(8), None));
    }

    #[test]
    fn fragments_are_malformed() {
        let malformed = |request, kind, bodies: &[_]| Books::of(&stream(request, kind, bodies)).malformed.len();
        assert_eq!(malformed("{}", "text/event-stream", &[("data: {\"a\":", false), ("1}\n\n", false)]), 1);
        assert_eq!(malformed(r#"{"stream":true}"#, "", &[("data: [DONE]\n\ndata: {", true)]), 1);
        assert_eq!(malformed("{}", "application/json", &[("{\"a\":", false)]), 0, "the end is still to come");
        assert_eq!(malformed("{}", "application/json", &[("{\"a\":", true)]), 1);
    }
}
