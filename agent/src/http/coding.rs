//! Content codings of request bodies (RFC 9110 §8.4), taken off so that a body can be looked at. The body itself goes on as it is.
//!
//! [`Codings`] is what the head says. A [`Decoder`] is given the body's bytes as they come and gives pieces of what they stand for,
//! each of at most [`PIECE`] bytes, so that nobody decodes for long at a time. What decoding may cost is bounded: the decoded bytes
//! by a limit, the windows of the codings by a budget, their number by [`MOST`].

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

/// Largest piece that a decoder gives.
pub const PIECE: usize = 32 * 1024;
/// More codings than this on one body are not taken off.
const MOST: usize = 3;
/// What RFC 9659 lets a zstd coding ask for; brotli has 16 MiB at most, and deflate 32 KiB.
const LARGEST_WINDOW: u64 = 8 << 20;
/// What a decoder takes besides its window.
const STATE: u64 = 64 * 1024;

/// The value of `Accept-Encoding` that tells a client what is understood.
pub const ACCEPTED: &str = "gzip, deflate, br, zstd";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodingError {
    #[error("found Content-Encoding \"{found}\", expected {ACCEPTED}, or {MOST} of them at most")]
    Unsupported { found: String },
    #[error("the body is not what Content-Encoding \"{coding}\" says: {reason}")]
    Corrupt { coding: &'static str, reason: String },
    #[error("the body ends inside Content-Encoding \"{coding}\"")]
    Truncated { coding: &'static str },
    #[error("the decoded body is larger than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("there is no room in memory to decode the body")]
    NoRoom,
}

/// How a body is coded, outermost coding last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Codings {
    Known(Vec<Coding>),
    /// The field.
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
    /// Of a body with this head. `identity` and what is empty are no codings.
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

/// What one call of a stage came to.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// So many bytes of output, more than 0.
    Output(usize),
    /// All input is used up, and the stream goes on.
    Input,
    /// The stream is complete, and so is the input.
    End,
}

/// Why a stage cannot go on.
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

/// One coding being taken off: bytes in with [`push`](Self::push), bytes out with [`step`](Self::step).
trait Stage {
    fn push(&mut self, input: &[u8]);
    /// Nothing more is pushed.
    fn end(&mut self);
    /// `out` is [`PIECE`] bytes long. Takes what it needs for its window from `share`, once it knows.
    fn step(&mut self, out: &mut [u8], share: &mut Share) -> Result<Step, Fault>;
}

pub struct Decoder {
    /// In the order in which they are taken off: the last coding that was put on comes first.
    stages: Vec<(Coding, Box<dyn Stage>)>,
    share: Share,
    limit: u64,
    /// Bytes that stages have given, all of them together.
    decoded: u64,
    /// How many of the stages, from the first, have been told that their input is over.
    ended: usize,
    out: Vec<u8>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("decoded", &self.decoded).finish_non_exhaustive()
    }
}

impl Decoder {
    /// For a body with these codings, at least one; it may become `limit` bytes long. Windows count against `memory`.
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

    /// The next bytes of the body.
    pub fn push(&mut self, bytes: &[u8]) {
        self.stages[0].1.push(bytes);
    }

    /// The body is complete. What there still is to decode comes with [`step`](Self::step), and then it is an error if that was
    /// not all of it.
    pub fn end(&mut self) {
        self.stages[0].1.end();
        self.ended = self.ended.max(1);
    }

    /// The next piece, of 1 to [`PIECE`] bytes; `None` when it takes more input to have one, or the body is complete.
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
                Step::Output(length) => {
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
                Step::End if at == last => return Ok(None),
                Step::End => {
                    at += 1;
                    if self.ended == at {
                        self.stages[at].1.end();
                        self.ended += 1;
                    }
                }
                Step::Input if at > 0 && self.ended <= at => at -= 1,
                Step::Input => return Ok(None),
            }
        }
    }
}
