//! How long a client may take with its body. Only time in which the agent waits for the client counts: while it writes to disk,
//! or does not read, the clock stands still.
//!
//! A body is late when no byte of it came for the limit, or when it took in all longer than the limit and the time that it needs at
//! the least rate. So a large body may take as long as it likes while it keeps coming, and one that trickles has an end.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::error::Error;

#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    /// `None` is off.
    limit: Option<Duration>,
    /// Bytes a second; 0 is off.
    rate: u64,
    received: u64,
    /// Since the last byte.
    quiet: Duration,
    /// Before it.
    waited: Duration,
}

impl Clock {
    pub(super) fn new(rate: u64) -> Self {
        Self { limit: None, rate, received: 0, quiet: Duration::ZERO, waited: Duration::ZERO }
    }

    pub(super) fn set_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// So many bytes have come.
    pub(super) fn progress(&mut self, bytes: usize) {
        self.received += bytes as u64;
        self.waited += self.quiet;
        self.quiet = Duration::ZERO;
    }

    /// Waits for the client, as long as it has time. Cancel-safe: the time of a dropped call counts.
    pub(super) async fn limit<T>(&mut self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let Some((left, late)) = self.left() else { return work.await };
        let running = Running { since: Instant::now(), clock: self };
        let result = timeout(left, work).await;
        drop(running);
        result.unwrap_or(Err(late))
    }

    /// The time that the client has left, and what it has run into when that is over.
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

/// Counts while it lives.
struct Running<'a> {
    since: Instant,
    clock: &'a mut Clock,
}

impl Drop for Running<'_> {
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

    /// `bytes` come after each pause, until the client is late: after how long, and for what reason.
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
    async fn a_body_that_stops_is_late_after_the_limit() {
        let (after, error) = until_late(clock(100), 1, Duration::MAX).await;
        assert_eq!(after, LIMIT);
        assert!(matches!(error, Error::BodyTimeout(LIMIT)));
        assert_eq!(until_late(clock(0), 1, LIMIT * 2).await.0, LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_is_late_and_one_at_the_least_rate_is_not() {
        // 50 bytes a second of 100: each earns half of the second that it took.
        let (after, error) = until_late(clock(100), 50, Duration::from_secs(1)).await;
        assert!(after > 2 * LIMIT - Duration::from_secs(1) && after <= 2 * LIMIT, "{after:?}");
        assert!(matches!(error, Error::BodySlow(100)));
        let long = LIMIT * 1000;
        for (rate, bytes) in [(100, 100), (0, 1)] {
            assert!(timeout(long, until_late(clock(rate), bytes, Duration::from_secs(1))).await.is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_nobody_reads_is_not_the_clients() {
        let mut clock = clock(100);
        for _ in 0..100 {
            advance(LIMIT).await;
            // Dropped again and again, as by a select: that time counts.
            let _ = timeout(LIMIT / 200, clock.limit(std::future::pending::<Result<(), Error>>())).await;
        }
        let begin = Instant::now();
        assert!(clock.limit(std::future::pending::<Result<(), Error>>()).await.is_err());
        assert_eq!(begin.elapsed(), LIMIT / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn off_is_for_ever() {
        let mut clock = Clock::new(100);
        let work = async {
            sleep(LIMIT * 1000).await;
            Ok(())
        };
        assert!(clock.limit(work).await.is_ok());
    }
}
