//! The brotli decoder (RFC 7932), without the large-window extension.

use brotli_decompressor::{BrotliDecompressStream, BrotliResult, BrotliState, StandardAlloc};
use bytes::{Buf as _, BytesMut};

use super::{Fault, Share, Stage, StageStep};

type DecoderState = BrotliState<StandardAlloc, StandardAlloc, StandardAlloc>;

pub(super) struct Brotli {
    input: BytesMut,
    over: bool,
    /// Created once the window size is known.
    state: Option<Box<DecoderState>>,
    total: usize,
    complete: bool,
}

impl Brotli {
    pub(super) fn new() -> Self {
        Self { input: BytesMut::new(), over: false, state: None, total: 0, complete: false }
    }
}

/// The window size in bytes, from the first byte of the stream (RFC 7932 §9.1).
fn window(first: u8) -> u64 {
    let bits = match (first & 1, first >> 1 & 7, first >> 4 & 7) {
        (0, ..) => 16,
        (_, 0, 0) => 17,
        (_, 0, less) => 8 + less,
        (_, more, _) => 17 + more,
    };
    1 << bits
}

impl Stage for Brotli {
    fn push(&mut self, input: &[u8]) {
        self.input.extend_from_slice(input);
    }

    fn end(&mut self) {
        self.over = true;
    }

    fn step(&mut self, out: &mut [u8], share: &mut Share) -> Result<StageStep, Fault> {
        if self.complete {
            return match (self.input.is_empty(), self.over) {
                (true, true) => Ok(StageStep::End),
                (true, false) => Ok(StageStep::Input),
                (false, _) => Err(Fault::corrupt("data after the end of the stream")),
            };
        }
        if self.state.is_none() {
            let Some(&first) = self.input.first() else {
                return if self.over { Err(Fault::Truncated) } else { Ok(StageStep::Input) };
            };
            if !share.grow(window(first)) {
                return Err(Fault::NoRoom);
            }
            let alloc = StandardAlloc::default;
            self.state = Some(Box::new(DecoderState::new_strict(alloc(), alloc(), alloc())));
        }
        let Some(state) = &mut self.state else { return Ok(StageStep::Input) };
        let (mut left, mut used, mut room, mut given) = (self.input.len(), 0, out.len(), 0);
        let result = BrotliDecompressStream(
            &mut left,
            &mut used,
            &self.input,
            &mut room,
            &mut given,
            out,
            &mut self.total,
            state,
        );
        self.input.advance(used);
        self.complete = matches!(result, BrotliResult::ResultSuccess);
        match result {
            BrotliResult::ResultFailure => Err(Fault::corrupt("invalid brotli data")),
            _ if given > 0 => Ok(StageStep::Output(given)),
            BrotliResult::ResultSuccess => self.step(out, share),
            BrotliResult::NeedsMoreInput if self.over => Err(Fault::Truncated),
            BrotliResult::NeedsMoreInput => Ok(StageStep::Input),
            BrotliResult::NeedsMoreOutput => Err(Fault::corrupt("the decoder made no progress")),
        }
    }
}
