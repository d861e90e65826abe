//! Selects the EPP replica to ask about one request, and the next one if that fails before a decision: each replica once, best
//! first, and once more a replica whose connection was lost. Streams that a server did not process are repeated, up to a bound.
//! Time is passed in, and the caller holds the deadline.

use std::{sync::Arc, time::Instant};

use http::StatusCode;

use super::{
    address::ReplicaAddress,
    error::{AskAgain, PickError},
    exchange::Outcome,
    replica::{Replica, Replicas},
};

/// How often the stream of one request is repeated after a server did not process it.
const NOT_TAKEN: u32 = 3;

/// The attempts for one request.
pub struct Attempts {
    replicas: Arc<Replicas>,
    current: Arc<Replica>,
    asked: Vec<ReplicaAddress>,
    /// Whether the one retry over a new connection is still available.
    fresh: bool,
    /// Remaining repetitions of streams that were not processed.
    not_taken: u32,
}

impl Attempts {
    /// Waits until a replica is known, for at most `connect_timeout`. Fails with `Unresolved` if none is. Cancel-safe.
    pub async fn begin(replicas: &Arc<Replicas>) -> Result<Self, PickError> {
        let known = replicas.known().await?;
        let best = known.best(&[], Instant::now()).ok_or_else(|| PickError::Unresolved("no replica".into()))?;
        Ok(Self {
            replicas: Arc::clone(replicas),
            current: Arc::clone(best),
            asked: Vec::new(),
            fresh: true,
            not_taken: NOT_TAKEN,
        })
    }

    /// The replica to ask now.
    pub fn replica(&self) -> &Arc<Replica> {
        &self.current
    }

    /// The current replica gave this outcome.
    pub fn answered(&self, outcome: &Outcome) {
        self.current.answered();
        // A 503 may mean that the replica has no endpoints or is no longer the leader, so check it before the next request.
        if matches!(outcome, Outcome::Immediate(reply) if reply.status == StatusCode::SERVICE_UNAVAILABLE) {
            self.replicas.recheck();
        }
    }

    /// The current replica failed. Returns true if there is another attempt, with the new [`Self::replica`].
    pub fn next_attempt(&mut self, error: &PickError, now: Instant) -> bool {
        match error.retry() {
            AskAgain::SameReplica if self.not_taken > 0 => {
                self.not_taken -= 1;
                return true;
            }
            AskAgain::SameReplicaOnce if self.fresh => {
                self.fresh = false;
                return true;
            }
            AskAgain::SameReplica | AskAgain::SameReplicaOnce | AskAgain::OtherReplica => {}
            AskAgain::Never => return false,
        }
        self.current.failed(now);
        self.replicas.recheck();
        self.asked.push(self.current.address.clone());
        let snapshot = self.replicas.snapshot();
        let Some(next) = snapshot.best(&self.asked, now) else { return false };
        self.current = Arc::clone(next);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::{config::Epp, picker::replica::ReplicaState};

    const ADDRESSES: [&str; 3] = ["10.0.0.1:9002", "10.0.0.2:9002", "10.0.0.3:9002"];

    fn replicas(count: usize) -> Arc<Replicas> {
        let addresses = ADDRESSES[..count].iter().map(ToString::to_string).collect();
        Arc::new(Replicas::new(&Epp { addresses, ..Epp::new("") }).unwrap())
    }

    fn refused() -> PickError {
        PickError::Connect(Arc::new(io::ErrorKind::ConnectionRefused.into()))
    }

    fn reset(answered: bool) -> PickError {
        PickError::Reset { message: String::new(), answered }
    }

    fn status(code: tonic::Code) -> PickError {
        PickError::Status { code, message: String::new() }
    }

    fn not_taken() -> PickError {
        PickError::NotTaken(String::new())
    }

    /// The replicas that are asked if the attempts fail in this way, each by its last digit.
    async fn asked(replicas: &Arc<Replicas>, failures: &[PickError]) -> Vec<u8> {
        let last = |replica: &Replica| replica.address.to_string().as_bytes()[7] - b'0';
        let mut attempts = Attempts::begin(replicas).await.unwrap();
        let mut asked = vec![last(attempts.replica())];
        for failure in failures {
            if !attempts.next_attempt(failure, Instant::now()) {
                break;
            }
            asked.push(last(attempts.replica()));
        }
        asked
    }

    #[tokio::test]
    async fn replicas_are_asked_once_each_and_once_over_a_new_connection() {
        let unavailable = status(tonic::Code::Unavailable);
        let cases: [(&[PickError], &[u8]); 7] = [
            (&[refused(), refused(), refused()], &[1, 2, 3]),
            (&[unavailable.clone(), unavailable.clone(), unavailable], &[1, 2, 3]),
            (&[reset(false), refused(), refused(), refused()], &[1, 1, 2, 3]),
            (&[refused(), reset(false), reset(false), reset(false)], &[1, 2, 2, 3]),
            (&[reset(true), refused(), refused()], &[1, 2, 3]),
            (&[not_taken(), reset(false), not_taken(), refused(), refused(), refused()], &[1, 1, 1, 1, 2, 3]),
            (&[status(tonic::Code::Internal)], &[1]),
        ];
        for (failures, expected) in cases {
            assert_eq!(asked(&replicas(3), failures).await, expected, "{failures:?}");
        }
        for last in [PickError::Deadline, PickError::ClosedWithoutPick, PickError::NoDestination] {
            assert_eq!(asked(&replicas(2), &[last]).await, [1]);
        }
        assert_eq!(asked(&replicas(1), &[reset(false), reset(false)]).await, [1, 1], "also with one replica");
        assert_eq!(asked(&replicas(1), &[refused()]).await, [1]);
    }

    #[tokio::test]
    async fn streams_that_are_not_processed_are_repeated_up_to_a_bound() {
        let failures: Vec<_> = (0..100).map(|_| not_taken()).collect();
        let asked = asked(&replicas(2), &failures).await;
        assert_eq!(asked, [1, 1, 1, 1, 2]);
    }

    #[tokio::test]
    async fn failed_replica_is_asked_last_until_it_answers() {
        let replicas = replicas(2);
        assert_eq!(asked(&replicas, &[refused()]).await, [1, 2]);
        assert_eq!(asked(&replicas, &[refused()]).await, [2, 1]);
        // Both have failed by now.
        let attempts = Attempts::begin(&replicas).await.unwrap();
        assert_eq!(attempts.replica().address.to_string(), ADDRESSES[0]);
        replicas.snapshot().replicas[1].answered();
        assert_eq!(asked(&replicas, &[]).await, [2]);
        replicas.snapshot().replicas[0].answered();
        assert_eq!(asked(&replicas, &[]).await, [1]);
    }

    #[tokio::test]
    async fn new_leader_is_asked_next() {
        let replicas = replicas(3);
        let all = replicas.snapshot().replicas;
        for (replica, state) in
            all.iter().zip([ReplicaState::Serving, ReplicaState::NotServing, ReplicaState::NotServing])
        {
            replica.set_state(state);
        }
        let mut attempts = Attempts::begin(&replicas).await.unwrap();
        // While the first is asked, the third becomes the leader.
        all[0].set_state(ReplicaState::NotServing);
        all[2].set_state(ReplicaState::Serving);
        assert!(attempts.next_attempt(&status(tonic::Code::Unavailable), Instant::now()));
        assert_eq!(attempts.replica().address.to_string(), ADDRESSES[2]);
    }
}
