//! The Zstandard decoder (RFC 8878), for concatenated frames, skippable frames included. Windows are limited as RFC
//! 9659 requires. `ruzstd` needs a complete block before it decodes it; a block is at most 128 KiB.

use std::io::Read as _;

use bytes::{Buf as _, BytesMut};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::{Fault, LARGEST_WINDOW, Share, Stage, StageStep};

const MAGIC: u32 = 0xfd2f_b528;
/// The last four bits are arbitrary.
const SKIPPABLE: u32 = 0x184d_2a50;
const LARGEST_BLOCK: usize = 128 << 10;

pub(super) struct Zstd {
    input: BytesMut,
    over: bool,
    decoder: FrameDecoder,
    state: ZstdState,
    /// Memory taken for the window, in bytes.
    window: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ZstdState {
    /// Before a frame.
    Between {
        any: bool,
    },
    /// Bytes left of a skippable frame.
    Skipping(u64),
    Blocks {
        checksum: bool,
    },
    /// The last block has been decoded but not returned completely.
    Draining {
        checksum: bool,
    },
}

impl Zstd {
    pub(super) fn new() -> Self {
        let state = ZstdState::Between { any: false };
        Self { input: BytesMut::new(), over: false, decoder: FrameDecoder::new(), state, window: 0 }
    }

    /// Reads a frame header. Returns false if it is incomplete.
    fn begin(&mut self, share: &mut Share) -> Result<bool, Fault> {
        let Some(&[a, b, c, d]) = self.input.first_chunk() else { return Ok(false) };
        let magic = u32::from_le_bytes([a, b, c, d]);
        if magic & !0xf == SKIPPABLE {
            let Some(&[.., a, b, c, d]) = self.input.first_chunk::<8>() else { return Ok(false) };
            self.input.advance(8);
            self.state = ZstdState::Skipping(u32::from_le_bytes([a, b, c, d]).into());
            return Ok(true);
        }
        if magic != MAGIC {
            return Err(Fault::corrupt("no frame magic number found"));
        }
        let Some(&descriptor) = self.input.get(4) else { return Ok(false) };
        let (single, checksum) = (descriptor & 0x20 != 0, descriptor & 4 != 0);
        let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let size = [usize::from(single), 2, 4, 8][usize::from(descriptor >> 6)];
        let at_size = 5 + usize::from(!single) + dictionary;
        let length = at_size + size;
        if self.input.len() < length {
            return Ok(false);
        }
        let window = if single {
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(&self.input[at_size..length]);
            u64::from_le_bytes(bytes) + if size == 2 { 256 } else { 0 }
        } else {
            let base = 1_u64 << (10 + (self.input[5] >> 3));
            base + base / 8 * u64::from(self.input[5] & 7)
        };
        if window > LARGEST_WINDOW {
            return Err(Fault::Corrupt(format!(
                "it needs a window of {window} bytes, more than the allowed {LARGEST_WINDOW}"
            )));
        }
        // The decoder holds one more block and may allocate twice as much while it grows.
        let wanted = 2 * (window + LARGEST_BLOCK as u64);
        if wanted > self.window {
            if !share.grow(wanted - self.window) {
                return Err(Fault::NoRoom);
            }
            self.window = wanted;
        }
        self.decoder.reset(&self.input[..length]).map_err(Fault::corrupt)?;
        self.input.advance(length);
        self.state = ZstdState::Blocks { checksum };
        Ok(true)
    }

    /// Decodes the next block. Returns false if it is incomplete.
    fn block(&mut self, checksum: bool) -> Result<bool, Fault> {
        let Some(&[a, b, c]) = self.input.first_chunk() else { return Ok(false) };
        let header = u32::from_le_bytes([a, b, c, 0]);
        let (last, kind, size) = (header & 1 != 0, header >> 1 & 3, (header >> 3) as usize);
        if size > LARGEST_BLOCK {
            return Err(Fault::corrupt("a block is larger than 128 KiB"));
        }
        // An RLE block stores a single byte.
        let content = if kind == 1 { 1 } else { size };
        let whole = 3 + content + if last && checksum { 4 } else { 0 };
        let Some(mut block) = self.input.get(..whole) else { return Ok(false) };
        self.decoder.decode_blocks(&mut block, BlockDecodingStrategy::UptoBlocks(1)).map_err(Fault::corrupt)?;
        self.input.advance(whole);
        if last {
            self.state = ZstdState::Draining { checksum };
        }
        Ok(true)
    }
}

impl Stage for Zstd {
    fn push(&mut self, input: &[u8]) {
        self.input.extend_from_slice(input);
    }

    fn end(&mut self) {
        self.over = true;
    }

    fn step(&mut self, out: &mut [u8], share: &mut Share) -> Result<StageStep, Fault> {
        loop {
            let goes_on = match self.state {
                ZstdState::Between { any } if self.input.is_empty() => {
                    return if self.over && any { Ok(StageStep::End) } else { self.starved() };
                }
                ZstdState::Between { .. } => self.begin(share)?,
                ZstdState::Skipping(left) => {
                    let skipped = left.min(self.input.len() as u64);
                    self.input.advance(skipped as usize);
                    let left = left - skipped;
                    self.state = if left == 0 { ZstdState::Between { any: true } } else { ZstdState::Skipping(left) };
                    left == 0
                }
                ZstdState::Blocks { checksum } => {
                    // Returns bytes older than the window first, so that at most one block is held in addition to it.
                    let given = self.decoder.read(out).map_err(Fault::corrupt)?;
                    if given > 0 {
                        return Ok(StageStep::Output(given));
                    }
                    self.block(checksum)?
                }
                ZstdState::Draining { checksum } => {
                    let given = self.decoder.read(out).map_err(Fault::corrupt)?;
                    if given > 0 {
                        return Ok(StageStep::Output(given));
                    }
                    if checksum && self.decoder.get_checksum_from_data() != self.decoder.get_calculated_checksum() {
                        return Err(Fault::corrupt("wrong checksum"));
                    }
                    self.state = ZstdState::Between { any: true };
                    true
                }
            };
            if !goes_on {
                return self.starved();
            }
        }
    }
}

impl Zstd {
    fn starved(&self) -> Result<StageStep, Fault> {
        if self.over { Err(Fault::Truncated) } else { Ok(StageStep::Input) }
    }
}
