//! Whether the head of a response can go to the client as it is, and what message begins behind it (RFC 9112 §2 to §6).
//!
//! Given a head byte by byte, it tells the plain ones from all others: status 200, a body of a declared length or in chunks,
//! and no field that concerns the endpoint's own connection. Anything else is for user space, whether it is wrong or only not
//! worth the kernel's while. It is stricter than user space's parser, and never reads a head another way. Constant size, no
//! allocation, no table.

use crate::framing::Framing;

/// Longest head that is looked at, bytes.
pub const MAX_HEAD: u32 = 4096;
/// Most field lines that are looked at.
pub const MAX_FIELDS: u32 = 64;

/// Beside the length of a passed head ([`Head::passed`]): the body is an event stream.
pub const EVENT_STREAM: u32 = 1 << 31;

/// The parser's states.
mod state {
    /// The head is complete.
    pub(super) const DONE: u32 = 0;
    /// It is none that can be passed on.
    pub(super) const OTHER: u32 = 1;
    /// `HTTP/1.1 200`, and the blank behind it.
    pub(super) const STATUS: u32 = 2;
    /// The reason phrase, or a value that nobody wants to know.
    pub(super) const TEXT: u32 = 3;
    /// The LF behind a line.
    pub(super) const LINE_LF: u32 = 4;
    /// The first byte of a field line, or of the line that ends the head.
    pub(super) const LINE: u32 = 5;
    pub(super) const NAME: u32 = 6;
    /// Blanks in front of a value.
    pub(super) const BLANK: u32 = 7;
    /// Digits of a Content-Length.
    pub(super) const LENGTH: u32 = 8;
    /// A Transfer-Encoding.
    pub(super) const CODING: u32 = 9;
    /// The beginning of a Content-Type.
    pub(super) const TYPE: u32 = 10;
    /// The last LF.
    pub(super) const END_LF: u32 = 11;
}
use state::*;

/// Has been seen: a Content-Length, a Transfer-Encoding, the type of an event stream.
const HAS_LENGTH: u32 = 1;
const HAS_CODING: u32 = 2;
const HAS_EVENTS: u32 = 4;

/// The bytes of a short word, the last one lowest. Longer ones differ from every short one: no byte of theirs is 0.
type Text = [u64; 3];

const fn text(word: &[u8]) -> Text {
    let mut text = [0; 3];
    let mut at = 0;
    while at < word.len() {
        push(&mut text, word[at]);
        at += 1;
    }
    text
}

#[inline(always)]
const fn push(text: &mut Text, byte: u8) {
    text[2] = text[2] << 8 | text[1] >> 56;
    text[1] = text[1] << 8 | text[0] >> 56;
    text[0] = text[0] << 8 | byte as u64;
}

#[inline(always)]
const fn is(text: &Text, word: Text) -> bool {
    text[0] == word[0] && text[1] == word[1] && text[2] == word[2]
}

const STATUS_LINE: Text = text(b"HTTP/1.1 200");
const CONTENT_LENGTH: Text = text(b"content-length");
const TRANSFER_ENCODING: Text = text(b"transfer-encoding");
const CONTENT_TYPE: Text = text(b"content-type");
const CHUNKED: Text = text(b"chunked");
const EVENTS: Text = text(b"text/event-stream");

/// How far into a head the bytes seen so far reach.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// The word being read, in lower case.
    pub text: Text,
    /// Content-Length.
    pub length: u64,
    /// One of [`state`].
    pub state: u32,
    /// What is waited for behind the blanks: a state.
    pub next: u32,
    /// Field lines begun.
    pub fields: u32,
    /// Bytes of the word, or digits.
    pub count: u32,
    /// What has been seen.
    pub has: u32,
}

impl Head {
    pub const fn new() -> Self {
        Self { text: [0; 3], length: 0, state: STATUS, next: TEXT, fields: 0, count: 0, has: 0 }
    }

