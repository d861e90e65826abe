//! ICMP errors that report a packet of a flow as too large for the way to the client (RFC 1191, RFC 8201). They quote the packet that this
//! machine sent. The endpoint gets them with the packet that it sent itself, and then sends smaller ones.

use super::{
    after,
    flow::{CLIENT, ENDPOINT, Flow},
    header::{address_sum, removed_and_added},
};

/// The beginning of a quoted packet: addresses and ports in packet order, the source's port first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// The source's address.
    pub source: [u32; 4],
    /// The destination's address.
    pub destination: [u32; 4],
    /// Both ports.
    pub ports: u32,
    /// The sequence number.
    pub seq: u32,
}

/// The packet as the endpoint sent it, if it is one that the client has not acknowledged (RFC 5927 §4.1). `quoted` went to the client of
/// this flow.
#[inline(always)]
pub fn as_sent(flow: &Flow, quoted: &Quoted) -> Option<Quoted> {
    let (client, endpoint) = (&flow.legs[CLIENT], &flow.legs[ENDPOINT]);
    let (ends, shift) = (&endpoint.facts.ends, endpoint.shift().seq);
    let end = endpoint.sent().wrapping_add(shift);
    if after(client.told.get() as u32, quoted.seq) || !after(end, quoted.seq) {
        return None;
    }
    Some(Quoted {
        source: ends.peer,
        destination: ends.own,
        // The peer's port comes first in the ends.
        ports: ends.ports,
        seq: quoted.seq.wrapping_sub(shift),
    })
}

/// How the sum of the quoted IP header changes, apart from its checksum.
#[inline(always)]
pub fn addresses(old: &Quoted, new: &Quoted) -> u32 {
    address_sum(&old.source, &new.source) + address_sum(&old.destination, &new.destination)
}

/// How the sum of the quoted TCP header changes.
#[inline(always)]
pub fn numbers(old: &Quoted, new: &Quoted) -> u32 {
    removed_and_added(u32::from_be(old.ports), u32::from_be(new.ports), false)
        + removed_and_added(old.seq, new.seq, false)
}
