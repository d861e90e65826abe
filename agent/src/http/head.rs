//! Shared parsing of request and response heads: where a head ends, its field lines, and the two fields that determine
//! the body's length.
//!
//! `httparse` reads the lines. Bytes that it accepts but another parser could read differently (bare LF, bare CR) are
//! refused before it runs; what it refuses is named afterwards. A fault is found at the first wrong byte, so the answer
//! does not depend on how the bytes were cut into reads.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version, header};
use penstock_common::framing::MAX_TRAILERS;

use crate::config::Limits;

/// The most bytes of a field's name that `http` reads, whatever `limits.head_bytes` allows.
const LONGEST_NAME: usize = u16::MAX as usize;

/// Size limits of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadLimits {
    /// Maximum bytes of start line, fields and blank line.
    pub bytes: usize,
    /// Maximum number of field lines.
    pub headers: usize,
}

impl HeadLimits {
    /// `limits.head_bytes` and the limit on the number of fields.
    pub(crate) fn of(limits: &Limits) -> Self {
        Self { bytes: limits.head_bytes, headers: limits.headers }
    }

    fn most(&self) -> usize {
        self.bytes.max(MAX_TRAILERS as usize)
    }

    /// The largest header list that h2 takes (RFC 9113 §6.5.2). It has room for heads and trailers beyond the limits, so that these
    /// get an error that names the limit, and no other stream of the connection suffers.
    pub fn header_list(&self) -> u32 {
        (4 * self.most() + 2 * 32 * self.headers).try_into().unwrap_or(u32::MAX)
    }

    /// The most bytes of one head or trailers in frames. What is compressed to fewer is within [`header_list`](Self::header_list),
    /// since Huffman codes save less than half.
    pub fn header_block(&self) -> usize {
        2 * self.most()
    }

    /// Checks the fields of a head that came over HTTP/2, besides `start` bytes of a start line.
    pub fn check(&self, fields: &HeaderMap, start: usize) -> Result<(), HeadError> {
        if fields.len() > self.headers {
            return Err(HeadError::TooManyFields { limit: self.headers });
        }
        if start + fields_len(fields) > self.bytes {
            return Err(HeadError::TooLong { limit: self.bytes });
        }
        match padded(fields) {
            Some((name, value)) => {
                Err(HeadError::FieldLine { line: shown(&[name.as_str().as_bytes(), b": ", value.as_bytes()].concat()) })
            }
            None => Ok(()),
        }
    }
}

/// A field whose value begins or ends with white space. HTTP/2 forbids it, and HTTP/1.1 does not carry it (RFC 9113 §8.2.1, RFC 9110
/// §5.5).
pub fn padded(fields: &HeaderMap) -> Option<(&HeaderName, &HeaderValue)> {
    fields.iter().find(|(_, value)| trimmed(value.as_bytes()).len() != value.len())
}

/// A field's value without the white space around it, which is not part of it (RFC 9110 §5.5).
pub fn trimmed(value: &[u8]) -> &[u8] {
    let is_text = |byte: &u8| !matches!(byte, b' ' | b'\t');
    let start = value.iter().position(is_text).unwrap_or(value.len());
    let end = value.iter().rposition(is_text).map_or(start, |last| last + 1);
    &value[start..end]
}

/// About the bytes that fields would take in HTTP/1.1.
pub fn fields_len(fields: &HeaderMap) -> usize {
    fields.iter().map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len()).sum()
}

