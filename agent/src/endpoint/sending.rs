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

use crate::{
    deadline::{self, with_deadline},
    http::body::BodyError,
};

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

/// When an endpoint last took a part of a request. Clones share the same time.
#[derive(Debug, Clone)]
pub struct Progress(Rc<Cell<Instant>>);

impl Progress {
    /// Starts with the current time.
    pub fn begin() -> Self {
        Self(Rc::new(Cell::new(Instant::now())))
    }

    /// Records that the endpoint took a part now.
    pub fn made(&self) {
        self.0.set(Instant::now());
    }

    /// Resolves when no progress was made for `limit`. Never resolves without a limit.
    pub async fn overdue(&self, limit: Option<Duration>) {
        let Some(limit) = limit else { return std::future::pending().await };
        loop {
            let due = self.0.get() + limit;
            if Instant::now() >= due {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// Waits for the endpoint to take a part of the request, for at most `idle`.
pub async fn with_idle_timeout<T, E>(
    idle: Option<Duration>,
    part: impl Future<Output = Result<T, E>>,
) -> Result<T, SendError> {
    let taken = with_deadline(deadline::after(idle), part).await;
    taken.ok_or(SendError::Stalled(idle.unwrap_or_default()))?.map_err(|_| SendError::Refused)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let sending = Sending::new(work(3, Progress::begin(), Rc::clone(&held)));
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
        let sending = Sending::new(work(3, Progress::begin(), Rc::clone(&held)));
        sending.run_during(tokio::time::sleep(Duration::from_secs(1))).await;
        sending.clone().stop();
        assert_eq!(Rc::strong_count(&held), 1);
        assert!(sending.run().await.is_ok() && !sending.is_sent());
    }

    #[tokio::test(start_paused = true)]
    async fn progress_postpones_the_limit() {
        let (begin, progress) = (Instant::now(), Progress::begin());
        let sending = Sending::new(work(3, progress.clone(), Rc::new(())));
        sending.run_during(progress.overdue(Some(Duration::from_millis(1500)))).await;
        assert_eq!(begin.elapsed(), Duration::from_millis(4500));
    }

    #[tokio::test(start_paused = true)]
    async fn part_that_is_not_taken_in_time_stalls() {
        let (idle, never) = (Some(Duration::from_secs(2)), std::future::pending::<Result<(), ()>>());
        assert!(matches!(with_idle_timeout(idle, never).await, Err(SendError::Stalled(_))));
        assert!(matches!(with_idle_timeout(None, async { Err::<(), ()>(()) }).await, Err(SendError::Refused)));
    }
}
