//! Position-dependent test bytes: each byte is a function of a stream's id and its position, so that a lost, repeated, swapped or
//! foreign byte is detected and located. Two alphabets over the same words: all 256 values, or 64 printable characters that need no
//! escape in JSON and event streams.
//!
//! Invariant: `fill` of a range is the same in any pieces.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The byte values of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alphabet {
    #[default]
    Binary,
    /// `A-Z a-z 0-9 - _`
    Text,
}

const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// How far around a mismatch to search for its bytes, in bytes each way.
const NEARBY: u64 = 1 << 20;
/// Bytes that must agree for a match.
const EVIDENCE: usize = 8;
const WINDOW: usize = 32;

impl Alphabet {
    /// The eight bytes at `8 * index`. The mix is splitmix64's finaliser, so neighbours are unrelated.
    #[inline]
    fn word(self, stream_id: u64, index: u64) -> [u8; 8] {
        let mut z =
            (stream_id.wrapping_mul(0xd1b5_4a32_d192_ed03) ^ index).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        match self {
            Self::Binary => z.to_le_bytes(),
            Self::Text => z.to_le_bytes().map(|byte| LETTERS[usize::from(byte & 63)]),
        }
    }

    /// Fills all of `buf` with the bytes of `stream_id` starting at `offset`.
    pub fn fill(self, stream_id: u64, offset: u64, buf: &mut [u8]) {
        let skip = (offset % 8) as usize;
        let mut index = offset / 8;
        let mut rest = buf;
        if skip != 0 {
            let word = self.word(stream_id, index);
            let n = rest.len().min(8 - skip);
            rest[..n].copy_from_slice(&word[skip..skip + n]);
            rest = &mut rest[n..];
            index += 1;
        }
        let mut words = rest.chunks_exact_mut(8);
        for place in &mut words {
            place.copy_from_slice(&self.word(stream_id, index));
            index += 1;
        }
        let last = words.into_remainder();
        let n = last.len();
        last.copy_from_slice(&self.word(stream_id, index)[..n]);
    }

    /// The `len` bytes of `stream_id` starting at `offset`.
    #[must_use]
    pub fn bytes(self, stream_id: u64, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(stream_id, offset, &mut bytes);
        bytes
    }

    /// The position in `stream_id`, nearest to `around`, where `found` occurs; `None` if it is shorter than eight bytes or not
    /// within a mebibyte. With another stream's id, this shows whether two streams were mixed up.
    #[must_use]
    pub fn locate(self, stream_id: u64, around: u64, found: &[u8]) -> Option<u64> {
        if found.len() < EVIDENCE {
            return None;
        }
        let from = around.saturating_sub(NEARBY);
        let span = self.bytes(stream_id, from, (around - from + NEARBY) as usize + found.len());
        span.windows(found.len())
            .enumerate()
            .filter(|(_, window)| *window == found)
            .map(|(at, _)| from + at as u64)
            .min_by_key(|at| at.abs_diff(around))
    }
}

/// [`Alphabet::Binary`]'s `fill`.
pub fn fill(stream_id: u64, offset: u64, buf: &mut [u8]) {
    Alphabet::Binary.fill(stream_id, offset, buf);
}

/// [`Alphabet::Text`]'s `fill`.
pub fn fill_text(stream_id: u64, offset: u64, buf: &mut [u8]) {
    Alphabet::Text.fill(stream_id, offset, buf);
}

/// The first wrong byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub stream_id: u64,
    pub offset: u64,
    pub expected: Vec<u8>,
    pub found: Vec<u8>,
    /// Where the found bytes belong, relative to their position: 5 if five bytes before them were lost, -5 if the last five were
    /// repeated. `None` if they belong nowhere near, or are too few to tell.
    pub shift: Option<i64>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stream_id, offset, expected, found, shift } = self;
        write!(f, "stream {stream_id} differs at byte {offset}: expected {expected:02x?}, found {found:02x?}, ")?;
        match shift {
            Some(lost @ 1..) => write!(f, "which belongs {lost} bytes later (lost bytes)"),
            Some(early) => write!(f, "which belongs {} bytes earlier (repeated bytes)", -early),
            None => f.write_str("which belongs nowhere nearby"),
        }
    }
}

impl std::error::Error for Mismatch {}

/// Compares received pieces with the expected stream.
#[derive(Clone, Debug)]
pub struct Checker {
    alphabet: Alphabet,
    stream_id: u64,
    offset: u64,
    expected: Vec<u8>,
}

