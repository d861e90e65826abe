//! Reads of the kernel's structures, and numbers that are hidden from the verifier.

use core::{arch::asm, ptr};

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use penstock_common::{
    framing::{Framing, state},
    verdict::SendBuffer,
};

use crate::maps::OFFSETS;

/// The methods of `penstock_common::verdict::VerdictKernel` that are the same for every program with an `index`.
macro_rules! same_for_all {
    () => {
        #[inline(always)]
        fn load_acquire(&mut self, word: &::penstock_common::slot::Word) -> u64 {
            ::penstock_atomics::load_acquire(word)
        }

        #[inline(always)]
        fn clear_release(&mut self, word: &::penstock_common::slot::Word) {
            ::penstock_atomics::store_release(word, 0);
        }

        #[inline(always)]
        fn now(&mut self) -> u64 {
            // SAFETY: a helper without arguments.
            unsafe { ::aya_ebpf::helpers::generated::bpf_ktime_get_ns() }
        }

        #[inline(always)]
        fn event(&mut self) {
            $crate::maps::event(self.index);
        }
    };
}
pub(crate) use same_for_all;

/// Whether the owner of a socket tracks its send queue: by completions of `SO_ZEROCOPY`, or because the owner is a Penstock.
#[inline(always)]
pub(crate) unsafe fn keeps_account(socket: *const u8) -> bool {
    let offsets = OFFSETS.load();
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let flags = unsafe { read_u64(socket, offsets.skc_flags) };
    flags & u64::from(offsets.accounts) != 0
}

/// Whether the owner of a socket asks for time stamps of what it sends (SO_TIMESTAMPING).
#[inline(always)]
pub(crate) unsafe fn stamps_what_it_sends(socket: *const u8) -> bool {
    /// SOF_TIMESTAMPING_TX_HARDWARE, _SOFTWARE, _SCHED and _ACK; the field has 16 bits on some kernels.
    const SENDING: u32 = 1 | 1 << 1 | 1 << 8 | 1 << 9;
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    unsafe { read_u32(socket, OFFSETS.load().sk_tsflags) & SENDING != 0 }
}

/// Whether calls on a socket may block. A blocking `recv` on a socket in a map fails with EAGAIN at any wake-up without data, such as
/// that of a writer for whom there is room again (`tcp_bpf_recvmsg`).
#[inline(always)]
pub(crate) unsafe fn may_block(socket: *const u8) -> bool {
    const O_NONBLOCK: u32 = 0o4000;
    let offsets = OFFSETS.load();
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    unsafe {
        let file = read_u64(read_u64(socket, offsets.sk_socket) as *const u8, offsets.socket_file);
        read_u32(file as *const u8, offsets.file_flags) & O_NONBLOCK == 0
    }
}

/// Fill of a socket's send buffer, at the offsets that the agent found in the kernel's BTF.
#[inline(always)]
pub(crate) unsafe fn send_buffer(tcp: *const u8) -> SendBuffer {
    let offsets = OFFSETS.load();
    SendBuffer {
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        write_seq: unsafe { read_u32(tcp, offsets.write_seq) },
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        queued: unsafe { read_u32(tcp, offsets.sk_wmem_queued) } as i32,
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        limit: unsafe { read_u32(tcp, offsets.sk_sndbuf) } as i32,
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        piece: unsafe { (read_u32(tcp, offsets.max_window) / 2).min(read_u32(tcp, offsets.mss_cache)) },
    }
}

/// 0 if the address cannot be read.
#[inline(always)]
pub(crate) unsafe fn read_u32(base: *const u8, offset: u32) -> u32 {
    // SAFETY: `read` tolerates bad addresses.
    unsafe { read(base, offset) }
}

/// 0 if the address cannot be read.
#[inline(always)]
pub(crate) unsafe fn read_u64(base: *const u8, offset: u32) -> u64 {
    // SAFETY: `read` tolerates bad addresses.
    unsafe { read(base, offset) }
}

#[inline(always)]
unsafe fn read<T: Default>(base: *const u8, offset: u32) -> T {
    let mut value = T::default();
    // SAFETY: the helper tolerates bad addresses, and writes only to `value`.
    unsafe {
        bpf_probe_read_kernel(ptr::from_mut(&mut value).cast(), size_of::<T>() as u32, base.add(offset as usize).cast())
    };
    value
}

/// 0, but unknown to the verifier, like `unknown`.
///
/// Every number that a callback reads from its caller's stack is combined with it, before the loop and at the end of each step, so
/// that none is a constant for the verifier. Before 6.8 the verifier does not see that branches depend on such constants (its
/// precision tracking follows r10 only): it explores the callback with one value, assumes that value for every call, and removes
/// the code that this value does not reach. Later verifiers explore each state, line length and chunk size that a step can lead to:
/// ten times the work, most of a second at each load.
#[inline(always)]
pub(crate) fn zero(unknown: u32) -> u64 {
    let mut low = u64::from(unknown);
    // SAFETY: subtracts a number from itself.
    unsafe { asm!("{0} -= {1}", inout(reg) low, in(reg) u64::from(unknown)) };
    low << 32 | low & u64::from(u32::MAX)
}

/// A mask of the bits of a state.
const STATES: u32 = 15;
const _: () = assert!(state::END_LF == STATES);

/// The same framing with numbers that the verifier does not know: see [`zero`].
#[inline(always)]
pub(crate) fn forgotten(framing: Framing, zero: u64) -> Framing {
    Framing {
        left: framing.left ^ zero,
        state: (framing.state ^ zero as u32) & STATES,
        line: framing.line ^ zero as u32,
        chunks: framing.chunks ^ zero as u32,
        payload: framing.payload ^ zero as u32,
    }
}
