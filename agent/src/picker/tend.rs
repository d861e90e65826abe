//! What goes on beside requests for the replicas of one pool's EPP, once for all workers: names are looked up again when their
//! answers are over, health is checked, TLS files are read when they change. Nothing here is waited for by a request but the
//! first answer of DNS.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    health::{self, Checker},
    replica::{Replica, Replicas, State},
};
use crate::{dns::Dns, metrics::Metrics};

/// Looks after the EPP of the pool with this index, for ever. Must be called on a tokio runtime.
pub async fn tend(replicas: Arc<Replicas>, dns: Dns, metrics: Arc<Metrics>, pool: usize) {
    let names = join_all(replicas.names().map(|(place, host)| look_up(&replicas, &dns, place, host)));
    let files = async {
        if let Some(tls) = &replicas.tls {
            tls.follow_files().await;
        }
    };
    tokio::join!(names, files, look_after(&replicas, &metrics, pool));
}

/// Keeps one name's addresses up to date.
async fn look_up(replicas: &Replicas, dns: &Dns, place: usize, host: &str) {
    loop {
        let holds = match dns.resolve(host).await {
            Ok(answer) => {
                replicas.resolved(place, answer.addresses);
                answer.holds
            }
            Err(error) => {
                tracing::warn!(%error, "the EPP's name cannot be looked up");
                replicas.unresolved(&error.to_string());
                dns.retry_after()
            }
        };
        // Sooner when a replica fails: it may be somewhere else by now.
        let gap = dns.shortest().min(holds);
        sleep(gap).await;
        let _ = timeout(holds - gap, replicas.look.notified()).await;
    }
}

/// Keeps a task, or without checks only the metric, for each replica that there is.
async fn look_after(replicas: &Arc<Replicas>, metrics: &Arc<Metrics>, pool: usize) {
    let mut changes = replicas.changes();
    let mut tended: HashMap<SocketAddr, Tended> = HashMap::new();
    loop {
        let known = Arc::clone(&changes.borrow_and_update().replicas);
        tended.retain(|_, tended| known.iter().any(|replica| Arc::ptr_eq(replica, &tended.shown.replica)));
        for replica in &*known {
            tended.entry(replica.address).or_insert_with(|| Tended::new(replicas, replica, metrics, pool));
        }
        // The sender is in `replicas`.
        if changes.changed().await.is_err() {
            return;
        }
    }
}

struct Tended {
    shown: Arc<Shown>,
    checks: Option<AbortOnDropHandle<()>>,
}

impl Tended {
    fn new(replicas: &Arc<Replicas>, replica: &Arc<Replica>, metrics: &Arc<Metrics>, pool: usize) -> Self {
        let shown = Arc::new(Shown { replica: Arc::clone(replica), metrics: Arc::clone(metrics), pool });
        shown.metrics.pool(pool).epp_replica(replica.address, None, Some(replica.state().label()));
        let checks = replicas.settings.health_interval.map(|interval| {
            let (shown, checker) = (Arc::clone(&shown), Checker::new(replicas, replica));
            AbortOnDropHandle::new(tokio::spawn(async move {
                health::watch(&shown.replica, interval, || checker.check(), |state| shown.found(state)).await;
            }))
        });
        Self { shown, checks }
    }
}

/// A replica in the metrics and the log.
struct Shown {
    replica: Arc<Replica>,
    metrics: Arc<Metrics>,
    pool: usize,
}

impl Shown {
    fn found(&self, state: State) {
        let before = self.replica.set_state(state);
        if before == state {
            return;
        }
        let (address, authority) = (self.replica.address, &self.replica.authority);
        match state {
            State::Unknown | State::Serving => {
                tracing::info!(%address, %authority, state = state.label(), "EPP replica");
            }
            State::NotServing | State::Unreachable => {
                tracing::warn!(%address, %authority, state = state.label(), "EPP replica");
            }
        }
        self.metrics.pool(self.pool).epp_replica(address, Some(before.label()), Some(state.label()));
    }
}

impl Drop for Tended {
    fn drop(&mut self) {
        // Aborted first: nothing is found after that.
        self.checks = None;
        let Shown { replica, metrics, pool } = &*self.shown;
        metrics.pool(*pool).epp_replica(replica.address, Some(replica.state().label()), None);
    }
}
