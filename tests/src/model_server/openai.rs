//! The completions API of inference servers: chat and text completions as a JSON document or an event stream, the model list,
//! health, and metrics with vLLM's names. Tokens are words from a short list, at the pace that the request sets.

use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Value, json};

use super::connection::{Connection, Stop};
use super::plan::After;
use super::request::Request;
use super::{Gauge, Shared};

const WORDS: [&str; 12] =
    ["Water ", "turns ", "the ", "wheel ", "while ", "the ", "gate ", "decides ", "how ", "much ", "of ", "it. "];

/// The text of a completion's token.
pub(crate) fn word(token: usize) -> &'static str {
    WORDS[token % WORDS.len()]
}

/// The model's arbitrary creation time.
static CREATED: LazyLock<u64> =
    LazyLock::new(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()));

#[derive(Deserialize)]
struct Completion {
    model: String,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    max_tokens: Option<u32>,
    #[serde(default)]
    max_completion_tokens: Option<u32>,
    #[serde(default)]
    messages: Vec<Value>,
    #[serde(default)]
    prompt: Value,
    /// A test extension.
    #[serde(default, rename = "x-test-interval-us")]
    interval_us: Option<u64>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

pub(super) async fn respond(connection: &mut Connection, request: &Request) -> Result<After, Stop> {
    let shared = Arc::clone(&connection.shared);
    match (request.echo.method.as_str(), request.path()) {
        ("POST", "/v1/chat/completions") => completion(connection, request, true).await,
        ("POST", "/v1/completions") => completion(connection, request, false).await,
        ("GET", "/v1/models") => {
            let model =
                json!({"id": shared.options.model, "object": "model", "created": *CREATED, "owned_by": "penstock"});
            connection.json(200, &json!({"object": "list", "data": [model]})).await
        }
        ("GET", "/health") => {
            let status = if shared.healthy.load(Ordering::Relaxed) { 200 } else { 503 };
            connection.answer(status, "text/plain", b"", After::KeepAlive).await
        }
        ("GET", "/metrics") => {
            let text = metrics(&shared);
            connection.answer(200, "text/plain; version=0.0.4", text.as_bytes(), After::KeepAlive).await
        }
        (_, path) => connection.json(404, &error(404, "NotFoundError", &format!("no {path} here"))).await,
    }
}

fn error(code: u16, kind: &str, message: &str) -> Value {
    json!({"error": {"message": message, "type": kind, "param": null, "code": code}})
}

fn metrics(shared: &Shared) -> String {
    let gauges = [
        ("num_requests_running", shared.running.load(Ordering::Relaxed) as f64),
        ("num_requests_waiting", shared.waiting.load(Ordering::Relaxed) as f64),
        ("kv_cache_usage_perc", *shared.kv_cache_usage.lock()),
    ];
    let model = &shared.options.model;
    let lines = gauges.map(|(name, value)| {
        format!("# TYPE vllm:{name} gauge\nvllm:{name}{{engine=\"0\",model_name=\"{model}\"}} {value:?}\n")
    });
    lines.concat()
}

/// The common parts of the responses to one request.
struct Job {
    chat: bool,
    id: String,
    model: String,
    tokens: u32,
    finish_reason: &'static str,
    prompt_tokens: usize,
    include_usage: bool,
}

async fn completion(connection: &mut Connection, request: &Request, chat: bool) -> Result<After, Stop> {
    let asked: Completion = match serde_json::from_slice(&request.body) {
        Ok(asked) => asked,
        Err(why) => return connection.json(400, &error(400, "BadRequestError", &why.to_string())).await,
    };
    let shared = Arc::clone(&connection.shared);
    let _running = Gauge::raise(&shared.running);
    let tokens = asked.max_completion_tokens.or(asked.max_tokens);
    let header = request.echo.header("x-test-interval-us").and_then(|us| us.parse().ok());
    let interval = asked.interval_us.or(header).map_or(shared.options.interval, Duration::from_micros);
    let prompt = asked.messages.iter().map(|message| words(&message["content"])).sum::<usize>() + words(&asked.prompt);
    let job = Job {
        chat,
        id: format!("{}-{}-{}", if chat { "chatcmpl" } else { "cmpl" }, shared.addr.port(), request_number(&shared)),
        model: asked.model,
        tokens: tokens.unwrap_or(shared.options.tokens),
        finish_reason: if tokens.is_some() { "length" } else { "stop" },
        prompt_tokens: prompt.max(1),
        include_usage: asked.stream_options.is_some_and(|options| options.include_usage),
    };
    if asked.stream.unwrap_or(false) {
        stream(connection, &job, interval).await
    } else {
        if !interval.is_zero() {
            connection.pause(Some(interval * job.tokens)).await?;
        }
        connection.json(200, &job.whole()).await
    }
}

fn request_number(shared: &Shared) -> u64 {
    shared.requests.load(Ordering::Relaxed)
}

/// Words in all texts of a prompt, counted as its tokens.
fn words(value: &Value) -> usize {
    match value {
        Value::String(text) => text.split_whitespace().count(),
        Value::Array(parts) => parts.iter().map(words).sum(),
        Value::Object(part) => part.get("text").map_or(0, words),
        _ => 0,
    }
}

async fn stream(connection: &mut Connection, job: &Job, interval: Duration) -> Result<After, Stop> {
    let mut head = connection.head(200);
    head.push_str("content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n");
    head.push_str("transfer-encoding: chunked\r\n\r\n");
    connection.write(head.as_bytes()).await?;
    if job.chat {
        event(connection, &job.part(json!({"role": "assistant", "content": ""}), None).to_string()).await?;
    }
    let begin = Instant::now();
    for token in 0..job.tokens {
        if !interval.is_zero() {
            // By a fixed schedule, so that one delay does not delay every later token.
            let due = begin + interval * (token + 1);
            connection.pause(Some(due.saturating_duration_since(Instant::now()))).await?;
        }
        let content = word(token as usize);
        event(connection, &job.part(json!({"content": content}), None).to_string()).await?;
    }
    event(connection, &job.part(json!({}), Some(job.finish_reason)).to_string()).await?;
    if job.include_usage {
        event(connection, &job.usage_part().to_string()).await?;
    }
    event(connection, "[DONE]").await?;
    connection.write(b"0\r\n\r\n").await?;
    Ok(After::KeepAlive)
}

/// Sends one event in one chunk and one write.
async fn event(connection: &mut Connection, data: &str) -> Result<(), Stop> {
    let len = "data: \n\n".len() + data.len();
    connection.write(format!("{len:x}\r\ndata: {data}\n\n\r\n").as_bytes()).await
}

impl Job {
    fn envelope(&self, object: &str, choices: &Value) -> Value {
        let Self { id, model, .. } = self;
        json!({"id": id, "object": object, "created": *CREATED, "model": model, "choices": choices})
    }

