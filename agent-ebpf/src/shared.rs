//! Whether a segment's bytes lie in memory that the sender can still write.
//!
//! `sendfile`, `splice` and `vmsplice` put pages of files and processes into a segment as they are. The kernel marks such segments
//! (SKBFL_SHARED_FRAG), but several kernels lose the mark where segments are merged (CVE-2026-43503, CVE-2026-46300). So each
//! page is looked at too: one that belongs to a file or a process has a mapping, the kernel's own have none.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;

use crate::{
    maps::OFFSETS,
    memory::{read_u32, read_u64, zero},
};

/// CONFIG_MAX_SKB_FRAGS at its most.
const MAX_FRAGS: u32 = 45;
/// Bytes of a `skb_frag_t`, which begins with the page.
const FRAG: u64 = 16;
/// The kernel's type information did not tell where the field is.
const UNKNOWN: u32 = 0;

/// # Safety
/// `skb` is a `struct sk_buff`.
#[inline(always)]
pub(crate) unsafe fn is_shared(skb: *const u8) -> bool {
    let offsets = OFFSETS.load();
    // SAFETY: the helper that reads checks every address.
    let (head, end) = unsafe { (read_u64(skb, offsets.skb_head), read_u32(skb, offsets.skb_end)) };
    let info = (head + u64::from(end)) as *const u8;
    // SAFETY: as above.
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
    // SAFETY: `page` is a function of the signature that bpf_loop calls, and `look` outlives the call.
    unsafe { bpf_loop(MAX_FRAGS, page as *mut c_void, look_ptr.cast(), 0) };
    look.shared != 0
}

struct Look {
    /// Address of the first fragment, and how many there are.
    first: u64,
    count: u32,
    shared: u32,
}

/// One fragment; 0 goes on, 1 ends it.
extern "C" fn page(number: u64, look: *mut Look) -> u64 {
    // SAFETY: bpf_loop hands over the pointer that it was given.
    let look = unsafe { &mut *look };
    if number >= u64::from(look.count) {
        return 1;
    }
    let offsets = OFFSETS.load();
    // SAFETY: the helper that reads checks every address.
    let memory = unsafe { read_u64((look.first + number * FRAG) as *const u8, 0) };
    // SAFETY: as above.
    let compound = unsafe { read_u64(memory as *const u8, offsets.page_compound_head) };
    // A page of a larger one names the first with this bit (`compound_head`).
    let first = if compound & 1 != 0 { compound - 1 } else { memory };
    // SAFETY: as above.
    let mapping = unsafe { read_u64(first as *const u8, offsets.page_mapping) };
    // Memory of a device has this bit, and no page (`netmem_is_net_iov`).
    if memory & 1 != 0 || mapping != 0 {
        look.shared = 1 ^ zero(look.count) as u32;
        return 1;
    }
    0
}
