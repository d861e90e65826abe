//! Waits until every kernel program that was running has ended.
//!
//! An update of a map of maps returns only after an RCU grace period, under which programs run
//! (`maybe_wait_bpf_programs`). membarrier(2) would fail on kernels with `nohz_full`; this works wherever the programs
//! can be loaded.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use super::bpf::{MAP_CREATE, MAP_UPDATE_ELEM, bpf};

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;

/// The beginning of `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

/// The beginning of `union bpf_attr` for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct Update {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// A map of maps that no program uses.
pub(super) struct Grace {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl Grace {
    /// Creates the maps. Needs CAP_BPF.
    pub(super) fn new() -> io::Result<Self> {
        let inner = create(BPF_MAP_TYPE_ARRAY, 0)?;
        let outer = create(BPF_MAP_TYPE_ARRAY_OF_MAPS, inner.as_raw_fd() as u32)?;
        Ok(Self { outer, inner })
    }

    /// Blocks for some milliseconds. Needs no capability.
    pub(super) fn wait(&self) -> io::Result<()> {
        let (key, value) = (0u32, self.inner.as_raw_fd() as u32);
        let (map_fd, key, value) = (self.outer.as_raw_fd() as u32, (&raw const key) as u64, (&raw const value) as u64);
        bpf(MAP_UPDATE_ELEM, &Update { map_fd, padding: 0, key, value, flags: 0 }).map(drop)
    }
}

fn create(map_type: u32, inner_map_fd: u32) -> io::Result<OwnedFd> {
    let attributes = Create { map_type, key_size: 4, value_size: 4, max_entries: 1, map_flags: 0, inner_map_fd };
    let fd = bpf(MAP_CREATE, &attributes)?;
    // SAFETY: the call has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capability;

    #[test]
    fn grace_period_needs_no_capabilities() {
        let grace = Grace::new().expect("CAP_BPF");
        capability::with(&[], || grace.wait()).expect("wait");
    }
}
