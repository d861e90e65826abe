//! Where an HTTP/1.1 message body ends (RFC 9112 §6 and §7): Content-Length, chunked with extensions and trailers, until
//! close, or no body.
//!
//! Takes wire bytes in pieces of any size, separates syntax from payload, and stops at the last byte of the message. Payload is
//! skipped by count, so the kernel program reads only chunk-size lines. Constant size, no allocation.

/// Longest accepted chunk-size line (size, extensions, CRLF), in bytes.
pub const MAX_CHUNK_LINE: u32 = 4096;
/// Longest accepted trailer section (including the empty line that ends it), in bytes.
pub const MAX_TRAILERS: u32 = 16 * 1024;

/// The parser's states. Plain numbers, because the value is in memory that the kernel and user space share.
pub mod state {
    /// The message is complete.
    pub const DONE: u32 = 0;
    /// The bytes are not a chunked body.
    pub const INVALID: u32 = 1;
    /// Payload of a Content-Length body.
    pub const LENGTH: u32 = 2;
    /// Payload until the connection closes.
    pub const UNTIL_CLOSE: u32 = 3;
    /// First digit of a chunk size.
    pub const SIZE_FIRST: u32 = 4;
    /// Further digits.
    pub const SIZE: u32 = 5;
    /// Blanks after the digits.
    pub const SIZE_BLANK: u32 = 6;
    /// A chunk extension.
    pub const EXTENSION: u32 = 7;
    /// The LF that ends a chunk-size line.
    pub const SIZE_LF: u32 = 8;
    /// Payload of a chunk.
    pub const CHUNK: u32 = 9;
    /// The CR after a chunk's payload.
    pub const CHUNK_CR: u32 = 10;
    /// The LF after a chunk's payload.
    pub const CHUNK_LF: u32 = 11;
    /// Start of a trailer line, or of the line that ends the message.
    pub const TRAILER_FIRST: u32 = 12;
    /// Inside a trailer line.
    pub const TRAILER: u32 = 13;
    /// The LF that ends a trailer line.
    pub const TRAILER_LF: u32 = 14;
    /// The last LF of the message.
    pub const END_LF: u32 = 15;
}

/// The position in a message body after the bytes taken so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::Immutable, zerocopy::KnownLayout)
)]
pub struct Framing {
    /// Payload bytes left in the body or chunk; while a chunk size is read, its value so far.
    pub left: u64,
    /// One of [`state`].
    pub state: u32,
    /// Bytes of the current chunk-size line, or of the trailer section.
    pub line: u32,
    /// Chunks with payload begun so far; wraps.
    pub chunks: u32,
    /// Payload bytes taken so far; wraps.
    pub payload: u32,
}

impl Framing {
    const fn new(state: u32, left: u64) -> Self {
        Self { left, state, line: 0, chunks: 0, payload: 0 }
    }

    /// No body: the response to HEAD, 1xx, 204, 304.
    pub const fn none() -> Self {
        Self::new(state::DONE, 0)
    }

    /// A body of exactly `bytes`.
    pub const fn length(bytes: u64) -> Self {
        if bytes == 0 { Self::none() } else { Self::new(state::LENGTH, bytes) }
    }

    /// `Transfer-Encoding: chunked`.
    pub const fn chunked() -> Self {
        Self::new(state::SIZE_FIRST, 0)
    }

    /// A body that ends when the peer closes.
    pub const fn until_close() -> Self {
        Self::new(state::UNTIL_CLOSE, 0)
    }

    /// The last byte of the message was taken.
    pub const fn is_done(&self) -> bool {
        self.state == state::DONE
    }

    /// The bytes break the chunked syntax or its limits.
    pub const fn is_invalid(&self) -> bool {
        self.state == state::INVALID
    }

    /// The message may end here if the peer closes now.
    pub const fn may_close(&self) -> bool {
        matches!(self.state, state::DONE | state::UNTIL_CLOSE)
    }

    /// Only the peer's close ends this message.
    pub const fn is_until_close(&self) -> bool {
        self.state == state::UNTIL_CLOSE
    }

