//! Sends a request while its response is delivered; the response may begin and end before the request has been sent.
//!
//! Takes the future that sends. It is dropped, with everything it holds, as soon as it is done or stopped.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::Rc,
    task::{Poll, ready},
    time::Duration,
};

use futures_util::future::{FutureExt as _, LocalBoxFuture};
use h2::Reason;
use tokio::time::Instant;

use crate::http::body::BodyError;

/// Why a request was not sent to its end.
#[derive(Debug)]
pub enum SendError {
    /// The kept body could not be read back.
    Body(BodyError),
    /// The endpoint took nothing for this long.
    Stalled(Duration),
    /// Writing failed. The endpoint may have responded and closed.
    Refused,
}

/// The reason with which a stream is reset if its request is not sent completely. Clones share it.
#[derive(Debug, Clone)]
pub struct CutReason(Rc<Cell<Reason>>);

impl Default for CutReason {
    fn default() -> Self {
        Self(Rc::new(Cell::new(Reason::CANCEL)))
    }
}

impl CutReason {
    /// The endpoint has sent a complete response and does not need the rest of the request (RFC 9113 §8.1).
    pub fn set_answered(&self) {
        self.0.set(Reason::NO_ERROR);
    }

    /// The current reason.
    pub fn get(&self) -> Reason {
        self.0.get()
    }
}

/// Clones share the same request.
#[derive(Clone)]
pub struct Sending(Rc<RefCell<SendState>>);

enum SendState {
    Running(LocalBoxFuture<'static, Result<(), SendError>>),
    Sent,
    Stopped,
}

impl Sending {
    /// Sends nothing before [`run`](Self::run) is polled.
    pub fn new(work: impl Future<Output = Result<(), SendError>> + 'static) -> Self {
        Self(Rc::new(RefCell::new(SendState::Running(work.boxed_local()))))
    }

    /// Sends until the request is sent or sending fails. An error is returned once; later calls return `Ok`. Cancel-safe.
    pub async fn run(&self) -> Result<(), SendError> {
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            let SendState::Running(work) = &mut *state else { return Poll::Ready(Ok(())) };
            let done = ready!(work.poll_unpin(cx));
            *state = if done.is_ok() { SendState::Sent } else { SendState::Stopped };
            Poll::Ready(done)
        })
        .await
    }

    /// Sends while `work` runs, and returns the result of `work`.
    pub async fn run_during<T>(&self, work: impl Future<Output = T>) -> T {
        let sending = async {
            if let Err(error) = self.run().await {
                tracing::debug!(?error, "sending the request failed, continuing with the response");
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            done = work => done,
            never = sending => never,
        }
    }

    /// Whether the whole request has been sent.
    pub fn is_sent(&self) -> bool {
        matches!(*self.0.borrow(), SendState::Sent)
    }

    /// Stops sending and drops the rest of the request.
    pub fn stop(&self) {
        let mut state = self.0.borrow_mut();
        if matches!(*state, SendState::Running(_)) {
            *state = SendState::Stopped;
        }
    }
}

/// Keeps the sending side of a request that could not be sent whole until the response has ended: closing it would end the response,
/// too. Clones are the same.
#[derive(Clone, Default)]
pub struct Unfinished(Rc<RefCell<Option<Box<dyn Any>>>>);

impl Unfinished {
    /// Drops `side` with the last clone.
    pub fn keep(&self, side: impl Any) {
        self.0.replace(Some(Box::new(side)));
    }
}

/// The time in which an exchange with an endpoint waits for the client, which no limit of the endpoint counts. Clones share it.
#[derive(Clone, Default)]
pub struct ClientTime(Rc<ClientTimeState>);

#[derive(Default)]
struct ClientTimeState {
    past: Cell<Duration>,
    since: Cell<Option<Instant>>,
}

impl ClientTime {
    /// Waits for the client.
    pub async fn during<T>(&self, waiting: impl Future<Output = T>) -> T {
        self.0.since.set(Some(Instant::now()));
        let done = waiting.await;
        self.0.past.set(self.total());
        self.0.since.set(None);
        done
    }

