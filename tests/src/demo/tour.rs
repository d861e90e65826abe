//! The demo's requests and the table of their results.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::future::try_join_all;
use serde_json::json;

use super::fleet::{Access, Fleet};
use super::grouped;
use crate::client::{BodyEnd, Client, Request, Response};
use crate::content::{Alphabet, Fnv};
use crate::model_server::{Framing, Lengths, Plan, Sent};

const INTERVAL_US: u64 = 20_000;
/// Long enough for the prompt to be sent in pieces, so that the picker is asked meanwhile.
const LONG_PROMPT: usize = 1 << 20;

/// The path expected for a response if the kernel can steer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Kernel,
    UserSpace,
    /// Bulk: the kernel gets it only when it pauses, and an endpoint that outruns the client never does.
    Either,
}

struct Ask {
    what: &'static str,
    request: Request,
    upload: Bytes,
    /// The body's plan, for position-dependent bytes.
    plan: Option<Plan>,
    by: By,
}

/// One result.
struct Answered {
    ask: Ask,
    id: String,
    response: Response,
    /// The body's bytes on the wire.
    wire: Vec<u8>,
}

/// Whether every response was exact and used the expected path.
pub(super) async fn run(fleet: &mut Fleet, steers: bool) -> Result<bool> {
    println!(
        "{:>2}  {:<29} {:<8}  {:<20} {:>10} {:>10}  {:>8}  exact",
        "#", "asked", "endpoint", "carried by: why", "kernel B", "user B", "ttft"
    );
    let (mut rows, mut wrong, mut kernel, mut user, mut picks) = (0, 0, 0, 0, Vec::new());
    for (visit, asks) in visits().into_iter().enumerate() {
        for answered in ask(fleet.agent.address, visit, asks).await? {
            let access = fleet.agent.access(&answered.id).await?;
            let problems = problems(&answered, &access, steers).await?;
            rows += 1;
            print(rows, &answered, &access, &problems);
            wrong += usize::from(!problems.is_empty());
            kernel += access.bytes_kernel;
            user += access.bytes_user;
            picks.push(access.pick_us);
        }
    }
    picks.sort_unstable();
    let total = kernel + user;
    println!(
        "\n{rows} requests, {} of them right in every respect\n{} bytes of bodies, {} of them ({:.2} %) touched by user \
         space\ntime to the pick, median: {:.1} ms",
        rows - wrong,
        grouped(total),
        grouped(user),
        user as f64 * 100.0 / total.max(1) as f64,
        picks[picks.len() / 2] as f64 / 1000.0
    );
    Ok(wrong == 0)
}

enum Visit {
    /// One connection, serially.
    InTurn(Vec<Ask>),
    /// Each on a new connection.
    AtOnce(Vec<Ask>),
}

fn visits() -> Vec<Visit> {
    let length = Plan { size: 64 << 20, stream_id: 7, ..Plan::default() };
    let chunked = Plan {
        framing: Framing::Chunked,
        size: 16 << 20,
        stream_id: 8,
        chunks: Lengths::Random { seed: 8, max: 40_000 },
        writes: Lengths::Random { seed: 9, max: 100_000 },
        ..Plan::default()
    };
    let prompt = String::from_utf8_lossy(&Alphabet::Text.bytes(9, 0, LONG_PROMPT)).into_owned();
    vec![
        Visit::InTurn(vec![
            Ask::get("list of models", "/v1/models"),
            Ask::chat("chat, streamed", "What turns the wheel?", true),
            Ask::chat("chat, whole", "And what decides how much?", false),
            Ask::chat("chat, streamed", "Once more, please.", true),
            Ask::text("text completion, streamed", "Water turns"),
            Ask::body("64 MiB by length", length.clone()),
            Ask::chat("chat, whole", "Still there?", false),
        ]),
        Visit::InTurn(vec![
            Ask::chat("chat, streamed, 1 MiB prompt", &prompt, true),
            Ask::body("16 MiB in uneven chunks", chunked),
            Ask::chat("chat, streamed", "The same connection again.", true),
        ]),
        Visit::AtOnce((0..6).map(|n| Ask::chat("chat, streamed, 6 at once", &format!("Stream {n}"), true)).collect()),
    ]
}

impl Ask {
    fn get(what: &'static str, target: &str) -> Self {
        Self { what, request: Request::get(target), upload: Bytes::new(), plan: None, by: By::UserSpace }
    }

    fn body(what: &'static str, plan: Plan) -> Self {
        let request = plan.request();
        Self { what, request, upload: Bytes::new(), plan: Some(plan), by: By::Either }
    }

    fn chat(what: &'static str, content: &str, stream: bool) -> Self {
        let messages = json!([{"role": "user", "content": content}]);
        Self::completion(what, "/v1/chat/completions", json!({"messages": messages}), stream)
    }

    fn text(what: &'static str, prompt: &str) -> Self {
        Self::completion(what, "/v1/completions", json!({"prompt": prompt}), true)
    }

