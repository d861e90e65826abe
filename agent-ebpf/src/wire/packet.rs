//! Reads the headers of a packet, and looks the agent's sockets up.

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock_tuple},
    helpers::generated::{bpf_sk_release, bpf_skb_load_bytes, bpf_skc_lookup_tcp, bpf_tcp_sock},
};
use penstock_common::wire::{flow::Ends, judge::Socket};

use crate::maps::Scratch;

/// Length of the link layer's header: the agent attaches the programs to interfaces with Ethernet's.
pub(crate) const IP: u32 = 14;
pub(crate) const ETH_P_IP: u16 = 0x0800;
pub(crate) const ETH_P_IPV6: u16 = 0x86dd;
pub(crate) const TCP: u8 = 6;
/// The network namespace of the interface (BPF_F_CURRENT_NETNS).
const OWN: u64 = u64::MAX;

/// What the IP header says.
pub(crate) struct Route {
    pub(crate) source: [u32; 4],
    pub(crate) destination: [u32; 4],
    pub(crate) hops: u8,
    pub(crate) is_ipv6: bool,
    /// Position of the TCP header, and the length of everything from there.
    pub(crate) tcp: u32,
    pub(crate) rest: u32,
}

/// Reads the IP header, and the TCP header without options. Returns `None` for packets
/// other than TCP, fragments, and packets with IP options or a VLAN tag.
#[inline(always)]
pub(crate) fn read(skb: *mut __sk_buff, scratch: &mut Scratch) -> Option<Route> {
    // SAFETY: the kernel passed this context.
    let (protocol, len, tagged) = unsafe {
        (
            (&raw const (*skb).protocol).read_volatile(),
            (&raw const (*skb).len).read_volatile(),
            (&raw const (*skb).vlan_present).read_volatile(),
        )
    };
    // The VLAN's own device sees the packet again, without its tag.
    if tagged != 0 {
        return None;
    }
    let route = match u16::from_be(protocol as u16) {
        ETH_P_IP => ipv4(skb, scratch)?,
        ETH_P_IPV6 => ipv6(skb, scratch)?,
        _ => return None,
    };
    load(skb, route.tcp, &raw mut scratch.header.bytes, 20)?;
    // A packet of more than 64 KiB has no length in its IP header.
    let rest = if route.rest == 0 { len.wrapping_sub(route.tcp) } else { route.rest };
    Some(Route { rest, ..route })
}

#[inline(always)]
fn ipv4(skb: *mut __sk_buff, scratch: &mut Scratch) -> Option<Route> {
    load(skb, IP, &raw mut scratch.ip, 20)?;
    let ip = &scratch.ip;
    let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff;
    if ip[0] != 0x45 || ip[9] != TCP || fragment != 0 {
        return None;
    }
    let [first, second, third] = Ends::MAPPED;
    Some(Route {
        source: [first, second, third, word(ip, 12)],
        destination: [first, second, third, word(ip, 16)],
        hops: ip[8],
        is_ipv6: false,
        tcp: IP + 20,
        rest: u32::from(u16::from_be_bytes([ip[2], ip[3]])).saturating_sub(20),
    })
}

#[inline(always)]
fn ipv6(skb: *mut __sk_buff, scratch: &mut Scratch) -> Option<Route> {
    load(skb, IP, &raw mut scratch.ip, 40)?;
    let ip = &scratch.ip;
    if ip[6] != TCP {
        return None;
    }
    Some(Route {
        source: [word(ip, 8), word(ip, 12), word(ip, 16), word(ip, 20)],
        destination: [word(ip, 24), word(ip, 28), word(ip, 32), word(ip, 36)],
        hops: ip[7],
        is_ipv6: true,
        tcp: IP + 40,
        rest: u32::from(u16::from_be_bytes([ip[4], ip[5]])),
    })
}

#[inline(always)]
pub(crate) fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Loads `len` bytes at `at`.
#[inline(always)]
pub(crate) fn load<T>(skb: *mut __sk_buff, at: u32, to: *mut T, len: u32) -> Option<()> {
    // SAFETY: the verifier checks that the memory holds `len` bytes.
    let error = unsafe { bpf_skb_load_bytes(skb.cast(), at, to.cast(), len) };
    if error == 0 { Some(()) } else { None }
}

/// The agent's established socket at these ends.
#[inline(always)]
pub(crate) fn look_up(skb: *mut __sk_buff, ends: &Ends) -> Option<Socket> {
    let mut ends = *ends;
    let socket = if ends.is_ipv4() {
        let mut tuple = [ends.peer[3], ends.own[3], ends.ports];
        let tuple_ptr = ptr::from_mut(&mut tuple).cast::<bpf_sock_tuple>();
        // SAFETY: the pointer is to an IPv4 tuple of this size.
        unsafe { bpf_skc_lookup_tcp(skb.cast(), tuple_ptr, 12, OWN, 0) }
    } else {
        let tuple_ptr = ptr::from_mut(&mut ends).cast::<bpf_sock_tuple>();
        // SAFETY: `Ends` has the layout of an IPv6 tuple.
        unsafe { bpf_skc_lookup_tcp(skb.cast(), tuple_ptr, 36, OWN, 0) }
    };
    if socket.is_null() {
        return None;
    }
    // SAFETY: the lookup returned this socket with a reference.
    let tcp = unsafe { bpf_tcp_sock(socket) };
    let numbers = if tcp.is_null() {
        None
    } else {
        // SAFETY: fields of `struct bpf_tcp_sock`, each read by itself, as the verifier demands.
        unsafe {
            Some(Socket {
                rcv_nxt: (&raw const (*tcp).rcv_nxt).read_volatile(),
                snd_nxt: (&raw const (*tcp).snd_nxt).read_volatile(),
                snd_una: (&raw const (*tcp).snd_una).read_volatile(),
                received: (&raw const (*tcp).bytes_received).read_volatile(),
                acked: (&raw const (*tcp).bytes_acked).read_volatile(),
            })
        }
    };
    // SAFETY: releases the reference of the lookup.
    unsafe { bpf_sk_release(socket.cast()) };
    numbers
}
