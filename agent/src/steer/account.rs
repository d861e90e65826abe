//! The account of a flow: the bytes that each path carried, stops and times.

use penstock_common::{path::Path, slot::stop};

#[derive(Debug, Default, Clone)]
pub struct Account {
    /// Bytes that user space carried.
    pub relayed: u64,
    /// Bytes that path `ingress` and path `local` carried.
    pub steered: u64,
    pub local: u64,
    /// Bytes that path `wire` carried.
    pub wire: u64,
    /// Bytes from the client to the endpoint after a switch of protocols.
    pub upstream: u64,
    /// Those of `upstream` that the kernel carried.
    pub upstream_steered: u64,
    /// Pieces that user space wrote, and segments that the kernel redirected.
    pub pieces: u64,
    pub segments: u64,
    /// Times that the kernel stopped before the end of the message, by reason (`penstock_common::slot::stop`).
    pub stops: [u32; stop::COUNT],
    /// Times of the body's first and last byte, CLOCK_MONOTONIC ns; 0 if there was none.
    pub first_ns: u64,
    pub last_ns: u64,
}

impl Account {
    /// Bytes that this path carried to the client.
    pub fn carried(&self, path: Path) -> u64 {
        match path {
            Path::Local => self.local,
            Path::Ingress => self.steered,
            Path::Wire => self.wire,
            Path::Relay => self.relayed,
        }
    }

    /// Adds a piece that user space has written.
    pub fn add_relayed(&mut self, bytes: usize) {
        self.relayed += bytes as u64;
        self.pieces += 1;
    }

    /// Adds what the kernel carried between arming and reclaim, and why it stopped.
    pub(super) fn add_steered(&mut self, path: Path, bytes: u64, segments: u64, stop: u32) {
        match path {
            Path::Local => self.local += bytes,
            Path::Ingress => self.steered += bytes,
            Path::Wire | Path::Relay => {}
        }
        self.segments += segments;
        if stop != 0
            && let Some(count) = self.stops.get_mut(stop as usize)
        {
            *count += 1;
        }
    }

    /// Adds the times of a first and a last byte.
    pub fn stamp(&mut self, first: u64, last: u64) {
        if self.first_ns == 0 {
            self.first_ns = first;
        }
        self.last_ns = self.last_ns.max(last);
    }
}
