//! `penstock-long-prompts` measures what a pick costs the picker and the agent by the length of the body, whole and abridged. The
//! picker works like production EPPs: it parses the body, hashes the prompt in blocks up to a limit, marshals the body and returns
//! it. One client sends serial requests; agent, picker, endpoint and client share this process and are told apart by thread.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bytes::Bytes;
use clap::Parser;
use penstock_agent::config::{BodyToPicker, FailureMode, Picker, SteeringMode};
use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_tests::{
    Client, ModelServer, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    content::{Alphabet, Fnv},
    model_server::Options,
    scripted_epp::{Answer, Exchange, Script, StreamRecord, reply},
    stage::echo,
    thread_cpu::thread_cpu,
};
use serde_json::Value;

/// Measures picks of long prompts.
#[derive(Parser)]
struct Args {
    /// Requests per measurement
    #[arg(long, default_value_t = 200)]
    requests: usize,
    /// Sizes of the prompt in KiB
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256,512")]
    sizes: Vec<usize>,
}

/// Bytes of the prompt that are hashed, and of a block.
const HASHED: usize = 64 << 10;
const BLOCK: usize = 64;

struct Costly {
    endpoint: String,
}

#[tonic::async_trait]
impl Script for Costly {
    async fn request_headers(&self, _: &mut Exchange, _: &HttpHeaders) -> Answer {
        Ok(())
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if !body.end_of_stream {
            return Ok(());
        }
        let document: Value = serde_json::from_slice(&exchange.request_body).unwrap_or_default();
        let prompt = document["messages"][0]["content"].as_str().unwrap_or_default();
        let hash = prompt.as_bytes()[..prompt.len().min(HASHED)].chunks(BLOCK).fold(0, |before: u64, block| {
            let mut hash = Fnv::default();
            hash.update(&before.to_le_bytes());
            hash.update(block);
            hash.value()
        });
        let marshalled = Bytes::from(document.to_string());
        exchange.send(reply::pick(&self.endpoint, &[("x-prefix", &format!("{hash:x}"))])).await?;
        for message in reply::request_body(&marshalled) {
            exchange.send(message).await?;
        }
        Ok(())
    }
}

struct Cost {
    picker: Duration,
    agent: Duration,
    p50: Duration,
    /// From the head to the end of the body, as the picker takes them.
    upload: Duration,
    messages: usize,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let Args { requests, sizes } = Args::parse();
    println!(
        "{requests} requests each; CPU µs of the picker / CPU µs of the agent / p50 µs / µs of the upload to the picker / messages of the body"
    );
    println!("{:>8}{:>44}{:>44}", "KiB", "whole", "abridged");
    for size in sizes {
        print!("{size:>8}");
        for told in [BodyToPicker::Whole, BodyToPicker::Abridged] {
            let cost = measure(told, size << 10, requests).await?;
            let micros = |time: Duration| time.as_secs_f64() * 1e6;
            let times = [cost.picker, cost.agent, cost.p50, cost.upload].map(|time| format!("{:.0}", micros(time)));
            print!("{:>44}", format!("{} / {}", times.join(" / "), cost.messages));
        }
        println!();
    }
    Ok(())
}

async fn measure(told: BodyToPicker, size: usize, requests: usize) -> Result<Cost> {
    let options = Options { idle_close: None, keep_requests: false, keep_sent: false, ..Options::default() };
    let server = ModelServer::start(options).await?;
    let epp = ScriptedEpp::start(Costly { endpoint: server.addr.to_string() }).await?;
    let agent =
        TestAgent::start(epp_pool(&[server.addr], epp.addr, FailureMode::Closed), SteeringMode::Off, |config| {
            config.listen.workers = 1;
            if let Picker::Epp(epp) = &mut config.pools[0].picker {
                epp.body_to_picker = told;
            }
        });
    let prompt = String::from_utf8(Alphabet::Text.bytes(1, 0, size))?;
    let body = format!(r#"{{"messages":[{{"role":"user","content":"{prompt}"}}],"model":"m","stream":false}}"#);
    let (request, hash) = (echo(body.clone()), Fnv::of(body.as_bytes()).value());
    let mut client = Client::connect(agent.addr).await?;
    let (mut times, warm) = (Vec::new(), requests / 10 + 1);
    let mut before = (Duration::ZERO, Duration::ZERO);
    for number in 0..warm + requests {
        if number == warm {
            before = (thread_cpu("scripted-epp")?, thread_cpu("penstock-")?);
        }
        let begin = Instant::now();
        let seen = client.request(&request).await?.echoed();
        times.push(begin.elapsed());
        // The picker's marshalling changes the order of the members, which an endpoint sees only without abridgement.
        ensure!(told == BodyToPicker::Whole || size <= 64 << 10 || seen.body_hash == hash, "another body arrived");
    }
    let after = (thread_cpu("scripted-epp")?, thread_cpu("penstock-")?);
    let mut times = times.split_off(warm);
    times.sort_unstable();
    let streams = epp.streams();
    let bodies = |stream: &StreamRecord| stream.kinds().iter().filter(|kind| **kind == "request_body").count();
    let messages = bodies(&streams[warm]);
    let upload: Duration = streams[warm..].iter().map(|stream| stream.taken[messages] - stream.taken[0]).sum();
    let count = u32::try_from(requests)?;
    Ok(Cost {
        picker: (after.0 - before.0) / count,
        agent: (after.1 - before.1) / count,
        p50: times[times.len() / 2],
        upload: upload / count,
        messages,
    })
}
