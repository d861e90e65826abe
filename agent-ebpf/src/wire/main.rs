//! The kernel programs of path `wire`: at ingress, one rewrites the packets of two connections of the agent and sends them from one
//! peer to the other; at egress, another keeps the agent's own sockets of such connections silent.
//!
//! The rules are in `penstock_common::wire`; the programs implement their maps, helpers and access to packets. Only stable helpers
//! are used (`bpf_skc_lookup_tcp`, `bpf_tcp_sock`), no kernel structures. Invariant: a packet of any other connection passes to the
//! next program unchanged.

#![no_std]
#![no_main]
#![allow(unsafe_code)] // helpers and maps

mod arrive;
mod inject;
mod leave;

mod maps;
mod packet;
mod quoted;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that can reach this.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
