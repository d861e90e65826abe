//! Runs an agent until it ends: reloads the configuration at SIGHUP, and stops at SIGTERM, SIGINT, `POST /drain`, a
//! failure of one of its parts, or when another agent has taken over.
//!
//! Stops in three steps. For `timeouts.lame_duck` the agent still accepts, while `/readyz` and each answer send clients
//! elsewhere. Then the port closes, and running requests may finish within `timeouts.drain`. Then what still runs is
//! aborted. A second signal aborts immediately. If another agent has taken over, the port stays open there, and
//! `process.upgrade_drain` is the limit.

mod begin;

use std::{io, pin::pin, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::{JoinHandle, spawn_blocking},
    time::Instant,
};

pub use self::begin::{Activated, StartWith};
use self::begin::{Begins, Begun, begin};
use crate::{
    app::Agent,
    config::{Config, ConfigErrors},
    notify::Notifier,
    probe::Probe,
    takeover::giving::{Giving, Successor, UpgradeSocket},
};

/// Time between two checks whether a drain is done.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Time between two signs of life of a worker.
const WORKER_PULSE: Duration = Duration::from_secs(1);
/// A drain without a limit.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// The signal handlers, with their runtime.
pub struct Signals {
    runtime: tokio::runtime::Runtime,
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Installs the handlers. Must be called before the agent starts, so that no signal kills it in the middle of a
    /// request.
    pub fn install() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let [terminate, interrupt, hangup] = {
            let _inside = runtime.enter();
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal)
        };
        Ok(Self { terminate: terminate?, interrupt: interrupt?, hangup: hangup?, runtime })
    }
}

/// The time limits for stopping.
#[derive(Clone, Copy)]
struct Leave {
    lame_duck: Duration,
    drain: Duration,
    /// Instead of `drain`, after another agent has taken over.
    upgrade_drain: Option<Duration>,
}

impl From<&Config> for Leave {
    fn from(Config { timeouts, process, .. }: &Config) -> Self {
        let lame_duck = timeouts.lame_duck.unwrap_or_default();
        Self { lame_duck, drain: timeouts.drain, upgrade_drain: process.upgrade_drain }
    }
}

/// Starts the agent with `start` and runs it until it has ended. `read` reads the current configuration. Returns an error if the agent
/// cannot start or a part of it failed.
pub fn start_and_run(
    config: Config,
    start: StartWith,
    signals: Signals,
    read: impl Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let StartWith { inherited, taking, upgrade } = start;
    let agent = Agent::start_waiting(config, Probe::default(), inherited)?;
    run(agent, Begins::Waiting(taking), upgrade, signals, read)
}

/// As [`start_and_run`], for an agent that already accepts.
pub fn until_ended(
    agent: Agent,
    signals: Signals,
    read: impl Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    run(agent, Begins::Accepting, None, signals, read)
}

fn run(
    agent: Agent,
    begins: Begins,
    upgrade: Option<UpgradeSocket>,
    signals: Signals,
    read: impl Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let Signals { runtime, terminate, interrupt, hangup } = signals;
    let agent = Arc::new(agent);
    let reloads = Reloads { agent: Arc::clone(&agent), read: Arc::new(read), running: None, again: false };
    let mut stop = StopSignals { terminate, interrupt };
    let ran = runtime.block_on(async {
        let notifier = Notifier::from_env();
        match agent.readiness().pending() {
            pending if pending.is_empty() => {}
            pending => notifier.waiting(&pending),
        }
        let begun = begin(&agent, begins, &mut stop).await?;
        if begun == Begun::Accepting {
            let mut running = Running { agent: &agent, stop, reloads, notifier };
            running.live(hangup, upgrade).await;
        }
        anyhow::Ok(begun)
    });
    runtime.shutdown_background();
    let failed = agent.has_failed();
    match Arc::into_inner(agent) {
        Some(agent) if ran.as_ref().is_ok_and(|begun| *begun == Begun::Accepting) => agent.join(),
        // It has no connections.
        Some(agent) => drop(agent),
        None => tracing::warn!("a reload still reads its files, stopping without it"),
    }
    ran?;
    tracing::info!("stopped");
    anyhow::ensure!(!failed, "a part of the agent failed, see the log");
    Ok(())
}

struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Resolves at the next SIGTERM or SIGINT. Cancel-safe.
    async fn requested(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Reloads of the configuration, one at a time. Each runs on its own thread: reading a file may take as long as its filesystem
/// likes, and the agent must answer signals meanwhile.
struct Reloads<R> {
    agent: Arc<Agent>,
    read: Arc<R>,
    running: Option<JoinHandle<Option<Leave>>>,
    /// Another was asked for while one was running.
    again: bool,
}

impl<R: Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static> Reloads<R> {
    fn start(&mut self) {
        if self.running.is_some() {
            tracing::warn!("the previous reload still reads its files, reloading again after it");
            self.again = true;
            return;
        }
        let (agent, read) = (Arc::clone(&self.agent), Arc::clone(&self.read));
        self.running = Some(spawn_blocking(move || reload(&agent, &*read)));
    }

    /// The result of the running reload; never resolves without one. Cancel-safe.
    async fn done(&mut self) -> Option<Leave> {
        let Some(running) = &mut self.running else { return std::future::pending().await };
        let result = running.await;
        self.running = None;
        if std::mem::take(&mut self.again) {
            self.start();
        }
        // A panic is logged and counted, and changes nothing.
        result.ok().flatten()
    }
}

/// An agent that accepts.
struct Running<'a, R> {
    agent: &'a Arc<Agent>,
    stop: StopSignals,
    reloads: Reloads<R>,
    notifier: Notifier,
}

