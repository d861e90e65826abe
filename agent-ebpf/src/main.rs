//! The kernel program: `sk_skb/stream_verdict` on endpoint connections.
//!
//! Each segment that an endpoint sends comes here before user space sees it. The rule is `penstock_common::verdict`; this
//! file gives it maps, helpers and the bytes of chunk-size lines. It returns `SK_PASS` always: a redirect is a pass to
//! another socket, and `SK_DROP` would lose bytes without a trace.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

use core::{arch::asm, ffi::c_void, ptr};

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{__sk_buff, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, sk_action::SK_PASS},
    helpers::generated::{
        bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_loop, bpf_map_lookup_elem, bpf_probe_read_kernel, bpf_sk_release,
        bpf_skb_adjust_room, bpf_skb_load_bytes, bpf_skc_to_tcp_sock,
    },
    macros::{map, stream_verdict},
    maps::{Array, HashMap, RingBuf, SockHash},
    programs::SkBuffContext,
};
use penstock_common::{
    framing::{Framing, state},
    slot::{Offsets, Slot, Word},
    tail,
    verdict::{Kernel, SendBuffer, verdict},
};

/// Endpoint connections, by cookie: the verdict runs on these.
#[map]
static SOURCES: SockHash<u64> = SockHash::with_max_entries(16384, 0);
/// Client connections, by cookie; no program runs on these.
#[map]
static TARGETS: SockHash<u64> = SockHash::with_max_entries(16384, 0);
/// Cookie of an endpoint connection to the index of its slot.
#[map]
static INDEX: HashMap<u64, u32> = HashMap::with_max_entries(16384, 0);
#[map]
static SLOTS: Array<Slot> = Array::with_max_entries(16384, BPF_F_MMAPABLE);
/// Indices of slots that have something for the agent.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// Rings of last payload bytes, by the index of the slot; the agent makes one where an EPP wants to know how responses end.
#[map]
static TAILS: HashMap<u32, [u8; tail::MEMORY]> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
/// Events that found `EVENTS` full.
#[map]
static MISSED: Array<u64> = Array::with_max_entries(1, 0);

#[unsafe(no_mangle)]
static OFFSETS: Global<Offsets> = Global::new(Offsets { sk_wmem_queued: 0, sk_sndbuf: 0, write_seq: 0, skb_cb: 0 });

/// Bytes of chunk syntax and runs of payload that one call looks at; a segment with more goes to user space.
const MAX_STEPS: u32 = 4096;

/// The bits of a state.
const STATES: u32 = 15;
const _: () = assert!(state::END_LF == STATES);

#[stream_verdict]
fn penstock_verdict(ctx: SkBuffContext) -> u32 {
    // SAFETY: the context is the one the kernel called us with.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: entries are removed only after the connection is closed.
    let Some(index) = (unsafe { INDEX.get(&cookie) }) else { return SK_PASS };
    let index = *index;
    let Some(slot) = SLOTS.get_ptr_mut(index) else { return SK_PASS };
    let len = ctx.len();
    // SAFETY: the socket lock serialises verdicts of one connection, a connection has its slot alone, and the agent
    // leaves the fields that are not atomics alone while the slot is armed.
    let slot = unsafe { &mut *slot };
    verdict(slot, len, &mut Segment { ctx: &ctx, index });
    SK_PASS
}

struct Segment<'a> {
    ctx: &'a SkBuffContext,
    index: u32,
}

