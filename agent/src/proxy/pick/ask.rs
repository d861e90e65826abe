//! Asks the EPP about one request. Sends the head, and the body as the client uploads it, to one replica after the other until
//! there is an outcome, a failure that a retry would not fix, or the deadline. The body is kept, so that each attempt starts with
//! all of it.
//! The client is read even while the EPP takes nothing, so that a client that leaves is noticed and, on HTTP/2, a body that waits
//! for its EPP does not block the flow-control window of other streams.

use std::{cell::RefCell, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::{short::ShortRequest, wait::Wait};
use crate::{
    client::Client,
    config,
    deadline::{self, with_deadline},
    endpoint::set::EndpointSet,
    error::Error,
    metrics::PoolMetrics,
    picker::{
        client::{EppClient, PickStream},
        error::PickError,
        exchange::{ExchangeLimits, Outcome},
        replica::Replica,
    },
    proxy::request::Request,
    upload::{CompleteBody, Upload},
};

pub(super) enum Asked {
    /// The EPP's outcome, and its stream.
    Answered(Outcome, Box<PickStream>),
    Failed(PickError),
    /// The request failed on the client's side.
    Client(Error),
}

/// How to ask the EPP about a request of one pool.
pub(super) struct Question<'a> {
    pub(super) epp: &'a EppClient,
    pub(super) settings: &'a config::Epp,
    /// How long the request may wait for a replica.
    pub(super) wait: Option<Duration>,
    /// Endpoints that did not take the request; the EPP has to pick another one.
    pub(super) dead: &'a [SocketAddr],
    /// The latest subset hint.
    pub(super) hint: RefCell<Option<Arc<[SocketAddr]>>>,
    pub(super) limits: ExchangeLimits,
    /// The pool's endpoints.
    pub(super) members: &'a Arc<EndpointSet>,
    pub(super) metrics: &'a PoolMetrics,
}

impl Question<'_> {
    /// The subset hint for the endpoints as they are now.
    fn new_hint(&self) -> Option<Arc<[SocketAddr]>> {
        let now = Instant::now().into_std();
        let hint =
            if self.dead.is_empty() { self.members.hint(now) } else { self.members.hint_without(self.dead, now) };
        self.hint.borrow_mut().clone_from(&hint);
        hint
    }

    /// Asks until there is an outcome. If no replica can be connected or is available, waits for one for up to `wait` and asks anew.
    /// The EPP gets `short` instead of the request, if that is given.
    pub(super) async fn ask(
        &self,
        client: &mut Client,
        request: &Request,
        upload: &mut Upload,
        short: Option<&ShortRequest>,
    ) -> Asked {
        let mut timer = DecisionTimer::new(self.settings.decision_timeout, upload.has_body());
        let mut wait = Wait::new(self.wait, self.epp.replicas(), self.metrics);
        let mut lost = 0;
        loop {
            let asked = self.ask_replicas(client, request, upload, short, &mut timer, &mut lost).await;
            let error = match asked {
                Asked::Failed(error) => error,
                Asked::Answered(..) => {
                    wait.ended(true);
                    return asked;
                }
                Asked::Client(_) => return asked,
            };
            if !wait.may_help(&error, lost) {
                wait.ended(false);
                return Asked::Failed(error);
            }
            match wait.wait(&error, timer.next_deadline(), client, upload).await {
                Ok(true) => tracing::debug!(%error, "asking the EPP again, a replica may serve"),
                Ok(false) => return Asked::Failed(error),
                Err(error) => return Asked::Client(error),
            }
        }
    }

    /// Asks one replica after the other. Adds to `lost` the streams that were lost.
    async fn ask_replicas(
        &self,
        client: &mut Client,
        request: &Request,
        upload: &mut Upload,
        short: Option<&ShortRequest>,
        timer: &mut DecisionTimer,
        lost: &mut usize,
    ) -> Asked {
        let mut attempts = match upload.during(client, timer.limit(self.epp.attempts())).await {
            Ok(Ok(Ok(attempts))) => attempts,
            Ok(Ok(Err(error)) | Err(error)) => return Asked::Failed(error),
            Err(error) => return Asked::Client(error),
        };
        let hint = self.new_hint();
        loop {
            if attempts.replica().is_stalled() {
                return Asked::Failed(PickError::Stalled);
            }
            let decisions = attempts.replica().decisions();
            let (parts, has_body) = (short.map_or(&request.parts, |short| &short.parts), upload.has_body());
            let mut stream = Box::new(self.epp.open(
                attempts.replica(),
                parts,
                has_body,
                hint.as_deref(),
                self.limits.clone(),
                Some(Arc::clone(self.members)),
            ));
            if let Some(metadata) = request.record.metadata() {
                stream.collect(metadata);
            }
            match converse(&mut stream, timer, client, upload, short).await {
                Ok(outcome) => {
                    attempts.answered(&outcome);
                    return Asked::Answered(outcome, stream);
                }
                Err(Asked::Failed(PickError::Deadline)) => {
                    return Asked::Failed(self.late(attempts.replica(), decisions, stream.was_sent()));
                }
                Err(Asked::Failed(error)) => {
                    *lost += usize::from(matches!(error, PickError::Reset { .. }));
                    let asked = attempts.replica().address.clone();
                    if !attempts.next_attempt(&error, Instant::now().into_std()) {
                        return Asked::Failed(error);
                    }
                    tracing::debug!(%asked, next = %attempts.replica().address, %error, "retrying with another EPP replica");
                    self.metrics.epp_asked_again(error.reason());
                }
                Err(other) => return other,
            }
        }
    }
}

