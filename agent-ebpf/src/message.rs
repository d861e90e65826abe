//! `sk_msg`: runs on each message that an endpoint on this machine sends, in the endpoint's own `sendmsg`.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _, bindings::sk_action::SK_PASS, helpers::generated::bpf_probe_read_kernel, macros::sk_msg,
    programs::SkMsgContext,
};
use penstock_atomics::ring::copy;
use penstock_common::{
    framing::Framing,
    local::{Message, message},
    verdict::{SendBuffer, VerdictKernel},
};

use crate::{
    maps::{FOUND, LOCAL_INDEX, LOCAL_SLOTS, OFFSETS, TARGETS, ring_of},
    memory::{self, read_u32, read_u64, same_for_all, send_buffer, zero},
    walk::{Bytes, walk},
};

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

impl VerdictKernel for Send<'_> {
    same_for_all!();

    /// Reads syntax, and payload that is kept, only in the message's first piece: a helper would have to move memory to show more.
    #[inline(always)]
    fn parse(&mut self, framing: &mut Framing, len: u32, keep: bool) -> bool {
        let position = framing.payload;
        let taken = framing.skip(u64::from(len)) as u32;
        if taken == len && !keep {
            return true;
        }
        let offsets = OFFSETS.load();
        let msg = self.ctx.as_ptr().cast::<u8>().cast_const();
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        let (begin, end) = unsafe { (read_u64(msg, offsets.msg_data), read_u64(msg, offsets.msg_data_end)) };
        let readable = end.saturating_sub(begin) ^ zero(len);
        let piece = Piece { data: begin, readable, ring: ring_of(self.index, keep) };
        piece.payload(position, 0, taken) && (taken == len || walk(framing, piece, taken, len))
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

/// The first piece of a message: its address and its length, and where copies of the payload go.
struct Piece {
    data: u64,
    readable: u64,
    /// Null: nowhere.
    ring: *mut u8,
}

impl Bytes for Piece {
    #[inline(always)]
    fn read(&self, at: u32) -> Option<u8> {
        if u64::from(at) >= self.readable {
            return None;
        }
        let mut byte = 0u8;
        let address = (self.data + u64::from(at)) as *const c_void;
        // SAFETY: the helper checks the address itself.
        let failed = unsafe { bpf_probe_read_kernel((&raw mut byte).cast(), 1, address) } != 0;
        (!failed).then_some(byte)
    }

    #[inline(always)]
    fn payload(&self, position: u32, at: u32, len: u32) -> bool {
        if self.ring.is_null() {
            return true;
        }
        if u64::from(at) + u64::from(len) > self.readable {
            return false;
        }
        copy(self.ring, position, len, |place, to, len| {
            let from = (self.data + u64::from(at) + u64::from(place)) as *const c_void;
            // SAFETY: the helper checks the address itself, and writes as many bytes as it is told.
            unsafe { bpf_probe_read_kernel(to, len, from) };
        });
        true
    }
}
