//! Finds the field `model` of a form (`multipart/form-data`, RFC 7578) while it uploads: transcriptions, translations and image edits
//! name their model so.
//!
//! Takes slices of any size. Files are passed over: memory holds a slice and what may be the beginning of a boundary, of a part's
//! fields, or of the model. What the model server may read in another way (a second field `model`, two names of one part) is an error,
//! so that no request is routed by a model that the server does not use. A form that ends early names no model.

use bytes::{Buf as _, BytesMut};
use memchr::memmem;

use super::MAX_MODEL;
use crate::http::media::without_parameters;

/// Maximum length of a boundary, in bytes. RFC 2046 §5.1.1 allows 70, and servers more.
const MAX_BOUNDARY: usize = 256;
/// Maximum size of the fields of a part, in bytes.
const MAX_FIELDS: usize = 8192;
/// Maximum white space after a delimiter, in bytes.
const MAX_PADDING: usize = 64;

#[derive(Debug)]
pub struct FormScanner {
    /// CRLF, two hyphens and the boundary.
    delimiter: Vec<u8>,
    state: FormState,
    /// What the current state has not consumed.
    pending: BytesMut,
    /// A field `model` has begun.
    names_model: bool,
    model: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FormState {
    /// Before the first delimiter, or in a part other than the model.
    Content,
    /// After a delimiter.
    Line,
    /// In the fields of a part, from the CRLF before them.
    Fields,
    /// In the value of a field `model`.
    Model,
    /// After the last part.
    Ended,
}

/// Why the model of a form is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    #[error("found a second field `model`, expected one")]
    Second,
    #[error("found a part whose Content-Disposition can be read in several ways, expected `form-data; name=\"model\"`")]
    Ambiguous,
    #[error("found a model that is longer than {MAX_MODEL} bytes, not UTF-8, or has control characters")]
    NoName,
    #[error(
        "found a part with more than {MAX_FIELDS} bytes of fields, or a delimiter with more than {MAX_PADDING} bytes of white space"
    )]
    Long,
}

impl FormScanner {
    /// For a request with this Content-Type; `None` unless it is a form with a valid boundary.
    pub fn new(content_type: &[u8]) -> Option<Self> {
        if !without_parameters(content_type).eq_ignore_ascii_case(b"multipart/form-data") {
            return None;
        }
        // One character for each byte, so that a boundary is found whatever its encoding.
        let content_type: String = content_type.iter().map(|&byte| char::from(byte)).collect();
        let (_, parameters) = content_type.split_once(';')?;
        let boundaries: Vec<String> =
            all_parameters(parameters).filter(|(name, _)| name == "boundary").map(|(_, value)| value).collect();
        let [boundary] = &boundaries[..] else { return None };
        let boundary: Vec<u8> = boundary.chars().filter_map(|character| u8::try_from(character).ok()).collect();
        let is_boundary = (1..=MAX_BOUNDARY).contains(&boundary.len()) && boundary.iter().all(|byte| *byte >= b' ');
        // The first delimiter has no CRLF before it.
        let start = || Self {
            delimiter: [b"\r\n--", &boundary[..]].concat(),
            state: FormState::Content,
            pending: BytesMut::from(&b"\r\n"[..]),
            names_model: false,
            model: None,
        };
        is_boundary.then(start)
    }

    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// Scans the next bytes.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), FormError> {
        if self.state == FormState::Ended {
            return Ok(());
        }
        self.pending.extend_from_slice(bytes);
        while let Some(next) = self.step()? {
            self.state = next;
        }
        Ok(())
    }

    /// Consumes what the state can. Returns the next state; `None` if that depends on bytes to come.
    fn step(&mut self) -> Result<Option<FormState>, FormError> {
        match self.state {
            FormState::Content => Ok(self.content()),
            FormState::Line => self.line(),
            FormState::Fields => self.fields(),
            FormState::Model => self.value(),
            FormState::Ended => {
                self.pending = BytesMut::new();
                Ok(None)
            }
        }
    }

    fn content(&mut self) -> Option<FormState> {
        if let Some(at) = memmem::find(&self.pending, &self.delimiter) {
            self.pending.advance(at + self.delimiter.len());
            return Some(FormState::Line);
        }
        self.pending.advance((self.pending.len() + 1).saturating_sub(self.delimiter.len()));
        None
    }

    /// The rest of a delimiter's line: nothing, white space, or two hyphens after the last part.
    fn line(&mut self) -> Result<Option<FormState>, FormError> {
        let padding = self.pending.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        if padding > MAX_PADDING {
            return Err(FormError::Long);
        }
        Ok(match self.pending[padding..] {
            [b'\r', b'\n', ..] => {
                self.pending.advance(padding);
                Some(FormState::Fields)
            }
            [] | [b'\r'] => None,
            [b'-'] if padding == 0 => None,
            [b'-', b'-', ..] if padding == 0 => Some(FormState::Ended),
            // Another delimiter, which begins as this one does.
            _ => Some(FormState::Content),
        })
    }

    fn fields(&mut self) -> Result<Option<FormState>, FormError> {
        let end = memmem::find(&self.pending, b"\r\n\r\n");
        let least = end.unwrap_or_else(|| self.pending.len().saturating_sub(b"\r\n\r".len()));
        if least > MAX_FIELDS {
            return Err(FormError::Long);
        }
        let Some(end) = end else { return Ok(None) };
        let fields = self.pending.split_to(end + b"\r\n\r\n".len());
        if !names_model(&fields)? {
            return Ok(Some(FormState::Content));
        }
        if self.names_model {
            return Err(FormError::Second);
        }
        self.names_model = true;
        Ok(Some(FormState::Model))
    }

    fn value(&mut self) -> Result<Option<FormState>, FormError> {
        let end = memmem::find(&self.pending, &self.delimiter);
        let least = end.unwrap_or_else(|| (self.pending.len() + 1).saturating_sub(self.delimiter.len()));
        if least > MAX_MODEL {
            return Err(FormError::NoName);
        }
        let Some(end) = end else { return Ok(None) };
        let value = self.pending.split_to(end);
        let text = std::str::from_utf8(&value).ok().filter(|text| !text.chars().any(char::is_control));
        self.model = Some(text.ok_or(FormError::NoName)?.to_owned());
        Ok(Some(FormState::Content))
    }
}

