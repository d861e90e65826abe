//! Limits of `penstock epp` over all of its clients: connections, streams and bytes of held bodies.
//!
//! Each is a quota. A reservation is returned when it is dropped.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

/// The limits of `penstock epp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EppServerLimits {
    /// Open connections. Further ones are closed at once. Default 1024.
    pub connections: usize,
    /// How long a new connection may take for its TLS handshake and HTTP/2's preface. Then it is closed. Default 10 s.
    pub opening: Duration,
    /// Open streams. Further ones get RESOURCE_EXHAUSTED. Default 65536.
    pub streams: usize,
    /// Bytes of request bodies that are held for all streams. Further ones get 503. Default 1073741824.
    pub held_bytes: usize,
    /// Fields of a head. More fail the stream. Default 1024.
    pub fields: usize,
    /// Bytes of a head's fields. More fail the stream. Default 262144.
    pub field_bytes: usize,
    /// Messages of one stream before its request is complete. More fail the stream. Default 65536.
    pub messages: usize,
    /// How long a stream may be silent before its request is complete. Default 60 s.
    pub idle: Duration,
    /// How long a stream may be silent afterwards, until the response ends. It is long, because some proxies report only the end
    /// of a response. Default 1 h.
    pub response_idle: Duration,
}

impl Default for EppServerLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            opening: Duration::from_secs(10),
            streams: 65_536,
            held_bytes: 1 << 30,
            fields: 1024,
            field_bytes: 256 << 10,
            messages: 65_536,
            idle: Duration::from_secs(60),
            response_idle: Duration::from_secs(3600),
        }
    }
}

/// A count that has a limit.
#[derive(Debug)]
pub(super) struct Quota {
    used: AtomicUsize,
    limit: usize,
}

impl Quota {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit })
    }

    /// An empty reservation.
    pub(super) fn reservation(self: &Arc<Self>) -> Reservation {
        Reservation { quota: Arc::clone(self), amount: 0 }
    }

    /// Reserves one. Returns `None` if the quota is used up.
    pub(super) fn one(self: &Arc<Self>) -> Option<Reservation> {
        let mut reservation = self.reservation();
        reservation.grow(1).then_some(reservation)
    }
}

/// A reservation of a part of a quota.
#[derive(Debug)]
pub(super) struct Reservation {
    quota: Arc<Quota>,
    amount: usize,
}

impl Reservation {
    /// Returns the reservation to the quota.
    pub(super) fn release(&mut self) {
        self.quota.used.fetch_sub(std::mem::take(&mut self.amount), Relaxed);
    }

    /// Reserves `by` more. Returns false if the quota has not enough left.
    pub(super) fn grow(&mut self, by: usize) -> bool {
        let Quota { used, limit } = &*self.quota;
        let add = |used: usize| used.checked_add(by).filter(|sum| sum <= limit);
        let granted = used.fetch_update(Relaxed, Relaxed, add).is_ok();
        self.amount += if granted { by } else { 0 };
        granted
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_reservation_is_returned_to_the_quota() {
        let quota = Quota::new(3);
        let mut reservation = quota.reservation();
        assert!(reservation.grow(2) && !reservation.grow(2) && !reservation.grow(usize::MAX));
        let one = quota.one();
        assert!(one.is_some() && quota.one().is_none());
        drop(reservation);
        assert!(quota.reservation().grow(2) && !quota.reservation().grow(3));
    }
}
