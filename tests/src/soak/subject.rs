//! An agent under soak: its process, configuration and clients.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result};
use futures_util::future::{join_all, join3};
use nix::sys::signal::Signal;
use penstock_agent::config::SteeringMode;

use super::caller::{Caller, Way};
use super::latency;
use super::ledger::Ledger;
use super::memory::{MemoryCgroup, Pressure};
use super::world::World;
use crate::agent_process::AgentProcess;
use crate::stress::{self, mode_name};
use crate::{Process, Random};

/// Clients with the stress run's cases: every framing, fault and protocol switch.
const STRESS_CLIENTS: usize = 3;

pub(super) struct Subject {
    pub(super) mode: SteeringMode,
    pub(super) agent: AgentProcess,
    pub(super) tls: SocketAddr,
    memory: Result<MemoryCgroup>,
    reloads: Cell<u64>,
    /// The state as of the last request.
    progress: RefCell<String>,
}

impl Subject {
    pub(super) async fn start(mode: SteeringMode, world: &World) -> Result<Self> {
        let agent = AgentProcess::start_with_text(&text(mode, world, 0)).await?;
        let tls = agent.tls.context("the agent logged no TLS address")?;
        // Last, so that it is dropped after the process.
        let memory = MemoryCgroup::around(agent.process.id());
        Ok(Self { mode, agent, tls, memory, reloads: Cell::new(0), progress: RefCell::default() })
    }

    pub(super) fn name(&self) -> String {
        mode_name(self.mode)
    }

    /// Changes the agent's configuration and makes it reload.
    pub(super) fn reload(&self, world: &World) -> Result<()> {
        self.reloads.set(self.reloads.get() + 1);
        self.agent.write_text(&text(self.mode, world, self.reloads.get()))?;
        self.agent.process.signal(Signal::SIGHUP)
    }

    /// Memory is scarce while the guard exists.
    pub(super) fn press(&self) -> Result<Pressure<'_>> {
        match &self.memory {
            Ok(memory) => memory.press(),
            Err(error) => anyhow::bail!("{error:#}"),
        }
    }

    pub(super) fn process(&self) -> &Process {
        &self.agent.process
    }

    pub(super) fn set_progress(&self, ledger: &Ledger) {
        *self.progress.borrow_mut() = format!("{}: {ledger}", self.name());
    }

    pub(super) fn progress(&self) -> String {
        self.progress.borrow().clone()
    }

    /// Runs every kind of client until the deadline.
    pub(super) async fn traffic(&self, world: &World, mut random: Random, until: Instant) -> Ledger {
        let mut fork = || Random::new(random.below(u64::MAX));
        let ledger = RefCell::new(Ledger::default());
        let seed = fork().below(u64::MAX);
        let stressed = (0..STRESS_CLIENTS).map(|_| {
            let (random, number) = (fork(), world.number());
            stress::calls(self.agent.addr, &world.stable, random, number, self.mode, seed, until)
        });
        let stressed: Vec<_> = stressed.collect();
        let callers = Way::ALL.map(|way| {
            let mut caller = Caller::new(self, world, fork(), way, &ledger);
            async move { caller.run(until).await }
        });
        let probe = latency::probe(self.agent.addr, until);
        let (stressed, _, samples) = join3(join_all(stressed), join_all(callers), probe).await;
        let mut ledger = ledger.into_inner();
        ledger.latency = samples;
        stressed.iter().for_each(|tally| ledger.add_stress(tally));
        ledger
    }

    /// Lines of the agent's log that no fault explains.
    pub(super) fn complaints(&self) -> Vec<String> {
        let output = self.agent.process.output();
        let bad = output.iter().filter(|line| line.contains("panicked") || line.contains("\"level\":\"ERROR\""));
        bad.take(5).map(|line| format!("the agent logged {line}")).collect()
    }
}

/// The configuration; versions differ in what a reload may change.
fn text(mode: SteeringMode, world: &World, version: u64) -> String {
    let stable: Vec<String> = world.stable_addrs().iter().map(|addr| format!("\"{addr}\"")).collect();
    let with = |addr: SocketAddr| format!("[{}, \"{addr}\"]", stable[0]);
    let (first, mortal, linked) = (stable.join(", "), with(world.mortal_addr), with(world.linked.addr));
    let (mode, epp) = (mode_name(mode), world.epp_addr);
    let (cert, key) = (world.cert_file.display(), world.key_file.display());
    let models = 50 + version % 2;
    let epp = format!(
        "endpoints = [{first}]\nfailure_mode = \"open\"\n[pools.picker]\nkind = \"epp\"\naddress = \"{epp}\"\n\
         decision_timeout = \"5s\"\nhealth_interval = \"1s\"\n"
    );
    let routes: Vec<String> = ["epp", "lease", "mortal", "linked"]
        .map(|pool| format!("[[routes]]\npath_prefix = \"/{pool}\"\npool = \"{pool}\"\n"))
        .into();
    format!(
        "[listen]\naddress = \"127.0.0.1:0\"\nworkers = 2\n[listen.tls]\naddress = \"127.0.0.1:0\"\ncert_file = \"{cert}\"\n\
         key_file = \"{key}\"\n[admin]\naddress = \"127.0.0.1:0\"\n[limits]\nmetric_models = {models}\n\
         [timeouts]\nlame_duck = \"off\"\nendpoint_keep_alive = \"2s\"\n[steering]\nmode = \"{mode}\"\nmax_flows = 4096\n\
         [[pools]]\nname = \"stable\"\nendpoints = [{first}]\n\
         [[pools]]\nname = \"epp\"\n{epp}\
         [[pools]]\nname = \"lease\"\npick_per = \"lease\"\n{epp}\
         [[pools]]\nname = \"mortal\"\nendpoints = {mortal}\n[pools.ejection]\nbase = \"1s\"\n\
         [[pools]]\nname = \"linked\"\nendpoints = {linked}\n[pools.ejection]\nbase = \"1s\"\n\
         {}[[routes]]\npool = \"stable\"\n",
        routes.concat()
    )
}
