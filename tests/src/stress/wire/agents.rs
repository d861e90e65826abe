//! Agents one after the other: each is killed or told to stop, and the next one adopts its flows.

use std::{
    collections::HashSet,
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::world::World;
use crate::{Process, Random, agent::sum, agent_process::AgentProcess, eventually::within, stress::Counters};

const SOON: Duration = Duration::from_secs(30);
/// How long an agent lives.
const LIFE: u64 = 1500;

/// Counts starts and ends of agents, so that a client can tell whether its agent was replaced.
#[derive(Debug, Default)]
pub(super) struct Lives(AtomicU64);

impl Lives {
    /// Odd while an agent runs.
    pub(super) fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn step(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether one agent has run since this moment.
    pub(super) fn is_same(&self, since: u64) -> bool {
        since % 2 == 1 && self.now() == since
    }
}

/// What agents did.
#[derive(Clone, Debug, Default)]
pub(super) struct Done {
    pub(super) counters: Counters,
    pub(super) replaced: u64,
    /// Clients whose flows outlived an agent.
    pub(super) adopted: HashSet<SocketAddr>,
}

pub(super) struct Agents<'a> {
    world: &'a World,
    lives: &'a Lives,
    random: Random,
    current: Option<AgentProcess>,
    done: Done,
}

impl<'a> Agents<'a> {
    pub(super) fn new(world: &'a World, lives: &'a Lives, random: Random) -> Self {
        Self { world, lives, random, current: None, done: Done::default() }
    }

    /// Runs on a thread in the agent's namespace.
    fn enter<T: Send>(&mut self, work: impl AsyncFnOnce(&mut Self) -> Result<T> + Send) -> Result<T> {
        let place = Arc::clone(&self.world.agent);
        place.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(work(self))
        })?
    }

    pub(super) fn start(&mut self) -> Result<()> {
        self.enter(async |agents| agents.begin().await)
    }

    /// Replaces agents until the deadline.
    pub(super) fn replace(&mut self, until: Instant) -> Result<()> {
        self.enter(async |agents| {
            while Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(500 + agents.random.below(LIFE))).await;
                agents.end().await?;
                agents.done.replaced += 1;
                agents.begin().await?;
            }
            Ok(())
        })
    }

    async fn begin(&mut self) -> Result<()> {
        let through = ["env", "PENSTOCK_LOG=info", "PENSTOCK_LOG_FORMAT=json"];
        let (front, endpoint) = (self.world.front, self.world.servers[0].addr);
        let agent = AgentProcess::start_through(&through, front, endpoint, "wire", &self.world.settings()).await?;
        let (_, said) = agent.ask_admin("/readyz?verbose").await?;
        ensure!(said.contains("path wire: ready") && !said.contains("end with the agent"), "{said}");
        self.current = Some(agent);
        self.lives.step();
        Ok(())
    }

    /// Ends the agent without a warning to its clients, or by SIGTERM.
    async fn end(&mut self) -> Result<()> {
        let mut agent = self.current.take().context("no agent runs")?;
        let metrics = agent.ask_admin("/metrics").await?.1;
        self.lives.step();
        if self.random.one_in(3) {
            agent.process.terminate()?;
            ensure!(agent.process.ended(SOON).await?.success(), "{:#?}", agent.process.output());
        } else {
            agent.process.kill()?;
        }
        self.note(&agent, &metrics)
    }

    /// The flows that there are, and the connections of both peers.
    fn flows(&self, agent: &AgentProcess) -> Result<String> {
        let mut doctor = Command::new(Process::binary("penstock")?);
        let said = doctor.arg("doctor").arg("--config").arg(agent.config_path()).output()?.stdout;
        let said = String::from_utf8_lossy(&said).into_owned();
        let lines = said.lines().filter(|line| line.contains("flows:") || line.contains(" <- "));
        let mut all: Vec<_> = lines.map(str::to_owned).collect();
        for place in [&self.world.client, &self.world.endpoint] {
            for table in ["tcp", "tcp6"] {
                let read = || std::fs::read_to_string(format!("/proc/thread-self/net/{table}"));
                // Without those in TIME_WAIT.
                let open = |line: &&str| line.split_whitespace().nth(3) != Some("06");
                all.extend(place.run(read)??.lines().skip(1).filter(open).map(str::to_owned));
            }
        }
        Ok(all.join("\n    "))
    }

    fn note(&mut self, agent: &AgentProcess, metrics: &str) -> Result<()> {
        self.done.counters.add(&Counters::read(metrics));
        for line in agent.process.output() {
            ensure!(!line.contains("panicked"), "{line}");
            if line.contains("\"adopted\":true") {
                let line: serde_json::Value = serde_json::from_str(&line)?;
                let client = line["client"].as_str().context("an adopted flow without a client")?;
                self.done.adopted.insert(client.parse()?);
            }
        }
        Ok(())
    }

    /// After the last client has left: nothing is held for requests, flows and connections, and nothing stays after the last agent.
    pub(super) fn settle(mut self) -> Result<Done> {
        self.enter(async |agents| {
            let mut agent = agents.current.take().context("no agent runs")?;
            for gauge in ["penstock_active_requests", "penstock_client_connections", "penstock_adopted_flows"] {
                let deadline = Instant::now() + SOON;
                loop {
                    let value = agent.metric(gauge, &[]).await?;
                    if value == 0.0 {
                        break;
                    }
                    ensure!(Instant::now() < deadline, "{gauge} stays at {value}: {}", agents.flows(&agent)?);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            // Connections may be kept for reuse for a few seconds.
            let open = || agents.world.servers[0].connections_open();
            ensure!(within(SOON, || open() == 0).await, "{} connections to endpoints were not closed", open());
            let metrics = agent.ask_admin("/metrics").await?.1;
            let missed = sum(&metrics, "penstock_steer_events_missed_total", &[]);
            ensure!(missed == 0.0, "{missed} events of the kernel programs were lost");
            agent.process.terminate()?;
            ensure!(agent.process.ended(SOON).await?.success(), "{:#?}", agent.process.output());
            agents.note(&agent, &metrics)
        })?;
        let left = folders(&self.world.bpffs.path().join("penstock"));
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(self.done)
    }
}

/// The agents' folders in a bpffs.
fn folders(of: &std::path::Path) -> Vec<String> {
    let entries = |path: &std::path::Path| {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    entries(of).iter().flat_map(|place| entries(place)).map(|path| path.display().to_string()).collect()
}
