//! Abridges a JSON request body for an EPP, whose work grows with the length of what it gets.
//!
//! Takes a body in pieces of any size; returns valid JSON with the same keys and values in the same order, in which long strings
//! end early once a limit is used up. Everything but the ends of strings is copied byte for byte. A string is cut between two
//! characters, never inside an escape or a surrogate pair. [`difference`] tells what an EPP changed in what it was sent.

mod compare;
#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;

pub use self::compare::{Difference, difference};
use crate::bbr::{Model, ModelScanner, Token};

/// Bytes at the beginning of each string that are always kept, so that roles, types, names and identifiers stay whole.
pub const ALWAYS: usize = 64;
/// Bytes of `\uXXXX`.
const ESCAPE: usize = 6;

/// Why a body is sent whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    /// It is not JSON, or nested too deeply, or its model is not unique or too long.
    NotJson,
    /// What cannot be cut exceeds the limit.
    Structure,
    /// No string had to be cut.
    Short,
}

impl Whole {
    /// A label for metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotJson => "not_json",
            Self::Structure => "structure",
            Self::Short => "short",
        }
    }
}

/// A body that was abridged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abridged {
    /// The JSON document with its long strings shortened: what the EPP gets in place of the body.
    pub body: Bytes,
    /// The top-level `model`, if it is a string.
    pub model: Option<ModelValue>,
}

/// The top-level `model` of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelValue {
    pub name: String,
    /// Where its JSON text is in the original body, with its quotes.
    pub at: Range<u64>,
}

/// A model that an EPP changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renamed {
    /// Where the client's body has its JSON text.
    pub at: Range<u64>,
    pub client: String,
    pub picker: String,
}

impl Renamed {
    /// The JSON text of the picker's name.
    pub fn text(&self) -> Bytes {
        serde_json::Value::from(self.picker.as_str()).to_string().into()
    }
}

/// Remembers for a time that the EPP of a pool rewrites bodies, so that it gets them whole.
#[derive(Debug, Default)]
pub struct Rewriter {
    until: Mutex<Option<Instant>>,
}

impl Rewriter {
    const TIME: Duration = Duration::from_secs(60);

    /// The EPP has rewritten a body.
    pub fn found(&self, now: Instant) {
        *self.until.lock() = Some(now + Self::TIME);
    }

    pub fn is_known(&self, now: Instant) -> bool {
        self.until.lock().is_some_and(|until| now < until)
    }
}

/// Abridges one body.
#[derive(Debug)]
pub struct Abridger {
    scanner: ModelScanner,
    writer: Writer,
}

impl Abridger {
    /// Keeps `limit` bytes of strings, beside the first [`ALWAYS`] of each, in the order of the document. The rest of the document
    /// may have `limit` bytes, too.
    pub fn new(limit: usize) -> Self {
        Self { scanner: ModelScanner::new(), writer: Writer::new(limit) }
    }

    /// Reads the next bytes of the body.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), Whole> {
        let Self { scanner, writer } = self;
        scanner.walk(bytes, |token, bytes| writer.take(token, bytes)).map_err(|_| Whole::NotJson)?;
        if writer.structure > writer.limit { Err(Whole::Structure) } else { Ok(()) }
    }

    /// Bytes of the abridged body so far.
    pub fn bytes(&self) -> usize {
        self.writer.out.len()
    }

    /// Ends the body.
    pub fn finish(self) -> Result<Abridged, Whole> {
        let summary = self.scanner.finish().map_err(|_| Whole::NotJson)?;
        let Writer { mut out, model, is_cut, .. } = self.writer;
        if !is_cut {
            return Err(Whole::Short);
        }
        out.shrink_to_fit();
        let model = match (summary.model, model) {
            (Model::Found(name), Some(at)) => Some(ModelValue { name, at }),
            _ => None,
        };
        Ok(Abridged { body: out.into(), model })
    }
}

/// Copies the parts of a document.
#[derive(Debug)]
struct Writer {
    limit: usize,
    out: Vec<u8>,
    /// Bytes that were copied without regard to the limit.
    structure: usize,
    /// Bytes that were copied because the limit had room for them.
    strings: usize,
    /// Bytes of the body so far.
    offset: u64,
    string: StringValue,
    /// The escape or character that is being read; at most [`ESCAPE`] bytes.
    unit: Vec<u8>,
    /// The escape of a high surrogate, which is kept or cut together with that of its low one.
    high: Option<[u8; ESCAPE]>,
    model: Option<Range<u64>>,
    /// Whether a string ended early.
    is_cut: bool,
}

