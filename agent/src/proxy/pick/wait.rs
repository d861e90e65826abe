//! Lets a request wait for a replica of its EPP while none can be connected, or while those that can be say that they are
//! unavailable. The client is read meanwhile. What waits is bounded by the pool's `WaitingRoom`, and each request that had to wait is
//! counted once, by its outcome.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    client::Client,
    error::Error,
    metrics::PoolMetrics,
    picker::{error::PickError, replica::Replicas},
    upload::Upload,
};

/// The first and the longest pause before an EPP is asked again that is unavailable or could not be connected. In the default time a
/// request asks it nine times.
const FIRST: Duration = Duration::from_millis(50);
const MOST: Duration = Duration::from_millis(250);

/// The wait of one request, which may have several parts.
pub(super) struct Wait<'a> {
    /// `None` if the request may not wait.
    limit: Option<Duration>,
    replicas: &'a Arc<Replicas>,
    metrics: &'a PoolMetrics,
    until: Option<Instant>,
    /// How long an EPP that is unavailable now is not asked.
    pause: Duration,
    /// The metric's label. `None` if the request has not waited.
    outcome: Option<&'static str>,
}

impl<'a> Wait<'a> {
    pub(super) fn new(limit: Option<Duration>, replicas: &'a Arc<Replicas>, metrics: &'a PoolMetrics) -> Self {
        Self { limit, replicas, metrics, until: None, pause: FIRST, outcome: None }
    }

    /// Whether a request that failed like this may be asked about again once a replica serves. `lost` is the number of its streams
    /// that were lost: the request may be what makes the EPP fail, so no more are lost than without waiting.
    pub(super) fn may_help(&self, error: &PickError, lost: usize) -> bool {
        if error.is_unavailable() {
            return self.limit.is_some();
        }
        let replicas = self.replicas.snapshot().replicas;
        let refused = matches!(error, PickError::NotTaken(_)) && replicas.iter().any(|one| !one.is_unreachable());
        self.limit.is_some()
            && self.replicas.is_tended()
            && error.is_unreachable()
            && !refused
            && lost <= replicas.len().max(1)
    }

    /// Waits until a replica may serve, at most until `deadline`: until one is reachable, or for a pause if `error` came from one
    /// that is, or from this machine. Returns false if none is in time, or if too many requests wait already.
    pub(super) async fn wait(
        &mut self,
        error: &PickError,
        deadline: Option<Instant>,
        client: &mut Client,
        upload: &mut Upload,
    ) -> Result<bool, Error> {
        let until = *self.until.get_or_insert_with(|| Instant::now() + self.limit.unwrap_or_default());
        let until = deadline.map_or(until, |deadline| deadline.min(until));
        // Holds if the client leaves, which may drop this future.
        self.outcome = Some("left");
        let Some(mut place) = self.replicas.waiting_room.enter() else {
            self.outcome = Some("full");
            return Ok(false);
        };
        let _waiting = self.metrics.epp_waiting();
        let replicas = self.replicas;
        // No news tell when an unavailable EPP serves again, or when this machine can connect to a replica that is not unreachable.
        let is_reachable = || replicas.snapshot().replicas.iter().any(|replica| !replica.is_unreachable());
        let pauses = error.is_unavailable() || (error.is_unconnected() && is_reachable());
        let pause = pauses.then(|| self.next_pause());
        let mut may_serve = pin!(async {
            if let Some(pause) = pause {
                sleep(pause).await;
            }
            replicas.reachable().await;
        });
        loop {
            if !place.holds(upload.kept.len()) {
                self.outcome = Some("full");
                return Ok(false);
            }
            let read = tokio::select! {
                biased;
                () = &mut may_serve => return Ok(true),
                () = sleep_until(until) => {
                    self.outcome = Some("in_vain");
                    return Ok(false);
                }
                read = upload.read_or_gone(client) => read?,
            };
            upload.take(read).await?;
        }
    }

    /// Up to a fifth more, so that requests do not ask in step.
    fn next_pause(&mut self) -> Duration {
        let pause = self.pause.mul_f64(1.0 + fastrand::f64() / 5.0);
        self.pause = (2 * self.pause).min(MOST);
        pause
    }

    /// The request, which may have waited, was served or failed otherwise.
    pub(super) fn ended(&mut self, served: bool) {
        if self.outcome.is_some() {
            self.outcome = Some(if served { "served" } else { "in_vain" });
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let Some(outcome) = self.outcome {
            self.metrics.epp_waited(outcome);
        }
    }
}
