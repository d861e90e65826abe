//! EPPs that keep their streams and say nothing about response heads: they would cost each response the whole
//! `response_timeout`. After a few in a row nobody waits any more, until a reply comes that would have been in time.
//!
//! Replies are read whether or not anybody waits for them, so no clock has to tell when to try again. One [`Silence`] for each
//! replica that a worker asks, one [`Waiting`] for each stream. Whoever calls brings the clock.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Replies in a row that did not come in time, after which nobody waits.
const PATIENCE: u32 = 3;

#[derive(Debug, Default)]
pub struct Silence {
    missed: AtomicU32,
}

/// What became of the question about a response's head: a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// It was answered in time, or the EPP had closed the stream and has nothing to say.
    InTime,
    TimedOut,
    /// Nobody waited: so it is configured, or the EPP had been silent before.
    NotAwaited,
}

impl Reply {
    pub fn label(self) -> &'static str {
        match self {
            Self::InTime => "in_time",
            Self::TimedOut => "timed_out",
            Self::NotAwaited => "not_awaited",
        }
    }
}

/// One stream's part.
#[derive(Debug)]
pub struct Waiting {
    shared: Arc<Silence>,
    /// When a reply that comes later is no longer in time.
    until: Option<Instant>,
    reply: Option<Reply>,
}

impl Waiting {
    pub fn new(shared: &Arc<Silence>) -> Self {
        Self { shared: Arc::clone(shared), until: None, reply: None }
    }

    /// The question is put; returns for how long to wait for the reply.
    pub fn ask(&mut self, configured: Option<Duration>, now: Instant) -> Option<Duration> {
        self.until = configured.map(|wait| now + wait);
        let wait = configured.filter(|_| self.shared.missed.load(Relaxed) < PATIENCE);
        self.reply = Some(if wait.is_some() { Reply::InTime } else { Reply::NotAwaited });
        wait
    }

    /// The reply came while it was waited for.
    pub fn answered(&self) {
        self.shared.missed.store(0, Relaxed);
    }

    /// It did not.
    pub fn timed_out(&mut self) {
        self.reply = Some(Reply::TimedOut);
        // Counts no further than it matters, so it cannot wrap.
        let _ = self.shared.missed.fetch_update(Relaxed, Relaxed, |missed| (missed < PATIENCE).then_some(missed + 1));
    }

    /// The reply came when nobody waited any more.
    pub fn late(&self, now: Instant) {
        if self.until.is_some_and(|until| now <= until) {
            self.answered();
        }
    }

    pub fn reply(&self) -> Option<Reply> {
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
    fn after_three_nobody_waits_until_a_reply_comes_in_time() {
        let (shared, now) = (Arc::default(), Instant::now());
        for _ in 0..PATIENCE {
            assert_eq!(silent(&shared).reply(), Some(Reply::TimedOut));
        }
        let mut waiting = Waiting::new(&shared);
        assert_eq!((waiting.ask(WAIT, now), waiting.reply()), (None, Some(Reply::NotAwaited)));
        waiting.late(now + Duration::from_millis(101));
        assert_eq!(Waiting::new(&shared).ask(WAIT, now), None, "a reply that is slow is as good as none");
        waiting.late(now + Duration::from_millis(100));
        assert_eq!(Waiting::new(&shared).ask(WAIT, now), WAIT);
    }

    #[test]
    fn only_silence_in_a_row_counts() {
        let shared = Arc::default();
        for _ in 0..10 {
            silent(&shared);
            silent(&shared);
            let mut waiting = Waiting::new(&shared);
            assert_eq!(waiting.ask(WAIT, Instant::now()), WAIT);
            waiting.answered();
            assert_eq!(waiting.reply(), Some(Reply::InTime));
        }
    }

    #[test]
    fn where_it_is_off_nobody_waits_or_counts() {
        let (shared, now) = (Arc::default(), Instant::now());
        let mut waiting = Waiting::new(&shared);
        assert_eq!((waiting.ask(None, now), waiting.reply()), (None, Some(Reply::NotAwaited)));
        waiting.late(now);
    }
}