impl<R: Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static> Running<'_, R> {
    async fn live(&mut self, mut hangup: Signal, upgrade: Option<UpgradeSocket>) {
        let agent = self.agent;
        let weak = Arc::downgrade(agent);
        let passed = move || weak.upgrade().ok_or_else(|| io::Error::other("the agent has ended"))?.passed();
        let mut giving = upgrade.and_then(|upgrade| {
            let published = upgrade.publish(passed);
            // This agent may have taken over already.
            published.inspect_err(|error| tracing::error!(%error, "cannot answer at process.upgrade_socket")).ok()
        });
        let mut leave = Leave::from(&agent.config());
        let mut told_ready = false;
        let successor = {
            let mut watching = pin!(watch_over(agent, &self.notifier));
            loop {
                tokio::select! {
                    () = self.stop.requested() => break None,
                    () = agent.failed() => break None,
                    () = agent.told_to_stop() => break None,
                    successor = successor(&mut giving) => break Some(successor),
                    () = agent.readiness().ready(), if !told_ready => {
                        self.notifier.ready();
                        told_ready = true;
                    }
                    _ = hangup.recv() => {
                        self.notifier.reloading();
                        self.reloads.start();
                    }
                    done = self.reloads.done() => {
                        leave = done.unwrap_or(leave);
                        match agent.readiness().pending() {
                            pending if pending.is_empty() => self.notifier.ready(),
                            pending => self.notifier.waiting(&pending),
                        }
                    }
                    () = &mut watching => {}
                }
            }
        };
        match successor {
            Some(successor) => self.hand_over(successor, &mut leave),
            None => self.notifier.stopping(),
        }
        drop(giving);
        let Self { stop, notifier, .. } = self;
        tokio::select! {
            () = drain(agent, stop, leave) => {}
            () = watch_over(agent, notifier) => {}
        }
    }

    /// Leaves the sockets to an agent that accepts from them.
    fn hand_over(&mut self, successor: Successor, leave: &mut Leave) {
        let Successor { roles, pid, program, done } = successor;
        self.agent.hand_over(&roles);
        self.notifier.handed_over(pid);
        leave.drain = leave.upgrade_drain.unwrap_or(FOREVER);
        let sockets: Vec<&str> = roles.iter().map(|role| role.name()).collect();
        tracing::info!(pid, version = program, sockets = sockets.join(","), "another agent has taken over");
        // It goes on if it has ended meanwhile: so does this one's drain.
        let _ = done.send(());
    }
}

/// Stops the agent within its time limits. A signal shortens them.
async fn drain(agent: &Agent, stop: &mut StopSignals, leave: Leave) {
    tracing::info!(lame_duck = ?leave.lame_duck, deadline = ?leave.drain, "draining");
    agent.leave();
    let mut forced = false;
    tokio::select! {
        () = stop.requested(), if !leave.lame_duck.is_zero() => forced = true,
        () = tokio::time::sleep(leave.lame_duck) => {}
    }
    if forced {
        agent.force();
    } else {
        agent.drain();
    }
    let deadline = Instant::now() + leave.drain;
    while !agent.is_done() {
        tokio::select! {
            () = stop.requested() => agent.force(),
            () = tokio::time::sleep_until(deadline), if !forced => {
                agent.force();
                forced = true;
            }
            () = tokio::time::sleep(CHECK_INTERVAL) => {}
        }
    }
}

/// The agent that takes over, if it can. Cancel-safe.
async fn successor(giving: &mut Option<Giving>) -> Successor {
    match giving {
        Some(giving) => giving.successor().await,
        None => std::future::pending().await,
    }
}

/// Gives the service manager's watchdog its signs of life, while every worker has some. Never returns.
async fn watch_over(agent: &Agent, notifier: &Notifier) {
    let Some(interval) = notifier.watchdog() else { return std::future::pending().await };
    loop {
        tokio::time::sleep(interval / 3).await;
        let silence = agent.silence();
        // Workers give one each second.
        if silence < (interval / 3).max(3 * WORKER_PULSE) {
            notifier.alive();
        } else {
            tracing::error!(
                ?silence,
                "a worker is stuck, not telling the service manager's watchdog that the agent is alive"
            );
        }
    }
}

/// Reloads the configuration and returns its time limits for stopping. An invalid configuration, or one that needs a
/// restart, changes nothing.
fn reload(agent: &Agent, read: impl Fn() -> Result<Config, ConfigErrors>) -> Option<Leave> {
    let config = match read() {
        Ok(config) => config,
        Err(errors) => {
            agent.metrics().reloaded("invalid");
            tracing::error!("configuration reload failed, keeping the current one:\n{errors}");
            return None;
        }
    };
    config.log_warnings();
    let leave = Leave::from(&config);
    match agent.reload(config) {
        Ok(()) => {
            tracing::info!("configuration reloaded");
            Some(leave)
        }
        Err(error) => {
            tracing::error!(%error, "configuration reload failed, keeping the current one");
            None
        }
    }
}

/// Resolves at SIGTERM or SIGINT.
pub async fn terminated() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
}
