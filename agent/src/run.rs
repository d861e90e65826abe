//! Runs an agent until it ends: reloads the configuration at SIGHUP, and stops at SIGTERM, SIGINT or a failure of one
//! of its parts.
//!
//! Stops in three steps. For `timeouts.lame_duck` the agent still accepts, while `/readyz` and each answer send clients
//! elsewhere. Then the port closes, and running requests may finish within `timeouts.drain`. Then what still runs is
//! aborted. A second signal aborts immediately.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::{JoinHandle, spawn_blocking},
    time::Instant,
};

use crate::{
    app::Agent,
    config::{Config, ConfigErrors, Timeouts},
};

/// Time between two checks whether a drain is done.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

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
}

impl From<&Timeouts> for Leave {
    fn from(timeouts: &Timeouts) -> Self {
        Self { lame_duck: timeouts.lame_duck.unwrap_or_default(), drain: timeouts.drain }
    }
}

/// Runs until the agent has ended. `read` reads the current configuration. Returns an error if a part of the agent
/// failed.
pub fn until_ended(
    agent: Agent,
    signals: Signals,
    read: impl Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let Signals { runtime, terminate, interrupt, hangup } = signals;
    let agent = Arc::new(agent);
    let reloads = Reloads { agent: Arc::clone(&agent), read: Arc::new(read), running: None, again: false };
    runtime.block_on(live(&agent, StopSignals { terminate, interrupt }, hangup, reloads));
    runtime.shutdown_background();
    let failed = agent.has_failed();
    match Arc::into_inner(agent) {
        Some(agent) => agent.join(),
        None => tracing::warn!("a reload still reads its files, stopping without it"),
    }
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

async fn live<R: Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static>(
    agent: &Agent,
    mut stop: StopSignals,
    mut hangup: Signal,
    mut reloads: Reloads<R>,
) {
    let mut leave = Leave::from(&agent.config().timeouts);
    loop {
        tokio::select! {
            () = stop.requested() => break,
            () = agent.failed() => break,
            _ = hangup.recv() => reloads.start(),
            done = reloads.done() => leave = done.unwrap_or(leave),
        }
    }
    tracing::info!(lame_duck = ?leave.lame_duck, deadline = ?leave.drain, "draining");
    agent.leave();
    tokio::select! {
        () = stop.requested() => agent.force(),
        () = tokio::time::sleep(leave.lame_duck) => {}
    }
    agent.drain();
    let deadline = Instant::now() + leave.drain;
    let mut forced = false;
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
    let leave = Leave::from(&config.timeouts);
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