    fn is_running(&self) -> bool {
        self.0.since.get().is_some()
    }

    fn total(&self) -> Duration {
        self.0.past.get() + self.0.since.get().map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// How often the acknowledged bytes are read within a limit, at least.
const LOOKS: u32 = 4;
/// The pause before they are read first, and after progress. Further pauses double. Most requests are acknowledged within the first
/// pause, so that a limit is exceeded by no more than that.
const FIRST_LOOK: Duration = Duration::from_millis(50);

/// When an endpoint last took a part of a request: the socket took bytes, or the endpoint's kernel acknowledged some. Room in the
/// send queue does not show every progress: the kernel reports it only after a third of the queue has left, which can take a slow
/// reader longer than the limit. Clones share the same time.
#[derive(Clone)]
pub struct Progress(Rc<ProgressState>);

struct ProgressState {
    last: Cell<Instant>,
    acknowledged: Box<dyn Fn() -> Option<u64>>,
    /// The largest number so far.
    seen: Cell<u64>,
}

impl Progress {
    /// Starts with the current time. `acknowledged` returns a number that grows with each acknowledged byte of the request, or `None`
    /// if it is unknown; beyond `before`, bytes of the request have been acknowledged.
    pub fn begin(before: Option<u64>, acknowledged: impl Fn() -> Option<u64> + 'static) -> Self {
        let (last, seen) = (Cell::new(Instant::now()), Cell::new(before.unwrap_or_default()));
        Self(Rc::new(ProgressState { last, acknowledged: Box::new(acknowledged), seen }))
    }

    /// Records that the endpoint took a part now.
    pub fn made(&self) {
        self.0.last.set(Instant::now());
    }

    /// Records progress if more has been acknowledged.
    fn look(&self) {
        let Some(now) = (self.0.acknowledged)() else { return };
        if now > self.0.seen.get() {
            self.0.seen.set(now);
            self.made();
        }
    }

    /// Resolves when no progress was made for `limit`, from the first poll on, and at most a quarter of it later. Never resolves without
    /// a limit, or while the client is waited for.
    pub async fn overdue(&self, limit: Option<Duration>, client: &ClientTime) {
        let Some(limit) = limit else { return std::future::pending().await };
        let (longest, mut since, mut excluded) = (limit / LOOKS, Instant::now(), client.total());
        let first = longest.min(FIRST_LOOK);
        let mut pause = first;
        loop {
            let (now, due) = (Instant::now(), since + limit + (client.total() - excluded));
            if now >= due {
                return;
            }
            let next = now + pause;
            tokio::time::sleep_until(if client.is_running() { next } else { due.min(next) }).await;
            self.look();
            (since, excluded, pause) = match self.0.last.get() {
                last if last > since => (last, client.total(), first),
                _ => (since, excluded, longest.min(pause * 2)),
            };
        }
    }

    /// Waits for the endpoint to take a part of the request, while progress is made at least every `idle`.
    pub async fn wait<T, E>(
        &self,
        idle: Option<Duration>,
        part: impl Future<Output = Result<T, E>>,
    ) -> Result<T, SendError> {
        let none = ClientTime::default();
        tokio::select! {
            biased;
            taken = part => taken.map_err(|_| SendError::Refused),
            () = self.overdue(idle, &none) => Err(SendError::Stalled(idle.unwrap_or_default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing is known of acknowledged bytes.
    fn begin() -> Progress {
        Progress::begin(None, || None)
    }

    /// Takes `parts` seconds and makes progress once a second.
    async fn work(parts: u32, progress: Progress, held: Rc<()>) -> Result<(), SendError> {
        for _ in 0..parts {
            tokio::time::sleep(Duration::from_secs(1)).await;
            progress.made();
        }
        drop(held);
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn request_is_sent_while_the_response_is_delivered() {
        let held = Rc::new(());
        let sending = Sending::new(work(3, begin(), Rc::clone(&held)));
        sending.run_during(tokio::time::sleep(Duration::from_millis(2500))).await;
        assert!(!sending.is_sent());
        assert_eq!(Rc::strong_count(&held), 2);
        sending.run_during(tokio::time::sleep(Duration::from_secs(1))).await;
        assert!(sending.is_sent());
        assert_eq!(Rc::strong_count(&held), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn stopped_request_drops_its_content() {
        let held = Rc::new(());
        let sending = Sending::new(work(3, begin(), Rc::clone(&held)));
        sending.run_during(tokio::time::sleep(Duration::from_secs(1))).await;
        sending.clone().stop();
        assert_eq!(Rc::strong_count(&held), 1);
        assert!(sending.run().await.is_ok() && !sending.is_sent());
    }

    #[tokio::test(start_paused = true)]
    async fn progress_postpones_the_limit() {
        let (begun, progress) = (Instant::now(), begin());
        let sending = Sending::new(work(3, progress.clone(), Rc::new(())));
        sending.run_during(progress.overdue(Some(Duration::from_millis(1500)), &ClientTime::default())).await;
        assert_eq!(begun.elapsed(), Duration::from_millis(4500));
    }

    #[tokio::test(start_paused = true)]
    async fn part_that_is_not_taken_in_time_stalls() {
        let (idle, never) = (Some(Duration::from_secs(2)), std::future::pending::<Result<(), ()>>());
        assert!(matches!(begin().wait(idle, never).await, Err(SendError::Stalled(_))));
        assert!(matches!(begin().wait(None, async { Err::<(), ()>(()) }).await, Err(SendError::Refused)));
    }

    /// From the begin on, a byte is acknowledged every `pause`, until `end`.
    fn acknowledging(pause: Duration, end: Duration) -> (Instant, Progress) {
        let begun = Instant::now();
        let bytes = move || Some(10 + (begun.elapsed().min(end).as_nanos() / pause.as_nanos()) as u64);
        (begun, Progress::begin(Some(10), bytes))
    }

    #[tokio::test(start_paused = true)]
    async fn acknowledged_bytes_postpone_the_limit() {
        for limit in [1, 2, 10, 50].map(Duration::from_secs) {
            let end = Duration::from_secs(100);
            let (begun, progress) = acknowledging(limit / 2, end);
            progress.overdue(Some(limit), &ClientTime::default()).await;
            let over = begun.elapsed() - end;
            assert!(over >= limit && over <= limit * 5 / 4, "{limit:?}: {over:?}");
            // A wait that begins now has the whole limit.
            let begun = Instant::now();
            let never = std::future::pending::<Result<(), ()>>();
            assert!(matches!(progress.wait(Some(limit), never).await, Err(SendError::Stalled(_))));
            assert_eq!(begun.elapsed(), limit);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn request_that_is_acknowledged_at_once_is_overdue_on_time() {
        let limit = Duration::from_secs(600);
        let soon = Duration::from_millis(5);
        let (begun, progress) = acknowledging(soon, soon);
        progress.overdue(Some(limit), &ClientTime::default()).await;
        assert!(begun.elapsed() >= limit && begun.elapsed() <= limit + FIRST_LOOK, "{:?}", begun.elapsed());
        // The last part of a request that took some minutes to send, as well.
        let (begun, progress) = acknowledging(soon, limit);
        progress.overdue(Some(limit), &ClientTime::default()).await;
        assert!(begun.elapsed() >= 2 * limit && begun.elapsed() <= 2 * limit + FIRST_LOOK, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn time_of_the_client_does_not_count() {
        for (waits, pause) in [(1, 0), (5, 700), (30, 10)] {
            let (begun, client, progress) = (Instant::now(), ClientTime::default(), begin());
            let limit = Duration::from_secs(4);
            let waiting = async {
                for _ in 0..waits {
                    client.during(tokio::time::sleep(Duration::from_secs(3))).await;
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = waiting => {}
                () = progress.overdue(Some(limit), &client) => {}
            }
            let over = begun.elapsed() - Duration::from_secs(3) * waits;
            assert!(over >= limit && over <= limit * 5 / 4, "{waits} waits: {over:?}");
        }
    }
}
