//! Limits how long a peer may go without acknowledging the data sent to it.
//!
//! Progress is what the peer's kernel acknowledges, not what our send queue takes: a queue of 1 MB reports room only
//! after a third of it has left, which can take a slow reader longer than the limit. The counter is read only at
//! intervals, so a wait ends between 1 and 1.25 limits after the last progress.

use std::{
    future::poll_fn,
    io,
    os::fd::AsFd,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Instant;

use super::{reach::Reach, wire::ClientIo};
use crate::{deadline::with_deadline, kernel::socket};

/// Checks per limit.
const CHECKS: u32 = 4;

pub struct Patience {
    limit: Option<Duration>,
    reach: Reach,
    waiting: Option<PatienceTimer>,
}

struct PatienceTimer {
    acked: u64,
    /// Time of the last acknowledgement, or the start of the wait.
    since: Instant,
    next_check: Instant,
}

impl Patience {
    /// `limit` applies to a peer that reads nothing, `unreachable` to one that acknowledges nothing, not even probes.
    /// `None` disables a limit.
    pub fn new(limit: Option<Duration>, unreachable: Option<Duration>) -> Self {
        Self { limit, reach: Reach::new(unreachable), waiting: None }
    }

    /// Time between two checks.
    fn interval(&self) -> Option<Duration> {
        self.limit.map(|limit| limit / CHECKS).into_iter().chain(self.reach.interval()).min()
    }

    /// Drives `poll`, which needs the whole connection, while the client makes progress. Cancel-safe if `poll` loses
    /// nothing between two calls.
    pub async fn step<T>(
        &mut self,
        wire: &mut ClientIo,
        mut poll: impl FnMut(Pin<&mut ClientIo>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> io::Result<T> {
        // Usually `poll` is ready immediately.
        let at_once = poll_fn(|cx| match poll(Pin::new(wire), cx) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending => Poll::Ready(None),
        });
        if let Some(done) = at_once.await {
            return done;
        }
        self.begin(wire.tcp())?;
        loop {
            let work = poll_fn(|cx| poll(Pin::new(wire), cx));
            match with_deadline(self.waiting.as_ref().map(|waiting| waiting.next_check), work).await {
                Some(done) => return done,
                None => self.look(wire.tcp())?,
            }
        }
    }

    /// Starts to wait, unless a wait has started.
    pub fn begin(&mut self, socket: impl AsFd) -> io::Result<()> {
        if let (Some(interval), None) = (self.interval(), &self.waiting) {
            let now = Instant::now();
            let acked = socket::bytes_acked(socket.as_fd())?;
            self.waiting = Some(PatienceTimer { acked, since: now, next_check: now + interval });
        }
        Ok(())
    }

    /// Checks for progress if a check is due. Returns an error for which [`is_over`] is true if there was none for too
    /// long, and `NotConnected` if the peer is gone.
    pub fn look(&mut self, socket: impl AsFd) -> io::Result<()> {
        let (Some(interval), Some(waiting)) = (self.interval(), &mut self.waiting) else { return Ok(()) };
        let now = Instant::now();
        if now < waiting.next_check {
            return Ok(());
        }
        let acked = socket::bytes_acked(socket.as_fd())?;
        if acked != waiting.acked {
            (waiting.acked, waiting.since) = (acked, now);
        } else if self.limit.is_some_and(|limit| now.duration_since(waiting.since) >= limit) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if self.reach.look(&socket) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        waiting.next_check = now + interval;
        Ok(())
    }
}

/// Whether the error means that the peer took nothing for too long. The kernel's own ETIMEDOUT means that the peer is
/// gone.
pub fn is_over(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none()
}
