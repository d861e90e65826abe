//! Reads the heads of HTTP/2 frames (RFC 9113 §4.1) from a byte stream that may be cut anywhere. Ignores the payload of
//! frames.

/// Length of the client's connection preface (RFC 9113 §3.4), in bytes.
pub const PREFACE: usize = 24;

pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
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

#[cfg(test)]
mod tests {
    use super::*;

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
