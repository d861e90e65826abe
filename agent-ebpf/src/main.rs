//! The kernel programs: they move response bytes from the endpoint's socket to the client's.
//!
//! `verdict` looks at what has arrived on a connection (`sk_skb/stream_verdict`), `message` at what an endpoint on this
//! machine is about to send (`sk_msg`), `peers` recognises the sockets of such endpoints (`sock_ops`), and `admit` puts one into the
//! message program's map and takes it out again, when the agent asks (`xdp`, run by hand). The rules are those of
//! `penstock_common`; the programs give them maps, helpers and the bytes of chunk-size lines. All return `SK_PASS` for whatever
//! has bytes: a redirect is a pass to another socket, and `SK_DROP` would lose them without a trace.

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

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that could get here.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
