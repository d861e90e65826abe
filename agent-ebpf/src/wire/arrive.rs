//! `classifier` at ingress: rewrites the packets of flows, and sends them to the other peer.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        tcx_action_base::{TCX_DROP, TCX_NEXT},
    },
    helpers::generated::{
        bpf_ktime_get_ns, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_loop, bpf_redirect_neigh, bpf_skb_store_bytes,
    },
    macros::classifier,
    programs::TcContext,
};
use penstock_atomics::bounded;
use penstock_common::wire::{
    flow::{Ends, Flow, Leg},
    header::{FIELDS, MAX_LEN, MIN_LEN, address_sum, fold, hop_sum},
    judge::{Packet, Verdict, arrive},
};

use crate::{
    maps::{LEGS, Programs, Scratch, flow, forget, scratch},
    packet::{IP, Route, load, read},
    quoted,
};

const OPTIONS: u32 = MAX_LEN - MIN_LEN;
/// The first position of an option after two bytes of padding and a timestamp, which is where Linux and others write one.
const USUAL_TIMESTAMP: u32 = 22;
const AFTER_TIMESTAMP: u32 = 32;
/// Says that the addresses are IPv6's, where only the checksum of TCP depends on them (Linux 6.16; the kernel refuses unknown bits).
const BPF_F_IPV6: u64 = 1 << 7;

#[classifier]
fn penstock_wire(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    run(skb).or_else(|| quoted::run(skb)).unwrap_or(TCX_NEXT)
}

#[inline(always)]
fn run(skb: *mut __sk_buff) -> Option<i32> {
    let scratch = scratch()?;
    let route = read(skb, scratch)?;
    let key = Ends { peer: route.source, own: route.destination, ports: scratch.header.ports() };
    // SAFETY: the value is copied at once.
    let value = *unsafe { LEGS.get(key) }?;
    let (index, from) = (value >> 1, (value & 1) as usize);
    let flow = flow(index)?;
    let packet = packet(skb, scratch, &route)?;
    let mut programs = Programs { skb, index, payload: route.tcp + scratch.header.len };
    match arrive(flow, from, &packet, &mut programs) {
        Verdict::Pass => None,
        Verdict::Drop => Some(TCX_DROP),
        Verdict::Forget => {
            forget(flow, &mut programs);
            None
        }
        verdict @ (Verdict::Forward | Verdict::Acknowledge | Verdict::Reset) => {
            let (mine, other) = (&flow.legs[from & 1], &flow.legs[from & 1 ^ 1]);
            if verdict != Verdict::Forward {
                scratch.header.set_seq(mine.highest.get() as u32);
            }
            if verdict == Verdict::Reset {
                scratch.header.make_reset();
            }
            Some(forward(skb, scratch, &route, mine, other).unwrap_or(TCX_DROP))
        }
    }
}

/// The rest of the TCP header, and what the rule wants to know.
#[inline(always)]
fn packet(skb: *mut __sk_buff, scratch: &mut Scratch, route: &Route) -> Option<Packet> {
    let len = scratch.header.begin()?;
    let payload = route.rest.checked_sub(len)?;
    if let Some(options) = bounded(len - MIN_LEN, OPTIONS) {
        load(skb, route.tcp + MIN_LEN, &raw mut scratch.header.bytes[MIN_LEN as usize], options)?;
    }
    (scratch.timestamped, scratch.tsval) = (0, 0);
    if let Some(tsval) = usual_timestamp(scratch) {
        (scratch.timestamped, scratch.tsval) = (1, tsval);
    } else if len > MIN_LEN {
        scratch.at = MIN_LEN;
        // SAFETY: `find` has the signature that `bpf_loop` calls.
        unsafe { bpf_loop(OPTIONS, find as *mut c_void, ptr::null_mut(), 0) };
    }
    // SAFETY: fields of the context, each read by itself, and a helper without arguments.
    let (segment, interface, now_ns) = unsafe {
        ((&raw const (*skb).gso_size).read_volatile(), (&raw const (*skb).ifindex).read_volatile(), bpf_ktime_get_ns())
    };
    Some(Packet {
        seq: scratch.header.seq(),
        ack: scratch.header.ack(),
        window: scratch.header.window(),
        flags: scratch.header.flags(),
        payload,
        largest: if segment == 0 { payload } else { segment },
        timestamped: scratch.timestamped,
        tsval: scratch.tsval,
        interface,
        now_ns,
    })
}

#[inline(always)]
fn usual_timestamp(scratch: &Scratch) -> Option<u32> {
    let padded = scratch.header.bytes[20] == 1 && scratch.header.bytes[21] == 1;
    if padded { scratch.header.timestamp(USUAL_TIMESTAMP) } else { None }
}

/// Looks at one option. Returns 0 to continue, 1 to stop.
extern "C" fn find(_: u64, _: *mut c_void) -> u64 {
    let Some(scratch) = scratch() else { return 1 };
    let at = scratch.at;
    if at >= scratch.header.len {
        return 1;
    }
    if let Some(tsval) = scratch.header.timestamp(at) {
        (scratch.timestamped, scratch.tsval) = (1, tsval);
        return 1;
    }
    scratch.at = scratch.header.next_option(at);
    0
}

