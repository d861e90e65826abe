//! Decodes the content codings of request bodies (RFC 9110 §8.4), so that a body can be inspected. The body itself is
//! forwarded unchanged.
//!
//! [`Codings`] is what the head declares. A [`Decoder`] takes the body's bytes as they arrive and returns decoded
//! pieces of at most [`PIECE`] bytes, so that no call runs for long. The cost is bounded: decoded bytes by a limit,
//! windows by a budget, the number of codings by `MOST`.

mod brotli;
mod gzip;
mod inflate;
#[cfg(test)]
mod tests;
mod zstd;

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, header};

use self::{brotli::Brotli, gzip::Gzip, inflate::Inflate, zstd::Zstd};
use super::head::{joined, shown};
use crate::budget::{Budget, Share};

/// Largest piece that a decoder returns, in bytes.
pub const PIECE: usize = 32 * 1024;
/// Maximum number of codings on one body.
const MOST: usize = 3;
/// Largest window of a zstd content coding (RFC 9659), in bytes. brotli uses at most 16 MiB, deflate 32 KiB.
const LARGEST_WINDOW: u64 = 8 << 20;
/// Memory of a decoder in addition to its window, in bytes.
const STATE: u64 = 64 * 1024;

/// The value of `Accept-Encoding` that tells a client which codings are supported.
pub const ACCEPTED: &str = "gzip, deflate, br, zstd";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodingError {
    #[error("found Content-Encoding \"{found}\", expected at most {MOST} of {ACCEPTED}")]
    Unsupported { found: String },
    #[error("the body is not valid for Content-Encoding \"{coding}\": {reason}")]
    Corrupt { coding: &'static str, reason: String },
    #[error("the body ends inside Content-Encoding \"{coding}\"")]
    Truncated { coding: &'static str },
    #[error("the decoded body is larger than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("not enough memory to decode the body")]
    NoRoom,
}

/// The codings of a body, in the order in which they were applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Codings {
    Known(Vec<Coding>),
    /// The value of an unsupported header.
    Unknown(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    Gzip,
    Deflate,
    Brotli,
    Zstd,
}

impl Codings {
    /// The codings declared by a head. `identity` and empty elements are ignored.
    pub fn of(headers: &HeaderMap) -> Self {
        let field = joined(headers, &header::CONTENT_ENCODING);
        let mut known = Vec::new();
        for name in field.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
            match name.to_ascii_lowercase().as_slice() {
                b"" | b"identity" => {}
                b"gzip" | b"x-gzip" => known.push(Coding::Gzip),
                b"deflate" => known.push(Coding::Deflate),
                b"br" => known.push(Coding::Brotli),
                b"zstd" => known.push(Coding::Zstd),
                _ => return Self::Unknown(shown(&field)),
            }
        }
        if known.len() > MOST { Self::Unknown(shown(&field)) } else { Self::Known(known) }
    }

    pub fn is_plain(&self) -> bool {
        matches!(self, Self::Known(codings) if codings.is_empty())
    }
}

impl Coding {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
            Self::Brotli => "br",
            Self::Zstd => "zstd",
        }
    }
}

/// The result of one call of a stage.
#[derive(Debug, PartialEq, Eq)]
enum StageStep {
    /// Number of bytes written to the output, more than 0.
    Output(usize),
    /// All input is consumed and the stream continues.
    Input,
    /// The stream and the input are complete.
    End,
}

/// Why a stage failed.
enum Fault {
    Corrupt(String),
    Truncated,
    NoRoom,
}

impl Fault {
    #[expect(clippy::needless_pass_by_value, reason = "as `map_err` calls it")]
    fn corrupt(error: impl ToString) -> Self {
        Self::Corrupt(error.to_string())
    }
}

/// A decoder for one coding: [`push`](Self::push) takes input, [`step`](Self::step) returns output.
trait Stage {
    fn push(&mut self, input: &[u8]);
    /// Marks the end of the input.
    fn end(&mut self);
    /// `out` is [`PIECE`] bytes long. Takes the memory for its window from `share` once the size is known.
    fn step(&mut self, out: &mut [u8], share: &mut Share) -> Result<StageStep, Fault>;
}

pub struct Decoder {
    /// In decoding order: the coding applied last comes first.
    stages: Vec<(Coding, Box<dyn Stage>)>,
    share: Share,
    limit: u64,
    /// Bytes that all stages have returned.
    decoded: u64,
    /// Number of stages, from the first, whose input has been ended.
    ended: usize,
    out: Vec<u8>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("decoded", &self.decoded).finish_non_exhaustive()
    }
}

impl Decoder {
    /// Decodes a body with these codings (at least one) of at most `limit` decoded bytes. Windows count against
    /// `memory`.
    pub fn new(codings: &[Coding], limit: u64, memory: &Arc<Budget>) -> Self {
        let stage = |&coding: &Coding| -> (Coding, Box<dyn Stage>) {
            let stage: Box<dyn Stage> = match coding {
                Coding::Gzip => Box::new(Gzip::new()),
                Coding::Deflate => Box::new(Inflate::new()),
                Coding::Brotli => Box::new(Brotli::new()),
                Coding::Zstd => Box::new(Zstd::new()),
            };
            (coding, stage)
        };
        let stages = codings.iter().rev().map(stage).collect();
        Self { stages, share: memory.share(), limit, decoded: 0, ended: 0, out: Vec::new() }
    }

    /// Adds the next bytes of the body.
    pub fn push(&mut self, bytes: &[u8]) {
        self.stages[0].1.push(bytes);
    }

    /// Marks the body complete. [`step`](Self::step) returns what remains to be decoded, and an error if the body was
    /// truncated.
    pub fn end(&mut self) {
        self.stages[0].1.end();
        self.ended = self.ended.max(1);
    }

    /// Returns the next piece of 1 to [`PIECE`] bytes; `None` if more input is needed or the body is complete.
    pub fn step(&mut self) -> Result<Option<Bytes>, CodingError> {
        if self.out.is_empty() {
            if !self.share.grow(STATE * self.stages.len() as u64) {
                return Err(CodingError::NoRoom);
            }
            self.out = vec![0; PIECE];
        }
        let last = self.stages.len() - 1;
        let mut at = last;
        loop {
            let (coding, stage) = &mut self.stages[at];
            let coding = coding.name();
            let step = stage.step(&mut self.out, &mut self.share).map_err(|fault| match fault {
                Fault::Corrupt(reason) => CodingError::Corrupt { coding, reason },
                Fault::Truncated => CodingError::Truncated { coding },
                Fault::NoRoom => CodingError::NoRoom,
            })?;
            match step {
                StageStep::Output(length) => {
                    self.decoded += length as u64;
                    if self.decoded > self.limit {
                        return Err(CodingError::TooLarge { limit: self.limit });
                    }
                    if at == last {
                        return Ok(Some(Bytes::copy_from_slice(&self.out[..length])));
                    }
                    self.stages[at + 1].1.push(&self.out[..length]);
                    at += 1;
                }
                StageStep::End if at == last => return Ok(None),
                StageStep::End => {
                    at += 1;
                    if self.ended == at {
                        self.stages[at].1.end();
                        self.ended += 1;
                    }
                }
                StageStep::Input if at > 0 && self.ended <= at => at -= 1,
                StageStep::Input => return Ok(None),
            }
        }
    }
}
