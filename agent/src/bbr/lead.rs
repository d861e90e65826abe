//! Detects a body's character encoding from its first bytes. JSON is UTF-8 (RFC 8259 §8.1), but some clients send a
//! byte order mark, UTF-16 or UTF-32.

/// Four bytes distinguish all of these encodings.
const ENOUGH: usize = 4;
const MARK: &[u8] = b"\xef\xbb\xbf";

#[derive(Debug, Default)]
pub(super) struct Lead {
    bytes: [u8; ENOUGH],
    length: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// UTF-8 after a byte order mark of this many bytes, or 0.
    Utf8(usize),
    Other,
}

impl Lead {
    /// Takes the bytes it still needs from the front of `bytes`. Returns whether it has enough.
    pub(super) fn take(&mut self, bytes: &mut &[u8]) -> bool {
        let (taken, rest) = bytes.split_at(bytes.len().min(ENOUGH - self.length));
        self.bytes[self.length..self.length + taken.len()].copy_from_slice(taken);
        self.length += taken.len();
        *bytes = rest;
        self.length == ENOUGH
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Detects the encoding by byte order marks and, because the first character of JSON is ASCII, by the positions of
    /// zero bytes.
    pub(super) fn encoding(&self) -> Encoding {
        match self.bytes() {
            bytes if bytes.starts_with(MARK) => Encoding::Utf8(MARK.len()),
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, 0, 0xfe, 0xff] => Encoding::Other,
            // UTF-32 and UTF-16: big-endian first, then little-endian.
            [0, 0, 0, last] if *last != 0 => Encoding::Other,
            [0, second, ..] if *second != 0 => Encoding::Other,
            [first, 0, ..] if *first != 0 => Encoding::Other,
            _ => Encoding::Utf8(0),
        }
    }
}
