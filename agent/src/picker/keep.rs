//! Keeps a worker connected to the replica that is asked first, so that no request waits for a connection: from the start, after
//! a loss, and when another replica is asked first. Does not connect to a replica that is unreachable; `reach` does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::client::Links;
use crate::readiness::Gate;

/// The first and the longest pause before a connection that was lost soon after it was made is made again.
const FIRST: Duration = Duration::from_millis(20);
const MOST: Duration = Duration::from_secs(1);
/// A connection that lasts this long is made again at once.
const STABLE: Duration = Duration::from_secs(2);

/// Keeps the connection. `connected` is told of the first one. Never returns.
pub(super) async fn keep(links: Arc<Links>, connected: oneshot::Sender<()>) {
    let replicas = Arc::clone(&links.replicas);
    let (mut news, mut connected, mut pause) = (replicas.news(), Some(connected), FIRST);
    loop {
        let best = replicas.snapshot().best(&[], Instant::now()).cloned();
        let Some(replica) = best.filter(|replica| !replica.is_unreachable()) else {
            // Cannot fail, because the sender is in `replicas`.
            if news.changed().await.is_err() {
                return;
            }
            continue;
        };
        let made = Instant::now();
        let Ok(http2) = links.connection(&replica).get().await else {
            // The news tell when an unreachable replica is connected again, but not when this machine can connect again.
            if !replica.is_unreachable() {
                pause = (2 * pause).min(MOST);
            }
            sleep(if replica.is_unreachable() { FIRST } else { pause }).await;
            continue;
        };
        if let Some(connected) = connected.take() {
            let _ = connected.send(());
        }
        tokio::select! {
            () = http2.ended() => {
                pause = if made.elapsed() < STABLE { (2 * pause).min(MOST) } else { FIRST };
                sleep(pause).await;
            }
            _ = news.changed() => {}
        }
    }
}

/// A gate of the agent's readiness that opens at the first connection, or after a time.
pub struct Start {
    pub gate: Gate,
    pub wait: Duration,
    pub pool: String,
    /// Whether the pool's missing connection was reported; shared by the workers.
    pub reported: Arc<AtomicBool>,
}

impl Start {
    /// Opens the gate at the latest after `wait`, and also if no connection is kept any more.
    pub(super) async fn open(self, connected: oneshot::Receiver<()>) {
        if timeout(self.wait, connected).await.is_err() && !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                pool = self.pool,
                "no connection to the EPP in the start time, counting as ready without it"
            );
        }
        self.gate.open();
    }
}
