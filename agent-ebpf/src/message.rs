//! `sk_msg`: runs on each message that an endpoint on this machine sends, in the endpoint's own `sendmsg`.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::sk_action::SK_PASS,
    helpers::generated::{bpf_ktime_get_ns, bpf_loop, bpf_probe_read_kernel},
    macros::sk_msg,
    programs::SkMsgContext,
};
use penstock_common::{
    framing::Framing,
    local::{Message, message},
    slot::Word,
    verdict::{Kernel, SendBuffer},
};

use crate::{
    maps::{FOUND, LOCAL_INDEX, LOCAL_SLOTS, OFFSETS, TARGETS, event},
    memory::{self, forgotten, read_u32, read_u64, send_buffer, zero},
};

/// Limit of bytes of chunk syntax and runs of payload in one call. A message with more is passed.
const MAX_STEPS: u32 = 4096;

#[sk_msg]
fn penstock_message(ctx: SkMsgContext) -> u32 {
    let offsets = OFFSETS.load();
    // The context is the kernel's own `sk_msg`, although the verifier presents other fields.
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let socket = unsafe { read_u64(ctx.as_ptr().cast(), offsets.msg_sk) } as *const u8;
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let cookie = unsafe { read_u64(socket, offsets.skc_cookie) };
    // SAFETY: the agent removes an entry only after it has closed the connection.
    let Some(index) = (unsafe { LOCAL_INDEX.get(&cookie) }) else { return SK_PASS };
    let index = *index;
    let Some(slot) = LOCAL_SLOTS.get_ptr_mut(index) else { return SK_PASS };
    // SAFETY: the endpoint's socket lock serialises calls for one connection, a connection has its slot alone, and the agent
    // leaves the fields that are not words alone while the slot is armed.
    let slot = unsafe { &mut *slot };
    message(slot, ctx.size(), &mut Send { ctx: &ctx, socket, index });
    SK_PASS
}

struct Send<'a> {
    ctx: &'a SkMsgContext,
    /// The sender's `struct sock`.
    socket: *const u8,
    index: u32,
}

impl Kernel for Send<'_> {
    #[inline(always)]
    fn load_acquire(&mut self, word: &Word) -> u64 {
        memory::load_acquire(word)
    }

    #[inline(always)]
    fn clear_release(&mut self, word: &Word) {
        memory::clear_release(word);
    }

    /// Reads syntax only in the message's first piece: a helper would have to move memory to show more.
    #[inline(always)]
    fn parse(&mut self, framing: &mut Framing, len: u32, _: bool) -> bool {
        let taken = framing.skip(u64::from(len)) as u32;
        if taken == len {
            return true;
        }
        let offsets = OFFSETS.load();
        let msg = self.ctx.as_ptr().cast::<u8>().cast_const();
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        let (begin, end) = unsafe { (read_u64(msg, offsets.msg_data), read_u64(msg, offsets.msg_data_end)) };
        let zero = zero(len);
        let (readable, at) = (end.saturating_sub(begin) ^ zero, taken ^ zero as u32);
        let mut walk = Walk { framing: forgotten(*framing, zero), data: begin, readable, at, len };
        let walk_ptr: *mut Walk = &raw mut walk;
        // SAFETY: `step` has the signature that `bpf_loop` calls, and `walk` outlives the call.
        unsafe { bpf_loop(MAX_STEPS, step as *mut c_void, walk_ptr.cast(), 0) };
        *framing = walk.framing;
        walk.at == len && !walk.framing.is_invalid()
    }

    /// Uses the address that the verdict has found, because this program cannot look a socket up (it could not release it).
    #[inline(always)]
    fn target(&mut self, key: u64) -> Option<SendBuffer> {
        let found = FOUND.get_ptr_mut(self.index)?;
        // SAFETY: reads whole words of a map's value.
        let (socket, cookie) =
            unsafe { ((&raw const (*found).socket).read_volatile(), (&raw const (*found).cookie).read_volatile()) };
        let socket = socket as *const u8;
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses. The cookie tells whether it is still the same socket.
        let is_it = cookie == key && unsafe { read_u64(socket, OFFSETS.load().skc_cookie) } == key;
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        is_it.then(|| unsafe { send_buffer(socket) })
    }

    #[inline(always)]
    fn redirect(&mut self, key: u64) -> bool {
        TARGETS.redirect_msg(self.ctx, key, 0) == i64::from(SK_PASS)
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

impl Message for Send<'_> {
    #[inline(always)]
    fn write_seq(&mut self) -> u32 {
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        unsafe { read_u32(self.socket, OFFSETS.load().write_seq) }
    }

    #[inline(always)]
    fn keeps_account(&mut self) -> bool {
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        unsafe { memory::keeps_account(self.socket) }
    }
}

/// A walk over one message, a run of payload or a byte of syntax at a time.
struct Walk {
    framing: Framing,
    /// Address of the message's first piece, and its length.
    data: u64,
    readable: u64,
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
    let payload = framing.skip(u64::from(walk.len - walk.at)) as u32;
    if payload > 0 {
        walk.framing = forgotten(framing, zero);
        walk.at += payload;
        return 0;
    }
    if !framing.wants_syntax() || u64::from(walk.at) >= walk.readable {
        return 1;
    }
    let mut byte = 0u8;
    let address = (walk.data + u64::from(walk.at)) as *const c_void;
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    if unsafe { bpf_probe_read_kernel((&raw mut byte).cast(), 1, address) } != 0 {
        return 1;
    }
    framing.step(byte);
    walk.framing = forgotten(framing, zero);
    walk.at += 1;
    0
}
