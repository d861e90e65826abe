//! Asking the EPP about one request: its head and the body as the client uploads it, to one replica after the other until
//! there is an outcome, a failure that no other attempt would mend, or no time left. What was read of the body is kept, so
//! another attempt begins with all of it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, error::Elapsed, timeout, timeout_at};

use super::Request;
use crate::{
    client::Client,
    config,
    endpoint::set::Snapshot,
    error::Error,
    metrics::PoolMetrics,
    picker::{
        client::{EppClient, PickStream},
        error::PickError,
        exchange::{Limits, Outcome},
        replica::Replica,
    },
    upload::Upload,
};

pub(super) enum Asked {
    Answered(Outcome, Box<PickStream>),
    Failed(PickError),
    /// Not the picker's fault.
    Client(Error),
}

/// How to ask.
pub(super) struct Question<'a> {
    pub(super) epp: &'a EppClient,
    pub(super) settings: &'a config::Epp,
    /// The EPP is to choose among these.
    pub(super) subset: Option<&'a [SocketAddr]>,
    pub(super) limits: Limits,
    /// The pool's endpoints.
    pub(super) members: Arc<Snapshot>,
    pub(super) metrics: &'a PoolMetrics,
}

impl Question<'_> {
    pub(super) async fn ask(&self, client: &mut Client, request: &Request, upload: &mut Upload) -> Asked {
        let mut patience = Patience::new(self.settings.decision_timeout, upload.is_done());
        let attempts = tokio::select! {
            biased;
            attempts = patience.limit(self.epp.attempts()) => attempts,
            () = client.gone() => return Asked::Client(Error::ClientGone),
        };
        let mut attempts = match attempts {
            Ok(Ok(attempts)) => attempts,
            Ok(Err(error)) => return Asked::Failed(error),
            Err(_) => return Asked::Failed(PickError::Deadline),
        };
        loop {
            if attempts.replica().is_stalled() {
                return Asked::Failed(PickError::Stalled);
            }
            let decisions = attempts.replica().decisions();
            let (parts, has_body) = (&request.parts, upload.has_body());
            let mut stream = Box::new(self.epp.open(
                attempts.replica(),
                parts,
                has_body,
                self.subset,
                self.limits,
                Some(Arc::clone(&self.members)),
            ));
            match converse(&mut stream, &mut patience, client, upload).await {
                Ok(outcome) => {
                    attempts.answered(&outcome);
                    return Asked::Answered(outcome, stream);
                }
                Err(Asked::Failed(PickError::Deadline)) => {
                    return Asked::Failed(self.late(attempts.replica(), decisions));
                }
                Err(Asked::Failed(error)) => {
                    let asked = attempts.replica().address;
                    if !attempts.again(&error, Instant::now().into_std()) {
                        return Asked::Failed(error);
                    }
                    tracing::debug!(%asked, next = %attempts.replica().address, %error, "the EPP is asked again");
                    self.metrics.epp_asked_again(error.reason());
                }
                Err(other) => return other,
            }
        }
    }
}

impl Question<'_> {
    /// What it means that the replica has not decided a request in time, after so many `decisions` when it was sent.
    fn late(&self, replica: &Replica, decisions: u64) -> PickError {
        if replica.decisions() > decisions {
            return PickError::Held;
        }
        if replica.stall() {
            self.metrics.epp_stalled();
            tracing::warn!(address = %replica.address, authority = %replica.authority, "EPP replica stalled");
        }
        PickError::Deadline
    }

    /// The replicas that have stalled and that no request is put to. Until these are dropped, no other request gets them.
    pub(super) fn probes(&self) -> Vec<Probe> {
        self.epp.stalled().into_iter().filter(|replica| replica.begin_probe()).map(Probe).collect()
    }

    /// Puts the request, whose body is whole, to replicas that have stalled: in the background, for as long as a decision may
    /// take. A decision is not followed; it says that the replica is to be asked again.
    pub(super) async fn probe(&self, probes: Vec<Probe>, request: &Request, upload: &Upload) -> Result<(), Error> {
        for probe in probes {
            let mut body = Vec::new();
            let mut kept = upload.kept.pieces();
            while let Some(piece) = kept.next().await? {
                body.push(piece);
            }
            let (parts, has_body) = (&request.parts, upload.has_body());
            let members = Some(Arc::clone(&self.members));
            let mut stream = self.epp.open(&probe.0, parts, has_body, self.subset, self.limits, members);
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
pub(super) struct Probe(Arc<Replica>);

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.probe_ended();
    }
}

