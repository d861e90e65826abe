//! The walk over chunk syntax that both programs take: from one run of payload to the next, and byte by byte between them.
//!
//! Given where a message stands and access to the bytes that come next, it advances the framing over all of them or says that it
//! cannot. Payload is skipped by count.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use penstock_common::framing::Framing;

use crate::memory::{forgotten, zero};

/// Limit of bytes of chunk syntax and runs of payload in one call. What has more is passed.
const MAX_STEPS: u32 = 4096;

/// The bytes that a program decides on.
pub(crate) trait Bytes {
    /// The byte at this place; `None`: it cannot be read here.
    fn read(&self, at: u32) -> Option<u8>;

    /// Learns of a run of `len` bytes of payload at this place, of which the first has the number `position` in the message. Returns
    /// false if it had to read them and could not.
    fn payload(&self, position: u32, at: u32, len: u32) -> bool;
}

struct Walk<B> {
    framing: Framing,
    bytes: B,
    at: u32,
    len: u32,
}

/// Advances `framing` from the byte at `at` over all `len` bytes. False: it ends before they do, is invalid, or cannot be read.
#[inline(always)]
pub(crate) fn walk<B: Bytes>(framing: &mut Framing, bytes: B, at: u32, len: u32) -> bool {
    let zero = zero(len);
    let mut walk = Walk { framing: forgotten(*framing, zero), bytes, at: at ^ zero as u32, len };
    let walk_ptr: *mut Walk<B> = &raw mut walk;
    // SAFETY: `step` is a function of the signature that bpf_loop calls, and `walk` outlives the call.
    unsafe { bpf_loop(MAX_STEPS, step::<B> as *mut c_void, walk_ptr.cast(), 0) };
    *framing = walk.framing;
    walk.at == len && !walk.framing.is_invalid()
}

/// One step of the walk; 0 goes on, 1 ends it.
extern "C" fn step<B: Bytes>(_: u64, walk: *mut Walk<B>) -> u64 {
    // SAFETY: bpf_loop hands over the pointer that it was given.
    let walk = unsafe { &mut *walk };
    if walk.at >= walk.len {
        return 1;
    }
    let zero = zero(walk.len);
    let mut framing = walk.framing;
    let position = framing.payload;
    let payload = framing.skip(u64::from(walk.len - walk.at)) as u32;
    if payload > 0 {
        if !walk.bytes.payload(position, walk.at, payload) {
            return 1;
        }
        walk.framing = forgotten(framing, zero);
        walk.at += payload;
        return 0;
    }
    if !framing.wants_syntax() {
        return 1;
    }
    let Some(byte) = walk.bytes.read(walk.at) else { return 1 };
    framing.step(byte);
    walk.framing = forgotten(framing, zero);
    walk.at += 1;
    0
}
