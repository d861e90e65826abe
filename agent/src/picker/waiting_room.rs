//! Bounds the requests of one pool that wait for a replica of its EPP, over all workers: their number, and the bytes of their
//! bodies. Dropping a [`WaitingPlace`] frees it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use prometheus_client::metrics::gauge::Gauge;

use crate::budget::{Budget, Share};

#[derive(Debug)]
pub struct WaitingRoom {
    limit: AtomicUsize,
    waiting: AtomicUsize,
    bytes: Arc<Budget>,
}

impl WaitingRoom {
    pub fn new(requests: usize, bytes: u64) -> Arc<Self> {
        let bytes = Budget::new(bytes, Gauge::default());
        Arc::new(Self { limit: AtomicUsize::new(requests), waiting: AtomicUsize::new(0), bytes })
    }

    /// Sets the bounds of later calls. Requests that wait keep their places.
    pub fn set_limits(&self, requests: usize, bytes: u64) {
        self.limit.store(requests, Relaxed);
        self.bytes.set_limit(bytes);
    }

    /// A place for one request; `None` if all are taken.
    pub fn enter(self: &Arc<Self>) -> Option<WaitingPlace> {
        let limit = self.limit.load(Relaxed);
        let more = |waiting: usize| (waiting < limit).then_some(waiting + 1);
        self.waiting.fetch_update(Relaxed, Relaxed, more).ok()?;
        Some(WaitingPlace { room: Arc::clone(self), share: self.bytes.share(), bytes: 0 })
    }
}

/// The place of one waiting request.
#[derive(Debug)]
pub struct WaitingPlace {
    room: Arc<WaitingRoom>,
    share: Share,
    bytes: u64,
}

impl WaitingPlace {
    /// Sets how many bytes the request has by now. Returns false if they do not fit.
    #[must_use]
    pub fn holds(&mut self, bytes: u64) -> bool {
        let fits = self.share.grow(bytes.saturating_sub(self.bytes));
        if fits {
            self.bytes = self.bytes.max(bytes);
        }
        fits
    }
}

impl Drop for WaitingPlace {
    fn drop(&mut self) {
        self.room.waiting.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_bounded_in_requests_and_bytes() {
        let room = WaitingRoom::new(2, 100);
        let (mut one, mut two) = (room.enter().unwrap(), room.enter().unwrap());
        assert!(room.enter().is_none());
        assert!(one.holds(60) && two.holds(40) && one.holds(60) && !two.holds(41));
        drop(one);
        assert!(two.holds(100) && !two.holds(101));
        let mut three = room.enter().unwrap();
        assert!(three.holds(0) && !three.holds(1));
        drop(two);
        assert!(three.holds(100));
        room.set_limits(3, 110);
        let (mut four, _five) = (room.enter().unwrap(), room.enter().unwrap());
        assert!(room.enter().is_none() && four.holds(10) && !four.holds(11));
    }
}
