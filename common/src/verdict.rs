//! The verdict, the rule of path `ingress`: what happens to one segment that an endpoint sent.
//!
//! Takes the connection's slot and the segment's length. Passes the segment to user space, or redirects it to the client's socket,
//! and counts it in the slot. Invariants: no byte overtakes another, and kernel memory stays bounded, because a redirect needs all
//! of the conditions in [`verdict`]; anything else disarms the slot.

use core::sync::atomic::Ordering::Acquire;

use crate::{
    framing::Framing,
    slot::{Slot, Span, Word, stop},
};

/// What both rules need from the kernel. Tests implement it with a model.
pub trait VerdictKernel {
    /// Loads with acquire order. Rust's core library has no such load for the kernel's target, so each side has its own.
    fn load_acquire(&mut self, word: &Word) -> u64;
    /// Stores 0 with release order.
    fn clear_release(&mut self, word: &Word);
    /// Advances `framing` over all `len` bytes. Returns false if the message ends before, is invalid, or has too much syntax for
    /// one call. With `keep`, copies the payload to the connection's ring.
    fn parse(&mut self, framing: &mut Framing, len: u32, keep: bool) -> bool;
    /// The fill of the target's send buffer; `None` if the target does not exist.
    fn target(&mut self, key: u64) -> Option<SendBuffer>;
    /// Queues the bytes for the target. Returns whether the kernel took them.
    fn redirect(&mut self, key: u64) -> bool;
    /// CLOCK_MONOTONIC in nanoseconds.
    fn now(&mut self) -> u64;
    /// Sends the agent an event for the slot.
    fn event(&mut self);
}

/// What the verdict needs to know about a segment.
pub trait Segment: VerdictKernel {
    /// TCP sequence number of the segment's first byte.
    fn sequence(&mut self) -> u32;
    /// Removes bytes from the segment's front. Returns whether they were removed.
    fn trim(&mut self, bytes: u32) -> bool;
    /// The endpoint has closed its side, with this segment or before it.
    fn closed(&mut self) -> bool;
    /// Some of the segment's bytes are in memory that the sender can still write.
    fn is_shared(&mut self) -> bool;
}

/// Fields of the target's `struct tcp_sock`.
#[derive(Clone, Copy)]
pub struct SendBuffer {
    /// Sequence number after the last byte that was put into the queue.
    pub write_seq: u32,
    /// Bytes of memory in the queue (`sk_wmem_queued`).
    pub queued: i32,
    /// Bytes of memory that it may have (`sk_sndbuf`).
    pub limit: i32,
    /// The smallest buffer of the queue, in bytes to be sent: half of a small window, otherwise a segment.
    pub piece: u32,
}

impl SendBuffer {
    /// Whether this many bytes fit without an acknowledgement from the peer. The queue consists of buffers of at least `piece`
    /// bytes (`tcp_send_mss`, `tcp_bound_to_half_wnd`). Each costs up to 1 KiB of its own, and buffers that are being sent may be
    /// split a few times (`tso_fragment`).
    #[inline(always)]
    pub(crate) fn has_room(self, bytes: u32) -> bool {
        const BUFFER: i64 = 1024;
        let buffers = bytes / if self.piece == 0 { 1 } else { self.piece };
        i64::from(self.limit) - i64::from(self.queued) - i64::from(bytes) - (i64::from(buffers) + 16) * BUFFER >= 0
    }
}

/// Decides on a segment of `len` bytes; `len` 0 is the endpoint's FIN. The segment passes to user space unless [`VerdictKernel::redirect`]
/// took it.
///
/// A redirect happens only if user space has consumed every passed byte, the segment lies inside the message, and the client's send
/// buffer has room. Otherwise the slot is disarmed, and only the agent arms it again. The kernel serialises calls for one
/// connection by its socket lock (`sk_psock_verdict_data_ready`).
#[inline(always)]
pub fn verdict(slot: &mut Slot, len: u32, kernel: &mut impl Segment) {
    let len = if len == 0 { 0 } else { without_overlap(slot, len, kernel) };
    if slot.span.armed.get() == 0 {
        add(&slot.passed, len);
        return;
    }
    // The acquire load orders what the agent wrote before it armed.
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

/// Removes bytes that earlier segments brought. Returns the remaining length.
///
/// A retransmitted segment may begin before the end of what has arrived. `tcp_recvmsg` skips that part by its offset.
/// `tcp_read_skb` hands over the whole segment, so without this function the bytes would be delivered twice.
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
    // The redirect sends the same pages later, when the sender may have changed a chunk length that was read here. A sender that
    // changes payload harms only its own message.
    if framing.has_syntax_within(len) && kernel.is_shared() {
        return Err(stop::SHARED);
    }
    if !kernel.parse(&mut framing, len, slot.span.keep != 0) {
        return Err(stop::FRAMING);
    }
    // After a FIN that comes with data no empty segment follows, so nothing else would tell the agent.
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
    // Bytes that do not fit would wait for the target's peer. If the target is a source too, what that peer sends would wait behind
    // them, because the kernel has one queue for both (`sk_psock_backlog`).
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
    /// Counts `len` redirected bytes, after which the position in the message is `framing`.
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

    /// Disarms: at the end of the message (0), or for a reason of [`stop`].
    #[inline(always)]
    pub(crate) fn end(&mut self, reason: u32, kernel: &mut impl VerdictKernel) {
        self.stop = reason;
        kernel.clear_release(&self.armed);
        kernel.event();
    }

    /// Whether the agent may read the span: the kernel does not write it until the agent arms again.
    pub fn is_released(&self) -> bool {
        self.armed.atomic().load(Acquire) == 0
    }
}
