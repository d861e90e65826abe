//! Whether a client's machine is still there while something is on its way to it.
//!
//! TCP's keepalive probes a connection on which nothing is, and TCP_USER_TIMEOUT would count a client that is there and takes
//! nothing as gone (Linux ends it although each probe of its window is answered). So this looks at whether anything at all is
//! acknowledged while the kernel repeats itself.

use std::{
    cell::RefCell,
    os::fd::AsFd,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

use crate::kernel::socket;

/// Looks in the time after which a client is gone.
const LOOKS: u32 = 8;
/// How far the age of an acknowledgement is off, which the kernel tells in milliseconds.
const ACCURACY: Duration = Duration::from_millis(50);

pub struct Reach {
    after: Option<Duration>,
    /// Since when nothing was acknowledged that had to be, and when the last acknowledgement before came.
    stuck: Option<(Instant, Instant)>,
}

impl Reach {
    /// `None`: it is not looked at.
    pub fn new(after: Option<Duration>) -> Self {
        Self { after, stuck: None }
    }

    /// How often to look.
    pub fn interval(&self) -> Option<Duration> {
        self.after.map(|after| after / LOOKS)
    }

    /// True: the client is gone, or its connection broken.
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

/// A [`Reach`] with its clock, which goes on from one wait to the next.
pub struct Watch(RefCell<Option<(Reach, Pin<Box<Sleep>>)>>);

impl Watch {
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