/// A head that cannot be read unambiguously as HTTP/1.1, from either side.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("the head does not end within {limit} bytes")]
    TooLong { limit: usize },
    #[error("a field's name is longer than {limit} bytes")]
    NameTooLong { limit: usize },
    #[error("the head has more than {limit} header fields")]
    TooManyFields { limit: usize },
    #[error("found a bare line feed after \"{line}\", expected lines to end with CR LF")]
    BareLf { line: String },
    #[error("found a bare carriage return after \"{line}\", expected lines to end with CR LF")]
    BareCr { line: String },
    #[error("found control character 0x{byte:02x} after \"{line}\", expected visible characters, blanks and tabs")]
    Control { byte: u8, line: String },
    #[error("found the folded line \"{line}\", expected each field on one line")]
    FoldedLine { line: String },
    #[error("found blanks before the colon in \"{line}\", expected `name: value`")]
    BlankBeforeColon { line: String },
    #[error("found the field line \"{line}\", expected `name: value`")]
    FieldLine { line: String },
    #[error("found Content-Length \"{found}\", expected one number of bytes")]
    ContentLength { found: String },
    #[error("found several values of Content-Length, \"{found}\", expected one")]
    ContentLengthRepeated { found: String },
    #[error("found Transfer-Encoding \"{found}\" together with Content-Length, expected only one of them")]
    LengthAndEncoding { found: String },
    #[error("found Transfer-Encoding \"{found}\", expected `chunked`")]
    TransferEncoding { found: String },
    #[error("found Transfer-Encoding \"{found}\", expected `chunked`, the only one implemented")]
    TransferCoding { found: String },
    #[error("found Transfer-Encoding \"{found}\" in an HTTP/1.0 message, which cannot have one")]
    TransferEncodingInHttp10 { found: String },
}

impl HeadError {
    /// The status of the answer to a request with this error.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::TooLong { .. } | Self::NameTooLong { .. } | Self::TooManyFields { .. } => {
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
            }
            Self::TransferCoding { .. } => StatusCode::NOT_IMPLEMENTED,
            _ => StatusCode::BAD_REQUEST,
        }
    }

    /// Label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLong { .. } | Self::NameTooLong { .. } => "head_too_long",
            Self::TooManyFields { .. } => "too_many_fields",
            Self::BareLf { .. } => "bare_lf",
            Self::BareCr { .. } => "bare_cr",
            Self::Control { .. } => "control_character",
            Self::FoldedLine { .. } => "folded_line",
            Self::BlankBeforeColon { .. } => "blank_before_colon",
            Self::FieldLine { .. } => "field_line",
            Self::ContentLength { .. } => "content_length",
            Self::ContentLengthRepeated { .. } => "content_length_repeated",
            Self::LengthAndEncoding { .. } => "length_and_encoding",
            Self::TransferEncoding { .. } => "transfer_encoding",
            Self::TransferCoding { .. } => "transfer_coding",
            Self::TransferEncodingInHttp10 { .. } => "transfer_encoding_in_http10",
        }
    }
}

/// Finds the end of a head as its bytes arrive, inspecting each byte once.
///
/// Lines must end with CR LF. RFC 9112 §2.2 allows a bare LF, but if the next hop reads it differently, requests can be
/// smuggled.
#[derive(Debug, Default)]
pub(super) struct HeadEnd {
    /// Number of bytes inspected.
    seen: usize,
    /// Offset of the current line.
    line: usize,
    previous: u8,
}

impl HeadEnd {
    /// The length of the head at the start of `buf`, including its blank line; `None` if the end has not arrived. Each
    /// call must pass the bytes of the previous calls, followed by new ones.
    pub(super) fn find(&mut self, buf: &[u8]) -> Result<Option<usize>, HeadError> {
        while let Some(&byte) = buf.get(self.seen) {
            let (at, line) = (self.seen, self.line);
            match byte {
                b'\n' if self.previous != b'\r' => return Err(HeadError::BareLf { line: shown(&buf[line..at]) }),
                b'\n' if at == line + 1 => return Ok(Some(at + 1)),
                b'\n' => self.line = at + 1,
                _ if self.previous == b'\r' => return Err(HeadError::BareCr { line: shown(&buf[line..at - 1]) }),
                b'\t' | b'\r' => {}
                0..0x20 | 0x7f => return Err(HeadError::Control { byte, line: shown(&buf[line..at]) }),
                _ => {}
            }
            self.previous = byte;
            self.seen += 1;
            #[cfg(test)]
            tests::count();
        }
        Ok(None)
    }
}

/// The first line of a complete head.
pub(super) fn start_line(head: &[u8]) -> &[u8] {
    lines(head).next().unwrap_or_default()
}

