//! Path `wire`: the client and the endpoint of a response become the two ends of one TCP connection, as each of them sees it.
//!
//! A kernel program rewrites the packets that arrive on one of the agent's two connections and sends them out on the other
//! ([`header`]). [`inject`] writes a packet for this machine itself. [`flow`] is the memory that the agent and the program share about the two connections, [`judge`] the rule by
//! which a flow begins, which packets pass, and when it ends, [`quoted`] the one by which errors about its packets are passed on. Sequence numbers are compared as in RFC 9293 §3.4.

pub mod flow;
pub mod header;
pub mod inject;
pub mod judge;
pub mod quoted;

/// Whether sequence number `a` is after `b`.
#[inline(always)]
pub const fn after(a: u32, b: u32) -> bool {
    (b.wrapping_sub(a) as i32) < 0
}
