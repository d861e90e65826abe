//! The rule of path `local`: what happens to one message that an endpoint on this machine is about to send.
//!
//! Takes the connection's slot and the message's length. Passes the message to the endpoint's own connection, or redirects it into
//! the client's send queue and counts it in the slot. Invariant: no byte overtakes another, because a redirect needs all of the
//! conditions in [`message`]; anything else disarms the slot.

use crate::{
    framing::Framing,
    slot::{LocalSlot, stop},
    verdict::VerdictKernel,
};

/// What the rule needs to know about a message.
pub trait Message: VerdictKernel {
    /// The sender's `write_seq`: the sequence number after the last byte that it sent over its own connection.
    fn write_seq(&mut self) -> u32;
    /// The sender tracks its own send queue, which a redirect would bypass.
    fn keeps_account(&mut self) -> bool;
}

/// Decides on a message of `len` bytes. The endpoint's own connection carries the message unless [`VerdictKernel::redirect`] took it.
///
/// A redirect happens only if
/// - user space has consumed every byte that the endpoint sent over its connection: `write_seq` is the value that the agent armed
///   with,
/// - everything redirected before has arrived: the target's `write_seq` shows it, because a transfer may fail after the program
///   ran,
/// - the client's send buffer has room, and
/// - the bytes lie inside the message.
///
/// The message is parsed last: parsing copies its payload to the connection's ring, and a message that is sent again after a transfer
/// failed must not be copied over what the ring holds of it already.
///
/// Otherwise the slot is disarmed, and only the agent arms it again. The kernel serialises calls for one connection by its socket
/// lock (`tcp_bpf_sendmsg`), and releases that lock between the call and the transfer.
#[inline(always)]
pub fn message(slot: &mut LocalSlot, len: u32, kernel: &mut impl Message) {
    if slot.span.armed.get() == 0 {
        return;
    }
    // The acquire load orders what the agent wrote before it armed. The agent may have disarmed since the first load.
    let armed = kernel.load_acquire(&slot.span.armed);
    if armed == 0 {
        return;
    }
    match try_redirect(slot, armed, len, kernel) {
        Ok(()) if slot.span.framing.is_done() => slot.span.end(0, kernel),
        Ok(()) => {}
        Err(reason) => slot.span.end(reason, kernel),
    }
}

#[inline(always)]
fn try_redirect(slot: &mut LocalSlot, armed: u64, len: u32, kernel: &mut impl Message) -> Result<(), u32> {
    if armed as u32 != kernel.write_seq() {
        return Err(stop::REFUSED);
    }
    if kernel.keeps_account() {
        return Err(stop::ACCOUNT);
    }
    let key = slot.span.target.get();
    let Some(buffer) = kernel.target(key) else { return Err(stop::TARGET) };
    if slot.expected >> 32 != 0 && slot.expected as u32 != buffer.write_seq {
        return Err(stop::BEHIND);
    }
    // The kernel would take a message that does not fit in part. The endpoint would then wait for its own socket to become
    // writable, and would never be woken.
    if !buffer.has_room(len) {
        return Err(stop::ROOM);
    }
    let mut framing: Framing = slot.span.framing;
    if !kernel.parse(&mut framing, len, slot.span.keep != 0) {
        return Err(stop::FRAMING);
    }
    if !kernel.redirect(key) {
        return Err(stop::TARGET);
    }
    slot.expected = 1 << 32 | u64::from(buffer.write_seq.wrapping_add(len));
    slot.span.book(framing, len, kernel.now());
    Ok(())
}
