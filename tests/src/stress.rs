//! Random cases: framings, sizes, pauses, buffers, slow and impatient clients, protocol switches, endpoints that break off, and
//! endpoints that overwrite what they have sent.
//! Bytes depend on their position, so a lost, repeated or swapped one is located.
//!
//! A run consists of rounds, each with its own agent in one steering mode; in one of three, connections are pinned. A seed
//! determines a round (except timing), and a failure names the seed whose first round reproduces it.

mod counters;
mod case;
mod exchange;
mod mutating;
mod switch;
mod tally;
mod wire;
#[cfg(test)]
mod tests;

pub use case::Case;
pub use counters::{Counters, Counts};
pub use tally::{Network, Tally};

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use futures_util::future::join_all;
use penstock_agent::config::{PickPer, SteeringMode};

use exchange::{Done, Outcome};
use mutating::Mutating;

use crate::agent::{TestAgent, builtin_pool};
use crate::eventually::within;
use crate::model_server::{ModelServer, Options as ServerOptions};
use crate::{Client, Random};

const CLIENTS: usize = 24;
const SERVERS: usize = 2;
/// Clients of the endpoint that overwrites what it has sent.
const MUTATED: usize = 2;
/// Longest time with one agent.
const ROUND: Duration = Duration::from_secs(10);
/// A client gives up if its response takes longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Finished requests are counted within this time.
const SOON: Duration = Duration::from_secs(10);

/// The paths that must carry something in this mode.
#[must_use]
pub fn paths(mode: SteeringMode) -> &'static [&'static str] {
    match mode {
        // Whether path `wire` has to carry something depends on the conditions of a round.
        SteeringMode::Off | SteeringMode::Wire => &["relay"],
        // Endpoints are on this machine.
        SteeringMode::Auto => &["local", "relay"],
        SteeringMode::Local => &["local"],
        SteeringMode::Ingress => &["ingress"],
    }
}

/// The modes that carry something on one machine without further networks.
pub(crate) fn local_modes() -> Vec<SteeringMode> {
    let all = SteeringMode::value_variants().iter().copied();
    all.filter(|mode| *mode != SteeringMode::Wire).collect()
}

/// As in the configuration.
#[must_use]
pub fn mode_name(mode: SteeringMode) -> String {
    mode.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub time: Duration,
    pub seed: u64,
    /// Only this mode; otherwise all in turn, except `wire`, which has networks of its own.
    pub mode: Option<SteeringMode>,
}

/// One tally per mode. Passes each finished round to `note`. Returns an error only for causes other than the agent.
pub async fn run(options: Options, mut note: impl FnMut(&Tally)) -> Result<Vec<Tally>> {
    let modes = options.mode.map_or_else(local_modes, |mode| vec![mode]);
    let turns = options.time.div_duration_f64(ROUND * modes.len() as u32).ceil().max(1.0) as u32;
    let time = options.time / (turns * modes.len() as u32);
    let mut tallies: Vec<Tally> = modes.iter().map(|mode| Tally::new(*mode)).collect();
    for turn in 0..turns {
        for (number, total) in tallies.iter_mut().enumerate() {
            let seed = options.seed.wrapping_add(u64::from(turn) * modes.len() as u64 + number as u64);
            let round = match total.mode {
                SteeringMode::Wire => wire::round(seed, time).await,
                mode => round(mode, seed, time).await,
            };
            let round = round.with_context(|| reproduce(total.mode, seed))?;
            note(&round);
            total.add(&round);
        }
    }
    Ok(tallies)
}

fn reproduce(mode: SteeringMode, seed: u64) -> String {
    format!("reproduce: cargo xtask stress --mode {} --seed {seed}", mode_name(mode))
}

