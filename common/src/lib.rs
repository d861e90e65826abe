//! What the agent and its kernel program share, once: where a message ends ([`framing`]), the memory both write
//! ([`slot`]), the rule by which the kernel lets a segment through or keeps it ([`verdict`]), and the copy that it makes of
//! the last bytes of a message ([`tail`]).
//!
//! Nothing here allocates, blocks or knows a socket; the host tests run exactly what the kernel runs.

#![no_std]

pub mod framing;
pub mod slot;
pub mod tail;
pub mod verdict;
