//! Mode `wire`: clients, an agent and an endpoint in three network namespaces, whose cables lose, repeat, delay and reorder packets,
//! with random settings of TCP, and agents that are killed and replaced. Each round is one such world.
//!
//! Bytes must be right, whatever happens. A client may miss its response only if its agent was replaced meanwhile, and not if the flow
//! outlived the agent. Whoever waits longer than [`PATIENCE`] for a byte is a failure: TCP recovers from the faults in less.

mod agents;
mod caller;
mod conditions;
mod talk;
mod world;

use std::{
    collections::HashSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use futures_util::future::join_all;
use penstock_agent::config::SteeringMode;

use self::{
    agents::{Agents, Lives},
    caller::Caller,
    conditions::Conditions,
    world::World,
};
use super::{Tally, reproduce, tally::Network};
use crate::Random;

const CLIENTS: usize = 16;
/// Longest wait for a byte.
const PATIENCE: Duration = Duration::from_secs(30);

/// One world for this time.
pub(super) async fn round(seed: u64, time: Duration) -> Result<Tally> {
    // Its threads enter network namespaces and have runtimes of their own.
    tokio::task::spawn_blocking(move || run(seed, time)).await?
}

fn run(seed: u64, time: Duration) -> Result<Tally> {
    let mut random = Random::new(seed);
    let conditions = Conditions::choose(&mut random);
    let repeat = format!("{conditions:?}\n    {}", reproduce(SteeringMode::Wire, seed));
    let mut world = World::new(&conditions, &mut random)?;
    let lives = Lives::default();
    let mut agents = Agents::new(&world, &lives, Random::new(random.below(u64::MAX)));
    agents.start()?;
    let until = Instant::now() + time;
    let callers = (0..CLIENTS).map(|number| Caller {
        front: world.front,
        servers: &world.servers,
        lives: &lives,
        random: Random::new(random.below(u64::MAX)),
        number,
        what: repeat.clone(),
    });
    let callers: Vec<_> = callers.collect();
    let (tallies, replaced) = std::thread::scope(|scope| {
        let clients = scope.spawn(|| world.client.run(|| clients(callers, until)));
        let replaced = if conditions.kills { agents.replace(until) } else { Ok(()) };
        (clients.join().expect("the thread panicked"), replaced)
    });
    replaced?;
    let mut tally = Tally::new(SteeringMode::Wire);
    let mut cut = HashSet::new();
    for (of_one, cut_addresses) in tallies?? {
        tally.add(&of_one);
        cut.extend(cut_addresses);
    }
    world.calm();
    let mut network = Network::default();
    match agents.settle() {
        Ok(done) => {
            for client in cut.intersection(&done.adopted) {
                let error = anyhow!("the response to {client} was broken although its flow outlived the agent");
                tally.fail(&repeat, &error);
            }
            (network.replaced, network.adopted) = (done.replaced, done.adopted.len() as u64);
            tally.counters = done.counters;
            if conditions.fits() != (tally.counters.bytes.get("wire") > 0) {
                let expected = if conditions.fits() { "no flow began" } else { "connections that differ were joined" };
                tally.fail(&repeat, &anyhow!("{expected}"));
            }
        }
        Err(error) => tally.fail(&repeat, &error),
    }
    let malformed: u64 = world.servers.iter().map(crate::ModelServer::malformed).sum();
    if malformed > 0 {
        let error = anyhow!("the endpoint got {malformed} requests that nobody routed");
        tally.fail(&repeat, &error);
    }
    network.carried = world.carried();
    tally.network = Some(network);
    world.servers.iter_mut().for_each(crate::ModelServer::stop);
    Ok(tally)
}

/// Runs on a thread in the clients' namespace. Returns for each client its tally and the addresses of its connections that were cut.
fn clients(callers: Vec<Caller<'_>>, until: Instant) -> Result<Vec<(Tally, Vec<SocketAddr>)>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(join_all(callers.into_iter().map(|caller| caller.run(until)))))
}
