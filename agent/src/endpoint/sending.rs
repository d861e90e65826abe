//! A request on its way to an endpoint. Sending goes on beside the response, which may begin and end before the request has been
//! sent. What is given is the work of sending; it is dropped, with all that it holds, as soon as it is done or stopped.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::Rc,
    task::{Poll, ready},
    time::Duration,
};

use futures_util::future::{FutureExt as _, LocalBoxFuture};
use tokio::time::Instant;

use crate::http::body::BodyError;

/// Why a request was not sent to its end.
#[derive(Debug)]
pub enum Unsent {
    /// The kept body could not be read back.
    Body(BodyError),
    /// The endpoint took nothing for this long.
    Stalled(Duration),
    /// The endpoint takes no more. It may have answered.
    Refused,
}

/// Clones are the same request.
#[derive(Clone)]
pub struct Sending(Rc<RefCell<State>>);

enum State {
    Running(LocalBoxFuture<'static, Result<(), Unsent>>),
    Sent,
    Stopped,
}

impl Sending {
    /// Nothing is sent before [`run`](Self::run).
    pub fn new(work: impl Future<Output = Result<(), Unsent>> + 'static) -> Self {
        Self(Rc::new(RefCell::new(State::Running(work.boxed_local()))))
    }

    /// Sends until the request is sent or cannot be, which is told once. Cancel-safe.
    pub async fn run(&self) -> Result<(), Unsent> {
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            let State::Running(work) = &mut *state else { return Poll::Ready(Ok(())) };
            let done = ready!(work.poll_unpin(cx));
            *state = if done.is_ok() { State::Sent } else { State::Stopped };
            Poll::Ready(done)
        })
        .await
    }

    /// Sends beside `work`, until that is done.
    pub async fn beside<T>(&self, work: impl Future<Output = T>) -> T {
        let sending = async {
            if let Err(error) = self.run().await {
                tracing::debug!(?error, "request not sent to its end, response goes on");
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            done = work => done,
            never = sending => never,
        }
    }

    /// The whole request has been sent.
    pub fn is_sent(&self) -> bool {
        matches!(*self.0.borrow(), State::Sent)
    }

    /// Sends no more.
    pub fn stop(&self) {
        let mut state = self.0.borrow_mut();
        if matches!(*state, State::Running(_)) {
            *state = State::Stopped;
        }
    }
}

/// When an endpoint has last taken a part of a request. Clones are the same.
#[derive(Debug, Clone)]
pub struct Progress(Rc<Cell<Instant>>);

impl Progress {
    /// Counts from now.
    pub fn begin() -> Self {
        Self(Rc::new(Cell::new(Instant::now())))
    }

    pub fn made(&self) {
        self.0.set(Instant::now());
    }

    /// Resolves when none has been made for so long; never without a limit.
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

/// Waits for the endpoint to take a part of the request, for as long as `idle` at most.
pub async fn taken<T, E>(idle: Option<Duration>, part: impl Future<Output = Result<T, E>>) -> Result<T, Unsent> {
    let taken = match idle {
        Some(idle) => tokio::time::timeout(idle, part).await.map_err(|_| Unsent::Stalled(idle))?,
        None => part.await,
    };
    taken.map_err(|_| Unsent::Refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `parts` times a second.
    async fn work(parts: u32, progress: Progress, held: Rc<()>) -> Result<(), Unsent> {
        for _ in 0..parts {
            tokio::time::sleep(Duration::from_secs(1)).await;
            progress.made();
        }
        drop(held);
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn request_is_sent_beside_the_response() {
        let held = Rc::new(());
        let sending = Sending::new(work(3, Progress::begin(), Rc::clone(&held)));
        sending.beside(tokio::time::sleep(Duration::from_millis(2500))).await;
        assert!(!sending.is_sent());
        assert_eq!(Rc::strong_count(&held), 2);
        sending.beside(tokio::time::sleep(Duration::from_secs(1))).await;
        assert!(sending.is_sent());
        assert_eq!(Rc::strong_count(&held), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn stopped_request_lets_go_of_what_it_holds() {
        let held = Rc::new(());
        let sending = Sending::new(work(3, Progress::begin(), Rc::clone(&held)));
        sending.beside(tokio::time::sleep(Duration::from_secs(1))).await;
        sending.clone().stop();
        assert_eq!(Rc::strong_count(&held), 1);
        assert!(sending.run().await.is_ok() && !sending.is_sent());
    }

    #[tokio::test(start_paused = true)]
    async fn progress_puts_off_the_limit() {
        let (begin, progress) = (Instant::now(), Progress::begin());
        let sending = Sending::new(work(3, progress.clone(), Rc::new(())));
        sending.beside(progress.overdue(Some(Duration::from_millis(1500)))).await;
        assert_eq!(begin.elapsed(), Duration::from_millis(4500));
    }

    #[tokio::test(start_paused = true)]
    async fn part_that_is_not_taken_in_time_is_a_stall() {
        let (idle, never) = (Some(Duration::from_secs(2)), std::future::pending::<Result<(), ()>>());
        assert!(matches!(taken(idle, never).await, Err(Unsent::Stalled(_))));
        assert!(matches!(taken(None, async { Err::<(), ()>(()) }).await, Err(Unsent::Refused)));
    }
}
