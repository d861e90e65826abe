//! POSTs of every size, framing and speed to a real server behind an agent: each response must carry the length and digest of the
//! sent bytes.

use std::{fmt, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::future::try_join_all;
use penstock_agent::config::SteeringMode;
use serde_json::Value;

use crate::{
    Alphabet, BodyEnd, Client, Plan, Request, Response, TestAgent,
    agent::builtin_pool,
    content::Fnv,
    model_server::{Framing, Lengths},
    servers::{CONTENT, RealServer},
};

/// A POST that takes longer counts as hung.
const PATIENCE: Duration = Duration::from_secs(30);
pub const MODES: [SteeringMode; 4] =
    [SteeringMode::Off, SteeringMode::Ingress, SteeringMode::Auto, SteeringMode::Local];

/// How much traffic to send.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub sizes: &'static [usize],
    /// Kept connections, each of which sends a small POST several times.
    pub kept: usize,
}

/// Traffic for a few seconds.
pub const SHORT: Extent = Extent { sizes: &[1000, 70_000, 2 << 20], kept: 20 };
pub const WHOLE: Extent = Extent { sizes: &[1000, 9000, 70_000, 1 << 20, 8 << 20, 32 << 20], kept: 300 };

/// The result in one mode.
#[derive(Debug)]
pub struct Tally {
    pub posts: usize,
    pub bytes: usize,
    /// Response bytes carried by the path `local`.
    pub local: u64,
    pub took: Duration,
}

impl fmt::Display for Tally {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { posts, bytes, local, took } = self;
        write!(out, "{posts} posts, {bytes} bytes, {local} bytes of responses local, {:.1} s", took.as_secs_f32())
    }
}

#[derive(Clone, Copy, Debug)]
enum Manner {
    Length,
    Chunked,
    /// With a length, in writes of an eighth with a pause after each.
    Slow,
    /// Chunked, in writes of an eighth.
    SlowChunked,
    /// `Expect: 100-continue`, with the body sent after the 100.
    Expect,
}

const MANNERS: [Manner; 5] = [Manner::Length, Manner::Chunked, Manner::Slow, Manner::SlowChunked, Manner::Expect];

