//! Reads the heads of HTTP/2 frames (RFC 9113 §4.1) from a byte stream that may be cut anywhere. Ignores the payload of
//! frames.

use std::collections::VecDeque;

/// Length of the client's connection preface (RFC 9113 §3.4), in bytes.
pub const PREFACE: usize = 24;

pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const CONTINUATION: u8 = 9;
}

/// Flag of DATA and HEADERS frames.
pub const END_STREAM: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHead {
    pub length: usize,
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
}

#[derive(Debug)]
pub struct FrameHeads {
    head: [u8; 9],
    have: usize,
    /// Bytes left before the next head.
    skip: usize,
}

impl FrameHeads {
    /// The first frame begins after `skip` bytes.
    pub fn after(skip: usize) -> Self {
        Self { head: [0; 9], have: 0, skip }
    }

    /// Calls `seen` for each head that ends in `bytes`.
    pub fn feed(&mut self, mut bytes: &[u8], mut seen: impl FnMut(FrameHead)) {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let taken = (self.head.len() - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == self.head.len() {
                let [a, b, c, kind, flags, stream @ ..] = self.head;
                let length = u32::from_be_bytes([0, a, b, c]) as usize;
                (self.have, self.skip) = (0, length);
                seen(FrameHead { length, kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff });
            }
        }
    }
}

/// The streams whose head or trailers took more than a number of bytes in frames. h2 leaves out the fields beyond its own limit,
/// and says so of heads only.
#[derive(Debug)]
pub struct LargeBlocks {
    limit: usize,
    /// Bytes of the last block so far.
    bytes: usize,
    streams: VecDeque<u32>,
}

impl LargeBlocks {
    /// Most streams that are remembered.
    const MOST: usize = 1024;

    pub fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, streams: VecDeque::new() }
    }

    /// Notes a received frame.
    pub fn note(&mut self, frame: FrameHead) {
        match frame.kind {
            kind::HEADERS => self.bytes = frame.length,
            kind::CONTINUATION => self.bytes += frame.length,
            _ => return,
        }
        if self.bytes > self.limit && self.streams.back() != Some(&frame.stream) {
            if self.streams.len() == Self::MOST {
                self.streams.pop_front();
            }
            self.streams.push_back(frame.stream);
        }
    }

    pub fn contains(&self, stream: u32) -> bool {
        self.streams.contains(&stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_blocks_are_found_by_the_sum_of_their_frames() {
        let mut blocks = LargeBlocks::new(100);
        let mut note = |stream, kind, length| {
            blocks.note(FrameHead { length, kind, flags: 0, stream });
            blocks.contains(stream)
        };
        assert!(!note(1, kind::HEADERS, 100));
        assert!(!note(1, kind::DATA, 1000));
        assert!(!note(3, kind::HEADERS, 60));
        assert!(note(3, kind::CONTINUATION, 41));
        assert!(!note(5, kind::HEADERS, 60));
        for stream in 10..3000 {
            assert!(note(stream, kind::HEADERS, 101));
        }
        assert!(blocks.streams.len() <= LargeBlocks::MOST);
    }

    #[test]
    fn frame_heads_cut_anywhere_are_the_same() {
        let frames = [(0u8, 1u8, 5u32, 300usize), (6, 0, 0, 8), (8, 0, 7, 4), (0, 0, 9, 0), (1, 5, 11, 70_000)];
        let mut wire = vec![b'P'; PREFACE];
        for (kind, flags, stream, length) in frames {
            wire.extend_from_slice(&(length as u32).to_be_bytes()[1..]);
            wire.extend([kind, flags]);
            // The reserved bit is ignored.
            wire.extend((stream | 1 << 31).to_be_bytes());
            wire.extend((0..length).map(|at| at as u8));
        }
        let expected = frames.map(|(kind, flags, stream, length)| FrameHead { length, kind, flags, stream });
        for size in [1, 2, 8, 9, 10, 33, 4096, wire.len()] {
            let (mut heads, mut seen) = (FrameHeads::after(PREFACE), Vec::new());
            for piece in wire.chunks(size) {
                heads.feed(piece, |head| seen.push(head));
            }
            assert_eq!(seen, expected, "pieces of {size}");
        }
    }
}
