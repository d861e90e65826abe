//! The load: clients that send requests for a time and check every byte. Closed loop: each client sends its next request after the
//! response to the one before, so latencies are those of a proxy with this many requests in flight.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;

use crate::chat::Chat;
use crate::client::{BodyEnd, Client, Request, Response};
use crate::content::{Alphabet, Fnv};
use crate::model_server::Echo;

/// What the clients ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// A JSON body with this much text; the response is the text.
    Text(usize),
    /// A JSON body with this much text; the response has the body's length and hash.
    Prompt(usize),
}

pub(super) struct Load {
    pub(super) ask: Ask,
    pub(super) clients: usize,
    /// Whether each request has its own connection.
    pub(super) connects: bool,
}

impl Load {
    /// Sends requests for this time. Returns how long each took.
    pub(super) async fn run(&self, proxy: SocketAddr, time: Duration) -> Result<Vec<Duration>> {
        let until = Instant::now() + time;
        let clients = try_join_all((0..self.clients).map(|number| self.client(proxy, number, until))).await?;
        Ok(clients.concat())
    }

    async fn client(&self, proxy: SocketAddr, number: usize, until: Instant) -> Result<Vec<Duration>> {
        let sent = Message::new(self.ask, number);
        let mut took = Vec::new();
        let mut kept = None;
        while Instant::now() < until {
            let begin = Instant::now();
            let mut client = match kept.take() {
                Some(client) => client,
                None => Client::connect(proxy).await?,
            };
            client.send_raw(&sent.wire).await?;
            let response = client.response().await.with_context(|| format!("client {number}"))?;
            took.push(begin.elapsed());
            sent.check(&response)?;
            kept = Some(client).filter(|_| !self.connects);
        }
        Ok(took)
    }
}

/// A request, and what the response must be.
struct Message {
    ask: Ask,
    wire: Vec<u8>,
    text: Vec<u8>,
    length: u64,
    hash: u64,
}

impl Message {
    fn new(ask: Ask, number: usize) -> Self {
        let (Ask::Text(size) | Ask::Prompt(size)) = ask;
        let text = Alphabet::Text.bytes(number as u64, 0, size);
        let said = String::from_utf8_lossy(&text);
        let (target, body) = match ask {
            Ask::Text(_) => ("/v1/chat/completions", format!(r#"{{"model":"sample","x-test-says":"{said}"}}"#)),
            Ask::Prompt(_) => ("/test/echo", format!(r#"{{"model":"sample","prompt":"{said}"}}"#)),
        };
        let (length, hash) = (body.len() as u64, Fnv::of(body.as_bytes()).value());
        let mut request = Request::post(target, body).header("content-type", "application/json");
        request = request.header("user-agent", "bench/1").header("accept", "application/json");
        if let Ask::Text(_) = ask {
            request = request.header("x-test-plan", r#"{"says":true,"head":{"with_body":true}}"#);
        }
        Self { ask, wire: request.wire("model.example"), text, length, hash }
    }

    fn check(&self, response: &Response) -> Result<()> {
        let whole = response.status() == 200 && response.read.end == BodyEnd::Complete;
        ensure!(whole, "status {}, {:?}: {}", response.status(), response.read.end, response.text());
        match self.ask {
            Ask::Text(_) => ensure!(response.body == self.text, "another text came back: {}", response.text()),
            Ask::Prompt(_) => {
                let seen: Echo = response.json()?;
                let right = (seen.body_length, seen.body_hash) == (self.length, self.hash);
                ensure!(right, "the endpoint got another body: {seen:?}");
            }
        }
        Ok(())
    }
}

/// Streams that begin one after the other, whatever became of those before (open loop).
pub(super) struct Streams {
    pub(super) streams: usize,
    pub(super) chat: Chat,
    /// In which all begin.
    pub(super) ramp: Duration,
}

impl Streams {
    /// The time, from the start, in which every stream runs and none begins or ends.
    pub(super) fn middle(&self) -> (Duration, Duration) {
        let rest = self.chat.interval * 5;
        (self.ramp + rest, self.chat.interval * self.chat.tokens as u32 - rest)
    }

    /// Tokens of all streams in this part of the middle.
    pub(super) fn tokens_in(&self, time: Duration) -> f64 {
        self.streams as f64 * time.div_duration_f64(self.chat.interval)
    }

    /// Returns the time to the first token of each stream.
    pub(super) async fn run(&self, proxy: SocketAddr) -> Result<Vec<Duration>> {
        let begin = tokio::time::Instant::now();
        try_join_all((0..self.streams).map(async |number| {
            tokio::time::sleep_until(begin + self.ramp * number as u32 / self.streams as u32).await;
            let response = Client::connect(proxy).await?.request(&self.chat.request(number)).await?;
            self.chat.check(&response).with_context(|| format!("stream {number}"))?;
            response.time_to_first_byte().context("the response has no body")
        }))
        .await
    }
}
