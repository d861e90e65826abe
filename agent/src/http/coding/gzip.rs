//! The gzip decoder (RFC 1952), for any number of concatenated members. Checks their checksums.

use std::io::{self, BufRead, Read};

use bytes::{Buf as _, BytesMut};
use flate2::bufread::MultiGzDecoder;

use super::{Fault, Share, Stage, StageStep};

pub(super) struct Gzip(MultiGzDecoder<Input>);

/// Input that has not been read.
#[derive(Default)]
struct Input {
    bytes: BytesMut,
    ended: bool,
}

impl Gzip {
    pub(super) fn new() -> Self {
        Self(MultiGzDecoder::new(Input::default()))
    }
}

impl Stage for Gzip {
    fn push(&mut self, input: &[u8]) {
        self.0.get_mut().bytes.extend_from_slice(input);
    }

    fn end(&mut self) {
        self.0.get_mut().ended = true;
    }

    fn step(&mut self, out: &mut [u8], _share: &mut Share) -> Result<StageStep, Fault> {
        match self.0.read(out) {
            Ok(0) => Ok(StageStep::End),
            Ok(length) => Ok(StageStep::Output(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(StageStep::Input),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Fault::Truncated),
            Err(error) => Err(Fault::corrupt(error)),
        }
    }
}

impl Read for Input {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.len().min(out.len());
        self.bytes.copy_to_slice(&mut out[..length]);
        Ok(length)
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.bytes.is_empty() && !self.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(&self.bytes)
    }

    fn consume(&mut self, amount: usize) {
        self.bytes.advance(amount);
    }
}