    fn usage(&self) -> Value {
        let (prompt, completion) = (self.prompt_tokens, self.tokens);
        let total = prompt + completion as usize;
        json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total})
    }

    /// One event of a stream.
    fn part(&self, delta: Value, finish_reason: Option<&str>) -> Value {
        let mut choice = json!({"index": 0, "logprobs": null, "finish_reason": finish_reason});
        if self.chat {
            choice["delta"] = delta;
        } else {
            choice["text"] = delta.get("content").cloned().unwrap_or_else(|| json!(""));
        }
        self.envelope(if self.chat { "chat.completion.chunk" } else { "text_completion" }, &json!([choice]))
    }

    /// The event with the usage and no choices.
    fn usage_part(&self) -> Value {
        let mut part = self.envelope(if self.chat { "chat.completion.chunk" } else { "text_completion" }, &json!([]));
        part["usage"] = self.usage();
        part
    }

    /// The whole response as one document.
    fn whole(&self) -> Value {
        let text: String = WORDS.iter().cycle().take(self.tokens as usize).copied().collect();
        let mut choice = json!({"index": 0, "logprobs": null, "finish_reason": self.finish_reason});
        if self.chat {
            choice["message"] = json!({"role": "assistant", "content": text});
        } else {
            choice["text"] = json!(text);
        }
        let mut whole = self.envelope(if self.chat { "chat.completion" } else { "text_completion" }, &json!([choice]));
        whole["usage"] = self.usage();
        whole
    }
}
