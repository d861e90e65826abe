//! Body-based routing: finds the top-level `model` (and `stream`) of a JSON body while it uploads.
//!
//! Takes slices of any size. Returns the model as soon as its value is complete, and at the end whether the body was
//! JSON (RFC 8259). Memory is constant. An object that names its model twice is refused, because the model server may
//! read the other one. A lone surrogate outside the model passes.

mod capture;
mod error;
pub(crate) mod form;
mod headers;
mod lead;
mod naming;
mod nesting;
mod number;
#[cfg(test)]
mod tests;
mod text;

pub use error::{Found, JsonError, NamingError};
pub use headers::ModelHeaders;
pub use naming::Naming;

use capture::Capture;
use nesting::Nesting;
use number::NumberPart;
use text::{Text, TextPiece};

/// Maximum length of a model name, in bytes.
pub const MAX_MODEL: usize = 256;
/// Maximum nesting depth of objects and arrays. serde_json has the same limit.
pub const MAX_DEPTH: u8 = 127;
/// Longest key of interest, in bytes: `stream`.
const MAX_KEY: usize = 6;

/// What a body says of its model: the value of the top-level key `model`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Model {
    /// Not seen so far; in a [`Summary`], the body has no model.
    NotYet,
    /// A string, with its escapes decoded: at most [`MAX_MODEL`] bytes.
    Found(String),
    /// The value's JSON text, cut after [`MAX_MODEL`] bytes.
    NotAString(String),
}

/// What a scan has found in a complete body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// `NotYet` if the body has no top-level `model`.
    pub model: Model,
    /// The top-level `stream` if it is a boolean; the last one counts.
    pub stream: Option<bool>,
}

/// Scans a JSON document for its top-level `model` and `stream` (RFC 8259) as the bytes come, cut anywhere. Keeps at most [`MAX_MODEL`]
/// bytes of it.
#[derive(Debug)]
pub struct ModelScanner {
    /// Bytes of the body consumed.
    offset: u64,
    state: ScanState,
    nesting: Nesting,
    /// The top-level member whose value is being read.
    member: Member,
    keep: Keep,
    capture: Capture,
    /// Offset of the opening quote of the current or last string.
    text_start: u64,
    found: Summary,
    failed: Option<JsonError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScanState {
    Value,
    ElementOrClose,
    KeyOrClose,
    Key,
    Colon,
    CommaOrClose,
    End,
    KeyText(Text),
    ValueText(Text),
    Number(NumberPart),
    /// The remaining bytes of `true`, `false` or `null`, and its boolean value.
    Literal(&'static [u8], Option<bool>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    Model,
    Stream,
    Other,
}

/// What a part of a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// Anything outside of string values. Keys belong to it.
    Structure,
    /// The opening quote of a string value.
    Open {
        /// Whether it is the top-level `model`.
        model: bool,
    },
    /// Whole characters of a string value, none of which is escaped.
    Plain,
    /// Part of an escape, or of a character that a slice cut. `ends` with the last part.
    Part { ends: bool },
    /// The closing quote of a string value.
    Close,
}

/// What is copied into the capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    Nothing,
    /// The decoded characters of the current string.
    Text,
    /// The JSON text of the current value, including nested values.
    Raw,
}

impl Default for ModelScanner {
    fn default() -> Self {
        Self::new()
    }
}

impl ModelScanner {
    /// Starts at the first byte of a body.
    pub fn new() -> Self {
        Self {
            offset: 0,
            state: ScanState::Value,
            nesting: Nesting::default(),
            member: Member::Other,
            keep: Keep::Nothing,
            capture: Capture::default(),
            text_start: 0,
            found: Summary { model: Model::NotYet, stream: None },
            failed: None,
        }
    }

    /// Counts bytes before the document without reading them.
    fn skip(&mut self, bytes: usize) {
        self.offset += bytes as u64;
    }

