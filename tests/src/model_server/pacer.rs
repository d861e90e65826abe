//! Submillisecond waits, which tokio's clock does not support: a timerfd for short waits.
#![allow(unsafe_code)] // tokio has no safe way to register a timer

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::unix::AsyncFd;

/// At this duration or longer, a millisecond's error is acceptable.
const COARSE: Duration = Duration::from_millis(5);

struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

#[derive(Default)]
pub(super) struct Pacer(Option<AsyncFd<Timer>>);

impl Pacer {
    /// Cancel-safe. Needs a tokio runtime.
    pub(super) async fn sleep(&mut self, duration: Duration) {
        let done = duration.is_zero() || (duration < COARSE && self.short(duration).await.is_ok());
        if !done {
            tokio::time::sleep(duration).await;
        }
    }

    async fn short(&mut self, duration: Duration) -> std::io::Result<()> {
        let timer = match &mut self.0 {
            Some(timer) => timer,
            empty => {
                let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
                let timer = Timer(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?);
                // SAFETY: the timer owns its descriptor, never changes it, and closes it only when it is dropped,
                // which the AsyncFd that holds it does after deregistering it.
                empty.insert(unsafe { AsyncFd::register(timer) }?)
            }
        };
        let once = Expiration::OneShot(TimeSpec::from_duration(duration));
        timer.get_ref().0.set(once, TimerSetTimeFlags::empty())?;
        loop {
            let mut ready = timer.readable().await?;
            // Setting the timer again discards an expiry that was not awaited; without this the read would block.
            if let Ok(read) = ready.try_io(|timer| Ok(timer.get_ref().0.wait()?)) {
                return read;
            }
        }
    }
}