async fn round(mode: SteeringMode, seed: u64, time: Duration) -> Result<Tally> {
    let mut random = Random::new(seed);
    let pinned = random.one_in(3);
    let mut servers = Vec::new();
    for _ in 0..SERVERS {
        let options = ServerOptions { idle_close: None, keep_requests: false, ..ServerOptions::default() };
        servers.push(ModelServer::start(options).await?);
    }
    let addrs: Vec<_> = servers.iter().map(|server| server.addr).collect();
    let agent = TestAgent::try_start(builtin_pool(&addrs), mode, |config| {
        config.listen.workers = random.pick(&[1, 2]);
        config.pools[0].pick_per = if pinned { PickPer::Connection } else { PickPer::Request };
        config.steering.client_send_buffer = random.pick(&[64 << 10, 1 << 20, 1 << 20]);
        config.steering.endpoint_receive_buffer = random.pick(&[32 << 10, 512 << 10, 4 << 20]);
    })?;
    let mutating = Mutating::start(random.below(u64::MAX))?;
    let its_agent = TestAgent::try_start(builtin_pool(&[mutating.addr]), mode, |config| config.listen.workers = 1)?;
    let until = Instant::now() + time;
    let seeds = [(); MUTATED].map(|()| random.below(u64::MAX));
    let its_clients = seeds.map(|of_client| mutated(its_agent.addr, Random::new(of_client), mode, seed, until));
    let clients = (0..CLIENTS).map(|number| {
        let random = Random::new(random.below(u64::MAX));
        let client = Caller { addr: agent.addr, servers: &servers, random, pinned, number };
        client.run(mode, seed, until)
    });
    let (of_clients, of_mutated) = tokio::join!(join_all(clients), join_all(its_clients));
    let mut tally = Tally::new(mode);
    for of_one in of_clients {
        tally.add(&of_one);
    }
    if let Err(error) = settle(&agent, &servers, &tally).await {
        tally.fail(&reproduce(mode, seed), &error);
    }
    for of_one in of_mutated {
        tally.add(&of_one);
    }
    tally.counters = Counters::read(&agent.agent.metrics().encode());
    tally.counters.add(&Counters::read(&its_agent.agent.metrics().encode()));
    Ok(tally)
}

/// One client of the endpoint that overwrites what it has sent.
async fn mutated(addr: SocketAddr, random: Random, mode: SteeringMode, seed: u64, until: Instant) -> Tally {
    let mut tally = Tally::new(mode);
    mutating::calls(addr, random, until, |result| match result {
        Ok((complete, bytes)) => tally.overwritten(complete, bytes),
        Err(error) => tally.fail(&reproduce(mode, seed), &error),
    })
    .await;
    tally
}

/// Asserts that no resources are held for finished requests, and that the paths account for all complete responses.
async fn settle(agent: &TestAgent, servers: &[ModelServer], tally: &Tally) -> Result<()> {
    for gauge in ["penstock_active_requests", "penstock_client_connections"] {
        let none = within(SOON, || agent.metric(gauge, &[]) == 0.0).await;
        ensure!(none, "{gauge} stays at {}", agent.metric(gauge, &[]));
    }
    // Connections may stay open for reuse: as many as were concurrent, for each worker and endpoint.
    let open = || servers.iter().map(ModelServer::connections_open).sum::<u64>();
    let most = (CLIENTS * SERVERS * 2) as u64;
    ensure!(within(SOON, || open() <= most).await, "{} connections to endpoints were not closed", open());
    let carried = agent.count("penstock_body_bytes_total", &[]);
    // After a broken response, the remainder of its last write to the client is counted nowhere.
    ensure!(carried >= tally.whole, "complete responses had {} bytes, but the paths counted {carried}", tally.whole);
    Ok(())
}

/// One client's cases against an agent over `servers`, until the deadline. A failure names `seed`.
pub(crate) async fn calls(
    addr: SocketAddr,
    servers: &[ModelServer],
    random: Random,
    number: usize,
    mode: SteeringMode,
    seed: u64,
    until: Instant,
) -> Tally {
    Caller { addr, servers, random, pinned: false, number }.run(mode, seed, until).await
}

/// A client: one case after another, on a kept connection if possible.
struct Caller<'a> {
    addr: SocketAddr,
    servers: &'a [ModelServer],
    random: Random,
    pinned: bool,
    number: usize,
}

impl Caller<'_> {
    async fn run(mut self, mode: SteeringMode, seed: u64, until: Instant) -> Tally {
        let (mut tally, mut kept, mut count) = (Tally::new(mode), None, 0_u64);
        while Instant::now() < until {
            let case = Case::choose(&mut self.random);
            count += 1;
            match self.exchange(kept.take(), &case, count).await {
                Ok(done) => {
                    tally.done(&case, done.outcome, done.bytes);
                    // A closing endpoint also closes the client connection pinned to it.
                    kept = done.client.filter(|_| !(self.pinned && case.exchange.closes()));
                }
                Err(error) => {
                    let what =
                        format!("client {}, its case {count}: {case:?}\n    {}", self.number, reproduce(mode, seed));
                    tally.fail(&what, &error);
                    // The fault may recur at once.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        tally
    }

    async fn exchange(&self, kept: Option<Client>, case: &Case, count: u64) -> Result<Done> {
        let client = match kept.filter(|_| !case.fresh) {
            Some(client) => client,
            None => Client::connect_with(self.addr, case.rcvbuf).await?,
        };
        let name = format!("{}-{count}", self.number);
        let exchange = exchange::run(client, case, &name, self.servers);
        // A client buffer smaller than a segment receives only what window probes bring: some KiB a second. Other checks ensure
        // that bytes arrive at all; a client that has waited this long has seen enough.
        let left = Done { outcome: Outcome::Left, bytes: 0, client: None };
        tokio::time::timeout(PATIENCE, exchange).await.unwrap_or(Ok(left))
    }
}
