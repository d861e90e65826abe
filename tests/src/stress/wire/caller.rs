//! A client of a world: one case after another, each on a connection of its own unless one is kept.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, bail};
use tokio::time::{error::Elapsed, sleep, timeout};

use super::{
    super::{
        Case,
        case::{Exchange, Taking, response},
        exchange::{self, Done, Garbled, Short},
        tally::Tally,
    },
    PATIENCE,
    agents::Lives,
    talk::{self, Talk},
};
use crate::{Client, ModelServer, Random, content::Mismatch, model_server::Framing};
use penstock_agent::config::SteeringMode;

/// Longest time of a case: several times what the slowest needs.
const LONGEST: Duration = Duration::from_secs(120);
/// One case in so many is a client that talks.
const ONE_IN_TALKS: u64 = 8;
/// One response in so many ends on both sides at about the same time.
const ONE_IN_TOGETHER: u64 = 12;

pub(super) struct Caller<'a> {
    pub(super) front: SocketAddr,
    pub(super) servers: &'a [ModelServer],
    pub(super) lives: &'a Lives,
    pub(super) random: Random,
    pub(super) number: usize,
    /// Where it happens and how to repeat it.
    pub(super) what: String,
}

impl Caller<'_> {
    /// Runs until the deadline. Returns the addresses of connections that were cut when the agent was replaced.
    pub(super) async fn run(mut self, until: Instant) -> (Tally, Vec<SocketAddr>) {
        let (mut tally, mut kept, mut cut) = (Tally::new(SteeringMode::Wire), None, Vec::new());
        let mut count = 0u64;
        while Instant::now() < until {
            count += 1;
            let (case, talk) = choose(&mut self.random);
            let since = self.lives.now();
            let client: Result<Client> = match kept.take().filter(|_| !case.fresh && talk.is_none()) {
                Some(client) => Ok(client),
                None => self.connect(&case).await,
            };
            let mut client = match client {
                Ok(client) => client,
                Err(_) if !self.lives.is_same(since) => {
                    sleep(Duration::from_millis(10)).await;
                    continue;
                }
                Err(error) => {
                    tally.fail(&self.what, &error);
                    continue;
                }
            };
            client.patience = PATIENCE;
            let address = client.local_addr().ok();
            match self.exchange(client, &case, talk, count).await {
                Ok(done) => {
                    tally.done(&case, done.outcome, done.bytes);
                    kept = done.client;
                }
                Err(error) if is_excused(&error) && !self.lives.is_same(since) => {
                    tally.cut += 1;
                    cut.extend(address);
                }
                Err(error) => {
                    let what = format!(
                        "client {} at {address:?}, its case {count}: {case:?} {talk:?}; its agent {}\n    {}",
                        self.number,
                        if self.lives.is_same(since) { "lives" } else { "was replaced" },
                        self.what
                    );
                    tally.fail(&what, &error);
                }
            }
        }
        (tally, cut)
    }

    async fn connect(&self, case: &Case) -> Result<Client> {
        timeout(PATIENCE, Client::connect_with(self.front, case.rcvbuf)).await.context("connecting")?
    }

    async fn exchange(&self, client: Client, case: &Case, talk: Option<Talk>, count: u64) -> Result<Done> {
        let Exchange::Response { plan, .. } = &case.exchange else { bail!("not a response") };
        let name = format!("{}-{count}", self.number);
        let exchange = async {
            match talk {
                Some(talk) => talk::run(client, plan, talk).await,
                None => exchange::run(client, case, &name, self.servers).await,
            }
        };
        timeout(LONGEST, exchange).await.context("the case did not end")?
    }
}

/// Whether the end of an agent explains this error: it explains neither wrong bytes nor a stream that stands still.
fn is_excused(error: &Error) -> bool {
    !(error.is::<Mismatch>() || error.is::<Short>() || error.is::<Garbled>() || error.is::<Elapsed>())
}

/// A response that is streamed most of the time.
fn choose(random: &mut Random) -> (Case, Option<Talk>) {
    let Exchange::Response { mut plan, head_only, body, mut taking, .. } = response(random) else {
        unreachable!("a response");
    };
    let talk = random.one_in(ONE_IN_TALKS).then(|| Talk::choose(random, plan.size));
    if talk.is_some() {
        plan.fault = None;
    } else if random.one_in(ONE_IN_TOGETHER)
        && let Some(fault) = plan.fault
        && plan.framing != Framing::UntilClose
    {
        taking = Taking::Part { bytes: fault.after.min(plan.size), reset: random.one_in(2) };
    }
    let streamed = !random.one_in(10);
    let case = Case {
        fresh: random.one_in(6),
        rcvbuf: random.pick(&[None, None, Some(16 << 10), Some(64 << 10), Some(256 << 10)]),
        exchange: Exchange::Response { plan, head_only, body, streamed, taking },
    };
    (case, talk)
}
