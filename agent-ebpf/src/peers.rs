//! `sock_ops`: recognises the endpoint's socket of connections that the agent makes on this machine.
//!
//! The agent's side is established first and is recorded under its addresses with its sequence numbers. The endpoint's side has the
//! mirrored values. `admit` inserts the recognised sockets into the map.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, bpf_sock_ops},
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::sock_ops,
    programs::SockOpsContext,
};
use aya_log_ebpf::debug;

use crate::maps::{End, Ends, INDEX, LOCAL_INDEX, LOCAL_SLOTS, NEIGHBOURS, Neighbour, PEERS, Peer};

const AF_INET: u32 = 2;

#[sock_ops]
fn penstock_peers(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => agents_side(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => endpoints_side(&ctx),
        _ => {}
    }
    1
}

#[inline(always)]
fn agents_side(ctx: &SockOpsContext) {
    // SAFETY: the kernel passed this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the agent removes the entry only after it has closed the connection.
    let Some(index) = (unsafe { INDEX.get(&cookie) }) else { return };
    let index = *index;
    let Some(slot) = LOCAL_SLOTS.get_ptr_mut(index) else { return };
    let (sends, receives) = sequence_numbers(ctx);
    // SAFETY: one word of a map's value that only this program writes.
    unsafe { (*slot).origin.set(1 << 32 | u64::from(receives)) };
    let ends = Ends { agent: local(ctx), endpoint: remote(ctx) };
    let _ = PEERS.insert(&ends, &Peer { cookie, index, unused: 0, sends, receives }, 0);
}

#[inline(always)]
fn endpoints_side(ctx: &SockOpsContext) {
    let ends = Ends { agent: remote(ctx), endpoint: local(ctx) };
    // SAFETY: the value is copied at once. If the entry was replaced meanwhile, its sequence numbers do not match.
    let Some(peer) = (unsafe { PEERS.get(&ends) }) else { return };
    let peer = *peer;
    if sequence_numbers(ctx) != (peer.receives, peer.sends) {
        return;
    }
    let _ = PEERS.remove(&ends);
    // SAFETY: the value is compared at once and not used again.
    if unsafe { INDEX.get(&peer.cookie) } != Some(&peer.index) {
        return;
    }
    let (Some(slot), Some(neighbour)) = (LOCAL_SLOTS.get_ptr_mut(peer.index), NEIGHBOURS.get_ptr_mut(peer.index))
    else {
        return;
    };
    // SAFETY: the kernel passed this context.
    let (cookie, namespace) = unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), bpf_get_netns_cookie(ctx.as_ptr())) };
    // SAFETY: a map's value that is not read before the slot names the socket.
    unsafe { neighbour.write(Neighbour { ends, namespace, searched: 0 }) };
    if LOCAL_INDEX.insert(&cookie, &peer.index, 0).is_err() {
        return;
    }
    // SAFETY: one word of a map's value that only this program writes.
    unsafe { (*slot).peer.set(cookie) };
    debug!(ctx, "socket {} of an endpoint recognised", cookie);
}

/// The next sequence numbers of this socket and of the other side.
#[inline(always)]
fn sequence_numbers(ctx: &SockOpsContext) -> (u32, u32) {
    let ops: *const bpf_sock_ops = ctx.ops;
    // SAFETY: reads fields of the context.
    unsafe { ((*ops).snd_nxt, (*ops).rcv_nxt) }
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> End {
    let ops = ctx.ops;
    // SAFETY: reads fields of the context, each as a separate word, because the verifier refuses computed addresses.
    let (ip4, ip6) = unsafe { (read(&raw const (*ops).local_ip4), read4(&raw const (*ops).local_ip6)) };
    End { address: if ctx.family() == AF_INET { mapped(ip4) } else { ip6 }, port: ctx.local_port() }
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> End {
    let ops = ctx.ops;
    // SAFETY: reads fields of the context, each as a separate word, because the verifier refuses computed addresses.
    let (ip4, ip6) = unsafe { (read(&raw const (*ops).remote_ip4), read4(&raw const (*ops).remote_ip6)) };
    // Unlike the local port, this one is in network order (include/uapi/linux/bpf.h).
    let port = u32::from_be(ctx.remote_port());
    End { address: if ctx.family() == AF_INET { mapped(ip4) } else { ip6 }, port }
}

#[inline(always)]
unsafe fn read(word: *const u32) -> u32 {
    // SAFETY: the caller passes a valid pointer.
    unsafe { word.read_volatile() }
}

#[inline(always)]
unsafe fn read4(words: *const [u32; 4]) -> [u32; 4] {
    let first: *const u32 = words.cast();
    // SAFETY: the caller passes a valid pointer to four words.
    unsafe { [read(first), read(first.add(1)), read(first.add(2)), read(first.add(3))] }
}

/// The IPv4-mapped IPv6 address.
#[inline(always)]
fn mapped(address: u32) -> [u32; 4] {
    [0, 0, 0xffff_u32.to_be(), address]
}
