//! Background work for the replicas of one pool's EPP, shared by all workers: resolves names when their answers expire, checks
//! health, and reloads TLS files when they change. Requests wait only for the first DNS answer.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    health::{self, Checker},
    replica::{Replica, Replicas, State},
};
use crate::{dns::Dns, metrics::Metrics};

/// Maintains the replicas of the EPP of the pool with this index. Never returns. Must be called on a tokio runtime.
pub async fn tend(replicas: Arc<Replicas>, dns: Dns, metrics: Arc<Metrics>, pool: usize) {
    let names = join_all(replicas.names().map(|(place, host)| look_up(&replicas, &dns, place, host)));
    let files = async {
        if let Some(tls) = &replicas.tls {
            tls.follow_files().await;
        }
    };
    tokio::join!(names, files, monitor(&replicas, &metrics, pool));
}

/// Keeps the addresses of one name up to date.
async fn look_up(replicas: &Replicas, dns: &Dns, place: usize, host: &str) {
    loop {
        let holds = match dns.resolve(host).await {
            Ok(answer) => {
                replicas.resolved(place, answer.addresses);
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

/// Keeps a health-check task, or without checks only the metric, for each replica.
async fn monitor(replicas: &Arc<Replicas>, metrics: &Arc<Metrics>, pool: usize) {
    let mut changes = replicas.changes();
    let mut monitored: HashMap<SocketAddr, Monitored> = HashMap::new();
    loop {
        let known = Arc::clone(&changes.borrow_and_update().replicas);
        monitored.retain(|_, monitored| known.iter().any(|replica| Arc::ptr_eq(replica, &monitored.status.replica)));
        for replica in &*known {
            monitored.entry(replica.address).or_insert_with(|| Monitored::new(replicas, replica, metrics, pool));
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
}

impl Monitored {
    fn new(replicas: &Arc<Replicas>, replica: &Arc<Replica>, metrics: &Arc<Metrics>, pool: usize) -> Self {
        let status = Arc::new(ReplicaStatus { replica: Arc::clone(replica), metrics: Arc::clone(metrics), pool });
        status.metrics.pool(pool).epp_replica(replica.address, None, Some(replica.state().label()));
        let checks = replicas.settings.health_interval.map(|interval| {
            let (status, checker) = (Arc::clone(&status), Checker::new(replicas, replica));
            AbortOnDropHandle::new(tokio::spawn(async move {
                health::watch(&status.replica, interval, || checker.check(), |state| status.found(state)).await;
            }))
        });
        Self { status, checks }
    }
}

/// Reports a replica's state in the metrics and the log.
struct ReplicaStatus {
    replica: Arc<Replica>,
    metrics: Arc<Metrics>,
    pool: usize,
}

impl ReplicaStatus {
    fn found(&self, state: State) {
        let before = self.replica.set_state(state);
        if before == state {
            return;
        }
        let (address, authority) = (self.replica.address, &self.replica.authority);
        match state {
            State::Unknown | State::Serving => {
                tracing::info!(%address, %authority, state = state.label(), "EPP replica changed state");
            }
            State::NotServing | State::Unreachable => {
                tracing::warn!(%address, %authority, state = state.label(), "EPP replica changed state");
            }
        }
        self.metrics.pool(self.pool).epp_replica(address, Some(before.label()), Some(state.label()));
    }
}

impl Drop for Monitored {
    fn drop(&mut self) {
        // Aborts the checks first, so that no result arrives afterwards.
        self.checks = None;
        let ReplicaStatus { replica, metrics, pool } = &*self.status;
        metrics.pool(*pool).epp_replica(replica.address, Some(replica.state().label()), None);
    }
}