/// The string value that is being read.
#[derive(Debug, Default)]
struct StringValue {
    begin: u64,
    is_model: bool,
    kept: usize,
    has_ended: bool,
}

impl Writer {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            out: Vec::new(),
            structure: 0,
            strings: 0,
            offset: 0,
            string: StringValue::default(),
            unit: Vec::new(),
            high: None,
            model: None,
            is_cut: false,
        }
    }

    fn take(&mut self, token: Token, bytes: &[u8]) {
        let begin = self.offset;
        self.offset += bytes.len() as u64;
        match token {
            Token::Structure => self.structure(bytes),
            Token::Open { model } => {
                self.string = StringValue { begin, is_model: model, ..StringValue::default() };
                self.structure(bytes);
            }
            Token::Plain => {
                self.end_surrogate();
                self.plain(bytes);
            }
            // The last string is at its end.
            Token::Part { .. } if self.string.has_ended => {}
            Token::Part { ends } => {
                self.unit.extend_from_slice(bytes);
                if ends {
                    let unit = std::mem::take(&mut self.unit);
                    self.end_unit(&unit);
                    self.unit = unit;
                    self.unit.clear();
                }
            }
            Token::Close => {
                self.end_surrogate();
                if self.string.is_model {
                    self.model = Some(self.string.begin..self.offset);
                }
                self.structure(bytes);
            }
        }
    }

    fn structure(&mut self, bytes: &[u8]) {
        self.structure += bytes.len();
        // The document is not used beyond that.
        if self.structure <= self.limit {
            self.out.extend_from_slice(bytes);
        }
    }

    /// Takes a whole escape, or a character of several bytes.
    fn end_unit(&mut self, unit: &[u8]) {
        if let Some(high) = self.high.take() {
            if is_surrogate(unit, b"cdef") {
                return self.undivided(&[&high, unit].concat());
            }
            self.undivided(&high);
        }
        match unit.try_into() {
            Ok(high) if is_surrogate(unit, b"89ab") => self.high = Some(high),
            _ => self.undivided(unit),
        }
    }

    /// Keeps a high surrogate that no low one follows.
    fn end_surrogate(&mut self) {
        if let Some(high) = self.high.take() {
            self.undivided(&high);
        }
    }

    /// Keeps bytes as a whole, or ends the string.
    fn undivided(&mut self, bytes: &[u8]) {
        let length = if bytes.len() <= self.room() { bytes.len() } else { 0 };
        self.keep(bytes, length);
    }

    /// Keeps as many of these characters as there is room for.
    fn plain(&mut self, bytes: &[u8]) {
        let mut length = self.room().min(bytes.len());
        while length < bytes.len() && length > 0 && bytes[length] & 0xc0 == 0x80 {
            length -= 1;
        }
        self.keep(bytes, length);
    }

    /// How much longer the string may become.
    fn room(&self) -> usize {
        match &self.string {
            string if string.has_ended => 0,
            string if string.is_model => usize::MAX,
            string => ALWAYS.saturating_sub(string.kept) + self.limit - self.strings,
        }
    }

    /// Keeps the first `length` of `bytes`, and ends the string there if that is not all.
    fn keep(&mut self, bytes: &[u8], length: usize) {
        let always = if self.string.is_model { length } else { ALWAYS.saturating_sub(self.string.kept).min(length) };
        self.structure(&bytes[..always]);
        self.strings += length - always;
        self.out.extend_from_slice(&bytes[always..length]);
        self.string.kept += length;
        if length < bytes.len() {
            self.string.has_ended = true;
            self.is_cut = true;
        }
    }
}

/// Whether this is the escape of a surrogate whose second hexadecimal digit is one of `second`.
fn is_surrogate(unit: &[u8], second: &[u8]) -> bool {
    matches!(unit, [b'\\', b'u', b'd' | b'D', digit, _, _] if second.contains(&digit.to_ascii_lowercase()))
}
