//! How long a peer may take nothing of what it is sent.
//!
//! Progress is what the peer's kernel acknowledges, not what our send queue takes: a queue of a megabyte has room again only
//! after a third of it has left, which takes a slow reader longer than the limit. The count is read only when time has passed.
//! A wait ends between the limit and a quarter more after the last progress.

use std::{
    future::poll_fn,
    io,
    os::fd::AsFd,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, timeout_at};

use super::{reach::Reach, wire::Wire};
use crate::kernel::socket;

/// Looks within one limit.
const LOOKS: u32 = 4;

pub struct Patience {
    limit: Option<Duration>,
    reach: Reach,
    waiting: Option<Waiting>,
}

struct Waiting {
    acked: u64,
    /// When the peer last acknowledged something, or the wait began.
    since: Instant,
    next_look: Instant,
}

impl Patience {
    /// For `limit`, and `unreachable` where nothing is acknowledged at all. `None` is for ever.
    pub fn new(limit: Option<Duration>, unreachable: Option<Duration>) -> Self {
        Self { limit, reach: Reach::new(unreachable), waiting: None }
    }

    /// How often to look.
    fn interval(&self) -> Option<Duration> {
        self.limit.map(|limit| limit / LOOKS).into_iter().chain(self.reach.interval()).min()
    }

    /// Waits for `poll`, which needs the whole connection, as long as the client takes something. Cancel-safe if `poll` loses
    /// nothing between two calls.
    pub async fn step<T>(
        &mut self,
        wire: &mut Wire,
        mut poll: impl FnMut(Pin<&mut Wire>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> io::Result<T> {
        // Most waits are none.
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
            let done = match &self.waiting {
                Some(waiting) => timeout_at(waiting.next_look, work).await.ok(),
                None => Some(work.await),
            };
            match done {
                Some(done) => return done,
                None => self.look(wire.tcp())?,
            }
        }
    }

    /// Begins to wait, unless it has begun.
    pub fn begin(&mut self, socket: impl AsFd) -> io::Result<()> {
        if let (Some(interval), None) = (self.interval(), &self.waiting) {
            let now = Instant::now();
            let acked = socket::bytes_acked(socket.as_fd())?;
            self.waiting = Some(Waiting { acked, since: now, next_look: now + interval });
        }
        Ok(())
    }

    /// Whether the peer has acknowledged something lately; if not, [`is_over`] holds for the error. `NotConnected`: it is gone.
    pub fn look(&mut self, socket: impl AsFd) -> io::Result<()> {
        let (Some(interval), Some(waiting)) = (self.interval(), &mut self.waiting) else { return Ok(()) };
        let now = Instant::now();
        if now < waiting.next_look {
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
        waiting.next_look = now + interval;
        Ok(())
    }
}

/// The peer has taken nothing for too long. The kernel's own ETIMEDOUT says that it is not there any more.
pub fn is_over(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none()
}
