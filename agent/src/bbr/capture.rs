//! A bounded copy of the string that is being read: a top-level key or the model.

use super::Found;

#[derive(Debug, Default)]
pub(super) struct Capture {
    bytes: Vec<u8>,
    limit: usize,
    /// The string was longer than the limit.
    over: bool,
    /// The first half of a surrogate pair, until its second half arrives.
    high: Option<u16>,
    lone: bool,
}

impl Capture {
    pub(super) fn start(&mut self, limit: usize) {
        self.bytes.clear();
        *self = Self { bytes: std::mem::take(&mut self.bytes), limit, ..Self::default() };
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.lone |= self.high.take().is_some();
        let room = self.limit - self.bytes.len();
        self.over |= bytes.len() > room;
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// Adds a UTF-16 code unit from an escape; two of them may form one character.
    pub(super) fn push_unit(&mut self, unit: u16) {
        let high = self.high.take();
        if high.is_none() && (0xd800..0xdc00).contains(&unit) {
            self.high = Some(unit);
            return;
        }
        for decoded in char::decode_utf16(high.into_iter().chain([unit])) {
            match decoded {
                Ok(character) => self.push(character.encode_utf8(&mut [0; 4]).as_bytes()),
                Err(_) => self.lone = true,
            }
        }
    }

    /// The whole string in UTF-8, or an error if it is too long, or has a lone surrogate or a control character.
    pub(super) fn decoded(&self) -> Result<&[u8], Found> {
        if self.lone || self.high.is_some() {
            Err(Found::LoneSurrogate)
        } else if self.over {
            Err(Found::LongModel)
        } else if self.bytes.iter().any(|&byte| byte.is_ascii_control() && byte != b'\t') {
            Err(Found::ControlCharacter)
        } else {
            Ok(&self.bytes)
        }
    }

    /// The string, cut at the limit, for error messages.
    pub(super) fn cut_text(&self) -> String {
        let whole = match std::str::from_utf8(&self.bytes) {
            Ok(text) => text.len(),
            Err(error) => error.valid_up_to(),
        };
        let mut text = String::from_utf8_lossy(&self.bytes[..whole]).into_owned();
        if self.over {
            text.push('…');
        }
        text
    }
}
