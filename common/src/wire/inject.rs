//! A packet that the agent lets its own machine's TCP see: an acknowledgement without payload, as if a peer had sent it.

use super::{
    flow::Ends,
    header::{ACK, address_sum, fold},
};

/// Where the frame has the number of the interface on which it arrives, in the place of the sender's hardware address.
pub const INTERFACE: u32 = 8;
/// The length of the longest frame: Ethernet, IPv6 and TCP.
pub const MAX_LEN: usize = 14 + 40 + 20;

const HOPS: u8 = 64;
const TCP: u8 = 6;

/// Writes the frame and returns its length. `hardware` is the interface's own address.
pub fn acknowledgement(
    frame: &mut [u8; MAX_LEN],
    hardware: [u8; 6],
    interface: u32,
    ends: &Ends,
    seq: u32,
    ack: u32,
) -> usize {
    *frame = [0; MAX_LEN];
    frame[..6].copy_from_slice(&hardware);
    // Locally administered.
    frame[6] = 2;
    frame[INTERFACE as usize..][..4].copy_from_slice(&interface.to_ne_bytes());
    let tcp = if ends.is_ipv4() { ipv4(frame, ends) } else { ipv6(frame, ends) };
    frame[tcp..][..4].copy_from_slice(&ends.ports.to_ne_bytes());
    frame[tcp + 4..][..4].copy_from_slice(&seq.to_be_bytes());
    frame[tcp + 8..][..4].copy_from_slice(&ack.to_be_bytes());
    frame[tcp + 12] = 5 << 4;
    frame[tcp + 13] = ACK;
    // The pseudo-header (RFC 9293 §3.1): both addresses, the protocol and the length.
    let addresses = address_sum(&[0; 4], &ends.peer) + address_sum(&[0; 4], &ends.own);
    // The first words of an IPv4-mapped address add up to 0.
    let header = sum(&frame[tcp..tcp + 20]);
    let checksum = !fold(u32::from(fold(addresses)) + u32::from(TCP) + 20 + header);
    frame[tcp + 16..][..2].copy_from_slice(&checksum.to_be_bytes());
    tcp + 20
}

fn ipv4(frame: &mut [u8; MAX_LEN], ends: &Ends) -> usize {
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip = &mut frame[14..34];
    (ip[0], ip[3], ip[6], ip[8], ip[9]) = (0x45, 40, 0x40, HOPS, TCP);
    ip[12..16].copy_from_slice(&ends.peer[3].to_ne_bytes());
    ip[16..20].copy_from_slice(&ends.own[3].to_ne_bytes());
    let checksum = !fold(sum(ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    34
}

fn ipv6(frame: &mut [u8; MAX_LEN], ends: &Ends) -> usize {
    frame[12..14].copy_from_slice(&[0x86, 0xdd]);
    let ip = &mut frame[14..54];
    (ip[0], ip[5], ip[6], ip[7]) = (0x60, 20, TCP, HOPS);
    for (word, place) in ends.peer.iter().chain(&ends.own).zip(ip[8..].chunks_exact_mut(4)) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    54
}

/// The sum of big-endian words; their number is even and small.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
}