impl Kernel for Segment<'_> {
    /// A fetch-and-add of 0: eBPF has no load-acquire on the kernels we support, and read-modify-writes that return the
    /// old value are fully ordered (Documentation/bpf/standardization/instruction-set.rst, JITs of x86-64 and arm64).
    #[inline(always)]
    fn load_acquire(&mut self, word: &Word) -> u64 {
        fetch_add(word.as_ptr(), 0)
    }

    #[inline(always)]
    fn clear_release(&mut self, word: &Word) {
        // SAFETY: exchanges a word that we hold a reference to.
        unsafe { asm!("{0} = xchg_64({1} + 0, {0})", inout(reg) 0u64 => _, in(reg) word.as_ptr()) };
    }

    #[inline(always)]
    fn sequence(&mut self) -> u32 {
        // The context is the kernel's own sk_buff, whatever the verifier makes of its fields.
        let skb: *const u8 = self.ctx.as_ptr().cast();
        // SAFETY: the helper checks the address itself.
        unsafe { read_u32(skb, OFFSETS.load().skb_cb) }
    }

    #[inline(always)]
    fn trim(&mut self, bytes: u32) -> bool {
        let skb: *mut __sk_buff = self.ctx.as_ptr().cast();
        let mut left = bytes;
        // One call takes at most 4095 bytes (sk_skb_adjust_room), and a segment has at most 64 KiB.
        for _ in 0..17 {
            if left == 0 {
                return true;
            }
            let now = if left > 4095 { 4095 } else { left };
            // SAFETY: a helper on the context; mode and flags 0 are all that it takes.
            if unsafe { bpf_skb_adjust_room(skb, -(now as i32), 0, 0) } != 0 {
                return false;
            }
            left -= now;
        }
        left == 0
    }

    #[inline(always)]
    fn parse(&mut self, framing: &mut Framing, len: u32, keep: bool) -> bool {
        let ring = if keep {
            TAILS.get_ptr_mut(self.index).map_or(ptr::null_mut(), |ring| ring.cast())
        } else {
            ptr::null_mut()
        };
        let position = framing.payload;
        let taken = framing.skip(u64::from(len)) as u32;
        copy(self.ctx.as_ptr(), ring, position, 0, taken);
        if taken == len {
            return true;
        }
        let mut walk = Walk { framing: *framing, skb: self.ctx.as_ptr(), ring, at: taken, len };
        let walk_ptr: *mut Walk = &raw mut walk;
        // SAFETY: `step` is a function of the signature that bpf_loop calls, and `walk` outlives the call.
        unsafe { bpf_loop(MAX_STEPS, step as *mut c_void, walk_ptr.cast(), 0) };
        *framing = walk.framing;
        walk.at == len && !walk.framing.is_invalid()
    }

    /// `tcp_fin` changes the state before it lets anyone see the segment.
    #[inline(always)]
    fn closed(&mut self) -> bool {
        const ESTABLISHED: u32 = 1;
        let skb: *mut __sk_buff = self.ctx.as_ptr().cast();
        // SAFETY: the context, and the socket that the verifier has us check for null.
        unsafe {
            let socket = (*skb).__bindgen_anon_2.sk;
            socket.is_null() || (*socket).state != ESTABLISHED
        }
    }

    #[inline(always)]
    fn target(&mut self, key: u64) -> Option<SendBuffer> {
        let targets = (&raw const TARGETS).cast_mut().cast::<c_void>();
        // SAFETY: a lookup in a socket map takes a reference, which is released below on every path.
        unsafe {
            let sock = bpf_map_lookup_elem(targets, (&raw const key).cast());
            if sock.is_null() {
                return None;
            }
            let tcp = bpf_skc_to_tcp_sock(sock);
            let found = if tcp.is_null() { None } else { Some(send_buffer(tcp.cast())) };
            bpf_sk_release(sock);
            found
        }
    }

    #[inline(always)]
    fn redirect(&mut self, key: u64) -> bool {
        TARGETS.redirect_skb(self.ctx, key, 0) == i64::from(SK_PASS)
    }

    #[inline(always)]
    fn now(&mut self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn event(&mut self) {
        if EVENTS.output::<u64>(u64::from(self.index), 0).is_err() {
            if let Some(missed) = MISSED.get_ptr_mut(0) {
                fetch_add(missed, 1);
            }
        }
    }
}

#[inline(always)]
fn fetch_add(word: *mut u64, n: u64) -> u64 {
    let mut value = n;
    // SAFETY: the pointer is to a word of a map's value, which the verifier checks.
    unsafe { asm!("{0} = atomic_fetch_add((u64 *)({1} + 0), {0})", inout(reg) value, in(reg) word) };
    value
}

