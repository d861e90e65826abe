//! The ring for a copy of the last payload bytes of a redirected message, without chunk-size lines. It lets the agent read the end
//! of a stream that it did not relay.
//!
//! A byte's place is its number in the payload ([`Framing::payload`](crate::framing::Framing)) modulo the ring's size, so the ring
//! needs no state of its own. A segment that was copied but not redirected overwrites only the oldest bytes, which the agent no
//! longer needs after it has forwarded that segment.

/// Bytes of a ring, a power of two.
pub const RING: u32 = 4096;
/// Payload bytes that can be read back. Less than the ring, so that the ring, one copy beyond its end and the kernel's header of a
/// map entry fit into 8 KiB.
pub const TAIL: u32 = RING - 256;
/// Size of a ring's memory in bytes: for the verifier, a copy may begin at the last byte of the ring and be as long as the tail.
pub const MEMORY: usize = (RING + TAIL) as usize;

const _: () = assert!(RING.is_power_of_two() && MEMORY + 256 <= 8192);

/// Where a run of payload is copied: `first` bytes after the first `skip` go to `offset`, the next `second` bytes to the ring's
/// start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copies {
    /// Bytes at the run's beginning that are not copied.
    pub skip: u32,
    /// Place in the ring, less than [`RING`].
    pub offset: u32,
    /// Bytes up to the ring's end at most.
    pub first: u32,
    /// Bytes from the ring's start on; 0 if all fit before its end.
    pub second: u32,
}

/// Places a run of `len` bytes whose first byte has the number `position`. Only the last [`TAIL`] bytes of the run are copied.
#[inline(always)]
pub fn place(position: u32, len: u32) -> Copies {
    let skip = len.saturating_sub(TAIL);
    let len = len - skip;
    let offset = position.wrapping_add(skip) & (RING - 1);
    let room = RING - offset;
    let first = if len < room { len } else { room };
    Copies { skip, offset, first, second: len - first }
}

/// The `n` bytes before the one with the number `position`, in two parts. At most [`TAIL`] bytes.
pub fn last(ring: &[u8; MEMORY], position: u32, n: u32) -> (&[u8], &[u8]) {
    let n = n.min(TAIL);
    let begin = (position.wrapping_sub(n) & (RING - 1)) as usize;
    let first = (n as usize).min(RING as usize - begin);
    (&ring[begin..begin + first], &ring[..n as usize - first])
}
