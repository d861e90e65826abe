//! The code that the agent and its kernel programs share: message framing ([`framing`]), the shared memory of a connection
//! ([`slot`]), the rules by which the kernel passes or redirects received segments ([`verdict`]) and messages of a local endpoint
//! ([`local`]), the ways that bytes take ([`path`]), the copy of a message's last bytes ([`tail`]), and the rewriting of packets
//! ([`wire`]).
//!
//! Nothing here allocates, blocks or knows a socket. Tests on the host run the same code as the kernel.

#![no_std]
#![warn(missing_docs)]
#![allow(unsafe_code)] // the slot is memory that two programs write

pub mod framing;
pub mod local;
pub mod path;
pub mod slot;
pub mod tail;
pub mod verdict;
pub mod wire;
mod word;