    /// Takes up to `available` bytes of payload by count. Returns how many: 0 if syntax comes next.
    #[inline(always)]
    pub fn skip(&mut self, available: u64) -> u64 {
        let next = match self.state {
            state::UNTIL_CLOSE => state::UNTIL_CLOSE,
            state::LENGTH => state::DONE,
            state::CHUNK => state::CHUNK_CR,
            _ => return 0,
        };
        let unbounded = self.state == state::UNTIL_CLOSE;
        let taken = if unbounded || available < self.left { available } else { self.left };
        self.payload = self.payload.wrapping_add(taken as u32);
        if unbounded {
            return taken;
        }
        self.left -= taken;
        if self.left == 0 {
            self.state = next;
        }
        taken
    }

    /// Takes one byte of chunked syntax. Must not be called if [`skip`](Self::skip) would take the byte.
    #[inline(always)]
    pub fn step(&mut self, byte: u8) {
        use state::*;
        // The state before the byte decides, so that the LF which ends the line or the message counts as part of it.
        let limit = if self.state >= TRAILER_FIRST { MAX_TRAILERS } else { MAX_CHUNK_LINE };
        if self.line >= limit {
            self.state = INVALID;
            return;
        }
        self.line += 1;
        self.state = match self.state {
            SIZE_FIRST | SIZE => self.size(byte),
            SIZE_BLANK => match byte {
                b' ' | b'\t' => SIZE_BLANK,
                b';' => EXTENSION,
                b'\r' => SIZE_LF,
                _ => INVALID,
            },
            EXTENSION => match byte {
                b'\r' => SIZE_LF,
                b'\n' | 0 => INVALID,
                _ => EXTENSION,
            },
            SIZE_LF if byte == b'\n' => {
                self.line = 0;
                if self.left == 0 {
                    TRAILER_FIRST
                } else {
                    self.chunks = self.chunks.wrapping_add(1);
                    CHUNK
                }
            }
            CHUNK_CR if byte == b'\r' => CHUNK_LF,
            CHUNK_LF if byte == b'\n' => {
                self.line = 0;
                SIZE_FIRST
            }
            TRAILER_FIRST if byte == b'\r' => END_LF,
            TRAILER_FIRST | TRAILER => match byte {
                b'\r' => TRAILER_LF,
                b'\n' | 0 => INVALID,
                _ => TRAILER,
            },
            TRAILER_LF if byte == b'\n' => TRAILER_FIRST,
            END_LF if byte == b'\n' => DONE,
            _ => INVALID,
        };
    }

    #[inline(always)]
    fn size(&mut self, byte: u8) -> u32 {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            b'A'..=b'F' => byte - b'A' + 10,
            _ if self.state == state::SIZE_FIRST => return state::INVALID,
            b' ' | b'\t' => return state::SIZE_BLANK,
            b';' => return state::EXTENSION,
            b'\r' => return state::SIZE_LF,
            _ => return state::INVALID,
        };
        if self.left >> 60 != 0 {
            return state::INVALID;
        }
        self.left = self.left << 4 | digit as u64;
        state::SIZE
    }

    /// Advances over `buf` up to the end of the message. Returns how many bytes belong to the message.
    pub fn feed(&mut self, buf: &[u8]) -> usize {
        let mut at = 0;
        while at < buf.len() && !self.is_done() && !self.is_invalid() {
            at += self.next(&buf[at..]).0;
        }
        at
    }

    /// Advances over the next run of `buf`. Returns how many bytes it took, and those that are payload. Takes at least one byte
    /// unless `buf` is empty, the message is done, or the bytes are invalid (see [`is_invalid`](Self::is_invalid)).
    pub fn next<'a>(&mut self, buf: &'a [u8]) -> (usize, Option<&'a [u8]>) {
        let payload = self.skip(buf.len() as u64) as usize;
        if payload > 0 {
            return (payload, Some(&buf[..payload]));
        }
        let mut at = 0;
        while at < buf.len() && self.wants_syntax() {
            self.step(buf[at]);
            at += 1;
        }
        (at, None)
    }

    /// Some of the next `len` bytes are chunked syntax.
    #[inline(always)]
    pub const fn has_syntax_within(&self, len: u32) -> bool {
        self.wants_syntax() || self.state == state::CHUNK && self.left < len as u64
    }

    /// The next byte is chunked syntax.
    #[inline(always)]
    pub const fn wants_syntax(&self) -> bool {
        self.state >= state::SIZE_FIRST && self.state != state::CHUNK
    }
}