/// Reads the fields at the offsets that the agent found in the kernel's BTF.
#[inline(always)]
unsafe fn send_buffer(tcp: *const u8) -> SendBuffer {
    let offsets = OFFSETS.load();
    SendBuffer {
        // SAFETY: `tcp` is a live tcp_sock while its reference is held.
        write_seq: unsafe { read_u32(tcp, offsets.write_seq) },
        // SAFETY: as above.
        queued: unsafe { read_u32(tcp, offsets.sk_wmem_queued) } as i32,
        // SAFETY: as above.
        limit: unsafe { read_u32(tcp, offsets.sk_sndbuf) } as i32,
    }
}

#[inline(always)]
unsafe fn read_u32(base: *const u8, offset: u32) -> u32 {
    let mut value = 0u32;
    // SAFETY: the helper checks the address itself and leaves 0 when it faults.
    unsafe { bpf_probe_read_kernel((&raw mut value).cast(), 4, base.add(offset as usize).cast()) };
    value
}

/// A walk over one segment, a run of payload or a byte of syntax at a time.
struct Walk {
    framing: Framing,
    skb: *mut c_void,
    /// Null, or where copies of the payload go.
    ring: *mut u8,
    at: u32,
    len: u32,
}

/// One step of the walk; 0 goes on, 1 ends it.
extern "C" fn step(_: u64, walk: *mut Walk) -> u64 {
    // SAFETY: bpf_loop hands over the pointer that it was given.
    let walk = unsafe { &mut *walk };
    if walk.at >= walk.len {
        return 1;
    }
    let position = walk.framing.payload;
    let payload = walk.framing.skip(u64::from(walk.len - walk.at)) as u32;
    if payload > 0 {
        copy(walk.skb, walk.ring, position, walk.at, payload);
        walk.at += payload;
        return 0;
    }
    if !walk.framing.wants_syntax() {
        return 1;
    }
    let mut byte = 0u8;
    // SAFETY: the helper checks the range and fails outside the segment.
    if unsafe { bpf_skb_load_bytes(walk.skb, walk.at, (&raw mut byte).cast(), 1) } != 0 {
        return 1;
    }
    walk.framing.step(byte);
    forget(&mut walk.framing, walk.len);
    walk.at += 1;
    0
}

/// Changes nothing, but the verifier does not know that. It would follow each state, length of line and size of chunk that a
/// step can lead to from each that came before: ten times the work, and most of a second at each load.
#[inline(always)]
fn forget(framing: &mut Framing, unknown: u32) {
    let mut zero = u64::from(unknown);
    // SAFETY: subtracts a number from itself.
    unsafe { asm!("{0} -= {1}", inout(reg) zero, in(reg) u64::from(unknown)) };
    framing.state = (framing.state ^ zero as u32) & STATES;
    framing.line ^= zero as u32;
    framing.left ^= zero << 32 | zero & u64::from(u32::MAX);
}

/// Copies the end of a run of payload into the ring, if there is one. `position` is the number of the run's first byte.
#[inline(always)]
fn copy(skb: *mut c_void, ring: *mut u8, position: u32, at: u32, len: u32) {
    if ring.is_null() || len == 0 {
        return;
    }
    let copies = tail::place(position, len);
    let at = at + copies.skip;
    let offset = u64::from(copies.offset);
    // SAFETY: at most RING - 1 + TAIL bytes from the start of the ring's memory, which the verifier checks; the helper fails
    // where the segment has no such bytes.
    unsafe {
        if let Some(first) = bounded(copies.first) {
            bpf_skb_load_bytes(skb, at, ring.add((offset & u64::from(tail::RING - 1)) as usize).cast(), first);
        }
        if let Some(second) = bounded(copies.second) {
            bpf_skb_load_bytes(skb, at + copies.first, ring.cast(), second);
        }
    }
}

/// The same length, where the verifier sees that it is from 1 to TAIL; `None` where it is not. Before 6.8 the verifier learns
/// nothing from a comparison with 0, so the lower bound comes from an addition.
#[inline(always)]
fn bounded(len: u32) -> Option<u32> {
    let mut less = u64::from(len);
    // SAFETY: subtracts 1, where the compiler does not see it: it can neither leave out the comparison nor put the length back
    // in place of the sum.
    unsafe { asm!("{0} += -1", inout(reg) less) };
    if less < u64::from(tail::TAIL) { Some(less as u32 + 1) } else { None }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that could get here.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
