//! The agent's CPU cost per streamed token with and without steering: two agents over the same servers and picker take the same
//! load in turns.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::future::try_join_all;

use super::fleet::{AgentProcess, Fleet};
use crate::chat::Chat;
use crate::client::Client;

const STREAMS: usize = 50;
const CHAT: Chat = Chat { tokens: 100, interval: Duration::from_millis(20) };
const ROUNDS: u32 = 3;

/// CPU time spent in one agent's rounds.
#[derive(Default)]
struct Cost {
    agent: Duration,
    others: Duration,
    tokens: u32,
}

/// Returns an error if a response of the load is incomplete; figures are printed, not judged.
pub(super) async fn compare(fleet: &Fleet) -> Result<()> {
    let relaying = fleet.relaying_agent().await?;
    println!(
        "\n{ROUNDS} rounds for each agent in turns, {STREAMS} streams of {} tokens, one every {} ms",
        CHAT.tokens,
        CHAT.interval.as_millis()
    );
    let (mut on, mut off) = (Cost::default(), Cost::default());
    // The first streams' connections, page faults and code loading are not part of the cost.
    for agent in [&fleet.agent, &relaying] {
        Cost::default().round(fleet, agent).await?;
    }
    let begin = Instant::now();
    for _ in 0..ROUNDS {
        on.round(fleet, &fleet.agent).await?;
        off.round(fleet, &relaying).await?;
    }
    println!("CPU time per streamed token, µs, in {:.0} s:", begin.elapsed().as_secs_f64());
    println!("{:<14} {:>12} {:>26} {:>12}", "", "the agent", "model servers and picker", "together");
    for (name, cost) in [("steering on", &on), ("steering off", &off)] {
        let [agent, others, all] = [cost.agent, cost.others, cost.all()].map(|cpu| cost.per_token(cpu));
        println!("{name:<14} {agent:>12.2} {others:>26.2} {all:>12.2}");
    }
    let [agent, others, all] =
        [(on.agent, off.agent), (on.others, off.others), (on.all(), off.all())].map(|(on, off)| ratio(on, off));
    println!("{:<14} {agent:>12.2} {others:>26.2} {all:>12.2}", "on / off");
    println!("The kernel's time for a redirected byte counts towards the sender or the kernel's own threads.");
    Ok(())
}

fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64()
}

impl Cost {
    async fn round(&mut self, fleet: &Fleet, agent: &AgentProcess) -> Result<()> {
        let (before, others) = (agent.cpu()?, fleet.others_cpu()?);
        try_join_all((0..STREAMS).map(|number| stream(agent.address, number))).await?;
        self.agent += agent.cpu()? - before;
        self.others += fleet.others_cpu()? - others;
        self.tokens += (STREAMS * CHAT.tokens) as u32;
        Ok(())
    }

    fn all(&self) -> Duration {
        self.agent + self.others
    }

    fn per_token(&self, cpu: Duration) -> f64 {
        cpu.as_secs_f64() * 1e6 / f64::from(self.tokens.max(1))
    }
}

async fn stream(agent: SocketAddr, number: usize) -> Result<()> {
    let response = Client::connect(agent).await?.request(&CHAT.request(number)).await?;
    CHAT.check(&response).with_context(|| format!("stream {number}"))
}
