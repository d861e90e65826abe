//! A request's head and body. Bodies are hashed as they arrive, and kept only for the completions API.

use crate::content::Fnv;
use crate::decoder::{Decoder, Framed};

use super::plan::Echo;

/// Maximum size of a head in bytes.
pub(super) const MAX_HEAD: usize = 256 << 10;

pub(super) struct Request {
    pub(super) echo: Echo,
    /// Empty unless the target belongs to the completions API.
    pub(super) body: Vec<u8>,
    pub(super) keep_alive: bool,
    pub(super) expects_continue: bool,
    decoder: Decoder,
    hash: Fnv,
}

impl Request {
    /// Parses a head at the start of `bytes`: returns the request and the head's length, `None` while it is incomplete, or an error
    /// text if it is malformed.
    pub(super) fn parse(bytes: &[u8], count: u64) -> Result<Option<(Self, usize)>, String> {
        let mut headers = [httparse::EMPTY_HEADER; 256];
        let mut parsed = httparse::Request::new(&mut headers);
        let len = match parsed.parse(bytes).map_err(|error| error.to_string())? {
            httparse::Status::Complete(len) => len,
            httparse::Status::Partial if bytes.len() > MAX_HEAD => return Err("head too large".to_owned()),
            httparse::Status::Partial => return Ok(None),
        };
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        let mut echo = Echo {
            method: parsed.method.unwrap_or_default().to_owned(),
            target: parsed.path.unwrap_or_default().to_owned(),
            headers: parsed.headers.iter().map(|header| (header.name.to_owned(), text(header.value))).collect(),
            body_framing: String::new(),
            body_length: 0,
            body_hash: 0,
            trailers: Vec::new(),
            count,
        };
        let has = |name: &str, token: &str| {
            let value = echo.header(name).unwrap_or_default();
            value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token))
        };
        let keep_alive = match parsed.version {
            Some(1) => !has("connection", "close"),
            _ => has("connection", "keep-alive"),
        };
        let expects_continue = has("expect", "100-continue");
        let (framed, name) = match (echo.header("transfer-encoding"), echo.header("content-length")) {
            (Some(_), Some(_)) => return Err("both transfer-encoding and content-length".to_owned()),
            (Some(coding), None) if coding.eq_ignore_ascii_case("chunked") => (Framed::Chunked, "chunked"),
            (Some(coding), None) => return Err(format!("transfer-encoding {coding}")),
            (None, Some(length)) => {
                let length = length.parse().map_err(|_| format!("content-length {length:?}"))?;
                (Framed::Length(length), "content-length")
            }
            (None, None) => (Framed::Nothing, "none"),
        };
        echo.body_framing = name.to_owned();
        let decoder = Decoder::new(framed);
        let request = Self { echo, body: Vec::new(), keep_alive, expects_continue, decoder, hash: Fnv::default() };
        Ok(Some((request, len)))
    }

    pub(super) fn complete(&self) -> bool {
        self.decoder.complete()
    }

    /// Consumes bytes of the body; returns how many.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<usize, String> {
        let kept = self.echo.target.starts_with("/v1/").then_some(&mut self.body);
        let (hash, length) = (&mut self.hash, &mut self.echo.body_length);
        let mut kept = kept;
        let taken = self.decoder.decode(bytes, |payload| {
            hash.update(payload);
            *length += payload.len() as u64;
            if let Some(body) = &mut kept {
                body.extend_from_slice(payload);
            }
        });
        let taken = taken.map_err(|error| error.to_string())?;
        if self.decoder.complete() {
            self.echo.body_hash = self.hash.value();
            self.echo.trailers = self.decoder.trailers().to_vec();
        }
        Ok(taken)
    }

    /// The target without its query.
    pub(super) fn path(&self) -> &str {
        self.echo.target.split('?').next().unwrap_or_default()
    }
}
