//! The kernel programs: they move response bytes from the endpoint's socket to the client's.
//!
//! `verdict` decides on received segments (`sk_skb/stream_verdict`), `message` on what an endpoint on this machine sends
//! (`sk_msg`). `peers` recognises the sockets of such endpoints (`sock_ops`), and `admit` inserts them into a map for a response
//! (`xdp`, never attached). The rules are in `penstock_common`; the programs implement their maps, helpers and access to bytes.
//! Invariant: a program returns `SK_PASS` for everything that has bytes, also for a redirect, because `SK_DROP` would lose them
//! silently.

#![no_std]
#![no_main]
#![allow(unsafe_code)] // helpers and maps
#![feature(asm_experimental_arch)]

mod admit;
mod message;
mod peers;
mod shared;
mod verdict;

mod maps;
mod memory;
mod walk;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that can reach this.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
