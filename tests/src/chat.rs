//! One streamed chat, as the demo and the bench send it. Every event of the response is checked.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::client::{BodyEnd, Request, Response};
use crate::model_server::word;

/// Events of a chat that are not tokens: the role, the finish reason, `[DONE]`.
const OTHER_EVENTS: usize = 3;

#[derive(Clone, Copy)]
pub(crate) struct Chat {
    pub(crate) tokens: usize,
    pub(crate) interval: Duration,
}

impl Chat {
    pub(crate) fn request(&self, number: usize) -> Request {
        let body = json!({
            "model": "sample",
            "stream": true,
            "max_tokens": self.tokens,
            "x-test-interval-us": self.interval.as_micros() as u64,
            "messages": [{"role": "user", "content": format!("Stream {number}")}],
        });
        Request::post("/v1/chat/completions", body.to_string()).header("content-type", "application/json")
    }

    /// Whether the response is complete and has every token in its place.
    pub(crate) fn check(&self, response: &Response) -> Result<()> {
        let events = response.events();
        let whole = response.status() == 200
            && response.read.end == BodyEnd::Complete
            && events.len() == self.tokens + OTHER_EVENTS
            && events.last().is_some_and(|last| last == "[DONE]");
        ensure!(whole, "status {}, {} events: {}", response.status(), events.len(), response.text());
        for (number, event) in events[1..=self.tokens].iter().enumerate() {
            let event: Value = serde_json::from_str(event)?;
            let found = &event["choices"][0]["delta"]["content"];
            ensure!(found == word(number), "token {number} is {found}, expected {:?}", word(number));
        }
        Ok(())
    }
}
