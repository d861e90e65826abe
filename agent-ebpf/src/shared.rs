//! Finds out whether a segment has bytes in memory that the sender can still write.
//!
//! `sendfile`, `splice` and `vmsplice` put pages of files and processes into a segment without a copy. The kernel marks such
//! segments (SKBFL_SHARED_FRAG), but several kernels lose the mark when they merge segments (CVE-2026-43503, CVE-2026-46300). So
//! each page is checked too: a page of a file or a process has a mapping, the kernel's own pages do not.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;

use crate::{
    maps::OFFSETS,
    memory::{read_u32, read_u64, zero},
};

/// The largest CONFIG_MAX_SKB_FRAGS.
const MAX_FRAGS: u32 = 45;
/// Size of a `skb_frag_t` in bytes. It begins with the page.
const FRAG: u64 = 16;
/// The offset if the kernel's type information does not have the field.
const UNKNOWN: u32 = 0;

/// # Safety
///
/// `skb` must be a `struct sk_buff`.
#[inline(always)]
pub(crate) unsafe fn is_shared(skb: *const u8) -> bool {
    let offsets = OFFSETS.load();
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let (head, end) = unsafe { (read_u64(skb, offsets.skb_head), read_u32(skb, offsets.skb_end)) };
    let info = (head + u64::from(end)) as *const u8;
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let (flags, count, list) = unsafe {
        (
            read_u32(info, offsets.shared_flags) & 0xff,
            read_u32(info, offsets.shared_nr_frags) & 0xff,
            read_u64(info, offsets.shared_frag_list),
        )
    };
    if flags != 0 || list != 0 {
        return true;
    }
    if count == 0 {
        return false;
    }
    if offsets.page_mapping == UNKNOWN {
        return true;
    }
    let first = info as u64 + u64::from(offsets.shared_frags);
    let mut look = Look { first, count, shared: zero(count) as u32 };
    let look_ptr: *mut Look = &raw mut look;
    // SAFETY: `page` has the signature that `bpf_loop` calls, and `look` outlives the call.
    unsafe { bpf_loop(MAX_FRAGS, page as *mut c_void, look_ptr.cast(), 0) };
    look.shared != 0
}

struct Look {
    /// Address of the first fragment, and the number of fragments.
    first: u64,
    count: u32,
    shared: u32,
}

/// Checks one fragment. Returns 0 to continue, 1 to stop.
extern "C" fn page(number: u64, look: *mut Look) -> u64 {
    // SAFETY: `bpf_loop` passes the pointer that it was given.
    let look = unsafe { &mut *look };
    if number >= u64::from(look.count) {
        return 1;
    }
    let offsets = OFFSETS.load();
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let memory = unsafe { read_u64((look.first + number * FRAG) as *const u8, 0) };
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let compound = unsafe { read_u64(memory as *const u8, offsets.page_compound_head) };
    // With this bit set, the page is part of a compound page and names its first page (`compound_head`).
    let first = if compound & 1 != 0 { compound - 1 } else { memory };
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let mapping = unsafe { read_u64(first as *const u8, offsets.page_mapping) };
    // With this bit set, it is device memory without a page (`netmem_is_net_iov`).
    if memory & 1 != 0 || mapping != 0 {
        look.shared = 1 ^ zero(look.count) as u32;
        return 1;
    }
    0
}
