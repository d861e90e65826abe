//! The local rule: what happens to one message that an endpoint on this machine is about to send.
//!
//! Given the connection's slot and the message's length, it leaves the message to the endpoint's own connection or has it put
//! into the client's send queue, and keeps the books. A redirect happens only when user space has consumed every byte that
//! the endpoint has sent over its connection (then `write_seq` is what the agent knows of), everything redirected before has
//! arrived (the target's `write_seq` says so: what the program counted may have met an error after it had run), the bytes
//! lie inside the message, and the client's send buffer has room. Any other outcome stops steering until the agent arms
//! again. The kernel serialises calls for one connection by its socket lock (`tcp_bpf_sendmsg`), and releases that between
//! the call and the transfer.

use crate::{
    framing::Framing,
    slot::{LocalSlot, stop},
    verdict::Kernel,
};

/// What the rule needs to know of a message.
pub trait Message: Kernel {
    /// The sender's `write_seq`: behind the last byte that it has sent over its own connection.
    fn write_seq(&mut self) -> u32;
    /// The sender keeps an account of its own queue, which a redirect would bypass.
    fn keeps_account(&mut self) -> bool;
}

/// Decides on a message of `len` bytes. It goes its ordinary way unless [`Kernel::redirect`] took it.
#[inline(always)]
pub fn message(slot: &mut LocalSlot, len: u32, kernel: &mut impl Message) {
    if slot.span.armed.get() == 0 {
        return;
    }
    // Read again, for what the agent wrote before it armed; it may have taken the flow back meanwhile.
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
    let mut framing: Framing = slot.span.framing;
    if !kernel.parse(&mut framing, len, false) {
        return Err(stop::FRAMING);
    }
    let key = slot.span.target.get();
    let Some(buffer) = kernel.target(key) else { return Err(stop::TARGET) };
    if slot.expected >> 32 != 0 && slot.expected as u32 != buffer.write_seq {
        return Err(stop::BEHIND);
    }
    // A message that does not fit would be taken in part, and an endpoint that waits for its own socket to become writable is
    // not told when it may go on.
    if !buffer.has_room(len) {
        return Err(stop::ROOM);
    }
    if !kernel.redirect(key) {
        return Err(stop::TARGET);
    }
    slot.expected = 1 << 32 | u64::from(buffer.write_seq.wrapping_add(len));
    slot.span.book(framing, len, kernel.now());
    Ok(())
}
