//! The ring in which the kernel keeps a copy of the last payload bytes of a message that it redirects, without chunk-size
//! lines, so that the agent can read what a stream ended with although it never saw the stream.
//!
//! A byte's place is its number in the payload ([`Framing::payload`](crate::framing::Framing)) modulo the ring's size, so
//! nothing but the framing has to be kept with it, and what a segment wrote that was not redirected after all is in the places
//! of the oldest bytes: they are out of reach once user space has forwarded that segment and added it to what it read here.

/// Bytes of a ring, a power of two.
pub const RING: u32 = 4096;
/// Payload bytes that can be read back. Less than the ring, so that ring, one copy behind its end and the kernel's own
/// header of a map entry fit into 8 KiB.
pub const TAIL: u32 = RING - 256;
/// Size of the memory that holds a ring: a copy may begin at its last byte and be as long as the tail, as far as the
/// verifier can tell.
pub const MEMORY: usize = (RING + TAIL) as usize;

const _: () = assert!(RING.is_power_of_two() && MEMORY + 256 <= 8192);

/// What of a run of payload goes where: `first` bytes from `skip` on to `offset`, then `second` bytes to the ring's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copies {
    pub skip: u32,
    pub offset: u32,
    pub first: u32,
    pub second: u32,
}

/// Places a run of `len` bytes of which the first has the number `position`. Only the last [`TAIL`] bytes of it are copied.
#[inline(always)]
pub fn place(position: u32, len: u32) -> Copies {
    let skip = len.saturating_sub(TAIL);
    let len = len - skip;
    let offset = position.wrapping_add(skip) & (RING - 1);
    let room = RING - offset;
    let first = if len < room { len } else { room };
    Copies { skip, offset, first, second: len - first }
}

/// The `n` bytes before the one with the number `position`, in two parts; at most [`TAIL`].
pub fn last(ring: &[u8; MEMORY], position: u32, n: u32) -> (&[u8], &[u8]) {
    let n = n.min(TAIL);
    let begin = (position.wrapping_sub(n) & (RING - 1)) as usize;
    let first = (n as usize).min(RING as usize - begin);
    (&ring[begin..begin + first], &ring[..n as usize - first])
}