impl Question<'_> {
    /// The error for a request that the replica did not decide in time: `Held` if the replica decided others since, and otherwise
    /// `Deadline`, with the replica marked as stalled. A request that was not sent says nothing
    /// about the replica. `decisions` is the replica's count when the stream was opened.
    fn late(&self, replica: &Replica, decisions: u64, sent: bool) -> PickError {
        if replica.decisions() > decisions {
            return PickError::Held;
        }
        if sent && replica.stall() {
            self.metrics.epp_stalled();
            tracing::warn!(
                address = %replica.address,
                authority = %replica.authority,
                "EPP replica stalled, sending it only probes"
            );
        }
        PickError::Deadline
    }

    /// Begins to probe the stalled replicas that no other request is probing. A probe ends when it is dropped.
    pub(super) fn probes(&self) -> Vec<ReplicaProbe> {
        self.epp.stalled().into_iter().filter(|replica| replica.begin_probe()).map(ReplicaProbe).collect()
    }

    /// Sends the request to stalled replicas in the background. The decision itself is ignored: a replica
    /// that decides within the decision timeout has recovered. The probes share one copy of the body, which counts against the
    /// memory budget; if that has no room, no probe is sent.
    pub(super) async fn probe(
        &self,
        probes: Vec<ReplicaProbe>,
        request: &Request,
        complete: &CompleteBody,
    ) -> Result<(), Error> {
        if probes.is_empty() {
            return Ok(());
        }
        let Some(body) = complete.kept().in_memory().await? else { return Ok(()) };
        for probe in probes {
            let body = body.clone();
            let (parts, has_body) = (&request.parts, complete.has_body());
            let (members, hint) = (Some(Arc::clone(self.members)), self.new_hint());
            let mut stream = self.epp.open(&probe.0, parts, has_body, hint.as_deref(), self.limits.clone(), members);
            let wait = self.settings.decision_timeout.unwrap_or(PROBE);
            tokio::spawn(async move {
                let decision = async {
                    let last = body.len();
                    for (number, piece) in (1..).zip(body) {
                        if let Some(outcome) = stream.send_body(piece, number == last).await? {
                            return Ok(outcome);
                        }
                    }
                    if has_body && last == 0 {
                        stream.send_body(Bytes::new(), true).await?;
                    }
                    stream.outcome().await
                };
                if let Ok(Ok(_)) = timeout(wait, decision).await {
                    probe.0.answered();
                }
            });
        }
        Ok(())
    }
}

/// A replica that is being probed.
pub(super) struct ReplicaProbe(Arc<Replica>);

impl Drop for ReplicaProbe {
    fn drop(&mut self) {
        self.0.probe_ended();
    }
}

/// How long a probe may take if decisions have no timeout.
const PROBE: Duration = Duration::from_secs(75);

/// How long to wait for the EPP. One timeout covers all attempts, from the moment at which the EPP was given the end of the body.
/// Before that, the timeout applies to each single wait for the EPP.
struct DecisionTimer {
    timeout: Option<Duration>,
    until: Option<Instant>,
    /// Since when the EPP has taken nothing, before it was given the end of the body.
    stalled: Option<Instant>,
}

impl DecisionTimer {
    fn new(timeout: Option<Duration>, has_body: bool) -> Self {
        let mut timer = Self { timeout, until: None, stalled: None };
        if !has_body {
            timer.begin(Duration::ZERO);
        }
        timer
    }

