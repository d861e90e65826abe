//! For the program at ingress: passes ICMP errors about packets that were too large for the way to a client on to the endpoint.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM},
    helpers::generated::{bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_neigh, bpf_skb_store_bytes},
};
use penstock_atomics::{fetch_add, load_acquire};
use penstock_common::wire::{
    flow::{CLIENT, ENDPOINT, Ends, state},
    header::{address_sum, fold, hop_sum},
    quoted::{Quoted, addresses, as_sent, numbers},
};

use crate::{
    maps::{LEGS, Scratch, flow, scratch},
    packet::{ETH_P_IP, ETH_P_IPV6, IP, TCP, load, word},
};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Types and codes: "fragmentation needed", and "packet too big".
const FRAGMENTATION_NEEDED: [u8; 2] = [3, 4];
const TOO_BIG: [u8; 2] = [2, 0];
/// Length of the ICMP header.
const HEADER: u32 = 8;

/// Where the parts of an error are, and what they say.
struct IcmpError {
    is_ipv6: bool,
    /// Length of an IP header.
    ip: u32,
    source: [u32; 4],
    destination: [u32; 4],
    hops: u8,
    quoted: Quoted,
}

/// Returns `None` for other packets. `scratch.ip` has the beginning of the packet, or of an earlier one.
#[inline(always)]
pub(crate) fn run(skb: *mut __sk_buff) -> Option<i32> {
    let scratch = scratch()?;
    if scratch.ip[9] != ICMP && scratch.ip[6] != ICMPV6 {
        return None;
    }
    // SAFETY: the kernel passed this context.
    let (protocol, tagged) =
        unsafe { ((&raw const (*skb).protocol).read_volatile(), (&raw const (*skb).vlan_present).read_volatile()) };
    if tagged != 0 {
        return None;
    }
    let error = match u16::from_be(protocol as u16) {
        ETH_P_IP => ipv4(skb, scratch)?,
        ETH_P_IPV6 => ipv6(skb, scratch)?,
        _ => return None,
    };
    let old = error.quoted;
    let key = Ends { peer: old.destination, own: old.source, ports: old.ports.rotate_left(16) };
    // SAFETY: the value is copied at once.
    let value = *unsafe { LEGS.get(key) }?;
    let flow = flow(value >> 1)?;
    if (value & 1) as usize != CLIENT || state::of(load_acquire(&flow.state)) != state::ACTIVE || error.hops <= 1 {
        return None;
    }
    let new = as_sent(flow, &old)?;
    let endpoint = &flow.legs[ENDPOINT];
    rewrite(skb, &error, &new, &endpoint.facts.ends)?;
    fetch_add(flow.too_big.as_ptr(), 1);
    let interface = endpoint.leaves_on.get() as u32;
    // SAFETY: without parameters, the kernel looks the next hop up by the packet's new addresses.
    Some(unsafe { bpf_redirect_neigh(interface, core::ptr::null_mut(), 0, 0) } as i32)
}

#[inline(always)]
fn ipv4(skb: *mut __sk_buff, scratch: &mut Scratch) -> Option<IcmpError> {
    const LEN: u32 = 20;
    load(skb, IP, &raw mut scratch.ip, LEN)?;
    load(skb, IP + LEN, &raw mut scratch.header.bytes, HEADER + LEN + 8)?;
    let (ip, icmp) = (&scratch.ip, &scratch.header.bytes);
    let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff;
    let is_first = u16::from_be_bytes([icmp[14], icmp[15]]) & 0x1fff == 0;
    let quotes_tcp = icmp[8] == 0x45 && icmp[17] == TCP && is_first;
    if ip[0] != 0x45 || ip[9] != ICMP || fragment != 0 || [icmp[0], icmp[1]] != FRAGMENTATION_NEEDED || !quotes_tcp {
        return None;
    }
    let [first, second, third] = Ends::MAPPED;
    let mapped = |address| [first, second, third, address];
    Some(IcmpError {
        is_ipv6: false,
        ip: LEN,
        source: mapped(word(ip, 12)),
        destination: mapped(word(ip, 16)),
        hops: ip[8],
        quoted: Quoted {
            source: mapped(word(icmp, 20)),
            destination: mapped(word(icmp, 24)),
            ports: word(icmp, 28),
            seq: u32::from_be(word(icmp, 32)),
        },
    })
}

