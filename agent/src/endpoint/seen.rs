//! The endpoints outside of a pool that have answered its requests lately, if the pool has `passthrough`: all that the agent knows
//! of them. Bounded in number and age.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// How many are kept. The one that answered longest ago makes room.
const MOST: usize = 1024;
/// How long after its last answer an endpoint is kept.
const KEPT: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
pub(super) struct SeenAddresses(Mutex<HashMap<SocketAddr, Instant>>);

impl SeenAddresses {
    /// The endpoint answered a request.
    pub(super) fn answered(&self, address: SocketAddr, now: Instant) {
        let mut seen = self.0.lock();
        if seen.len() >= MOST && !seen.contains_key(&address) {
            let oldest = seen.iter().min_by_key(|(_, at)| **at).map(|(address, _)| *address);
            oldest.map(|oldest| seen.remove(&oldest));
        }
        seen.insert(address, now);
    }

    /// The endpoint failed a request.
    pub(super) fn failed(&self, address: SocketAddr) {
        self.0.lock().remove(&address);
    }

    /// The endpoints, sorted by address.
    pub(super) fn recent(&self, now: Instant) -> Vec<SocketAddr> {
        let mut seen = self.0.lock();
        seen.retain(|_, at| now.saturating_duration_since(*at) < KEPT);
        let mut recent: Vec<_> = seen.keys().copied().collect();
        recent.sort_unstable();
        recent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 8000))
    }

    #[test]
    fn endpoints_are_kept_until_they_fail_or_are_silent_for_long() {
        let (seen, now) = (SeenAddresses::default(), Instant::now());
        for n in [3, 1, 2, 3] {
            seen.answered(address(n), now);
        }
        assert_eq!(seen.recent(now), [1, 2, 3].map(address));
        seen.failed(address(2));
        seen.answered(address(3), now + KEPT / 2);
        assert_eq!(seen.recent(now), [1, 3].map(address));
        assert_eq!(seen.recent(now + KEPT), [address(3)]);
    }

    #[test]
    fn oldest_endpoint_makes_room() {
        let (seen, now) = (SeenAddresses::default(), Instant::now());
        for n in 0..MOST as u16 + 2 {
            seen.answered(address(n), now + Duration::from_millis(n.into()));
        }
        let recent = seen.recent(now + Duration::from_secs(10));
        assert_eq!((recent.len(), recent[0]), (MOST, address(2)));
    }
}
