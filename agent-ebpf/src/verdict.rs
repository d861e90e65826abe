//! `sk_skb/stream_verdict`: runs on each segment that arrives on a connection, before user space sees it.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::generated::{
        bpf_get_socket_cookie, bpf_map_lookup_elem, bpf_sk_release, bpf_skb_adjust_room, bpf_skb_load_bytes,
        bpf_skc_to_tcp_sock,
    },
    macros::stream_verdict,
    programs::SkBuffContext,
};
use aya_log_ebpf::error;
use penstock_atomics::ring::copy;
use penstock_common::{
    framing::Framing,
    verdict::{Segment, SendBuffer, VerdictKernel, verdict},
};

use crate::{
    maps::{FOUND, INDEX, LOCAL_SLOTS, OFFSETS, SLOTS, TARGETS, ring_of},
    memory::{read_u32, same_for_all, send_buffer},
    shared::is_shared,
    walk::{Bytes, walk},
};

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
    with_target(key, |tcp| {
        if let Some(found) = FOUND.get_ptr_mut(index) {
            // SAFETY: words of a map's value, each written whole.
            unsafe {
                (&raw mut (*found).socket).write_volatile(tcp.addr() as u64);
                (&raw mut (*found).cookie).write_volatile(key);
            }
            slot.found.set(key);
        }
    });
}

/// Calls `f` with the `struct tcp_sock` of a target; returns `None` if the target does not exist.
#[inline(always)]
fn with_target<T>(key: u64, f: impl FnOnce(*const u8) -> T) -> Option<T> {
    let targets = (&raw const TARGETS).cast_mut().cast::<c_void>();
    // SAFETY: the lookup takes a reference, which is released on every path.
    unsafe {
        let sock = bpf_map_lookup_elem(targets, (&raw const key).cast());
        if sock.is_null() {
            return None;
        }
        let tcp = bpf_skc_to_tcp_sock(sock);
        let result = if tcp.is_null() { None } else { Some(f(tcp.cast())) };
        bpf_sk_release(sock);
        result
    }
}

struct Skb<'a> {
    ctx: &'a SkBuffContext,
    index: u32,
}

impl VerdictKernel for Skb<'_> {
    same_for_all!();

    #[inline(always)]
    fn parse(&mut self, framing: &mut Framing, len: u32, keep: bool) -> bool {
        let segment = Readable { skb: self.ctx.as_ptr(), ring: ring_of(self.index, keep) };
        let position = framing.payload;
        let taken = framing.skip(u64::from(len)) as u32;
        segment.payload(position, 0, taken);
        taken == len || walk(framing, segment, taken, len)
    }

    #[inline(always)]
    fn target(&mut self, key: u64) -> Option<SendBuffer> {
        // SAFETY: the socket is one.
        with_target(key, |tcp| unsafe { send_buffer(tcp) })
    }

    #[inline(always)]
    fn redirect(&mut self, key: u64) -> bool {
        TARGETS.redirect_skb(self.ctx, key, 0) == i64::from(SK_PASS)
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

/// A segment's bytes, and where copies of the payload go.
struct Readable {
    skb: *mut c_void,
    /// Null: nowhere.
    ring: *mut u8,
}

impl Bytes for Readable {
    #[inline(always)]
    fn read(&self, at: u32) -> Option<u8> {
        let mut byte = 0u8;
        // SAFETY: the helper checks the range and fails outside the segment.
        let failed = unsafe { bpf_skb_load_bytes(self.skb, at, (&raw mut byte).cast(), 1) } != 0;
        (!failed).then_some(byte)
    }

    #[inline(always)]
    fn payload(&self, position: u32, at: u32, len: u32) -> bool {
        // SAFETY: the helper writes as many bytes as it is told; it fails if the segment does not have them.
        copy(self.ring, position, len, |place, to, len| unsafe {
            bpf_skb_load_bytes(self.skb, at + place, to, len);
        });
        true
    }
}
