//! Detects EPPs that never reply to response heads or trailers, which would delay each response. After `PATIENCE` timeouts in a row
//! responses do not wait for replies to heads, until a reply arrives that would have been in time: replies are read even if nothing
//! waits for them. After one missing reply to trailers the EPP is sent no trailers for `TRAILERS_AGAIN`. One [`Silence`] per replica
//! and worker, one [`Waiting`] per stream. Time is passed in.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Timeouts in a row after which responses stop waiting.
const PATIENCE: u32 = 3;
/// How long an EPP that did not reply to trailers is sent none.
const TRAILERS_AGAIN: Duration = Duration::from_secs(600);

/// The replies that one replica did not send.
#[derive(Debug, Default)]
pub struct Silence {
    /// Timeouts in a row of replies to heads.
    missed: AtomicU32,
    /// Until when the replica is sent no trailers.
    no_trailers: Mutex<Option<Instant>>,
}

/// How an EPP replied to a response's head. A metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadReply {
    /// The EPP replied in time, or it had already closed the stream.
    InTime,
    TimedOut,
    /// The response did not wait, because of the configuration or because the EPP was silent before.
    NotAwaited,
}

impl HeadReply {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::InTime => "in_time",
            Self::TimedOut => "timed_out",
            Self::NotAwaited => "not_awaited",
        }
    }
}

/// The wait of one stream.
#[derive(Debug)]
pub struct Waiting {
    shared: Arc<Silence>,
    /// Until when a reply is in time.
    until: Option<Instant>,
    reply: Option<HeadReply>,
}

impl Waiting {
    /// A stream that has not sent a head.
    pub fn new(shared: &Arc<Silence>) -> Self {
        Self { shared: Arc::clone(shared), until: None, reply: None }
    }

    /// The response's head is sent. Returns how long to wait for the reply; `None` means not to wait.
    pub fn ask(&mut self, configured: Option<Duration>, now: Instant) -> Option<Duration> {
        self.until = configured.map(|wait| now + wait);
        let wait = configured.filter(|_| self.shared.missed.load(Relaxed) < PATIENCE);
        self.reply = Some(if wait.is_some() { HeadReply::InTime } else { HeadReply::NotAwaited });
        wait
    }

    /// The reply arrived during the wait.
    pub fn answered(&self) {
        self.shared.missed.store(0, Relaxed);
    }

    /// The wait timed out.
    pub fn timed_out(&mut self) {
        self.reply = Some(HeadReply::TimedOut);
        // Stops counting at the threshold, so it cannot overflow.
        let _ = self.shared.missed.fetch_update(Relaxed, Relaxed, |missed| (missed < PATIENCE).then_some(missed + 1));
    }

    /// The reply arrived without a wait, or after it.
    pub fn late(&self, now: Instant) {
        if self.until.is_some_and(|until| now <= until) {
            self.answered();
        }
    }

    /// Whether the EPP may be sent trailers, to which it replies.
    pub fn replies_to_trailers(&self, now: Instant) -> bool {
        self.shared.no_trailers.lock().is_none_or(|until| until <= now)
    }

    /// The EPP did not reply to trailers in time.
    pub fn trailers_unanswered(&self, now: Instant) {
        *self.shared.no_trailers.lock() = Some(now + TRAILERS_AGAIN);
    }

    /// The EPP replied to trailers in time.
    pub fn trailers_answered(&self) {
        *self.shared.no_trailers.lock() = None;
    }

    /// How the EPP replied. Returns `None` before the head was sent.
    pub fn reply(&self) -> Option<HeadReply> {
        self.reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Option<Duration> = Some(Duration::from_millis(100));

    fn silent(shared: &Arc<Silence>) -> Waiting {
        let mut waiting = Waiting::new(shared);
        assert_eq!(waiting.ask(WAIT, Instant::now()), WAIT);
        waiting.timed_out();
        waiting
    }

    #[test]
    fn three_timeouts_disable_the_wait_until_a_reply_in_time() {
        let (shared, now) = (Arc::default(), Instant::now());
        for _ in 0..PATIENCE {
            assert_eq!(silent(&shared).reply(), Some(HeadReply::TimedOut));
        }
        let mut waiting = Waiting::new(&shared);
        assert_eq!((waiting.ask(WAIT, now), waiting.reply()), (None, Some(HeadReply::NotAwaited)));
        waiting.late(now + Duration::from_millis(101));
        assert_eq!(Waiting::new(&shared).ask(WAIT, now), None, "a slow reply does not restore the wait");
        waiting.late(now + Duration::from_millis(100));
        assert_eq!(Waiting::new(&shared).ask(WAIT, now), WAIT);
    }

    #[test]
    fn only_consecutive_timeouts_count() {
        let shared = Arc::default();
        for _ in 0..10 {
            silent(&shared);
            silent(&shared);
            let mut waiting = Waiting::new(&shared);
            assert_eq!(waiting.ask(WAIT, Instant::now()), WAIT);
            waiting.answered();
            assert_eq!(waiting.reply(), Some(HeadReply::InTime));
        }
    }

    #[test]
    fn silence_about_trailers_lasts_until_a_reply_or_the_next_try() {
        let (shared, now) = (Arc::default(), Instant::now());
        let (first, second) = (Waiting::new(&shared), Waiting::new(&shared));
        assert!(first.replies_to_trailers(now));
        first.trailers_unanswered(now);
        let soon = now + TRAILERS_AGAIN - Duration::from_millis(1);
        assert!(!second.replies_to_trailers(now) && !second.replies_to_trailers(soon));
        assert!(second.replies_to_trailers(now + TRAILERS_AGAIN));
        second.trailers_answered();
        assert!(first.replies_to_trailers(now));
    }

    #[test]
    fn disabled_wait_is_never_counted() {
        let (shared, now) = (Arc::default(), Instant::now());
        let mut waiting = Waiting::new(&shared);
        assert_eq!((waiting.ask(None, now), waiting.reply()), (None, Some(HeadReply::NotAwaited)));
        waiting.late(now);
    }
}