    /// No byte is to be looked at any more.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        self.state == DONE || self.state == OTHER
    }

    /// The message behind the head, when it can be passed on and has been seen to its end.
    #[inline(always)]
    pub const fn framing(&self) -> Option<Framing> {
        match (self.state, self.has & (HAS_LENGTH | HAS_CODING)) {
            (DONE, HAS_LENGTH) => Some(Framing::length(self.length)),
            (DONE, HAS_CODING) => Some(Framing::chunked()),
            _ => None,
        }
    }

    /// What is kept of a head of `len` bytes that has been passed on.
    #[inline(always)]
    pub const fn passed(&self, len: u32) -> u32 {
        if self.has & HAS_EVENTS == 0 { len } else { len | EVENT_STREAM }
    }

    /// Takes the next byte. Must not be called when it [is over](Self::is_over).
    #[inline(always)]
    pub fn step(&mut self, byte: u8) {
        self.state = match self.state {
            STATUS => self.status(byte),
            TEXT => line_or(byte, TEXT),
            LINE_LF if byte == b'\n' => LINE,
            LINE if byte == b'\r' => END_LF,
            LINE => self.first(byte),
            NAME if byte == b':' => self.named(),
            NAME => self.name(byte),
            BLANK => match byte {
                b' ' | b'\t' => BLANK,
                _ => self.value(self.next, byte),
            },
            LENGTH | CODING | TYPE => self.value(self.state, byte),
            END_LF if byte == b'\n' => DONE,
            _ => OTHER,
        };
    }

    #[inline(always)]
    fn status(&mut self, byte: u8) -> u32 {
        if self.count == 12 {
            // A reason phrase follows, which may be empty (RFC 9112 §4).
            return if byte == b' ' && is(&self.text, STATUS_LINE) { TEXT } else { OTHER };
        }
        self.count += 1;
        push(&mut self.text, byte);
        STATUS
    }

    #[inline(always)]
    fn first(&mut self, byte: u8) -> u32 {
        if self.fields >= MAX_FIELDS {
            return OTHER;
        }
        self.fields += 1;
        self.text = [0; 3];
        self.name(byte)
    }

    #[inline(always)]
    fn name(&mut self, byte: u8) -> u32 {
        if !is_token(byte) {
            return OTHER;
        }
        push(&mut self.text, lower(byte));
        NAME
    }

    /// Behind the colon: what the name says of the value.
    #[inline(always)]
    fn named(&mut self) -> u32 {
        self.next = if is(&self.text, CONTENT_LENGTH) && self.has & HAS_LENGTH == 0 {
            self.has |= HAS_LENGTH;
            LENGTH
        } else if is(&self.text, TRANSFER_ENCODING) && self.has & HAS_CODING == 0 {
            self.has |= HAS_CODING;
            CODING
        } else if is(&self.text, CONTENT_TYPE) {
            TYPE
        } else if concerns_the_agent(&self.text) {
            return OTHER;
        } else {
            TEXT
        };
        self.text = [0; 3];
        self.count = 0;
        BLANK
    }

    #[inline(always)]
    fn value(&mut self, kind: u32, byte: u8) -> u32 {
        match kind {
            LENGTH => self.digit(byte),
            CODING if byte == b'\r' => {
                if is(&self.text, CHUNKED) {
                    LINE_LF
                } else {
                    OTHER
                }
            }
            CODING => {
                push(&mut self.text, lower(byte));
                CODING
            }
            TYPE => {
                push(&mut self.text, lower(byte));
                self.count += 1;
                if is(&self.text, EVENTS) {
                    self.has |= HAS_EVENTS;
                }
                line_or(byte, if self.count < 17 { TYPE } else { TEXT })
            }
            _ => line_or(byte, TEXT),
        }
    }

    #[inline(always)]
    fn digit(&mut self, byte: u8) -> u32 {
        match byte {
            // No sum of 18 digits is too large for the number.
            b'0'..=b'9' if self.count < 18 => {
                self.count += 1;
                self.length = self.length * 10 + (byte - b'0') as u64;
                LENGTH
            }
            b'\r' if self.count > 0 => LINE_LF,
            _ => OTHER,
        }
    }
}

impl Default for Head {
    fn default() -> Self {
        Self::new()
    }
}

/// A byte of a line whose rest is `text`: visible, a blank, or the CR at its end.
#[inline(always)]
const fn line_or(byte: u8, text: u32) -> u32 {
    match byte {
        b'\r' => LINE_LF,
        b'\t' => text,
        0..0x20 | 0x7f => OTHER,
        _ => text,
    }
}

/// Fields that user space takes out or answers for: those of one connection (RFC 9110 §7.6.1, §11.7), a second length or
/// coding, and the one that only the agent sets.
#[inline(always)]
const fn concerns_the_agent(name: &Text) -> bool {
    is(name, const { text(b"connection") })
        || is(name, const { text(b"keep-alive") })
        || is(name, const { text(b"proxy-connection") })
        || is(name, const { text(b"proxy-authenticate") })
        || is(name, const { text(b"proxy-authorization") })
        || is(name, const { text(b"te") })
        || is(name, const { text(b"upgrade") })
        || is(name, const { text(b"x-penstock-reason") })
        || is(name, CONTENT_LENGTH)
        || is(name, TRANSFER_ENCODING)
}

#[inline(always)]
const fn lower(byte: u8) -> u8 {
    if byte.wrapping_sub(b'A') < 26 { byte | 0x20 } else { byte }
}

/// RFC 9110 §5.6.2.
#[inline(always)]
const fn is_token(byte: u8) -> bool {
    const fn bits(from: u8) -> u64 {
        let (mut bits, mut at) = (0, 0);
        while at < 64 {
            let byte = from + at;
            let special = matches!(
                byte,
                b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
            );
            if special || byte.is_ascii_alphanumeric() {
                bits |= 1 << at;
            }
            at += 1;
        }
        bits
    }
    let set = match byte >> 6 {
        0 => const { bits(0) },
        1 => const { bits(64) },
        _ => 0,
    };
    set >> (byte & 63) & 1 == 1
}