/// Rewrites one option. Returns 0 to continue, 1 to stop.
extern "C" fn rewrite(_: u64, _: *mut c_void) -> u64 {
    let Some(scratch) = scratch() else { return 1 };
    let at = scratch.at;
    if at >= scratch.header.len {
        return 1;
    }
    let shift = scratch.shift;
    scratch.at = scratch.header.shift_option(at, &shift);
    0
}

/// Rewrites the packet and sends it to the peer of `other`. `None`: a helper failed.
#[inline(always)]
fn forward(skb: *mut __sk_buff, scratch: &mut Scratch, route: &Route, mine: &Leg, other: &Leg) -> Option<i32> {
    if route.hops <= 1 {
        return None;
    }
    let ends = &other.facts.ends;
    let shift = mine.shift();
    scratch.shift = shift;
    // The peer's port comes first in the ends, and last in a packet to it.
    scratch.header.shift(ends.ports.rotate_left(16), &shift);
    let len = scratch.header.len;
    scratch.at = MIN_LEN;
    if usual_timestamp(scratch).is_some() {
        scratch.header.shift_option(USUAL_TIMESTAMP, &shift);
        scratch.at = AFTER_TIMESTAMP;
    }
    if scratch.at < len {
        // SAFETY: `rewrite` has the signature that `bpf_loop` calls.
        unsafe { bpf_loop(OPTIONS, rewrite as *mut c_void, ptr::null_mut(), 0) };
    }
    tcp(skb, scratch, route.tcp)?;
    addresses(skb, route, ends)?;
    let interface = other.leaves_on.get() as u32;
    // SAFETY: without parameters, the kernel looks the next hop up by the packet's new addresses.
    Some(unsafe { bpf_redirect_neigh(interface, ptr::null_mut(), 0, 0) } as i32)
}

/// Writes the TCP header back, with the change of its checksum.
#[inline(always)]
fn tcp(skb: *mut __sk_buff, scratch: &mut Scratch, at: u32) -> Option<()> {
    let sum = u64::from(fold(scratch.header.sum).to_be());
    let len = scratch.header.len;
    // SAFETY: the kernel passed this context; the verifier checks the memory. A partial checksum covers no header field, and the
    // helper leaves it alone.
    let errors = unsafe {
        bpf_l4_csum_replace(skb, at + FIELDS as u32, 0, sum, 0)
            | bpf_skb_store_bytes(skb, at, (&raw const scratch.header.bytes).cast(), FIELDS as u32, 0)
    };
    if errors != 0 {
        return None;
    }
    let Some(options) = bounded(len.wrapping_sub(MIN_LEN), OPTIONS) else { return Some(()) };
    // SAFETY: at most 40 bytes after the first 20 of 128.
    let error = unsafe {
        bpf_skb_store_bytes(skb, at + MIN_LEN, (&raw const scratch.header.bytes[MIN_LEN as usize]).cast(), options, 0)
    };
    if error == 0 { Some(()) } else { None }
}

/// Writes the addresses and the hop count, with the changes of the checksums that cover them.
#[inline(always)]
fn addresses(skb: *mut __sk_buff, route: &Route, ends: &Ends) -> Option<()> {
    let sum = address_sum(&route.source, &ends.own) + address_sum(&route.destination, &ends.peer);
    let pseudo = u64::from(fold(sum).to_be());
    let checksum = route.tcp + FIELDS as u32;
    let hops = route.hops - 1;
    // SAFETY: the kernel passed this context, and the pointers are to locals of the given sizes.
    let errors = unsafe {
        if route.is_ipv6 {
            let both = [ends.own, ends.peer];
            let flags = u64::from(BPF_F_PSEUDO_HDR);
            let mut error = bpf_l4_csum_replace(skb, checksum, 0, pseudo, flags | BPF_F_IPV6);
            if error != 0 {
                error = bpf_l4_csum_replace(skb, checksum, 0, pseudo, flags);
            }
            error
                | bpf_skb_store_bytes(skb, IP + 8, (&raw const both).cast(), 32, 0)
                | bpf_skb_store_bytes(skb, IP + 7, (&raw const hops).cast(), 1, u64::from(BPF_F_RECOMPUTE_CSUM))
        } else {
            let both = [ends.own[3], ends.peer[3]];
            let header = u64::from(fold(sum + hop_sum(route.hops)).to_be());
            bpf_l4_csum_replace(skb, checksum, 0, pseudo, u64::from(BPF_F_PSEUDO_HDR))
                | bpf_l3_csum_replace(skb, IP + 10, 0, header, 0)
                | bpf_skb_store_bytes(skb, IP + 12, (&raw const both).cast(), 8, 0)
                | bpf_skb_store_bytes(skb, IP + 8, (&raw const hops).cast(), 1, 0)
        }
    };
    if errors == 0 { Some(()) } else { None }
}

const _: () = assert!(size_of::<Flow>() == 568);
