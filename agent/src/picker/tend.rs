//! Background work for the replicas of one pool's EPP, shared by all workers: resolves names when their answers expire, checks
//! health, connects again to replicas that were lost, and reloads TLS files when they change.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    address::ReplicaAddress,
    health::{self, Checker},
    reach,
    replica::{Replica, ReplicaState, Replicas},
};
use crate::{
    dns::DnsResolver,
    listeners::Listeners,
    metrics::Metrics,
    probe::{Point, Probe},
};

/// What the background work for one pool's EPP uses.
pub struct Means {
    pub dns: DnsResolver,
    /// The agent's own listeners, which are never used as an EPP.
    pub own: Listeners,
    /// With the pool's index. `None` if other replicas of the pool are counted.
    pub metrics: Option<(Arc<Metrics>, usize)>,
    pub probe: Probe,
}

/// Maintains the replicas of an EPP, which count as [tended](Replicas::tended) from now on. The future never resolves. It must be
/// polled on a tokio runtime.
pub fn tend(replicas: Arc<Replicas>, means: Means) -> impl Future<Output = ()> + Send {
    let tended = replicas.tended();
    async move {
        maintain(&replicas, Arc::new(means)).await;
        drop(tended);
    }
}

/// As [`tend`], for an EPP that a reload has replaced: resolves when no request that began before can ask it any more.
pub fn tend_while_used(replicas: Arc<Replicas>, means: Means) -> impl Future<Output = ()> + Send {
    let tending = tend(Arc::clone(&replicas), means);
    async move {
        replicas.users.close();
        tokio::select! {
            () = tending => {}
            () = replicas.users.wait() => {}
        }
    }
}

async fn maintain(replicas: &Arc<Replicas>, means: Arc<Means>) {
    let names = join_all(replicas.names().map(|(place, host)| look_up(replicas, &means, place, host)));
    let files = async {
        if let Some(tls) = &replicas.tls {
            tls.follow_files().await;
        }
    };
    tokio::join!(names, files, monitor(replicas, &means));
}

/// Keeps the addresses of one name up to date. Skips addresses at which this agent listens. If no others are left, the name counts
/// as unresolved.
async fn look_up(replicas: &Replicas, means: &Means, place: usize, host: &str) {
    let Means { dns, own, .. } = means;
    let mut skipped = Vec::new();
    loop {
        let holds = match dns.resolve(host).await {
            Ok(answer) => {
                let is_own = |ip: &IpAddr| own.accept(SocketAddr::new(*ip, replicas.port(place)));
                let (ours, others): (Vec<_>, Vec<_>) = answer.addresses.into_iter().partition(is_own);
                if ours != skipped && !ours.is_empty() {
                    tracing::warn!(host, addresses = ?ours, "EPP is one of the agent's own listeners, skipping it");
                }
                skipped = ours;
                let none_left = others.is_empty() && !skipped.is_empty();
                replicas.resolved(place, others);
                if none_left {
                    replicas.unresolved(&format!("{host} is this agent itself"));
                }
                answer.holds
            }
            Err(error) => {
                tracing::warn!(%error, "resolving the EPP's name failed, keeping the previous replicas");
                replicas.unresolved(&error.to_string());
                dns.retry_after()
            }
        };
        // Look up sooner if a replica fails, because its address may have changed.
        let gap = dns.shortest().min(holds);
        sleep(gap).await;
        let _ = timeout(holds - gap, replicas.look.notified()).await;
    }
}

/// Keeps the tasks and the metric of each replica.
async fn monitor(replicas: &Arc<Replicas>, means: &Arc<Means>) {
    let mut changes = replicas.changes();
    let mut monitored: HashMap<ReplicaAddress, Monitored> = HashMap::new();
    loop {
        let known = Arc::clone(&changes.borrow_and_update().replicas);
        monitored.retain(|_, monitored| known.iter().any(|replica| Arc::ptr_eq(replica, &monitored.status.replica)));
        for replica in &*known {
            monitored.entry(replica.address.clone()).or_insert_with(|| Monitored::new(replicas, replica, means));
        }
        // Cannot fail, because the sender is in `replicas`.
        if changes.changed().await.is_err() {
            return;
        }
    }
}

struct Monitored {
    status: Arc<ReplicaStatus>,
    checks: Option<AbortOnDropHandle<()>>,
    _reach: AbortOnDropHandle<()>,
}

impl Monitored {
    fn new(replicas: &Arc<Replicas>, replica: &Arc<Replica>, means: &Arc<Means>) -> Self {
        let status = Arc::new(ReplicaStatus { replica: Arc::clone(replica), means: Arc::clone(means) });
        status.count_state(None, Some(replica.state()));
        let checks = replicas.settings.health_interval.map(|interval| {
            let checker = Checker::new(replicas, replica);
            AbortOnDropHandle::new(tokio::spawn(check(Arc::clone(&status), interval, checker)))
        });
        let (replicas, replica) = (Arc::clone(replicas), Arc::clone(replica));
        let reach = tokio::spawn(async move { reach::keep_following(&replicas, &replica).await });
        Self { status, checks, _reach: AbortOnDropHandle::new(reach) }
    }
}

async fn check(status: Arc<ReplicaStatus>, interval: Duration, checker: Checker) {
    let ReplicaStatus { replica, means } = &*status;
    let check = || async {
        means.probe.at(Point::HealthCheck);
        checker.check().await
    };
    health::keep_watching(replica, interval, check, |state| status.found(state)).await;
}

/// Reports a replica's state in the metrics and the log.
struct ReplicaStatus {
    replica: Arc<Replica>,
    means: Arc<Means>,
}

impl ReplicaStatus {
    /// Updates the metric from one state to another. `None` means that the replica did not, or does not, exist.
    fn count_state(&self, before: Option<ReplicaState>, now: Option<ReplicaState>) {
        if let Some((metrics, pool)) = &self.means.metrics {
            let (before, now) = (before.map(ReplicaState::label), now.map(ReplicaState::label));
            metrics.pool(*pool).epp_replica(&self.replica.address, before, now);
        }
    }

    fn found(&self, state: ReplicaState) {
        let before = self.replica.set_state(state);
        if before == state {
            return;
        }
        let (address, authority) = (&self.replica.address, &self.replica.authority);
        match state {
            ReplicaState::Unknown | ReplicaState::Serving => {
                tracing::info!(%address, %authority, state = state.label(), "EPP replica changed state");
            }
            ReplicaState::NotServing | ReplicaState::Unreachable => {
                tracing::warn!(%address, %authority, state = state.label(), "EPP replica changed state");
            }
        }
        self.count_state(Some(before), Some(state));
    }
}

impl Drop for Monitored {
    fn drop(&mut self) {
        // Aborts the checks first, so that no result arrives afterwards.
        self.checks = None;
        self.status.count_state(Some(self.status.replica.state()), None);
    }
}
