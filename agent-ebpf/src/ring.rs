//! Copies the last payload bytes of what passes into the ring of its flow (`penstock_common::tail`).

use core::ffi::c_void;

use penstock_common::tail;

use crate::bounded;

/// Copies the end of a run of payload to the ring, unless that is null. `position` is the number of the run's first byte. `read` gets
/// a place in the run, a destination and a length.
#[inline(always)]
pub fn copy(ring: *mut u8, position: u32, len: u32, read: impl Fn(u32, *mut c_void, u32)) {
    if ring.is_null() || len == 0 {
        return;
    }
    let copies = tail::place(position, len);
    let offset = u64::from(copies.offset);
    if let Some(first) = bounded(copies.first, tail::TAIL) {
        // SAFETY: at most RING - 1 bytes from the start of the ring's memory, which has TAIL bytes more. The verifier checks both.
        let to = unsafe { ring.add((offset & u64::from(tail::RING - 1)) as usize) };
        read(copies.skip, to.cast(), first);
    }
    if let Some(second) = bounded(copies.second, tail::TAIL) {
        read(copies.skip + copies.first, ring.cast(), second);
    }
}
