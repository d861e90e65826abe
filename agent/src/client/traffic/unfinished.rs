//! How long the client has been sending something that nothing else on its connection may interrupt, such as a header block.

use std::{cell::Cell, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

pub(super) struct UnfinishedHead {
    /// The number of the part, and since when its rest has been awaited.
    part: Cell<Option<(u64, Instant)>>,
    /// Whether everything that had arrived when it was last looked for has been read.
    all_read: Cell<bool>,
    begun: Notify,
}

impl UnfinishedHead {
    /// The preface, part 0, has begun.
    pub(super) fn new(begun: Instant) -> Self {
        Self { part: Cell::new(Some((0, begun))), all_read: Cell::new(true), begun: Notify::new() }
    }

    pub(super) fn all_read(&self) {
        self.all_read.set(true);
    }

    /// Something was read, and this part is unfinished after it.
    pub(super) fn note(&self, part: Option<u64>, now: Instant) {
        self.all_read.set(false);
        let known = self.part.get();
        match part {
            Some(part) if known.is_none_or(|(known, _)| known != part) => {
                self.part.set(Some((part, now)));
                self.begun.notify_one();
            }
            Some(_) => {}
            None => self.part.set(None),
        }
    }

    /// Resolves when one part has been unfinished for `limit`. If the agent has not read what has arrived, which `has_unread` tells
    /// of the socket, the client is not to blame, and the limit begins anew. Cancel-safe.
    pub(super) async fn overdue(&self, limit: Duration, has_unread: impl Fn() -> bool) {
        loop {
            match self.part.get() {
                Some((_, begun)) if begun.elapsed() < limit => sleep_until(begun + limit).await,
                Some((part, _)) if !self.all_read.get() || has_unread() => self.part.set(Some((part, Instant::now()))),
                Some(_) => return,
                None => self.begun.notified().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// When a client is overdue, in seconds: it has sent something at these times, after which a part is unfinished. `has_unread`
    /// gets the time.
    async fn overdue(reads: &[(u64, Option<u64>)], has_unread: impl Fn(u64) -> bool) -> u64 {
        let start = Instant::now();
        let unfinished = UnfinishedHead::new(start);
        let client = async {
            for &(seconds, part) in reads {
                sleep_until(start + Duration::from_secs(seconds)).await;
                unfinished.note(part, Instant::now());
                unfinished.all_read();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = unfinished.overdue(LIMIT, || has_unread(start.elapsed().as_secs())) => {}
            () = client => {}
        }
        start.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn each_part_has_the_whole_limit() {
        assert_eq!(overdue(&[], |_| false).await, 10);
        let reads = [(4, Some(0)), (9, None), (30, Some(1)), (39, Some(2)), (48, Some(2))];
        assert_eq!(overdue(&reads, |_| false).await, 49);
    }

    #[tokio::test(start_paused = true)]
    async fn client_has_the_limit_anew_while_the_agent_does_not_read() {
        assert_eq!(overdue(&[(9, None), (30, Some(1))], |seconds| seconds < 60).await, 60);
        let unfinished = UnfinishedHead::new(Instant::now());
        unfinished.note(Some(1), Instant::now());
        let read = tokio::time::timeout(100 * LIMIT, unfinished.overdue(LIMIT, || false)).await;
        assert!(read.is_err(), "the client was blamed for what had not been read");
    }
}
