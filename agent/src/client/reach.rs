//! Detects that a client's machine is gone while data for it is in transit.
//!
//! TCP keepalive probes only idle connections, and TCP_USER_TIMEOUT also ends clients that are present but take nothing
//! (Linux ends the connection although each window probe is answered). So this module checks whether anything is
//! acknowledged while the kernel retransmits.

use std::{
    cell::RefCell,
    os::fd::AsFd,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

use crate::kernel::socket;

/// Checks within the limit.
const CHECKS: u32 = 8;
/// Accuracy of an acknowledgement's age, which the kernel reports in milliseconds.
const ACCURACY: Duration = Duration::from_millis(50);

pub struct Reach {
    after: Option<Duration>,
    /// When due acknowledgements stopped, and the time of the last acknowledgement before that.
    stuck: Option<(Instant, Instant)>,
}

impl Reach {
    /// `None` disables the check.
    pub fn new(after: Option<Duration>) -> Self {
        Self { after, stuck: None }
    }

    /// Time between two checks.
    pub fn interval(&self) -> Option<Duration> {
        self.after.map(|after| after / CHECKS)
    }

    /// Returns true if the client is gone or its connection is broken.
    pub fn look(&mut self, socket: impl AsFd) -> bool {
        let Some(after) = self.after else { return false };
        let now = Instant::now();
        let acknowledged = match socket::unanswered(socket) {
            Err(_) => return true,
            Ok(None) => {
                self.stuck = None;
                return false;
            }
            Ok(Some(age)) => now.checked_sub(age).unwrap_or(now),
        };
        match self.stuck {
            Some((since, before)) if acknowledged <= before + ACCURACY => now.duration_since(since) >= after,
            _ => {
                self.stuck = Some((now, acknowledged));
                false
            }
        }
    }
}

/// A [`Reach`] with its timer, which keeps running from one wait to the next.
pub struct ReachWatch(RefCell<Option<(Reach, Pin<Box<Sleep>>)>>);

impl ReachWatch {
    pub fn new(after: Option<Duration>) -> Self {
        let reach = Reach::new(after);
        let watched = reach.interval().map(|interval| Box::pin(sleep_until(Instant::now() + interval)));
        Self(RefCell::new(watched.map(|sleep| (reach, sleep))))
    }

    /// Ready when the client is gone.
    pub fn poll_gone(&self, socket: impl AsFd, cx: &mut Context<'_>) -> Poll<()> {
        let mut watched = self.0.borrow_mut();
        let Some((reach, sleep)) = &mut *watched else { return Poll::Pending };
        loop {
            ready!(sleep.as_mut().poll(cx));
            if reach.look(&socket) {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(Instant::now() + reach.interval().unwrap_or(Duration::MAX));
        }
    }
}
