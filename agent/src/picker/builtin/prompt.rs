//! What the built-in picker knows of a request: its session, and what its body begins with as a chain of hashes: the n-th covers the first n blocks, so that two requests share as
//! many hashes as they share leading blocks. Only whole blocks count, and only the first [`MAX_BLOCKS`].

use std::hash::{DefaultHasher, Hasher};

use super::SessionHash;

/// Bytes in a block: about 64 tokens, a few blocks of a model server's prefix cache.
pub(super) const BLOCK: usize = 256;
/// With [`BLOCK`]: the first 16 KiB of a body tell conversations apart.
pub(super) const MAX_BLOCKS: usize = 64;

/// Hashes within one process only: they are not stable over builds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromptHash {
    /// Shortest prefix first.
    pub(super) blocks: Vec<u64>,
    pub(super) session: Option<SessionHash>,
}

impl PromptHash {
    /// Of a request without a body: no affinity.
    pub fn none() -> Self {
        Self::default()
    }

    /// The same prompt of this session, which goes before what the prompt begins with.
    #[must_use]
    pub fn of(self, session: Option<SessionHash>) -> Self {
        Self { session, ..self }
    }
}

/// Takes the body in slices of any size.
#[derive(Debug, Clone, Default)]
pub struct PromptHasher {
    hasher: DefaultHasher,
    /// Bytes in the block that is not whole yet.
    filled: usize,
    hash: PromptHash,
}

impl PromptHasher {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.hash.blocks.len() < MAX_BLOCKS {
            let (block, rest) = bytes.split_at(bytes.len().min(BLOCK - self.filled));
            self.hasher.write(block);
            self.filled += block.len();
            if self.filled == BLOCK {
                self.filled = 0;
                self.hash.blocks.push(self.hasher.finish());
            }
            bytes = rest;
        }
    }

    pub fn finish(self) -> PromptHash {
        self.hash
    }
}