    fn completion(what: &'static str, target: &str, mut asked: serde_json::Value, stream: bool) -> Self {
        asked["model"] = json!("sample");
        asked["stream"] = json!(stream);
        asked["max_tokens"] = json!(40);
        asked["x-test-interval-us"] = json!(if stream { INTERVAL_US } else { 0 });
        let upload = Bytes::from(asked.to_string());
        let request = Request::post(target, upload.clone()).header("content-type", "application/json");
        // A whole response is a few hundred bytes: too small to be worth arming.
        Self { what, request, upload, plan: None, by: if stream { By::Kernel } else { By::UserSpace } }
    }
}

async fn ask(agent: SocketAddr, visit: usize, asks: Visit) -> Result<Vec<Answered>> {
    let id = |number: usize| format!("demo-{visit}-{number}");
    match asks {
        Visit::InTurn(asks) => {
            let mut client = Client::connect(agent).await?;
            let mut answered = Vec::new();
            for (number, ask) in asks.into_iter().enumerate() {
                answered.push(ask.put(&mut client, id(number)).await?);
            }
            Ok(answered)
        }
        Visit::AtOnce(asks) => {
            let each = asks.into_iter().enumerate().map(|(number, ask)| async move {
                let mut client = Client::connect(agent).await?;
                ask.put(&mut client, id(number)).await
            });
            try_join_all(each).await
        }
    }
}

impl Ask {
    async fn put(self, client: &mut Client, id: String) -> Result<Answered> {
        client.record();
        let request = self.request.clone().header("x-request-id", &id);
        let response = client.request(&request).await.with_context(|| format!("asking for {}", self.what))?;
        let heads = response.interim.iter().chain([&response.head]).map(|head| head.raw.len()).sum();
        let wire = client.recorded().get(heads..).unwrap_or_default().to_vec();
        Ok(Answered { ask: self, id, response, wire })
    }
}

/// What is wrong with a response; empty if correct.
async fn problems(answered: &Answered, access: &Access, steers: bool) -> Result<Vec<String>> {
    let Answered { ask, id, response, wire } = answered;
    let mut problems = Vec::new();
    let mut expect = |fine: bool, problem: &dyn Fn() -> String| {
        if !fine {
            problems.push(problem());
        }
    };
    expect(response.status() == 200, &|| format!("status {}", response.status()));
    expect(response.read.end == BodyEnd::Complete, &|| format!("the body ended as {:?}", response.read.end));
    let served_by = response.header("x-served-by").unwrap_or_default();
    expect(served_by == access.endpoint, &|| format!("{served_by} answered, but the agent logged {}", access.endpoint));
    expect(access.reason == "ok", &|| format!("the agent logged {}", access.reason));

    let sent = sent(served_by, id).await?;
    let (upload, body) = (Fnv::of(&ask.upload).value(), Fnv::of(wire).value());
    expect((sent.request_length, sent.request_hash) == (ask.upload.len() as u64, upload), &|| {
        format!(
            "sent a request body of {} bytes, the endpoint got {}, or they differ",
            ask.upload.len(),
            sent.request_length
        )
    });
    expect((sent.length, sent.hash) == (wire.len() as u64, body), &|| {
        format!("the endpoint sent {} bytes, {} arrived, or they differ", sent.length, wire.len())
    });
    if let Some(plan) = &ask.plan {
        let checked = plan.checker().feed(&response.body);
        expect(checked.is_ok(), &|| format!("{checked:?}"));
        expect(response.body.len() as u64 == plan.size, &|| format!("{} of {}", response.body.len(), plan.size));
    }
    let accounted = access.bytes_kernel + access.bytes_user;
    expect(accounted == sent.length, &|| format!("the agent counted {accounted} bytes"));
    match ask.by {
        By::Kernel if steers => {
            expect(access.by_kernel(), &|| "expected to be carried by the kernel".to_owned());
            expect(access.bytes_kernel > 0, &|| "no byte was steered".to_owned());
        }
        By::Either if steers => {}
        _ => expect(!access.by_kernel(), &|| "expected to be carried by user space".to_owned()),
    }
    Ok(problems)
}

/// The endpoint's record of the exchange, requested without the agent.
async fn sent(endpoint: &str, id: &str) -> Result<Sent> {
    let endpoint: SocketAddr = endpoint.parse().with_context(|| format!("x-served-by: {endpoint:?}"))?;
    let mut client = Client::connect(endpoint).await?;
    let answer = client.request(&Request::get(&format!("/test/sent?{id}"))).await?;
    answer.json().with_context(|| format!("what {endpoint} sent for {id}"))
}

fn print(row: usize, answered: &Answered, access: &Access, problems: &[String]) {
    let carrier = if access.by_kernel() { "kernel" } else { "user space" };
    println!(
        "{row:>2}  {:<29} {:<8}  {:<20} {:>10} {:>10}  {:>5.1} ms  {}",
        answered.ask.what,
        access.endpoint.rsplit_once(':').map_or("-".to_owned(), |(_, port)| format!(":{port}")),
        format!("{carrier}: {}", access.carried_why),
        grouped(access.bytes_kernel),
        grouped(access.bytes_user),
        answered.response.time_to_first_byte().unwrap_or(Duration::ZERO).as_secs_f64() * 1000.0,
        if problems.is_empty() { "yes" } else { "WRONG" }
    );
    for problem in problems {
        println!("    - {problem}");
    }
}
