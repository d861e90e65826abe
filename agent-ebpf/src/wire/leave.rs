//! `classifier` at egress: keeps silent what the agent's own sockets still say about a connection whose packets are rewritten, such
//! as a delayed acknowledgement, a probe, or FIN and RST when the agent dies.

use aya_ebpf::{
    bindings::{
        __sk_buff,
        tcx_action_base::{TCX_DROP, TCX_NEXT},
    },
    helpers::generated::bpf_get_socket_cookie,
    macros::classifier,
    programs::TcContext,
};
use penstock_common::wire::{
    flow::Ends,
    judge::{Leaving, OwnPacket, leave},
};

use crate::{
    maps::{LEGS, Programs, flow, forget, scratch},
    packet::read,
};

#[classifier]
fn penstock_guard(ctx: TcContext) -> i32 {
    run(ctx.skb.skb).unwrap_or(TCX_NEXT)
}

#[inline(always)]
fn run(skb: *mut __sk_buff) -> Option<i32> {
    // SAFETY: fields of the context, each read by itself.
    let (arrived_on, interface) =
        unsafe { ((&raw const (*skb).ingress_ifindex).read_volatile(), (&raw const (*skb).ifindex).read_volatile()) };
    // What this machine sends itself has arrived on no interface; rewritten packets have.
    if arrived_on != 0 {
        return None;
    }
    let scratch = scratch()?;
    let route = read(skb, scratch)?;
    let ports = scratch.header.ports().rotate_left(16);
    let key = Ends { peer: route.destination, own: route.source, ports };
    // SAFETY: the value is copied at once.
    let value = *unsafe { LEGS.get(key) }?;
    let (index, leg) = (value >> 1, (value & 1) as usize);
    let flow = flow(index)?;
    // SAFETY: the kernel passed this context.
    let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    let header = &scratch.header;
    let packet = OwnPacket { cookie, ack: header.ack(), window: header.window(), flags: header.flags(), interface };
    let mut programs = Programs { skb, index, payload: 0 };
    match leave(flow, leg, &packet, &mut programs) {
        Leaving::Pass => None,
        Leaving::Drop => Some(TCX_DROP),
        Leaving::Forget => {
            forget(flow, &mut programs);
            None
        }
    }
}