#[inline(always)]
fn ipv6(skb: *mut __sk_buff, scratch: &mut Scratch) -> Option<IcmpError> {
    const LEN: u32 = 40;
    load(skb, IP, &raw mut scratch.ip, LEN)?;
    load(skb, IP + LEN, &raw mut scratch.header.bytes, HEADER + LEN + 8)?;
    let (ip, icmp) = (&scratch.ip, &scratch.header.bytes);
    if ip[6] != ICMPV6 || [icmp[0], icmp[1]] != TOO_BIG || icmp[14] != TCP {
        return None;
    }
    Some(IcmpError {
        is_ipv6: true,
        ip: LEN,
        source: [word(ip, 8), word(ip, 12), word(ip, 16), word(ip, 20)],
        destination: [word(ip, 24), word(ip, 28), word(ip, 32), word(ip, 36)],
        hops: ip[7],
        quoted: Quoted {
            source: [word(icmp, 16), word(icmp, 20), word(icmp, 24), word(icmp, 28)],
            destination: [word(icmp, 32), word(icmp, 36), word(icmp, 40), word(icmp, 44)],
            ports: word(icmp, 48),
            seq: u32::from_be(word(icmp, 52)),
        },
    })
}

/// Addresses the error to the peer of these ends, and lets it quote the other packet. What changes in headers with a checksum of their
/// own changes nothing in sums over them.
#[inline(always)]
fn rewrite(skb: *mut __sk_buff, error: &IcmpError, new: &Quoted, ends: &Ends) -> Option<()> {
    let IcmpError { ip, hops, quoted: old, .. } = error;
    let (icmp, inner) = (IP + ip, IP + ip + HEADER);
    let outer = address_sum(&error.source, &ends.own) + address_sum(&error.destination, &ends.peer);
    let (quoted, mut sum) = (addresses(old, new), numbers(old, new));
    let hops_left = hops - 1;
    let tcp = [new.ports, new.seq.to_be()];
    // SAFETY: the kernel passed this context, and the pointers are to locals of the given sizes.
    let errors = unsafe {
        let headers = if error.is_ipv6 {
            let (to, of) = ([ends.own, ends.peer], [new.source, new.destination]);
            // Without a checksum in the header, the one of ICMP covers both pairs of addresses.
            sum += outer + quoted;
            bpf_skb_store_bytes(skb, IP + 8, (&raw const to).cast(), 32, 0)
                | bpf_skb_store_bytes(skb, IP + 7, (&raw const hops_left).cast(), 1, u64::from(BPF_F_RECOMPUTE_CSUM))
                | bpf_skb_store_bytes(skb, inner + 8, (&raw const of).cast(), 32, 0)
        } else {
            let (to, of) = ([ends.own[3], ends.peer[3]], [new.source[3], new.destination[3]]);
            let header = u64::from(fold(outer + hop_sum(*hops)).to_be());
            bpf_l3_csum_replace(skb, IP + 10, 0, header, 0)
                | bpf_skb_store_bytes(skb, IP + 12, (&raw const to).cast(), 8, 0)
                | bpf_skb_store_bytes(skb, IP + 8, (&raw const hops_left).cast(), 1, 0)
                | bpf_l3_csum_replace(skb, inner + 10, 0, u64::from(fold(quoted).to_be()), 0)
                | bpf_skb_store_bytes(skb, inner + 12, (&raw const of).cast(), 8, 0)
        };
        headers
            | bpf_skb_store_bytes(skb, inner + ip, (&raw const tcp).cast(), 8, 0)
            | bpf_l4_csum_replace(skb, icmp + 2, 0, u64::from(fold(sum).to_be()), 0)
    };
    if errors == 0 { Some(()) } else { None }
}
