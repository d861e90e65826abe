//! `sk_skb/stream_verdict`: runs on each segment that arrives on a connection, before user space sees it.

use core::{arch::asm, ffi::c_void, ptr};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::generated::{
        bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_loop, bpf_map_lookup_elem, bpf_sk_release, bpf_skb_adjust_room,
        bpf_skb_load_bytes, bpf_skc_to_tcp_sock,
    },
    macros::stream_verdict,
    programs::SkBuffContext,
};
use aya_log_ebpf::error;
use penstock_common::{
    framing::Framing,
    slot::Word,
    tail,
    verdict::{Kernel, Segment, SendBuffer, verdict},
};

use crate::{
    maps::{FOUND, INDEX, LOCAL_SLOTS, OFFSETS, SLOTS, TAILS, TARGETS, event},
    memory::{self, forgotten, read_u32, send_buffer, zero},
    shared::is_shared,
};

/// Limit of bytes of chunk syntax and runs of payload in one call. A segment with more is passed.
const MAX_STEPS: u32 = 4096;

#[stream_verdict]
fn penstock_verdict(ctx: SkBuffContext) -> u32 {
    // SAFETY: the kernel passed this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the agent removes an entry only after it has closed the connection.
    let Some(index) = (unsafe { INDEX.get(&cookie) }) else { return SK_PASS };
    let index = *index;
    let Some(slot) = SLOTS.get_ptr_mut(index) else { return SK_PASS };
    let len = ctx.len();
    // SAFETY: the socket lock serialises verdicts of one connection, a connection has its slot alone, and the agent
    // leaves the fields that are not atomics alone while the slot is armed.
    let slot = unsafe { &mut *slot };
    let was_astray = slot.astray.get();
    verdict(slot, len, &mut Skb { ctx: &ctx, index });
    if slot.astray.get() != was_astray {
        error!(&ctx, "connection {}: {} bytes are not where they belong; it will be broken off", cookie, len);
    }
    find_client(index);
    // An empty segment is the FIN. Dropping it loses nothing, because the socket's state shows the end. If it were passed while
    // something is queued, it would break the socket: `sk_psock_backlog` takes the 0 bytes that it moves for a failure.
    if len == 0 { SK_DROP } else { SK_PASS }
}

/// If the agent has announced the response's client, finds that client's socket for the message program, once.
#[inline(always)]
fn find_client(index: u32) {
    let Some(slot) = LOCAL_SLOTS.get_ptr_mut(index) else { return };
    // SAFETY: only whole words of the slot are used.
    let slot = unsafe { &*slot };
    let key = slot.span.target.get();
    if key == slot.found.get() {
        return;
    }
    let targets = (&raw const TARGETS).cast_mut().cast::<c_void>();
    // SAFETY: the lookup takes a reference, which is released on every path.
    unsafe {
        let sock = bpf_map_lookup_elem(targets, (&raw const key).cast());
        if sock.is_null() {
            return;
        }
        let tcp = bpf_skc_to_tcp_sock(sock);
        if !tcp.is_null()
            && let Some(found) = FOUND.get_ptr_mut(index)
        {
            (&raw mut (*found).socket).write_volatile(tcp.addr() as u64);
            (&raw mut (*found).cookie).write_volatile(key);
            slot.found.set(key);
        }
        bpf_sk_release(sock);
    }
}

struct Skb<'a> {
    ctx: &'a SkBuffContext,
    index: u32,
}

impl Kernel for Skb<'_> {
    #[inline(always)]
    fn load_acquire(&mut self, word: &Word) -> u64 {
        memory::load_acquire(word)
    }

    #[inline(always)]
    fn clear_release(&mut self, word: &Word) {
        memory::clear_release(word);
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
        let zero = zero(len);
        let at = taken ^ zero as u32;
        let mut walk = Walk { framing: forgotten(*framing, zero), skb: self.ctx.as_ptr(), ring, at, len };
        let walk_ptr: *mut Walk = &raw mut walk;
        // SAFETY: `step` has the signature that `bpf_loop` calls, and `walk` outlives the call.
        unsafe { bpf_loop(MAX_STEPS, step as *mut c_void, walk_ptr.cast(), 0) };
        *framing = walk.framing;
        walk.at == len && !walk.framing.is_invalid()
    }

    #[inline(always)]
    fn target(&mut self, key: u64) -> Option<SendBuffer> {
        let targets = (&raw const TARGETS).cast_mut().cast::<c_void>();
        // SAFETY: the lookup takes a reference, which is released on every path.
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
        // SAFETY: the helper has no arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn event(&mut self) {
        event(self.index);
    }
}

