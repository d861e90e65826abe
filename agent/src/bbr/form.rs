//! Finds the field `model` of a form (`multipart/form-data`, RFC 7578) while it uploads: transcriptions, translations and image edits
//! name their model so.
//!
//! Takes slices of any size. Files are passed over: memory holds a slice and what may be the beginning of a boundary, of a part's
//! fields, or of the model. A form that is malformed names no model; the model server decides about it. A second field `model` is an
//! error, because the model server may read the other one.

use bytes::{Buf as _, BytesMut};
use memchr::memmem;

use super::MAX_MODEL;

/// Maximum length of a boundary (RFC 2046 §5.1.1), in bytes.
const MAX_BOUNDARY: usize = 70;
/// Maximum size of the fields of a part, in bytes.
const MAX_FIELDS: usize = 8192;

#[derive(Debug)]
pub struct FormScanner {
    /// CRLF, two hyphens and the boundary.
    delimiter: Vec<u8>,
    state: State,
    /// What the current state has not consumed.
    pending: BytesMut,
    model: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the first delimiter, or in a part that is no model.
    Content,
    /// After a delimiter.
    Line,
    /// In the fields of a part, from the CRLF before them.
    Fields,
    /// In the value of a field `model`.
    Model,
    /// After the last part, or the form is malformed.
    Ended,
}

/// A form with two fields `model`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("found a second field `model` in the form, expected one")]
pub struct SecondModel;

impl FormScanner {
    /// For a request with this Content-Type; `None` unless it is a form with a valid boundary.
    pub fn new(content_type: &str) -> Option<Self> {
        let (essence, parameters) = content_type.split_once(';')?;
        if !essence.trim().eq_ignore_ascii_case("multipart/form-data") {
            return None;
        }
        let boundary = parameter(parameters, "boundary")?;
        let is_boundary = (1..=MAX_BOUNDARY).contains(&boundary.len()) && boundary.bytes().all(|byte| byte >= b' ');
        // The first delimiter has no CRLF before it.
        let start = || Self {
            delimiter: [b"\r\n--", boundary.as_bytes()].concat(),
            state: State::Content,
            pending: BytesMut::from(&b"\r\n"[..]),
            model: None,
        };
        is_boundary.then(start)
    }

    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// Scans the next bytes.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), SecondModel> {
        if self.state == State::Ended {
            return Ok(());
        }
        self.pending.extend_from_slice(bytes);
        while let Some(next) = self.step()? {
            self.state = next;
        }
        Ok(())
    }

    /// Consumes what the state can. Returns the next state; `None` if that depends on bytes to come.
    fn step(&mut self) -> Result<Option<State>, SecondModel> {
        match self.state {
            State::Content => Ok(self.content()),
            State::Line => Ok(self.line()),
            State::Fields => Ok(self.fields()),
            State::Model => self.value(),
            State::Ended => {
                self.pending = BytesMut::new();
                Ok(None)
            }
        }
    }

    fn content(&mut self) -> Option<State> {
        if let Some(at) = memmem::find(&self.pending, &self.delimiter) {
            self.pending.advance(at + self.delimiter.len());
            return Some(State::Line);
        }
        self.pending.advance((self.pending.len() + 1).saturating_sub(self.delimiter.len()));
        None
    }

    /// The rest of a delimiter's line: nothing, white space, or two hyphens after the last part.
    fn line(&mut self) -> Option<State> {
        let padding = self.pending.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        match self.pending[padding..] {
            [b'\r', b'\n', ..] => {
                self.pending.advance(padding);
                Some(State::Fields)
            }
            [] | [b'\r'] if padding <= MAX_FIELDS => None,
            [b'-'] if padding == 0 => None,
            // Of another delimiter that begins as this one does, or malformed.
            _ if !self.pending.starts_with(b"--") => Some(State::Content),
            _ => Some(State::Ended),
        }
    }

    fn fields(&mut self) -> Option<State> {
        let Some(end) = memmem::find(&self.pending, b"\r\n\r\n") else {
            return (self.pending.len() > MAX_FIELDS).then_some(State::Ended);
        };
        let fields = self.pending.split_to(end + b"\r\n\r\n".len());
        Some(if names_model(&fields) { State::Model } else { State::Content })
    }

    fn value(&mut self) -> Result<Option<State>, SecondModel> {
        let Some(end) = memmem::find(&self.pending, &self.delimiter) else {
            let is_long = self.pending.len() > MAX_MODEL + self.delimiter.len();
            return Ok(is_long.then_some(State::Ended));
        };
        if self.model.is_some() {
            return Err(SecondModel);
        }
        let value = self.pending.split_to(end);
        match std::str::from_utf8(&value) {
            Ok(text) if text.len() <= MAX_MODEL && !text.chars().any(char::is_control) => {
                self.model = Some(text.to_owned());
            }
            _ => return Ok(Some(State::Ended)),
        }
        Ok(Some(State::Content))
    }
}

/// Whether these are the fields of a part `model` that is no file.
fn names_model(fields: &[u8]) -> bool {
    let Ok(fields) = std::str::from_utf8(fields) else { return false };
    let dispositions = fields.split("\r\n").filter_map(|line| line.split_once(':'));
    let mut dispositions = dispositions.filter(|(name, _)| name.eq_ignore_ascii_case("content-disposition"));
    let Some((_, disposition)) = dispositions.next() else { return false };
    let Some((kind, parameters)) = disposition.split_once(';') else { return false };
    let is_file = ["filename", "filename*"].iter().any(|name| parameter(parameters, name).is_some());
    kind.trim().eq_ignore_ascii_case("form-data")
        && parameter(parameters, "name").as_deref() == Some("model")
        && !is_file
}

/// The value of a parameter, without quotes and backslashes before characters (RFC 9110 §5.6.6).
fn parameter(mut parameters: &str, wanted: &str) -> Option<String> {
    loop {
        let (name, rest) = parameters.split_once('=')?;
        let name = name.rsplit(';').next().unwrap_or_default();
        let is_wanted = name.trim().eq_ignore_ascii_case(wanted);
        let rest = rest.trim_start();
        let (value, after) = match rest.strip_prefix('"') {
            Some(quoted) => unquoted(quoted)?,
            None => {
                let (value, after) = rest.split_once(';').unwrap_or((rest, ""));
                (value.trim().to_owned(), after)
            }
        };
        if is_wanted {
            return Some(value);
        }
        parameters = after;
    }
}

/// The text of a quoted string, and what follows its closing quote.
fn unquoted(quoted: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((text, &quoted[at + 1..])),
            '\\' => text.push(characters.next()?.1),
            other => text.push(other),
        }
    }
    None
}

/// The model that a query names (`?model=`), for requests without a body: a session over WebSocket begins so. `None` if it names none,
/// or several.
pub fn model_in_query(query: &str) -> Option<String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let mut models = pairs.filter(|(name, _)| *name == "model").map(|(_, value)| value.replace('+', " "));
    let model = models.next().filter(|_| models.next().is_none())?;
    let model = percent_encoding::percent_decode_str(&model).decode_utf8().ok()?.into_owned();
    let is_name = !model.is_empty() && model.len() <= MAX_MODEL && !model.chars().any(char::is_control);
    is_name.then_some(model)
}

#[cfg(test)]
mod tests;
