//! The verdict: what happens to one segment that an endpoint sent.
//!
//! Given the connection's slot and the segment's length, it lets the segment through to user space or has it redirected
//! to the client's socket, and keeps the books. A redirect happens only when user space has consumed every byte that was
//! let through, the segment lies inside the message, and the client's send buffer has room: so no byte overtakes another
//! and kernel memory stays bounded. Any other outcome stops steering until the agent arms again. The kernel serialises
//! calls for one connection by its socket lock (`sk_psock_verdict_data_ready`).

use core::sync::atomic::Ordering::Acquire;

use crate::{
    framing::Framing,
    slot::{Slot, Span, Word, stop},
};

/// What both rules need of the kernel; tests put a model in its place.
pub trait Kernel {
    /// Loads with acquire order. The target has no such load in Rust's core library, so each side brings its own.
    fn load_acquire(&mut self, word: &Word) -> u64;
    /// Stores 0 with release order.
    fn clear_release(&mut self, word: &Word);
    /// Advances `framing` over all `len` bytes. False: it ends before they do, is invalid, or is too long to tell.
    /// With `keep`, what is payload is copied into the connection's ring on the way.
    fn parse(&mut self, framing: &mut Framing, len: u32, keep: bool) -> bool;
    /// Fill of the target's send buffer; `None`: no such target.
    fn target(&mut self, key: u64) -> Option<SendBuffer>;
    /// Has the bytes queued for the target.
    fn redirect(&mut self, key: u64) -> bool;
    /// CLOCK_MONOTONIC, ns.
    fn now(&mut self) -> u64;
    /// Tells the agent that the slot has something for it.
    fn event(&mut self);
}

/// What the verdict needs to know of a segment.
pub trait Segment: Kernel {
    /// TCP sequence number of the segment's first byte.
    fn sequence(&mut self) -> u32;
    /// Cuts bytes off the segment's front. False: they are still there.
    fn trim(&mut self, bytes: u32) -> bool;
    /// The endpoint has closed its side, with this segment or before it.
    fn closed(&mut self) -> bool;
    /// The segment has bytes in memory that the sender can still write.
    fn is_shared(&mut self) -> bool;
}

/// `struct tcp_sock` of the target, as far as it matters here.
#[derive(Clone, Copy)]
pub struct SendBuffer {
    pub write_seq: u32,
    pub queued: i32,
    pub limit: i32,
    /// The smallest buffer, of bytes to be sent, that the queue is made of: half of a small window, else a segment.
    pub piece: u32,
}

impl SendBuffer {
    /// Whether so many bytes can be put into it without an acknowledgement from the peer. The queue is made of buffers of at
    /// least `piece` bytes (`tcp_send_mss`, `tcp_bound_to_half_wnd`), of which each costs up to 1 KiB of its own, and what is
    /// being sent meanwhile may be split a few times (`tso_fragment`).
    #[inline(always)]
    pub(crate) fn has_room(self, bytes: u32) -> bool {
        const BUFFER: i64 = 1024;
        let buffers = bytes / if self.piece == 0 { 1 } else { self.piece };
        i64::from(self.limit) - i64::from(self.queued) - i64::from(bytes) - (i64::from(buffers) + 16) * BUFFER >= 0
    }
}

/// Decides on a segment of `len` bytes; `len` 0 is the endpoint's FIN. The segment passes to user space unless
/// [`Kernel::redirect`] took it.
#[inline(always)]
pub fn verdict(slot: &mut Slot, len: u32, kernel: &mut impl Segment) {
    let len = if len == 0 { 0 } else { without_overlap(slot, len, kernel) };
    if slot.span.armed.get() == 0 {
        add(&slot.passed, len);
        return;
    }
    // Read again, for what the agent wrote before it armed.
    let armed = kernel.load_acquire(&slot.span.armed);
    match try_redirect(slot, armed, len, kernel) {
        Ok(()) if slot.span.framing.is_done() => slot.span.end(0, kernel),
        Ok(()) => {}
        Err(reason) => {
            add(&slot.passed, len);
            slot.span.end(reason, kernel);
        }
    }
}