/// Whether these fields begin the part `model`. A file of that name is not the model.
fn names_model(fields: &[u8]) -> Result<bool, FormError> {
    let text = String::from_utf8_lossy(fields).replace("\r\n ", " ").replace("\r\n\t", " ");
    let lines = text.split("\r\n").filter_map(|line| line.split_once(':'));
    let dispositions = lines.filter(|(name, _)| name.trim().eq_ignore_ascii_case("content-disposition"));
    let dispositions: Vec<(&str, Vec<(String, String)>)> = dispositions
        .map(|(_, value)| value.split_once(';').unwrap_or((value, "")))
        .map(|(kind, parameters)| (kind.trim(), all_parameters(parameters).collect()))
        .collect();
    let may_be_model = |(name, value): &(String, String)| match name.as_str() {
        "name" => value == "model",
        "name*" => extended(value) == b"model",
        _ => false,
    };
    if !dispositions.iter().flat_map(|(_, parameters)| parameters).any(may_be_model) {
        return Ok(false);
    }
    let [(kind, parameters)] = &dispositions[..] else { return Err(FormError::Ambiguous) };
    let count = |wanted: &str| parameters.iter().filter(|(name, _)| name.trim_end_matches('*') == wanted).count();
    let has_star = parameters.iter().any(|(name, _)| name.ends_with('*'));
    let is_model = parameters.iter().any(|(name, value)| name == "name" && value == "model");
    match (count("name"), count("filename")) {
        (1, _) if !is_model && !has_star => Ok(false),
        (1, 0) if !has_star && kind.eq_ignore_ascii_case("form-data") => Ok(true),
        (1, 1) if !has_star => Ok(false),
        _ => Err(FormError::Ambiguous),
    }
}

/// The parameters, with names in lower case and values without quotes and backslashes before characters (RFC 9110 §5.6.6). A quote
/// that is not closed ends the list.
fn all_parameters(mut parameters: &str) -> impl Iterator<Item = (String, String)> {
    // Of bytes beyond ASCII, some are white space as characters.
    const SPACE: [char; 2] = [' ', '\t'];
    std::iter::from_fn(move || {
        let (name, rest) = parameters.split_once('=')?;
        let name = name.rsplit(';').next().unwrap_or_default().trim_matches(SPACE).to_ascii_lowercase();
        let rest = rest.trim_start_matches(SPACE);
        let (value, after) = match rest.strip_prefix('"') {
            Some(quoted) => unquoted(quoted)?,
            None => {
                let (value, after) = rest.split_once(';').unwrap_or((rest, ""));
                (value.trim_matches(SPACE).to_owned(), after)
            }
        };
        parameters = after;
        Some((name, value))
    })
}

/// The bytes of an extended value, which may follow the names of a charset and a language (RFC 8187 §3.2.1).
fn extended(value: &str) -> Vec<u8> {
    let mut encoded = value.rsplit('\'').next().unwrap_or_default().as_bytes();
    let mut bytes = Vec::with_capacity(encoded.len());
    while let [first, rest @ ..] = encoded {
        let hex = |digit: u8| char::from(digit).to_digit(16);
        let decoded = match encoded {
            [b'%', high, low, after @ ..] => hex(*high).zip(hex(*low)).map(|(high, low)| (high * 16 + low, after)),
            _ => None,
        };
        let (byte, after) = decoded.map_or((*first, rest), |(byte, after)| (byte as u8, after));
        bytes.push(byte);
        encoded = after;
    }
    bytes
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

/// The model that a query names (`?model=`), for requests without a body: a session over WebSocket begins so. Returns `None` if the
/// query names no model or several, or if the name is not UTF-8.
pub fn model_in_query(query: &str) -> Option<String> {
    let mut models = form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name == "model");
    let (_, model) = models.next().filter(|_| models.next().is_none())?;
    let is_name = |character: char| !character.is_control() && character != char::REPLACEMENT_CHARACTER;
    let fits = (1..=MAX_MODEL).contains(&model.len()) && model.chars().all(is_name);
    fits.then(|| model.into_owned())
}

#[cfg(test)]
mod tests;