impl Checker {
    #[must_use]
    pub fn new(stream_id: u64) -> Self {
        Self::of(Alphabet::Binary, stream_id)
    }

    #[must_use]
    pub fn text(stream_id: u64) -> Self {
        Self::of(Alphabet::Text, stream_id)
    }

    #[must_use]
    pub fn of(alphabet: Alphabet, stream_id: u64) -> Self {
        Self { alphabet, stream_id, offset: 0, expected: Vec::new() }
    }

    /// Bytes that matched so far.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), Mismatch> {
        for piece in bytes.chunks(64 << 10) {
            self.expected.resize(piece.len(), 0);
            self.alphabet.fill(self.stream_id, self.offset, &mut self.expected);
            if self.expected != piece {
                let at = self.expected.iter().zip(piece).position(|(a, b)| a != b).unwrap_or(0);
                let consumed = piece.as_ptr().addr() - bytes.as_ptr().addr() + at;
                return Err(self.mismatch(self.offset + at as u64, &bytes[consumed..]));
            }
            self.offset += piece.len() as u64;
        }
        Ok(())
    }

    fn mismatch(&self, offset: u64, found: &[u8]) -> Mismatch {
        let found = found[..found.len().min(WINDOW)].to_vec();
        let expected = self.alphabet.bytes(self.stream_id, offset, found.len());
        let place = self.alphabet.locate(self.stream_id, offset, &found);
        let shift = place.map(|at| at.wrapping_sub(offset).cast_signed());
        Mismatch { stream_id: self.stream_id, offset, expected, found, shift }
    }
}

/// A 64-bit FNV-1a hash, for bodies that are compared without being kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    pub fn update(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut hash = Self::default();
        hash.update(bytes);
        hash
    }

    #[must_use]
    pub fn value(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fill_of_any_partition_gives_same_bytes(id: u64, start in 0u64..5000, cuts in prop::collection::vec(0usize..40, 0..20), text: bool) {
            let alphabet = if text { Alphabet::Text } else { Alphabet::Binary };
            let whole = alphabet.bytes(id, start, cuts.iter().sum());
            let mut pieces = Vec::new();
            for cut in cuts {
                pieces.extend(alphabet.bytes(id, start + pieces.len() as u64, cut));
            }
            prop_assert_eq!(whole, pieces);
        }

        #[test]
        fn lost_bytes_are_located(id: u64, at in 0usize..5000, lost in 1usize..3000) {
            let mut bytes = Alphabet::Binary.bytes(id, 0, 10_000);
            bytes.drain(at..at + lost);
            let mismatch = Checker::new(id).feed(&bytes).unwrap_err();
            // The first lost byte may equal its replacement by chance.
            prop_assert!((at as u64..at as u64 + 4).contains(&mismatch.offset));
            prop_assert_eq!(mismatch.shift, Some(lost as i64));
        }

        #[test]
        fn repeated_bytes_are_located(id: u64, at in 3000usize..5000, again in 1usize..3000) {
            let whole = Alphabet::Text.bytes(id, 0, 10_000);
            let bytes = [&whole[..at], &whole[at - again..]].concat();
            let mut checker = Checker::text(id);
            let mismatch = bytes.chunks(2000).find_map(|piece| checker.feed(piece).err());
            // The rest of a piece may be too short to tell.
            if let Some(Mismatch { shift: Some(shift), .. }) = mismatch {
                prop_assert_eq!(shift, -(again as i64));
            } else {
                prop_assert!(mismatch.is_some());
            }
        }
    }

    #[test]
    fn swapped_streams_are_located_in_other_stream() {
        let mut checker = Checker::new(1);
        checker.feed(&Alphabet::Binary.bytes(1, 0, 100)).unwrap();
        let mismatch = checker.feed(&Alphabet::Binary.bytes(2, 100, 100)).unwrap_err();
        assert_eq!((mismatch.offset, mismatch.shift), (100, None));
        assert_eq!(Alphabet::Binary.locate(2, 100, &mismatch.found), Some(100));
        assert!(mismatch.to_string().contains("nowhere nearby"));
    }

    #[test]
    fn text_in_json_needs_no_escape() {
        let text = String::from_utf8(Alphabet::Text.bytes(7, 3, 4096)).unwrap();
        assert_eq!(serde_json::to_string(&text).unwrap().len(), text.len() + 2);
    }

    #[test]
    fn fnv_matches_published_values() {
        assert_eq!(Fnv::of(b"").value(), 0xcbf2_9ce4_8422_2325);
        assert_eq!(Fnv::of(b"foobar").value(), 0x8594_4171_f739_67e8);
    }
}
