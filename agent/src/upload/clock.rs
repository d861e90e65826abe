//! Limits how long a client may take to send its body. Only time in which the agent waits for the client counts; the
//! clock stops while the agent writes to disk or does not read.
//!
//! A body is late if no byte of it arrived for the limit, or if it took longer in total than the limit plus the time it
//! needs at the minimum rate. So a large body may take any time while it keeps arriving, and one that trickles ends.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::error::Error;

#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    /// `None` disables the clock.
    limit: Option<Duration>,
    /// Minimum rate in bytes per second; 0 disables it.
    rate: u64,
    received: u64,
    /// Waiting time since the last byte.
    quiet: Duration,
    /// Waiting time before the last byte.
    waited: Duration,
}

impl Clock {
    pub(super) fn new(rate: u64) -> Self {
        Self { limit: None, rate, received: 0, quiet: Duration::ZERO, waited: Duration::ZERO }
    }

    pub(super) fn set_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// Records received bytes.
    pub(super) fn progress(&mut self, bytes: usize) {
        self.received += bytes as u64;
        self.waited += self.quiet;
        self.quiet = Duration::ZERO;
    }

    /// Waits for the client within its time limit. Cancel-safe: the time of a dropped call counts.
    pub(super) async fn limit<T>(&mut self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let Some((left, late)) = self.left() else { return work.await };
        let running = RunningClock { since: Instant::now(), clock: self };
        let result = timeout(left, work).await;
        drop(running);
        result.unwrap_or(Err(late))
    }

    /// The time that the client has left, and the error when it is over.
    fn left(&self) -> Option<(Duration, Error)> {
        let limit = self.limit?;
        let until_silent = (limit.saturating_sub(self.quiet), Error::BodyTimeout(limit));
        if self.rate == 0 {
            return Some(until_silent);
        }
        let allowed = limit + Duration::from_secs_f64(self.received as f64 / self.rate as f64);
        let until_slow = allowed.saturating_sub(self.waited + self.quiet);
        if until_slow < until_silent.0 { Some((until_slow, Error::BodySlow(self.rate))) } else { Some(until_silent) }
    }
}

/// Counts waiting time until dropped.
struct RunningClock<'a> {
    since: Instant,
    clock: &'a mut Clock,
}

impl Drop for RunningClock<'_> {
    fn drop(&mut self) {
        self.clock.quiet += self.since.elapsed();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn clock(rate: u64) -> Clock {
        let mut clock = Clock::new(rate);
        clock.set_limit(Some(LIMIT));
        clock
    }

    /// Sends `bytes` after each pause until the client is late; returns the time until then and the error.
    async fn until_late(mut clock: Clock, bytes: usize, pause: Duration) -> (Duration, Error) {
        let begin = Instant::now();
        loop {
            let work = async {
                sleep(pause).await;
                Ok(())
            };
            match clock.limit(work).await {
                Ok(()) => clock.progress(bytes),
                Err(error) => return (begin.elapsed(), error),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn stopped_body_is_late_after_the_limit() {
        let (after, error) = until_late(clock(100), 1, Duration::MAX).await;
        assert_eq!(after, LIMIT);
        assert!(matches!(error, Error::BodyTimeout(LIMIT)));
        assert_eq!(until_late(clock(0), 1, LIMIT * 2).await.0, LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn trickling_body_is_late_and_body_at_the_minimum_rate_is_not() {
        // 50 bytes per second at a minimum rate of 100: each pause earns half of its time.
        let (after, error) = until_late(clock(100), 50, Duration::from_secs(1)).await;
        assert!(after > 2 * LIMIT - Duration::from_secs(1) && after <= 2 * LIMIT, "{after:?}");
        assert!(matches!(error, Error::BodySlow(100)));
        let long = LIMIT * 1000;
        for (rate, bytes) in [(100, 100), (0, 1)] {
            assert!(timeout(long, until_late(clock(rate), bytes, Duration::from_secs(1))).await.is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_without_reading_does_not_count() {
        let mut clock = clock(100);
        for _ in 0..100 {
            advance(LIMIT).await;
            // Dropped repeatedly, as by a select; that time counts.
            let _ = timeout(LIMIT / 200, clock.limit(std::future::pending::<Result<(), Error>>())).await;
        }
        let begin = Instant::now();
        assert!(clock.limit(std::future::pending::<Result<(), Error>>()).await.is_err());
        assert_eq!(begin.elapsed(), LIMIT / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn clock_without_limit_never_ends() {
        let mut clock = Clock::new(100);
        let work = async {
            sleep(LIMIT * 1000).await;
            Ok(())
        };
        assert!(clock.limit(work).await.is_ok());
    }
}