/// Sends all of it to one server in one mode.
pub async fn run(server: &RealServer, mode: SteeringMode, extent: Extent) -> Result<Tally> {
    let agent = TestAgent::try_start(builtin_pool(&[server.addr]), mode, |config| {
        config.limits.body_bytes = 64 << 20;
        // The smallest response may be steered.
        config.steering.min_bytes = 1;
    })?;
    let begun = tokio::time::Instant::now();
    let mut tally = Tally { posts: 0, bytes: 0, local: 0, took: Duration::ZERO };
    let all = async {
        // One agent connection, and therefore serial requests on one endpoint connection.
        let mut client = Client::connect(agent.addr).await?;
        for &size in extent.sizes {
            for manner in MANNERS {
                // A steered response, followed by the next request on the same connection.
                let streamed = tokio::time::timeout(PATIENCE, stream(&mut client, server)).await;
                streamed
                    .unwrap_or_else(|_| bail!("the response stalled"))
                    .context("the response before the POST failed")?;
                let body = body(tally.posts, size);
                let post = post(&mut client, server.target(), manner, &body);
                let answered = tokio::time::timeout(PATIENCE, post).await;
                answered.unwrap_or_else(|_| bail!("no response")).with_context(|| format!("{manner:?} of {size}"))?;
                tally.posts += 1;
                tally.bytes += size;
            }
        }
        tally.posts += pipelined(agent.addr, server.target()).await.context("pipelined")?;
        tally.posts += kept(agent.addr, server.target(), extent.kept).await.context("kept alive")?;
        Ok(())
    };
    let result: Result<()> = all.await;
    result.with_context(|| format!("{:?} on {mode:?}; it said {:#?}", server.kind, server.output()))?;
    tally.local = agent.count("penstock_body_bytes_total", &[r#"path="local""#]);
    tally.took = begun.elapsed();
    Ok(tally)
}

async fn stream(client: &mut Client, server: &RealServer) -> Result<()> {
    let Some(path) = server.stream() else { return Ok(()) };
    let chunks = Lengths::Fixed(3000);
    let plan = Plan { framing: Framing::Chunked, size: 2 * CONTENT as u64, chunks, ..Plan::default() };
    let response = client.request(&Request::get(path).header("x-test-plan", plan.header())).await?;
    ensure!(
        response.status() == 200 && response.read.end == BodyEnd::Complete,
        "{} {:?}",
        response.status(),
        response.read.end
    );
    ensure!(response.body.len() >= CONTENT, "{} bytes", response.body.len());
    Ok(())
}

fn body(number: usize, size: usize) -> Vec<u8> {
    Alphabet::Binary.bytes(number as u64, 0, size)
}

async fn post(client: &mut Client, target: &str, manner: Manner, body: &[u8]) -> Result<()> {
    let (piece, pause) = (body.len() / 8 + 1, Duration::from_millis(5));
    let request = Request::post(target, body.to_vec());
    let request = match manner {
        Manner::Length => request,
        Manner::Chunked => request.chunked(body.to_vec(), 10_000),
        Manner::Slow => request.piecewise(piece, pause),
        Manner::SlowChunked => request.chunked(body.to_vec(), 10_000).piecewise(piece, pause),
        Manner::Expect => {
            let wire = request.header("expect", "100-continue").wire("agent");
            let (head, body) = wire.split_at(wire.len() - body.len());
            client.send_raw(head).await?;
            let interim = client.head().await?;
            ensure!(interim.status == 100, "{interim:?}");
            client.send_raw(body).await?;
            return check(&client.response().await?, wire.len() - head.len(), body);
        }
    };
    let response = client.request(&request).await?;
    check(&response, body.len(), body)
}

/// Two concurrent requests on each of two connections.
async fn pipelined(agent: SocketAddr, target: &str) -> Result<usize> {
    let both = (0..2).map(async |number| {
        let mut client = Client::connect(agent).await?;
        let bodies = [body(number, 3000), body(number + 10, 50_000)];
        let wire: Vec<u8> = bodies.iter().flat_map(|body| Request::post(target, body.clone()).wire("agent")).collect();
        client.send_raw(&wire).await?;
        for body in &bodies {
            let response = tokio::time::timeout(PATIENCE, client.response()).await.context("no response")??;
            check(&response, body.len(), body)?;
        }
        anyhow::Ok(bodies.len())
    });
    Ok(try_join_all(both).await?.into_iter().sum())
}

/// Connections that stay open, each with several requests, all concurrently.
async fn kept(agent: SocketAddr, target: &str, connections: usize) -> Result<usize> {
    const ROUNDS: usize = 3;
    let mut clients = Vec::new();
    for _ in 0..connections {
        clients.push(Client::connect(agent).await?);
    }
    for round in 0..ROUNDS {
        let posts = clients.iter_mut().enumerate().map(async |(number, client)| {
            let body = body(round * connections + number, 1000 + number);
            let post = post(client, target, Manner::Length, &body);
            tokio::time::timeout(PATIENCE, post).await.context("no response")?
        });
        try_join_all(posts).await?;
    }
    Ok(connections * ROUNDS)
}

/// The response reports what arrived: `length digest`, or a model server's echo.
fn check(response: &Response, length: usize, body: &[u8]) -> Result<()> {
    ensure!(response.status() == 200, "{} {}", response.status(), response.text());
    let text = response.text();
    let (said, right) = match serde_json::from_str::<Value>(&text) {
        Ok(echo @ Value::Object(_)) => {
            (format!("{} {}", echo["body_length"], echo["body_hash"]), format!("{length} {}", Fnv::of(body).value()))
        }
        _ => {
            let digest = ring::digest::digest(&ring::digest::SHA256, body);
            let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
            (text, format!("{length} {hex}"))
        }
    };
    ensure!(said == right, "the response reports {said}, sent {right}");
    Ok(())
}