/// How long a probe may take where decisions have no deadline.
const PROBE: Duration = Duration::from_secs(75);

/// For how long the EPP is waited for. The clock runs from when the whole body is here, through all attempts; before that,
/// each wait for the EPP alone is measured by itself.
struct Patience {
    timeout: Option<Duration>,
    until: Option<Instant>,
}

impl Patience {
    fn new(timeout: Option<Duration>, is_body_here: bool) -> Self {
        let mut patience = Self { timeout, until: None };
        if is_body_here {
            patience.begin();
        }
        patience
    }

    /// The whole body is here.
    fn begin(&mut self) {
        if self.until.is_none() {
            self.until = self.timeout.map(|timeout| Instant::now() + timeout);
        }
    }

    async fn limit<T>(&self, what: impl Future<Output = T>) -> Result<T, Elapsed> {
        match (self.until, self.timeout) {
            (Some(until), _) => timeout_at(until, what).await,
            (None, Some(patience)) => timeout(patience, what).await,
            (None, None) => Ok(what.await),
        }
    }
}

/// Sends what is kept of the body, then the rest as the client uploads it, until the EPP has answered or patience is over.
async fn converse(
    stream: &mut PickStream,
    patience: &mut Patience,
    client: &mut Client,
    upload: &mut Upload,
) -> Result<Outcome, Asked> {
    if upload.has_body() {
        let (mut sent, total) = (0, upload.kept.len());
        let mut kept = upload.kept.pieces();
        while let Some(piece) = kept.next().await.map_err(|error| Asked::Client(error.into()))? {
            sent += piece.len() as u64;
            let end = sent == total && upload.is_done();
            if let Some(outcome) = send(stream, piece, end, patience, client).await? {
                return Ok(outcome);
            }
        }
        let mut ended = upload.is_done() && total > 0;
        while !ended {
            let read = tokio::select! {
                biased;
                outcome = stream.outcome() => return outcome.map_err(Asked::Failed),
                read = upload.read(client) => read.map_err(Asked::Client)?,
            };
            if let Some(piece) = &read {
                upload.keep(piece).await.map_err(Asked::Client)?;
            } else {
                upload.end().map_err(Asked::Client)?;
            }
            ended = upload.is_done();
            if ended {
                patience.begin();
            }
            if let Some(outcome) = send(stream, read.unwrap_or_default(), ended, patience, client).await? {
                return Ok(outcome);
            }
        }
    }
    tokio::select! {
        biased;
        outcome = patience.limit(stream.outcome()) => match outcome {
            Ok(outcome) => outcome.map_err(Asked::Failed),
            Err(_) => stream.at_deadline().map_err(Asked::Failed),
        },
        () = client.gone() => Err(Asked::Client(Error::ClientGone)),
    }
}

async fn send(
    stream: &mut PickStream,
    piece: Bytes,
    end: bool,
    patience: &Patience,
    client: &mut Client,
) -> Result<Option<Outcome>, Asked> {
    tokio::select! {
        biased;
        sent = patience.limit(stream.send_body(piece, end)) => match sent {
            Ok(sent) => sent.map_err(Asked::Failed),
            Err(_) => Err(Asked::Failed(PickError::Deadline)),
        },
        () = client.gone() => Err(Asked::Client(Error::ClientGone)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn the_clock_runs_from_the_end_of_the_body_through_all_attempts() {
        let mut patience = Patience::new(Some(TIMEOUT), false);
        for _ in 0..3 {
            // The client uploads slowly, and the EPP takes each piece.
            assert!(patience.limit(sleep(TIMEOUT / 2)).await.is_ok());
        }
        patience.begin();
        assert!(patience.limit(sleep(TIMEOUT / 2)).await.is_ok());
        // Another attempt begins.
        patience.begin();
        let begin = Instant::now();
        assert!(patience.limit(sleep(TIMEOUT)).await.is_err());
        assert_eq!(begin.elapsed(), TIMEOUT / 2);
        assert!(patience.limit(std::future::pending::<()>()).await.is_err());
        assert_eq!(begin.elapsed(), TIMEOUT / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn before_that_each_wait_is_measured() {
        let patience = Patience::new(Some(TIMEOUT), false);
        let begin = Instant::now();
        assert!(patience.limit(std::future::pending::<()>()).await.is_err());
        assert_eq!(begin.elapsed(), TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn off_is_for_ever() {
        let patience = Patience::new(None, true);
        assert!(patience.limit(sleep(Duration::from_secs(1_000_000))).await.is_ok());
    }
}