    /// Reads the next bytes of the body. After an error every call returns the same error.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), JsonError> {
        self.walk(bytes, |_, _| {})
    }

    /// As [`feed`](Self::feed), and calls `each` with every part of `bytes` in turn.
    pub fn walk(&mut self, mut bytes: &[u8], mut each: impl FnMut(Token, &[u8])) -> Result<(), JsonError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        while !bytes.is_empty() {
            let before = self.state;
            let used = self.step(bytes).inspect_err(|error| self.failed = Some(error.clone()))?;
            let (read, rest) = bytes.split_at(used);
            each(self.token(before), read);
            if self.keep == Keep::Raw {
                self.capture.push(read);
                if self.nesting.depth() == 1 && self.state == ScanState::CommaOrClose {
                    self.keep = Keep::Nothing;
                    self.found.model = Model::NotAString(self.capture.cut_text());
                }
            }
            self.offset += used as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// The model as far as it has been read.
    pub(crate) fn model(&self) -> &Model {
        &self.found.model
    }

    /// Finishes a complete body.
    pub fn finish(self) -> Result<Summary, JsonError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let complete = match self.state {
            ScanState::End => true,
            ScanState::Number(number) => number.is_complete() && self.nesting.depth() == 0,
            _ => false,
        };
        if complete { Ok(self.found) } else { Err(self.error(Found::EndOfInput)) }
    }

    /// Consumes a prefix of `bytes`, which must not be empty. Returns its length; 0 if the first byte ends a number and
    /// belongs to the next token.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, JsonError> {
        let byte = bytes[0];
        match self.state {
            ScanState::KeyText(mut text) => {
                let (used, closed) = self.read_text(&mut text, bytes)?;
                if closed {
                    self.end_key()?;
                } else {
                    self.state = ScanState::KeyText(text);
                }
                return Ok(used);
            }
            ScanState::ValueText(mut text) => {
                let (used, closed) = self.read_text(&mut text, bytes)?;
                if closed {
                    self.end_text()?;
                } else {
                    self.state = ScanState::ValueText(text);
                }
                return Ok(used);
            }
            ScanState::Number(number) => return self.read_number(number, byte),
            ScanState::Literal([first, rest @ ..], boolean) if *first == byte => {
                self.state = ScanState::Literal(rest, boolean);
                if rest.is_empty() {
                    if self.value_of() == Member::Stream {
                        self.found.stream = boolean;
                    }
                    self.end_value();
                }
                return Ok(1);
            }
            ScanState::Literal(..) => return Err(self.error(Found::Byte(byte))),
            _ => {}
        }
        if is_white(byte) {
            return Ok(bytes.iter().position(|&byte| !is_white(byte)).unwrap_or(bytes.len()));
        }
        match (self.state, byte) {
            (ScanState::ElementOrClose, b']') | (ScanState::KeyOrClose, b'}') => self.close(),
            (ScanState::CommaOrClose, b'}') if self.nesting.in_object() => self.close(),
            (ScanState::CommaOrClose, b']') if !self.nesting.in_object() => self.close(),
            (ScanState::CommaOrClose, b',') => {
                self.state = if self.nesting.in_object() { ScanState::Key } else { ScanState::Value };
            }
            (ScanState::Key | ScanState::KeyOrClose, b'"') => self.begin_key(),
            (ScanState::Colon, b':') => self.state = ScanState::Value,
            (ScanState::Value | ScanState::ElementOrClose, _) => self.begin_value(byte)?,
            _ => return Err(self.error(Found::Byte(byte))),
        }
        Ok(1)
    }

    /// Takes a byte of a number, or ends the number before it.
    fn read_number(&mut self, number: NumberPart, byte: u8) -> Result<usize, JsonError> {
        match number.next(byte) {
            Some(number) => {
                self.state = ScanState::Number(number);
                Ok(1)
            }
            None if number.is_complete() => {
                self.end_value();
                Ok(0)
            }
            None => Err(self.error(Found::Byte(byte))),
        }
    }

    /// What was read since the state was `before`.
    fn token(&self, before: ScanState) -> Token {
        match (before, self.state) {
            (ScanState::ValueText(Text::Plain), ScanState::ValueText(Text::Plain)) => Token::Plain,
            (ScanState::ValueText(_), ScanState::ValueText(text)) => Token::Part { ends: text == Text::Plain },
            (ScanState::ValueText(_), _) => Token::Close,
            (_, ScanState::ValueText(_)) => Token::Open { model: self.value_of() == Member::Model },
            _ => Token::Structure,
        }
    }

    fn read_text(&mut self, text: &mut Text, bytes: &[u8]) -> Result<(usize, bool), JsonError> {
        let Some((used, piece)) = text.step(bytes) else {
            return Err(self.error(Found::Byte(bytes[0])));
        };
        if self.keep == Keep::Text {
            match piece {
                TextPiece::Bytes(bytes) => self.capture.push(bytes),
                TextPiece::Unit(unit) => self.capture.push_unit(unit),
                TextPiece::Part | TextPiece::Close => {}
            }
        }
        Ok((used, piece == TextPiece::Close))
    }

    fn begin_key(&mut self) {
        self.text_start = self.offset;
        if self.nesting.depth() == 1 {
            self.keep = Keep::Text;
            self.capture.start(MAX_KEY);
        }
        self.state = ScanState::KeyText(Text::Plain);
    }

    fn end_key(&mut self) -> Result<(), JsonError> {
        if self.keep == Keep::Text {
            self.keep = Keep::Nothing;
            self.member = match self.capture.decoded() {
                Ok(b"model") => Member::Model,
                Ok(b"stream") => Member::Stream,
                _ => Member::Other,
            };
            if self.member == Member::Model && self.found.model != Model::NotYet {
                return Err(self.error(Found::SecondModel));
            }
        }
        self.state = ScanState::Colon;
        Ok(())
    }

    /// The top-level member whose value begins here.
    fn value_of(&self) -> Member {
        if self.nesting.depth() == 1 && self.nesting.in_object() { self.member } else { Member::Other }
    }

    fn begin_value(&mut self, byte: u8) -> Result<(), JsonError> {
        let member = self.value_of();
        let state = match byte {
            b'"' => ScanState::ValueText(Text::Plain),
            b'{' => ScanState::KeyOrClose,
            b'[' => ScanState::ElementOrClose,
            b't' => ScanState::Literal(b"rue", Some(true)),
            b'f' => ScanState::Literal(b"alse", Some(false)),
            b'n' => ScanState::Literal(b"ull", None),
            _ => ScanState::Number(NumberPart::start(byte).ok_or_else(|| self.error(Found::Byte(byte)))?),
        };
        match member {
            Member::Model => {
                self.keep = if byte == b'"' { Keep::Text } else { Keep::Raw };
                self.capture.start(MAX_MODEL);
            }
            Member::Stream => self.found.stream = None,
            Member::Other => {}
        }
        self.text_start = self.offset;
        if matches!(byte, b'{' | b'[') && !self.nesting.open(byte == b'{') {
            return Err(self.error(Found::TooDeep));
        }
        self.state = state;
        Ok(())
    }

    fn end_text(&mut self) -> Result<(), JsonError> {
        if self.keep == Keep::Text {
            self.keep = Keep::Nothing;
            let text = self.capture.decoded().map_err(|found| self.error(found))?;
            self.found.model = Model::Found(String::from_utf8_lossy(text).into_owned());
        }
        self.end_value();
        Ok(())
    }

    fn close(&mut self) {
        self.nesting.close();
        self.end_value();
    }

    fn end_value(&mut self) {
        self.state = if self.nesting.depth() == 0 { ScanState::End } else { ScanState::CommaOrClose };
    }

    /// An error at this point. If a whole string is refused, the offset is that of its opening quote.
    fn error(&self, found: Found) -> JsonError {
        let (offset, expected) = match found {
            Found::Byte(_) | Found::EndOfInput => (self.offset, self.expected()),
            Found::TooDeep => (self.offset, "at most 127 levels"),
            Found::SecondModel => (self.text_start, "one model"),
            Found::LongModel => (self.text_start, "at most 256 bytes"),
            Found::LoneSurrogate => (self.text_start, "Unicode characters"),
            Found::ControlCharacter => (self.text_start, "visible characters and blanks"),
        };
        JsonError { offset, found, expected }
    }

    fn expected(&self) -> &'static str {
        match self.state {
            ScanState::Value => "a value",
            ScanState::ElementOrClose => "a value or `]`",
            ScanState::KeyOrClose => "`\"` of a key, or `}`",
            ScanState::Key => "`\"` of a key",
            ScanState::Colon => "`:`",
            ScanState::CommaOrClose if self.nesting.in_object() => "`,` or `}`",
            ScanState::CommaOrClose => "`,` or `]`",
            ScanState::End => "the end of the document",
            ScanState::KeyText(text) | ScanState::ValueText(text) => text.expected(),
            ScanState::Number(number) => number.expected(),
            ScanState::Literal(..) => "`true`, `false` or `null`",
        }
    }
}

fn is_white(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}
