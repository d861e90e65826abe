//! Waits with an optional deadline. All functions are cancel-safe if the work is.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

/// The deadline of something that begins now and may take `limit`.
pub fn after(limit: Option<Duration>) -> Option<Instant> {
    limit.map(|limit| Instant::now() + limit)
}

/// Runs `work`. Returns `None` if it has not finished by the deadline.
pub async fn with_deadline<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}

/// Resolves at the deadline. Never resolves without one.
pub async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Resolves when `limit` has passed since the first poll. Never resolves without one.
pub async fn elapsed(limit: Option<Duration>) {
    passed(after(limit)).await;
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn work_that_takes_longer_than_its_limit_is_stopped() {
        let begin = Instant::now();
        assert_eq!(with_deadline(after(Some(LIMIT)), sleep(LIMIT / 2)).await, Some(()));
        assert_eq!(with_deadline(after(Some(LIMIT)), sleep(LIMIT * 2)).await, None);
        assert_eq!(begin.elapsed(), LIMIT / 2 + LIMIT);
        elapsed(Some(LIMIT)).await;
        assert_eq!(begin.elapsed(), LIMIT / 2 + LIMIT * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn work_without_limit_is_not_stopped() {
        assert_eq!(with_deadline(after(None), sleep(LIMIT * 1_000_000)).await, Some(()));
        assert_eq!(with_deadline(after(Some(LIMIT)), passed(after(None))).await, None);
    }
}
