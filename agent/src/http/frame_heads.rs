//! Reads the heads of HTTP/2 frames (RFC 9113 §4.1) from a byte stream that may be cut anywhere. Ignores the payload of
//! frames.

use std::collections::VecDeque;

/// Length of the client's connection preface (RFC 9113 §3.4), in bytes.
pub const PREFACE: usize = 24;

/// Most streams that h2 resets on one connection because their frames are wrong or late, before it ends the connection. While the peer
/// does not read, each is a queued frame.
pub const MAX_FRAME_ERRORS: usize = 1 << 16;

pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const CONTINUATION: u8 = 9;
}

/// Flag of DATA and HEADERS frames.
pub const END_STREAM: u8 = 1;
/// Flag of DATA and HEADERS frames: padding follows the payload.
pub const PADDED: u8 = 8;
/// Flag of HEADERS and CONTINUATION frames: the header block ends.
pub const END_HEADERS: u8 = 4;

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
    /// The frame before the next head is DATA.
    is_data: bool,
    /// Whether the next frame belongs to what has begun: a header block, or the connection preface.
    continues: bool,
    /// Number of the last part that has begun.
    part: u64,
}

impl FrameHeads {
    /// The first frame begins after `skip` bytes.
    pub fn after(skip: usize) -> Self {
        Self { head: [0; 9], have: 0, skip, is_data: false, continues: skip > 0, part: 0 }
    }

    /// The number of the part that has begun and is not complete. A part is a header block, or a frame other than DATA; the
    /// client's first frame is one with the preface. Nothing else of the connection can follow before its end.
    pub fn unfinished(&self) -> Option<u64> {
        let is_open = self.continues || self.have > 0 || (self.skip > 0 && !self.is_data);
        is_open.then_some(self.part)
    }

    /// Calls `seen` for each head that ends in `bytes`.
    pub fn feed(&mut self, bytes: &[u8], mut seen: impl FnMut(FrameHead)) {
        self.locate(bytes, |frame, _| seen(frame));
    }

    /// Calls `seen` for each head that ends in `bytes`, with the number of bytes after it.
    pub fn locate(&mut self, mut bytes: &[u8], mut seen: impl FnMut(FrameHead, usize)) {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let taken = (self.head.len() - self.have).min(bytes.len());
            if self.have == 0 && taken > 0 && !self.continues {
                self.part += 1;
            }
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == self.head.len() {
                let [a, b, c, kind, flags, stream @ ..] = self.head;
                let length = u32::from_be_bytes([0, a, b, c]) as usize;
                (self.have, self.skip, self.is_data) = (0, length, kind == kind::DATA);
                self.continues = matches!(kind, kind::HEADERS | kind::CONTINUATION) && flags & END_HEADERS == 0;
                let stream = u32::from_be_bytes(stream) & 0x7fff_ffff;
                seen(FrameHead { length, kind, flags, stream }, bytes.len());
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
    fn parts_are_unfinished_until_their_last_byte() {
        let frame = |kind: u8, flags: u8, length: u8| {
            let mut bytes = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
            bytes.extend((0..length).map(|at| at ^ 0xa5));
            bytes
        };
        let mut heads = FrameHeads::after(PREFACE);
        assert_eq!(heads.unfinished(), Some(0));
        let preface = [vec![b'P'; PREFACE], frame(4, 0, 6)].concat();
        let parts = [
            (0, preface, true),
            (1, frame(kind::HEADERS, END_HEADERS | END_STREAM, 20), true),
            (2, [frame(kind::HEADERS, END_STREAM, 5), frame(9, 0, 0), frame(9, END_HEADERS, 3)].concat(), true),
            // DATA may take as long as the body's own limits allow, but not its frame head.
            (3, frame(kind::DATA, 0, 40), false),
            (4, frame(6, 0, 8), true),
            (5, frame(4, 1, 0), true),
        ];
        for (number, part, is_whole) in &parts {
            for (at, byte) in part.iter().enumerate() {
                heads.feed(&[*byte], |_| {});
                let is_open = at + 1 < if *is_whole { part.len() } else { 9 };
                assert_eq!(heads.unfinished(), is_open.then_some(*number), "byte {at} of part {number}");
            }
        }
        // The end of one and the beginning of the next come in one read.
        heads.feed(&frame(kind::HEADERS, 0, 4), |_| {});
        heads.feed(&[frame(9, END_HEADERS, 4), frame(kind::HEADERS, 0, 4)].concat(), |_| {});
        assert_eq!(heads.unfinished(), Some(7));
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
