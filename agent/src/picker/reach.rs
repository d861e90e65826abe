//! Connects again to a replica that could not be connected. There is one such task per replica for all workers and requests; it
//! pauses longer after each failure. A success wakes the requests that wait.

use std::{io, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::future::FutureExt as _;
use tokio::time::{Instant, sleep, timeout};

use super::{
    connection,
    handshake::{self, Mismatch},
    replica::{Replica, Replicas},
};
use crate::server_tls;

/// The pause before the first attempt. It doubles with each failure.
const FIRST: Duration = Duration::from_millis(20);
/// The longest pause at first. A request that waits for `unreachable_wait` sees several attempts.
const MOST: Duration = Duration::from_millis(250);
/// The longest pause once the replica has been away for [`LONG`].
const MOST_LATER: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(10);
/// A replica that is lost again within this time is not connected more often than before.
const STABLE: Duration = Duration::from_secs(2);

/// As [`follow`], but restarts after a panic, which the panic hook has counted.
pub(super) async fn keep_following(replicas: &Replicas, replica: &Arc<Replica>) {
    while AssertUnwindSafe(follow(replicas, replica)).catch_unwind().await.is_err() {
        sleep(MOST_LATER).await;
    }
}

/// Connects to `replica` whenever it has become unreachable. Never returns.
async fn follow(replicas: &Replicas, replica: &Arc<Replica>) {
    let connect = async || {
        let tls = replicas.tls.is_some();
        connection::connect(replicas, replica, &replica.address, tls, None).await.map(drop).map_err(Arc::new)
    };
    let mut pauses = Pauses::default();
    let mut news = replicas.news();
    loop {
        if let Some(why) = replica.why_unreachable() {
            let (address, authority) = (&replica.address, &replica.authority);
            tracing::warn!(%address, %authority, error = %why, "EPP replica unreachable, connecting again");
            let since = Instant::now();
            let mut explanation = Explanation::default();
            loop {
                // The replica may have another address by now.
                replicas.recheck();
                sleep(jittered(pauses.next(since.elapsed()))).await;
                match connect().await {
                    Ok(()) => break,
                    // Requests that fail meanwhile name the cause, too.
                    Err(why) => replica.unreachable(&explanation.of(replicas, replica, why).await),
                }
            }
            replica.reached();
            // Its health is that of before.
            replica.look.notify_one();
            pauses.recovered(Instant::now());
            tracing::info!(%address, %authority, after = ?since.elapsed(), "EPP replica reachable again");
        }
        // Cannot fail, because the sender is in `replicas`.
        if news.changed().await.is_err() {
            return;
        }
    }
}

/// The likely cause of failed connections to one replica, which is looked for once.
#[derive(Default)]
struct Explanation(Option<Option<Mismatch>>);

impl Explanation {
    /// The error that names the cause, if it is known.
    async fn of(&mut self, replicas: &Replicas, replica: &Replica, why: Arc<io::Error>) -> Arc<io::Error> {
        if !is_unexplained(&why) {
            return why;
        }
        if self.0.is_none() {
            let cause = cause(replicas, replica, &why).await;
            if let Some(cause) = cause {
                tracing::warn!(address = %replica.address, authority = %replica.authority, %cause, "EPP replica unreachable");
            }
            self.0 = Some(cause);
        }
        self.0.flatten().map_or(why, |cause| Arc::new(cause.error()))
    }
}

/// The likely cause of a failed connection, if the error does not say it. A server that expects TLS may close the connection
/// without an answer, so it is asked with TLS.
pub(super) async fn cause(replicas: &Replicas, replica: &Replica, why: &io::Error) -> Option<Mismatch> {
    if replicas.tls.is_some() || !is_unexplained(why) {
        return None;
    }
    let asked = handshake::answers_tls(&replica.address, server_tls::unverified()?, replica.name.clone());
    timeout(replicas.settings.connect_timeout, asked).await.unwrap_or(false).then_some(Mismatch::Tls)
}

/// Whether the server accepted the connection and closed it without an answer.
fn is_unexplained(why: &io::Error) -> bool {
    Mismatch::of(why) == Some(Mismatch::Closed) || connection::is_loss(why.kind())
}

/// The pauses between attempts.
#[derive(Default)]
struct Pauses {
    last: Option<Duration>,
    recovered: Option<Instant>,
}

impl Pauses {
    /// The pause before the next attempt, to a replica that has been away for this long.
    fn next(&mut self, away: Duration) -> Duration {
        if self.recovered.take().is_some_and(|recovered| recovered.elapsed() >= STABLE) {
            self.last = None;
        }
        let most = if away < LONG { MOST } else { MOST_LATER };
        let pause = self.last.map_or(FIRST, |last| last * 2).min(most);
        self.last = Some(pause);
        pause
    }

    fn recovered(&mut self, now: Instant) {
        self.recovered = Some(now);
    }
}

/// Up to a fifth more, so that agents do not connect in step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(1.0 + fastrand::f64() / 5.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(pauses: &mut Pauses, count: usize, away: Duration) -> Vec<u128> {
        (0..count).map(|_| pauses.next(away).as_millis()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_and_start_anew_after_a_stable_recovery() {
        let mut pauses = Pauses::default();
        assert_eq!(milliseconds(&mut pauses, 6, Duration::ZERO), [20, 40, 80, 160, 250, 250]);
        assert_eq!(milliseconds(&mut pauses, 3, LONG), [500, 1000, 1000]);
        pauses.recovered(Instant::now());
        sleep(STABLE / 2).await;
        assert_eq!(milliseconds(&mut pauses, 2, Duration::ZERO), [250, 250], "lost again at once");
        pauses.recovered(Instant::now());
        sleep(STABLE).await;
        assert_eq!(milliseconds(&mut pauses, 2, Duration::ZERO), [20, 40]);
    }
}
