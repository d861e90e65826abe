//! `classifier`, never attached: the agent runs it (`BPF_PROG_TEST_RUN`) to let this machine's TCP see a packet as if it had arrived.
//! Without a socket for it, TCP answers with a reset that has the right number, by the right route.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS},
    helpers::generated::bpf_clone_redirect,
    macros::classifier,
    programs::TcContext,
};
use penstock_common::wire::inject::INTERFACE;

use crate::packet::load;

#[classifier]
fn penstock_inject(ctx: TcContext) -> i32 {
    run(ctx.skb.skb).unwrap_or(-1)
}

#[inline(always)]
fn run(skb: *mut __sk_buff) -> Option<i32> {
    let mut interface = 0u32;
    load(skb, INTERFACE, &raw mut interface, 4)?;
    // SAFETY: the kernel passed this context.
    Some(unsafe { bpf_clone_redirect(skb, interface, u64::from(BPF_F_INGRESS)) } as i32)
}
