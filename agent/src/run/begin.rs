//! How an agent begins: with sockets of its own, with those of the service manager, or by taking over those of a running agent.

use std::{pin::pin, time::Duration};

use anyhow::{Result, ensure};

use super::StopSignals;
use crate::{
    app::Agent,
    config::Config,
    takeover::{
        Inherited,
        giving::UpgradeSocket,
        taking::{self, Taking},
    },
};

pub use crate::takeover::activation::Activated;

/// Time between two messages about what a takeover waits for.
const REMIND: Duration = Duration::from_secs(10);

/// What an agent begins with.
pub struct StartWith {
    pub(super) inherited: Inherited,
    /// The running agent that it takes over from.
    pub(super) taking: Option<Taking>,
    pub(super) upgrade: Option<UpgradeSocket>,
}

impl StartWith {
    /// Gets the sockets of the service manager and of the agent that answers at `process.upgrade_socket`, if there are any. Blocks for
    /// at most some seconds.
    pub fn prepare(config: &Config, activated: Activated) -> Result<Self> {
        let activated = activated.sockets(config)?;
        let path = config.process.upgrade_socket.as_deref();
        let (taking, taken) = path.map(taking::ask).transpose()?.flatten().unzip();
        // Bound now, because a failure must not come after the takeover.
        let upgrade = path.map(UpgradeSocket::bind).transpose()?;
        Ok(Self { inherited: Inherited::new(taken.unwrap_or_default(), activated), taking, upgrade })
    }
}

/// How far the agent is.
pub(super) enum Begins {
    Accepting,
    /// It accepts nothing yet. The running agent that it takes over from, if there is one.
    Waiting(Option<Taking>),
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Begun {
    Accepting,
    /// A signal ended the agent before it took over.
    Stopped,
}

/// Begins to accept: at once, or if the agent takes over from another one, when it is ready.
pub(super) async fn begin(agent: &Agent, begins: Begins, stop: &mut StopSignals) -> Result<Begun> {
    let taking = match begins {
        Begins::Accepting => return Ok(Begun::Accepting),
        Begins::Waiting(None) => {
            agent.accept()?;
            return Ok(Begun::Accepting);
        }
        Begins::Waiting(Some(taking)) => taking,
    };
    let (pid, version) = (taking.pid, taking.program.clone());
    tracing::info!(pid, version, "taking over from the running agent once this one is ready");
    let mut ended = pin!(taking.ended());
    let is_alone = loop {
        tokio::select! {
            biased;
            () = stop.requested() => return Ok(Begun::Stopped),
            () = agent.failed() => anyhow::bail!("a part of the agent failed before it took over, see the log"),
            () = agent.readiness().ready() => break false,
            () = &mut ended => break true,
            () = tokio::time::sleep(REMIND) => {
                tracing::info!(pid, pending = agent.readiness().pending().join(", "), "not taking over yet");
            }
        }
    };
    ensure!(!agent.has_failed(), "a part of the agent failed before it took over, see the log");
    agent.accept()?;
    if is_alone {
        tracing::warn!(pid, "the running agent has ended, accepting without it");
    } else if let Err(error) = taking.ready(agent.taken().to_vec()).await {
        tracing::warn!(pid, error = format!("{error:#}"), "the running agent did not say that it drains");
    } else {
        tracing::info!(pid, "taken over");
    }
    Ok(Begun::Accepting)
}
