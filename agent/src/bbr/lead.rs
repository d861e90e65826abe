//! The first bytes of a body, which tell how its characters are encoded. JSON is UTF-8 (RFC 8259 §8.1), and some send it with a byte
//! order mark, or as UTF-16 or UTF-32 all the same.

/// Four bytes tell all of these apart.
const ENOUGH: usize = 4;
const MARK: &[u8] = b"\xef\xbb\xbf";

#[derive(Debug, Default)]
pub(super) struct Lead {
    bytes: [u8; ENOUGH],
    length: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Behind so many bytes of a mark.
    Utf8(usize),
    Other,
}

impl Lead {
    /// Takes from the front of `bytes` what it needs; whether it has enough.
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

    /// By the marks, and because the first character of JSON is ASCII, by where its zeros are.
    pub(super) fn encoding(&self) -> Encoding {
        match self.bytes() {
            bytes if bytes.starts_with(MARK) => Encoding::Utf8(MARK.len()),
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, 0, 0xfe, 0xff] => Encoding::Other,
            // UTF-32 and UTF-16, each with the high byte first; then with the low byte first.
            [0, 0, 0, last] if *last != 0 => Encoding::Other,
            [0, second, ..] if *second != 0 => Encoding::Other,
            [first, 0, ..] if *first != 0 => Encoding::Other,
            _ => Encoding::Utf8(0),
        }
    }
}
