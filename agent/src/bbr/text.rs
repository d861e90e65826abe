//! The inside of a JSON string (RFC 8259 §7): escapes, and UTF-8 as in Unicode 15 table 3-7. Slices may be cut
//! anywhere.
//!
//! Almost every byte of a body is plain text inside one string. Plain text is scanned in blocks that the compiler
//! vectorises and validated by the standard library. The state machine handles the rest: escapes, and characters cut by
//! the end of a slice.

/// The state inside a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Text {
    Plain,
    /// After a backslash.
    Escape,
    /// In `\uXXXX`: digits still to come and the value so far.
    Hex {
        left: u8,
        unit: u16,
    },
    /// Inside a character: bytes still to come and the allowed range of the next one.
    Utf8 {
        left: u8,
        low: u8,
        high: u8,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TextPiece<'a> {
    /// Literal bytes. The bytes of one character may arrive in several pieces.
    Bytes(&'a [u8]),
    /// One UTF-16 code unit from an escape.
    Unit(u16),
    /// Part of an escape.
    Part,
    /// The closing quote.
    Close,
}

impl Text {
    /// Reads a prefix of `bytes`, which must not be empty. Returns its length and meaning, or None if the first byte is
    /// not allowed.
    pub(super) fn step<'a>(&mut self, bytes: &'a [u8]) -> Option<(usize, TextPiece<'a>)> {
        let byte = bytes[0];
        let piece = match *self {
            Text::Plain => {
                let plain = plain_prefix(bytes);
                if plain > 0 {
                    return Some((plain, TextPiece::Bytes(&bytes[..plain])));
                }
                match byte {
                    b'"' => TextPiece::Close,
                    b'\\' => {
                        *self = Text::Escape;
                        TextPiece::Part
                    }
                    _ => {
                        *self = after_lead(byte)?;
                        TextPiece::Bytes(&bytes[..1])
                    }
                }
            }
            Text::Escape if byte == b'u' => {
                *self = Text::Hex { left: 4, unit: 0 };
                TextPiece::Part
            }
            Text::Escape => {
                let character = match byte {
                    b'"' | b'\\' | b'/' => byte,
                    b'b' => 0x08,
                    b'f' => 0x0c,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    _ => return None,
                };
                *self = Text::Plain;
                TextPiece::Unit(u16::from(character))
            }
            Text::Hex { left, unit } => {
                let digit = char::from(byte).to_digit(16)?;
                let unit = unit << 4 | digit as u16;
                if left > 1 {
                    *self = Text::Hex { left: left - 1, unit };
                    TextPiece::Part
                } else {
                    *self = Text::Plain;
                    TextPiece::Unit(unit)
                }
            }
            Text::Utf8 { left, low, high } => {
                if !(low..=high).contains(&byte) {
                    return None;
                }
                *self = if left > 1 { Text::Utf8 { left: left - 1, low: 0x80, high: 0xbf } } else { Text::Plain };
                TextPiece::Bytes(&bytes[..1])
            }
        };
        Some((1, piece))
    }

    pub(super) fn expected(self) -> &'static str {
        match self {
            Text::Plain => "a character of a string, in UTF-8 and above 0x1f, or `\"`",
            Text::Escape => "one of `\"\\/bfnrtu` after a backslash",
            Text::Hex { .. } => "four hexadecimal digits after `\\u`",
            Text::Utf8 { .. } => "the rest of a UTF-8 character",
        }
    }
}

/// Length of the prefix that consists of whole, unescaped characters, in bytes.
fn plain_prefix(bytes: &[u8]) -> usize {
    const BLOCK: usize = 32;
    let special = |byte: u8| (byte < 0x20) | (byte == b'"') | (byte == b'\\');
    // No early exit inside a block, so that the compiler can vectorise it.
    let clean =
        bytes.chunks_exact(BLOCK).take_while(|block| !block.iter().fold(false, |any, &byte| any | special(byte)));
    let clean = clean.count() * BLOCK;
    let end = bytes[clean..].iter().position(|&byte| special(byte)).map_or(bytes.len(), |at| clean + at);
    match std::str::from_utf8(&bytes[..end]) {
        Ok(_) => end,
        Err(error) => error.valid_up_to(),
    }
}

/// The state after the first byte of a multi-byte character; None if no character begins with this byte.
fn after_lead(byte: u8) -> Option<Text> {
    let (left, low, high) = match byte {
        0xc2..=0xdf => (1, 0x80, 0xbf),
        0xe0 => (2, 0xa0, 0xbf),
        0xed => (2, 0x80, 0x9f),
        0xe1..=0xef => (2, 0x80, 0xbf),
        0xf0 => (3, 0x90, 0xbf),
        0xf1..=0xf3 => (3, 0x80, 0xbf),
        0xf4 => (3, 0x80, 0x8f),
        _ => return None,
    };
    Some(Text::Utf8 { left, low, high })
}