    /// The EPP was given the end of the body.
    ///
    /// `sending` is how long this attempt took to send the body. In a retry it does not count against the deadline.
    fn begin(&mut self, sending: Duration) {
        self.until = match self.until {
            Some(until) => Some(until + sending),
            None => self.timeout.map(|timeout| Instant::now() + timeout),
        };
    }

    /// Sets whether the EPP currently holds up the body.
    fn waits_for_epp(&mut self, waits: bool) {
        self.stalled = if waits { self.stalled.or_else(|| Some(Instant::now())) } else { None };
    }

    /// `ended`: the EPP was given the end of the body.
    fn deadline(&self, ended: bool) -> Option<Instant> {
        if ended { self.until } else { Some(self.stalled? + self.timeout?) }
    }

    /// When a wait that begins now has to end.
    fn next_deadline(&self) -> Option<Instant> {
        self.until.or_else(|| deadline::after(self.timeout))
    }

    async fn limit<T>(&self, what: impl Future<Output = T>) -> Result<T, PickError> {
        with_deadline(self.next_deadline(), what).await.ok_or(PickError::Deadline)
    }
}

/// Sends the kept body, or the abridged one of a complete upload, to the EPP and keeps what the client uploads meanwhile, until the
/// EPP decides or the deadline passes.
async fn converse(
    stream: &mut PickStream,
    timer: &mut DecisionTimer,
    client: &mut Client,
    upload: &mut Upload,
    short: Option<&ShortRequest>,
) -> Result<Outcome, Asked> {
    timer.waits_for_epp(false);
    let (mut sent, mut ended, mut deadline_set) = (0, !upload.has_body(), !upload.has_body());
    let begun = Instant::now();
    loop {
        if !ended && stream.takes_body() {
            let piece = match short {
                Some(short) => Some(short.body.clone()),
                None => upload.kept.piece_at(sent).await.map_err(|error| Asked::Client(error.into()))?,
            };
            sent += piece.as_ref().map_or(0, |piece| piece.len() as u64);
            ended = short.is_some() || (upload.is_done() && sent == upload.kept.len());
            if piece.is_some() || ended {
                stream.give_body(piece.unwrap_or_default(), ended);
            }
        }
        if ended && !std::mem::replace(&mut deadline_set, true) {
            timer.begin(begun.elapsed());
        }
        timer.waits_for_epp(stream.has_unsent());
        let deadline = timer.deadline(ended);
        let read = tokio::select! {
            biased;
            progress = stream.progress() => match progress.map_err(Asked::Failed)? {
                Some(outcome) => return Ok(outcome),
                None => {
                    timer.waits_for_epp(false);
                    continue;
                }
            },
            () = deadline::passed(deadline) => return stream.at_deadline().map_err(Asked::Failed),
            read = upload.read_or_gone(client) => read.map_err(Asked::Client)?,
        };
        upload.take(read).await.map_err(Asked::Client)?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn timeout_covers_all_attempts_from_the_end_of_the_body() {
        let mut timer = DecisionTimer::new(Some(TIMEOUT), true);
        for _ in 0..3 {
            // The client uploads slowly, and the EPP takes each piece.
            assert!(timer.limit(sleep(TIMEOUT / 2)).await.is_ok());
        }
        timer.begin(TIMEOUT);
        assert!(timer.limit(sleep(TIMEOUT / 2)).await.is_ok());
        // Another attempt begins.
        timer.begin(Duration::ZERO);
        let begin = Instant::now();
        assert!(timer.limit(sleep(TIMEOUT)).await.is_err());
        assert_eq!(begin.elapsed(), TIMEOUT / 2);
        assert!(timer.limit(std::future::pending::<()>()).await.is_err());
        assert_eq!(begin.elapsed(), TIMEOUT / 2);
        // A retry that sends the body slowly: each part has the whole timeout.
        assert_eq!(timer.deadline(false), None);
        timer.waits_for_epp(true);
        assert_eq!(timer.deadline(false), Some(Instant::now() + TIMEOUT));
        sleep(TIMEOUT / 3).await;
        timer.begin(TIMEOUT / 3);
        assert_eq!(timer.deadline(true), Some(Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn timeout_covers_each_wait_before_the_end_of_the_body() {
        let timer = DecisionTimer::new(Some(TIMEOUT), true);
        let begin = Instant::now();
        assert!(timer.limit(std::future::pending::<()>()).await.is_err());
        assert_eq!(begin.elapsed(), TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn wait_without_timeout_is_unlimited() {
        let timer = DecisionTimer::new(None, false);
        assert!(timer.limit(sleep(Duration::from_secs(1_000_000))).await.is_ok());
    }
}