impl Segment for Skb<'_> {
    #[inline(always)]
    fn sequence(&mut self) -> u32 {
        // The context is the kernel's own `sk_buff`, although the verifier presents other fields.
        let skb: *const u8 = self.ctx.as_ptr().cast();
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
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
            // SAFETY: the helper takes the context; it accepts only 0 as mode and flags.
            if unsafe { bpf_skb_adjust_room(skb, -(now as i32), 0, 0) } != 0 {
                return false;
            }
            left -= now;
        }
        left == 0
    }

    /// `tcp_fin` changes the socket's state before the verdict runs.
    #[inline(always)]
    fn closed(&mut self) -> bool {
        const ESTABLISHED: u32 = 1;
        let skb: *mut __sk_buff = self.ctx.as_ptr().cast();
        // SAFETY: the kernel passed the context, and its socket is checked for null.
        unsafe {
            let socket = (*skb).__bindgen_anon_2.sk;
            socket.is_null() || (*socket).state != ESTABLISHED
        }
    }

    #[inline(always)]
    fn is_shared(&mut self) -> bool {
        // SAFETY: the context is the kernel's own sk_buff, and the helper that reads checks every address.
        unsafe { is_shared(self.ctx.as_ptr().cast()) }
    }
}

/// A walk over one segment, a run of payload or a byte of syntax at a time.
struct Walk {
    framing: Framing,
    skb: *mut c_void,
    /// The ring for copies of the payload, or null.
    ring: *mut u8,
    at: u32,
    len: u32,
}

/// One step of the walk. Returns 0 to continue, 1 to stop.
extern "C" fn step(_: u64, walk: *mut Walk) -> u64 {
    // SAFETY: `bpf_loop` passes the pointer that it was given.
    let walk = unsafe { &mut *walk };
    if walk.at >= walk.len {
        return 1;
    }
    let zero = zero(walk.len);
    let mut framing = walk.framing;
    let position = framing.payload;
    let payload = framing.skip(u64::from(walk.len - walk.at)) as u32;
    if payload > 0 {
        copy(walk.skb, walk.ring, position, walk.at, payload);
        walk.framing = forgotten(framing, zero);
        walk.at += payload;
        return 0;
    }
    if !framing.wants_syntax() {
        return 1;
    }
    let mut byte = 0u8;
    // SAFETY: the helper fails outside of the segment.
    if unsafe { bpf_skb_load_bytes(walk.skb, walk.at, (&raw mut byte).cast(), 1) } != 0 {
        return 1;
    }
    framing.step(byte);
    walk.framing = forgotten(framing, zero);
    walk.at += 1;
    0
}

/// Copies the end of a run of payload to the ring, unless it is null. `position` is the number of the run's first byte.
#[inline(always)]
fn copy(skb: *mut c_void, ring: *mut u8, position: u32, at: u32, len: u32) {
    if ring.is_null() || len == 0 {
        return;
    }
    let copies = tail::place(position, len);
    let at = at + copies.skip;
    let offset = u64::from(copies.offset);
    // SAFETY: writes at most RING - 1 + TAIL bytes from the start of the ring's memory, which the verifier checks. The helper fails
    // if the segment does not have these bytes.
    unsafe {
        if let Some(first) = bounded(copies.first) {
            bpf_skb_load_bytes(skb, at, ring.add((offset & u64::from(tail::RING - 1)) as usize).cast(), first);
        }
        if let Some(second) = bounded(copies.second) {
            bpf_skb_load_bytes(skb, at + copies.first, ring.cast(), second);
        }
    }
}

/// The same length if it is from 1 to TAIL, in a form that the verifier understands; otherwise `None`. Before 6.8 the verifier
/// learns nothing from a comparison with 0, so the lower bound comes from an addition.
#[inline(always)]
fn bounded(len: u32) -> Option<u32> {
    let mut less = u64::from(len);
    // SAFETY: subtracts 1 in a way that the compiler cannot see, so it can neither omit the comparison nor replace the sum by the
    // length.
    unsafe { asm!("{0} += -1", inout(reg) less) };
    if less < u64::from(tail::TAIL) { Some(less as u32 + 1) } else { None }
}
