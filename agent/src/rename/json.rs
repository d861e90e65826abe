//! Walks a JSON document far enough to find where a model is named, and passes everything on.

use bytes::{BufMut as _, BytesMut};

use super::ModelNames;

/// The longest key that is compared, as JSON text: `response` with every character escaped.
const MAX_KEY: usize = 6 * "response".len();
/// Deeper values are only skipped.
const DEEPEST: usize = 2;

#[derive(Debug)]
pub(super) struct JsonDocument {
    /// The picker's name.
    from: String,
    /// The client's name as JSON text.
    to: Vec<u8>,
    state: JsonState,
    /// Open objects and arrays.
    depth: usize,
    /// The outer levels.
    levels: [Level; DEEPEST],
    /// The text of the key or of the model's name that is being read, without quotes.
    text: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum JsonState {
    Between,
    /// In a string; the flag is set after a backslash.
    Skipped(bool),
    Key(bool),
    /// In a string that may be the picker's name. It is kept back.
    Name(bool),
}

#[derive(Debug, Clone, Copy, Default)]
struct Level {
    is_object: bool,
    /// A key comes next.
    at_key: bool,
    key: MemberKey,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum MemberKey {
    Model,
    /// `message` or `response`.
    Envelope,
    #[default]
    Other,
}

impl JsonDocument {
    pub(super) fn new(names: &ModelNames) -> Self {
        Self {
            from: names.picker.clone(),
            to: serde_json::Value::from(names.client.as_str()).to_string().into_bytes(),
            state: JsonState::Between,
            depth: 0,
            levels: [Level::default(); DEEPEST],
            text: Vec::new(),
        }
    }

    /// Begins a new document; the rest of the last one passes unchanged.
    pub(super) fn reset(&mut self, out: &mut BytesMut) {
        self.release(out);
        (self.state, self.depth) = (JsonState::Between, 0);
    }

    pub(super) fn feed(&mut self, mut bytes: &[u8], out: &mut BytesMut) {
        while let Some(&first) = bytes.first() {
            let length = match self.state {
                JsonState::Between => {
                    let length = bytes.iter().position(|&byte| self.structure(byte)).map_or(bytes.len(), |at| at + 1);
                    // The quote of a name is kept back with it.
                    let kept = usize::from(matches!(self.state, JsonState::Name(_)));
                    out.put_slice(&bytes[..length - kept]);
                    length
                }
                JsonState::Skipped(false) => {
                    let length = bytes.iter().position(|byte| matches!(byte, b'"' | b'\\')).unwrap_or(bytes.len());
                    match bytes.get(length) {
                        Some(b'"') => self.state = JsonState::Between,
                        Some(_) => self.state = JsonState::Skipped(true),
                        None => {}
                    }
                    let length = bytes.len().min(length + 1);
                    out.put_slice(&bytes[..length]);
                    length
                }
                JsonState::Skipped(true) => {
                    self.state = JsonState::Skipped(false);
                    out.put_u8(first);
                    1
                }
                JsonState::Key(escaped) => {
                    out.put_u8(first);
                    self.key(escaped, first);
                    1
                }
                JsonState::Name(escaped) => {
                    self.name(escaped, first, out);
                    1
                }
            };
            bytes = &bytes[length..];
        }
    }

    /// Takes a byte outside of strings. Returns true if a string begins.
    fn structure(&mut self, byte: u8) -> bool {
        match byte {
            b'{' | b'[' => {
                self.depth += 1;
                let is_object = byte == b'{';
                if let Some(level) = self.level_mut() {
                    *level = Level { is_object, at_key: is_object, key: MemberKey::Other };
                }
            }
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b',' => {
                if let Some(level) = self.level_mut() {
                    level.at_key = level.is_object;
                }
            }
            b':' => {
                if let Some(level) = self.level_mut() {
                    level.at_key = false;
                }
            }
            b'"' => {
                self.text.clear();
                let at_key = self.level_mut().is_some_and(|level| level.at_key);
                self.state = match () {
                    () if at_key => JsonState::Key(false),
                    () if self.at_model() => JsonState::Name(false),
                    () => JsonState::Skipped(false),
                };
                return true;
            }
            _ => {}
        }
        false
    }

    /// The innermost level, if it is one of the outer ones.
    fn level_mut(&mut self) -> Option<&mut Level> {
        self.levels.get_mut(self.depth.checked_sub(1)?)
    }

    /// Whether a string that begins here is the value of a model.
    fn at_model(&self) -> bool {
        let is = |level: Level, key| level.is_object && level.key == key;
        match self.depth {
            1 => is(self.levels[0], MemberKey::Model),
            2 => is(self.levels[0], MemberKey::Envelope) && is(self.levels[1], MemberKey::Model),
            _ => false,
        }
    }

    fn key(&mut self, escaped: bool, byte: u8) {
        match byte {
            b'"' if !escaped => {
                let key = match decoded(&self.text).as_deref() {
                    Some("model") => MemberKey::Model,
                    Some("message" | "response") => MemberKey::Envelope,
                    _ => MemberKey::Other,
                };
                if let Some(level) = self.level_mut() {
                    level.key = key;
                }
                self.state = JsonState::Between;
            }
            _ => {
                // One byte more than the longest key, so that a longer one is not taken for it.
                if self.text.len() <= MAX_KEY {
                    self.text.push(byte);
                }
                self.state = JsonState::Key(byte == b'\\' && !escaped);
            }
        }
    }

    fn name(&mut self, escaped: bool, byte: u8, out: &mut BytesMut) {
        if byte == b'"' && !escaped {
            if decoded(&self.text).as_deref() == Some(&self.from) {
                out.put_slice(&self.to);
            } else {
                self.release(out);
                out.put_u8(byte);
            }
            self.state = JsonState::Between;
            return;
        }
        self.text.push(byte);
        let escaped = byte == b'\\' && !escaped;
        self.state = JsonState::Name(escaped);
        // Longer than the name with every character escaped, or no JSON: then what follows must not overtake it.
        if self.text.len() > 6 * self.from.len() || byte < b' ' {
            self.release(out);
            self.state = JsonState::Skipped(escaped);
        }
    }

    /// Passes on a string that was kept back.
    fn release(&mut self, out: &mut BytesMut) {
        if matches!(self.state, JsonState::Name(_)) {
            out.put_u8(b'"');
            out.put_slice(&self.text);
        }
    }
}

/// The characters of a string's JSON text.
fn decoded(text: &[u8]) -> Option<String> {
    serde_json::from_slice(&[b"\"", text, b"\""].concat()).ok()
}
