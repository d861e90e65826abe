//! The `deflate` decoder. RFC 9110 §8.4.1.2 defines it as zlib format (RFC 1950), but some senders omit the zlib header
//! (RFC 1951). The first two bytes tell the formats apart.

use bytes::{Buf as _, BytesMut};
use flate2::{Decompress, FlushDecompress, Status};

use super::{Fault, Share, Stage, StageStep};

pub(super) struct Inflate {
    input: BytesMut,
    over: bool,
    /// Created once the format is known.
    state: Option<Decompress>,
    complete: bool,
}

impl Inflate {
    pub(super) fn new() -> Self {
        Self { input: BytesMut::new(), over: false, state: None, complete: false }
    }
}

impl Stage for Inflate {
    fn push(&mut self, input: &[u8]) {
        self.input.extend_from_slice(input);
    }

    fn end(&mut self) {
        self.over = true;
    }

    fn step(&mut self, out: &mut [u8], _share: &mut Share) -> Result<StageStep, Fault> {
        if self.state.is_none() {
            let [first, second, ..] = self.input[..] else {
                return if self.over { Err(Fault::Truncated) } else { Ok(StageStep::Input) };
            };
            let zlib = first & 0x0f == 8 && first >> 4 <= 7 && u16::from_be_bytes([first, second]).is_multiple_of(31);
            self.state = Some(Decompress::new(zlib));
        }
        loop {
            if self.complete {
                return match (self.input.is_empty(), self.over) {
                    (true, true) => Ok(StageStep::End),
                    (true, false) => Ok(StageStep::Input),
                    (false, _) => Err(Fault::corrupt("data after the end of the stream")),
                };
            }
            let Some(state) = &mut self.state else { return Ok(StageStep::Input) };
            let (before_in, before_out) = (state.total_in(), state.total_out());
            let status = state.decompress(&self.input, out, FlushDecompress::None).map_err(Fault::corrupt)?;
            let (used, given) = (state.total_in() - before_in, (state.total_out() - before_out) as usize);
            self.input.advance(used as usize);
            self.complete = status == Status::StreamEnd;
            if given > 0 {
                return Ok(StageStep::Output(given));
            }
            if self.complete || used > 0 && !self.input.is_empty() {
                continue;
            }
            return if self.over && self.input.is_empty() { Err(Fault::Truncated) } else { Ok(StageStep::Input) };
        }
    }
}
