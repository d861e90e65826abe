//! Maps sessions to endpoints by rendezvous hashing: it needs no state, all agents agree, and an endpoint that is added or removed
//! moves only its own sessions.
//!
//! The hash function is fixed here, because the standard library's may differ between two builds that run side by side.

use std::net::{IpAddr, SocketAddr};

/// The hash of a session's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionHash(u64);

impl SessionHash {
    /// Hashes a session's name.
    pub fn new(name: &[u8]) -> Self {
        Self(fnv(name))
    }

    /// The endpoint's score for this session. The highest score is the session's endpoint, the next one its second choice.
    pub(super) fn score(self, endpoint: SocketAddr) -> u64 {
        let address = match endpoint.ip() {
            IpAddr::V4(ip) => u128::from(ip.to_bits()),
            IpAddr::V6(ip) => ip.to_bits(),
        };
        let [high, low] = [(address >> 64) as u64, address as u64];
        [high, low, u64::from(endpoint.port())].iter().fold(self.0, |hash, part| mixed(hash ^ part))
    }
}

/// FNV-1a.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The final mix of SplitMix64: every bit of the argument affects every bit of the result.
fn mixed(hash: u64) -> u64 {
    let hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_is_stable_across_builds() {
        let endpoints = ["10.0.0.1:8000", "[fd00::1]:8000"].map(|address| address.parse().unwrap());
        assert_eq!(
            endpoints.map(|endpoint| SessionHash::new(b"abc").score(endpoint)),
            [17_280_564_299_576_009_385, 12_593_732_897_289_432_066]
        );
    }
}
