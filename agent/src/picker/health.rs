//! Checks the health of one EPP replica with repeated gRPC `Check` calls. `Watch` is not used, because EPPs do not implement it.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::future::FutureExt as _;
use penstock_proto::health::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus};
use tokio::time::{sleep, timeout};
use tonic::Code;

use super::{
    connection::ReplicaConnections,
    grpc::{self, PeerEnd},
    replica::{Replica, ReplicaState, Replicas},
};
use crate::endpoint::local_fault::is_exhaustion;

const CHECK: &str = "/grpc.health.v1.Health/Check";
/// Least time between two checks. Failing requests ask for checks before the interval has passed.
const GAP: Duration = Duration::from_millis(100);

/// As [`watch`], but restarts the checks an interval after a check panicked. The replica is `Unknown` meanwhile. The panic hook has
/// already counted the panic.
pub(super) async fn keep_watching<F: Future<Output = ReplicaState>>(
    replica: &Replica,
    interval: Duration,
    mut check: impl FnMut() -> F,
    mut found: impl FnMut(ReplicaState),
) {
    loop {
        let watching = AssertUnwindSafe(watch(replica, interval, &mut check, &mut found));
        if watching.catch_unwind().await.is_ok() {
            return;
        }
        tracing::warn!(address = %replica.address, authority = %replica.authority, "health check panicked, restarting it");
        found(ReplicaState::Unknown);
        sleep(interval).await;
    }
}

/// Calls `check` every `interval` and whenever `replica.look` is notified, and passes each result to `found`. Never returns.
pub(super) async fn watch<F: Future<Output = ReplicaState>>(
    replica: &Replica,
    interval: Duration,
    mut check: impl FnMut() -> F,
    mut found: impl FnMut(ReplicaState),
) {
    let gap = GAP.min(interval);
    loop {
        found(check().await);
        sleep(gap).await;
        // A timeout means that the interval has passed.
        let _ = timeout(interval - gap, replica.look.notified()).await;
    }
}

/// Checks one replica over a connection that is kept for the next check.
pub(super) struct Checker {
    replica: Arc<Replica>,
    connection: ReplicaConnections,
    service: String,
    timeout: Duration,
}

impl Checker {
    pub(super) fn new(replicas: &Arc<Replicas>, replica: &Arc<Replica>) -> Self {
        let settings = &replicas.settings;
        Self {
            replica: Arc::clone(replica),
            connection: ReplicaConnections::to_health(replicas, replica),
            service: settings.health_service.clone(),
            timeout: settings.connect_timeout,
        }
    }

    /// Takes at most `connect_timeout`; twice that if it has to connect, and twice as long again if a connection is lost.
    pub(super) async fn check(&self) -> ReplicaState {
        // A connection that was lost while idle, or by GOAWAY, does not tell the server's health, so try once more.
        let first = self.once().await;
        let second = if first.is_none() { self.once().await } else { first };
        second.unwrap_or(ReplicaState::Unreachable)
    }

    /// Returns `None` if the connection was lost.
    async fn once(&self) -> Option<ReplicaState> {
        let http2 = match self.connection.get().await {
            Ok(http2) => http2,
            // The check did not take place.
            Err(error) if is_exhaustion(&error) => return Some(self.replica.state()),
            Err(_) => return Some(ReplicaState::Unreachable),
        };
        let request = HealthCheckRequest { service: self.service.clone() };
        let (mut sender, method) = (http2.sender(), self.connection.method(CHECK));
        match timeout(self.timeout, grpc::unary::<HealthCheckResponse>(&mut sender, method, &request)).await {
            Ok(Ok(response)) => Some(state(response.status())),
            Ok(Err(PeerEnd::Lost(error))) => {
                http2.loss(&error);
                None
            }
            Ok(Err(PeerEnd::Status(status))) => Some(failed(status.code())),
            Ok(Err(PeerEnd::Unclean(_))) => Some(failed(Code::Unknown)),
            // Without an answer.
            Ok(Err(PeerEnd::Closed)) => Some(ReplicaState::NotServing),
            Err(_) => {
                http2.retire();
                Some(ReplicaState::Unreachable)
            }
        }
    }
}

fn state(status: ServingStatus) -> ReplicaState {
    match status {
        ServingStatus::Serving => ReplicaState::Serving,
        ServingStatus::NotServing => ReplicaState::NotServing,
        ServingStatus::Unknown | ServingStatus::ServiceUnknown => ReplicaState::Unknown,
    }
}

/// A server that does not know the service, or refuses to tell, is alive. Any other error counts as not serving.
fn failed(code: Code) -> ReplicaState {
    match code {
        Code::NotFound | Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => ReplicaState::Unknown,
        _ => ReplicaState::NotServing,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use tokio::time::Instant;

    use super::*;
    use crate::config::Epp;

    #[test]
    fn only_explicit_failures_are_not_serving() {
        assert_eq!(state(ServingStatus::Serving), ReplicaState::Serving);
        assert_eq!(state(ServingStatus::NotServing), ReplicaState::NotServing);
        assert_eq!(state(ServingStatus::ServiceUnknown), ReplicaState::Unknown);
        assert_eq!(failed(Code::Unimplemented), ReplicaState::Unknown);
        assert_eq!(failed(Code::NotFound), ReplicaState::Unknown);
        assert_eq!(failed(Code::Unavailable), ReplicaState::NotServing);
    }

    #[tokio::test(start_paused = true)]
    async fn panicking_check_makes_the_replica_unknown_and_is_restarted() {
        const INTERVAL: Duration = Duration::from_secs(5);
        let replicas = Arc::new(Replicas::new(&Epp::new("10.0.0.1:1")).unwrap());
        let replica = Arc::clone(&replicas.snapshot().replicas[0]);
        let (begin, found, checks) = (Instant::now(), RefCell::new(Vec::new()), Cell::new(0));
        let check = || {
            checks.set(checks.get() + 1);
            let fails = checks.get() == 2;
            async move { if fails { panic!("a fault of this test's") } else { ReplicaState::Serving } }
        };
        let watching = keep_watching(&replica, INTERVAL, check, |state| {
            found.borrow_mut().push((begin.elapsed().as_secs(), state));
        });
        assert!(timeout(Duration::from_secs(16), watching).await.is_err());
        let expected = [
            (0, ReplicaState::Serving),
            (5, ReplicaState::Unknown),
            (10, ReplicaState::Serving),
            (15, ReplicaState::Serving),
        ];
        assert_eq!(*found.borrow(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn check_runs_at_the_interval_or_on_request() {
        const INTERVAL: Duration = Duration::from_secs(5);
        let replicas = Arc::new(Replicas::new(&Epp::new("10.0.0.1:1")).unwrap());
        let replica = Arc::clone(&replicas.snapshot().replicas[0]);
        let (begin, checked) = (Instant::now(), RefCell::new(Vec::new()));
        let check = || async {
            sleep(Duration::from_millis(10)).await;
            ReplicaState::Serving
        };
        let script = async {
            sleep(Duration::from_secs(7)).await;
            // In the middle of an interval: checks at once. Ten more requests in a row: one more check after the gap.
            replicas.recheck();
            tokio::task::yield_now().await;
            for _ in 0..10 {
                replicas.recheck();
            }
            sleep(Duration::from_secs(6)).await;
        };
        tokio::select! {
            () = watch(&replica, INTERVAL, check, |_| checked.borrow_mut().push(begin.elapsed().as_millis())) => {}
            () = script => {}
        }
        assert_eq!(*checked.borrow(), [10, 5020, 7010, 7120, 12_130]);
    }
}
