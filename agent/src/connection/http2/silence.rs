//! Notices a client that answers no PING.

use std::{future::poll_fn, time::Duration};

use h2::{Ping, PingPong};
use tokio::time::{Instant, sleep, sleep_until};

use crate::client::Traffic;

/// How long a client may be silent before it gets a PING, and how long it may take to answer it at least.
const PING_INTERVAL: Duration = Duration::from_secs(30);
pub(super) const PONG_TIMEOUT: Duration = Duration::from_secs(20);
/// Time between two looks at a client that owes an answer.
const CHECK: Duration = Duration::from_secs(5);

/// Resolves when the client has been silent and does not answer a PING within `patience`, which has no limit if `None`.
pub(super) async fn unresponsive(traffic: &Traffic, ping: Option<PingPong>, patience: impl Fn() -> Option<Duration>) {
    let Some(mut ping) = ping else { return std::future::pending().await };
    loop {
        sleep_until(traffic.last_received() + PING_INTERVAL).await;
        if traffic.last_received().elapsed() < PING_INTERVAL {
            continue;
        }
        let Ok(()) = ping.send_ping(Ping::opaque()) else { return };
        tokio::select! {
            pong = poll_fn(|cx| ping.poll_pong(cx)) => match pong {
                Ok(_) => {}
                // The connection task reports the error.
                Err(_) => return std::future::pending().await,
            },
            () = unanswered(|| traffic.acknowledged().ok(), &patience) => return,
        }
    }
}

/// Resolves when the client has acknowledged nothing for `patience`. Acknowledged bytes extend the wait, because a slow reader sees
/// the PING late. `acknowledged` returns `None` if the connection is broken.
async fn unanswered(acknowledged: impl Fn() -> Option<u64>, patience: impl Fn() -> Option<Duration>) {
    let (mut before, mut since) = (acknowledged(), Instant::now());
    loop {
        sleep(CHECK).await;
        let now = acknowledged();
        if now != before {
            (before, since) = (now, Instant::now());
        } else if now.is_none() || patience().is_some_and(|limit| since.elapsed() >= limit) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const IDLE: Duration = Duration::from_secs(60);

    async fn time_of(acknowledged: impl Fn() -> Option<u64>, patience: impl Fn() -> Option<Duration>) -> Duration {
        let begin = Instant::now();
        unanswered(acknowledged, patience).await;
        begin.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn answer_may_take_as_long_as_requests_allow() {
        assert_eq!(time_of(|| Some(1), || Some(PONG_TIMEOUT)).await, PONG_TIMEOUT);
        assert_eq!(time_of(|| Some(1), || Some(IDLE)).await, IDLE);
        // The requests end meanwhile.
        let begin = Instant::now();
        let patience = || Some(if begin.elapsed() < Duration::from_secs(40) { IDLE } else { PONG_TIMEOUT });
        assert_eq!(time_of(|| Some(1), patience).await, Duration::from_secs(40));
        let endless = tokio::time::timeout(Duration::from_secs(86_400), unanswered(|| Some(1), || None)).await;
        assert!(endless.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn acknowledged_bytes_extend_the_wait() {
        let acknowledged = Cell::new(0);
        let begin = Instant::now();
        let more = || {
            if begin.elapsed() <= Duration::from_secs(100) {
                acknowledged.set(acknowledged.get() + 1);
            }
            Some(acknowledged.get())
        };
        assert_eq!(time_of(more, || Some(PONG_TIMEOUT)).await, Duration::from_secs(100) + PONG_TIMEOUT);
        assert_eq!(time_of(|| None, || Some(IDLE)).await, CHECK);
    }
}
