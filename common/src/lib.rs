//! What the agent and its kernel program share, once: where a message ends ([`framing`]), the memory both write
//! ([`slot`]), the rules by which the kernel lets through or redirects what a connection's peer has sent ([`verdict`]) and what
//! a socket of this machine is about to send ([`local`]), and the copy that it makes of the last bytes of a message ([`tail`]).
//!
//! Nothing here allocates, blocks or knows a socket; the host tests run exactly what the kernel runs.

#![no_std]
#![allow(unsafe_code)] // the slot is memory that two programs write

pub mod framing;
pub mod local;
pub mod slot;
pub mod tail;
pub mod verdict;
mod word;
