//! `penstock run`: start, read the configuration again at SIGHUP, drain at SIGTERM.

use std::time::Duration;

use penstock_agent::{
    app::Agent,
    config::{Config, ConfigErrors},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::Instant,
};

/// How often a running agent is asked whether its workers live.
const WATCH: Duration = Duration::from_secs(1);
/// How often a draining agent looks whether it is done.
const LOOK: Duration = Duration::from_millis(20);

/// `read` reads the configuration as it is now.
pub(crate) fn agent(config: Config, read: impl Fn() -> Result<Config, ConfigErrors>) -> anyhow::Result<()> {
    let mut drain = config.timeouts.drain;
    // The signal handlers stand before the first request is taken.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let guard = runtime.enter();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(guard);
    let agent = Agent::start(config)?;
    runtime.block_on(async {
        while !agent.has_failed() {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => drain = reload(&agent, &read).unwrap_or(drain),
                () = tokio::time::sleep(WATCH) => {}
            }
        }
        tracing::info!(deadline = ?drain, "draining");
        agent.drain();
        let deadline = Instant::now() + drain;
        let mut forced = false;
        while !agent.is_done() {
            tokio::select! {
                _ = terminate.recv() => agent.force(),
                _ = interrupt.recv() => agent.force(),
                () = tokio::time::sleep_until(deadline), if !forced => {
                    agent.force();
                    forced = true;
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    });
    let failed = agent.has_failed();
    agent.join();
    tracing::info!("stopped");
    anyhow::ensure!(!failed, "a worker failed; the log says why");
    Ok(())
}

/// Reads the configuration again and takes it; returns its time for draining. One that is wrong, or needs a restart, changes
/// nothing.
fn reload(agent: &Agent, read: impl Fn() -> Result<Config, ConfigErrors>) -> Option<Duration> {
    let config = match read() {
        Ok(config) => config,
        Err(errors) => {
            agent.metrics().reloaded("invalid");
            tracing::error!("the configuration stays as it was:\n{errors}");
            return None;
        }
    };
    let drain = config.timeouts.drain;
    match agent.reload(config) {
        Ok(()) => {
            tracing::info!("the configuration was read again");
            Some(drain)
        }
        Err(error) => {
            tracing::error!(%error, "the configuration stays as it was");
            None
        }
    }
}

/// Resolves at SIGTERM or SIGINT.
pub(crate) async fn terminated() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
}