/// Cuts off what earlier segments have brought already; returns the length that is left.
///
/// A retransmitted segment may begin before the end of what has arrived. `tcp_recvmsg` skips that part by its offset;
/// `tcp_read_skb` hands over the whole segment, so without this the bytes would be delivered twice.
#[inline(always)]
fn without_overlap(slot: &mut Slot, len: u32, kernel: &mut impl Segment) -> u32 {
    let sequence = kernel.sequence();
    if slot.origin >> 32 == 0 {
        slot.origin = 1 << 32 | u64::from(sequence);
    }
    let expected =
        (slot.origin as u32).wrapping_add(slot.passed.get() as u32).wrapping_add(slot.span.redir.get() as u32);
    let overlap = expected.wrapping_sub(sequence);
    if overlap == 0 {
        return len;
    }
    if overlap < len && kernel.trim(overlap) {
        return len - overlap;
    }
    slot.astray.set(1);
    len
}

#[inline(always)]
fn try_redirect(slot: &mut Slot, armed: u64, len: u32, kernel: &mut impl Segment) -> Result<(), u32> {
    if armed.wrapping_sub(1) != slot.passed.get() || slot.astray.get() != 0 {
        return Err(stop::REFUSED);
    }
    if len == 0 {
        return Err(stop::FIN);
    }
    let mut framing = slot.span.framing;
    // The redirect sends the same pages later: what was read as the length of a chunk could be another one by then. Payload
    // is the sender's own matter.
    if framing.has_syntax_within(len) && kernel.is_shared() {
        return Err(stop::SHARED);
    }
    if !kernel.parse(&mut framing, len, slot.span.keep != 0) {
        return Err(stop::FRAMING);
    }
    // A FIN that comes with data brings no empty segment of its own, so nothing else would tell the agent.
    if !framing.is_done() && kernel.closed() {
        return Err(stop::FIN);
    }
    let key = slot.span.target.get();
    let redir = slot.span.redir.get();
    let Some(buffer) = kernel.target(key) else { return Err(stop::TARGET) };
    if slot.wbase >> 32 == 0 {
        slot.wbase = 1 << 32 | u64::from(buffer.write_seq.wrapping_sub(redir as u32));
    }
    // Redirected, but not yet in the target's send queue.
    let backlog = (redir as u32).wrapping_sub(buffer.write_seq.wrapping_sub(slot.wbase as u32));
    // What does not fit would wait for the target's peer, and with it whatever that peer sends, where the target is a source
    // too: one queue of the kernel's holds both (`sk_psock_backlog`).
    if !buffer.has_room(backlog.saturating_add(len)) {
        return Err(stop::ROOM);
    }
    if !kernel.redirect(key) {
        return Err(stop::TARGET);
    }
    slot.span.book(framing, len, kernel.now());
    Ok(())
}

/// Only one side writes the counter at a time, so no read-modify-write is needed.
#[inline(always)]
fn add(counter: &Word, n: u32) {
    counter.set(counter.get() + u64::from(n));
}

impl Span {
    /// Enters `len` redirected bytes, after which the message stands at `framing`.
    #[inline(always)]
    pub(crate) fn book(&mut self, framing: Framing, len: u32, now: u64) {
        add(&self.redir, len);
        self.segments += 1;
        self.framing = framing;
        if self.first_ns.get() == 0 {
            self.first_ns.set(now);
        }
        self.last_ns.set(now);
    }

    /// Gives the flow back: at the end of the message (0), or for one of [`stop`].
    #[inline(always)]
    pub(crate) fn end(&mut self, reason: u32, kernel: &mut impl Kernel) {
        self.stop = reason;
        kernel.clear_release(&self.armed);
        kernel.event();
    }

    /// True when the agent may take the books: the kernel writes nothing of the span until the next arming.
    pub fn is_released(&self) -> bool {
        self.armed.atomic().load(Acquire) == 0
    }
}