/// The head as HTTP/1.1, if its version, at this offset, is HTTP/1 with a higher minor version (RFC 9110 §2.5). httparse does not read
/// those.
pub(super) fn as_http11(head: &[u8], version: usize) -> Option<Vec<u8>> {
    let minor = version + b"HTTP/1.".len();
    let is_higher =
        head.get(version..=minor)?.strip_prefix(b"HTTP/1.").is_some_and(|minor| matches!(minor, [b'2'..=b'9']));
    is_higher.then(|| {
        let mut known = head.to_vec();
        known[minor] = b'1';
        known
    })
}

/// The first malformed field line of a complete head; `None` if all are well formed.
pub(super) fn field_fault(head: &[u8]) -> Option<HeadError> {
    lines(head).skip(1).take_while(|line| !line.is_empty()).find_map(|line| {
        let name = line.split(|&b| b == b':').next().unwrap_or_default();
        let blank = |b: &u8| matches!(b, b' ' | b'\t');
        if line.first().is_some_and(blank) {
            Some(HeadError::FoldedLine { line: shown(line) })
        } else if name.len() < line.len() && name.last().is_some_and(blank) {
            Some(HeadError::BlankBeforeColon { line: shown(line) })
        } else if name.len() < line.len() && name.len() > LONGEST_NAME {
            Some(HeadError::NameTooLong { limit: LONGEST_NAME })
        } else if name.len() == line.len() || HeaderName::from_bytes(name).is_err() {
            Some(HeadError::FieldLine { line: shown(line) })
        } else {
            None
        }
    })
}

fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    head.split(|&b| b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

/// The fields as a map, in their order.
pub(super) fn fields(parsed: &[httparse::Header<'_>], limit: usize) -> Result<HeaderMap, HeadError> {
    // Leaves room for the fields that forwarding adds.
    let mut map = HeaderMap::try_with_capacity(parsed.len() + 8).map_err(|_| HeadError::TooManyFields { limit })?;
    for field in parsed {
        if field.name.len() > LONGEST_NAME {
            return Err(HeadError::NameTooLong { limit: LONGEST_NAME });
        }
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_bytes(field.value);
        let (Ok(name), Ok(value)) = (name, value) else {
            return Err(HeadError::FieldLine { line: shown(&[field.name.as_bytes(), b": ", field.value].concat()) });
        };
        map.try_append(name, value).map_err(|_| HeadError::TooManyFields { limit })?;
    }
    Ok(map)
}

/// The body length declared by the fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Declared {
    #[default]
    Nothing,
    Length(u64),
    Chunked,
}

/// The declared length of a request body (RFC 9112 §6.1 to §6.3), if it is unambiguous.
///
/// Stricter than the RFC, which lets a recipient prefer Transfer-Encoding over Content-Length and merge equal lengths.
pub(super) fn declared(headers: &HeaderMap, version: Version) -> Result<Declared, HeadError> {
    declared_with(headers, version, length)
}

/// Like [`declared`], for a response: a repeated equal length counts as one (RFC 9110 §8.6).
pub(super) fn declared_by_response(headers: &HeaderMap, version: Version) -> Result<Declared, HeadError> {
    declared_with(headers, version, repeated_length)
}

fn declared_with(
    headers: &HeaderMap,
    version: Version,
    length: fn(&[u8]) -> Result<u64, HeadError>,
) -> Result<Declared, HeadError> {
    let encoded = headers.contains_key(header::TRANSFER_ENCODING);
    let found = joined(headers, &header::TRANSFER_ENCODING);
    if encoded && headers.contains_key(header::CONTENT_LENGTH) {
        Err(HeadError::LengthAndEncoding { found: shown(&found) })
    } else if encoded && version == Version::HTTP_10 {
        Err(HeadError::TransferEncodingInHttp10 { found: shown(&found) })
    } else if encoded {
        chunked(&found).map(|()| Declared::Chunked)
    } else if headers.contains_key(header::CONTENT_LENGTH) {
        length(&joined(headers, &header::CONTENT_LENGTH)).map(Declared::Length)
    } else {
        Ok(Declared::Nothing)
    }
}

fn length(value: &[u8]) -> Result<u64, HeadError> {
    if value.contains(&b',') {
        return Err(HeadError::ContentLengthRepeated { found: shown(value) });
    }
    // `parse` alone would accept a plus sign.
    let digits = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
    let length = digits.and_then(|text| text.parse().ok());
    length.ok_or_else(|| HeadError::ContentLength { found: shown(value) })
}

/// A single length, or a list of equal ones.
fn repeated_length(value: &[u8]) -> Result<u64, HeadError> {
    let mut lengths = value.split(|&b| b == b',').map(|part| length(part.trim_ascii()));
    let first = lengths.next().unwrap_or_else(|| length(value))?;
    for other in lengths {
        if other? != first {
            return Err(HeadError::ContentLengthRepeated { found: shown(value) });
        }
    }
    Ok(first)
}

fn chunked(value: &[u8]) -> Result<(), HeadError> {
    if value.eq_ignore_ascii_case(b"chunked") {
        return Ok(());
    }
    let codings: Vec<&[u8]> = value.split(|&b| b == b',').map(<[u8]>::trim_ascii).collect();
    let is_chunked = |coding: &&[u8]| coding.eq_ignore_ascii_case(b"chunked");
    let well_formed = codings.iter().all(|coding| !coding.is_empty());
    // RFC 9112 §6.1: chunked is applied exactly once, as the last coding. Other codings before it are not implemented.
    if well_formed && codings.iter().position(is_chunked) == Some(codings.len() - 1) {
        Err(HeadError::TransferCoding { found: shown(value) })
    } else {
        Err(HeadError::TransferEncoding { found: shown(value) })
    }
}

/// All values of a field as one list (RFC 9110 §5.3).
pub(super) fn joined(headers: &HeaderMap, name: &HeaderName) -> Vec<u8> {
    let values: Vec<&[u8]> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    values.join(&b", "[..])
}

/// The protocols that the sender wants to switch to (RFC 9110 §7.8), as one list, if Connection names the field. None in
/// HTTP/1.0.
pub(super) fn upgrade(headers: &HeaderMap, version: Version) -> Option<HeaderValue> {
    let offers = version == Version::HTTP_11 && has_option(headers, "upgrade");
    offers.then(|| protocols(headers)).flatten()
}

/// All values of Upgrade as one list; `None` if it names nothing.
pub(super) fn protocols(headers: &HeaderMap) -> Option<HeaderValue> {
    let list = joined(headers, &header::UPGRADE);
    elements(&list).next()?;
    HeaderValue::from_bytes(&list).ok()
}

/// The elements of a list. Empty ones mean nothing (RFC 9110 §5.6.1).
pub fn elements(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}

/// Whether the sender allows the connection to be reused (RFC 9112 §9.3).
pub(super) fn keep_alive(headers: &HeaderMap, version: Version) -> bool {
    !has_option(headers, "close") && (version != Version::HTTP_10 || has_option(headers, "keep-alive"))
}

fn has_option(headers: &HeaderMap, option: &str) -> bool {
    elements(&joined(headers, &header::CONNECTION)).any(|found| found.eq_ignore_ascii_case(option.as_bytes()))
}

/// Wire bytes for a log line or an error body: escaped, and cut after 80 bytes.
pub(super) fn shown(bytes: &[u8]) -> String {
    const MOST: usize = 80;
    let cut = &bytes[..bytes.len().min(MOST)];
    format!("{}{}", cut.escape_ascii(), if bytes.len() > MOST { "..." } else { "" })
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        static LOOKED_AT: Cell<usize> = const { Cell::new(0) };
    }

    /// Counts a byte inspected by [`HeadEnd::find`] on this thread.
    pub(super) fn count() {
        LOOKED_AT.set(LOOKED_AT.get() + 1);
    }

    /// The number of bytes inspected since the last call.
    pub(in crate::http) fn looked_at() -> usize {
        LOOKED_AT.take()
    }

    #[test]
    fn head_end_in_single_bytes_is_found_at_the_same_offset() {
        let wire = b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET";
        let mut find = HeadEnd::default();
        let found = (0..=wire.len()).find_map(|cut| find.find(&wire[..cut]).unwrap());
        assert_eq!(found, Some(wire.len() - 3));
        assert_eq!(HeadEnd::default().find(wire), Ok(found));
    }
}
