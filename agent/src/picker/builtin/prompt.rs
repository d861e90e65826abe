//! A request as the built-in picker sees it: its session and a chain of hashes of its body. The n-th hash covers the first n
//! blocks, so two requests share as many hashes as leading blocks. Only the first [`MAX_BLOCKS`] complete blocks count.

use std::hash::{DefaultHasher, Hasher};

use super::SessionHash;

/// Bytes per block: about 64 tokens, or a few blocks of a model server's prefix cache.
pub(super) const BLOCK: usize = 256;
/// Most blocks: with [`BLOCK`], the first 16 KiB of a body, which distinguish conversations.
pub(super) const MAX_BLOCKS: usize = 64;

/// The hashes are valid within one process only, because they differ between builds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromptHash {
    /// Shortest prefix first.
    pub(super) blocks: Vec<u64>,
    pub(super) session: Option<SessionHash>,
}

impl PromptHash {
    /// The hash of a request without a body, which has no affinity.
    pub fn none() -> Self {
        Self::default()
    }

    /// The same prompt with a session, which takes precedence over the prefix.
    #[must_use]
    pub fn with_session(self, session: Option<SessionHash>) -> Self {
        Self { session, ..self }
    }
}

/// Computes a [`PromptHash`] from slices of any size.
#[derive(Debug, Clone, Default)]
pub struct PromptHasher {
    hasher: DefaultHasher,
    /// Bytes in the incomplete block.
    filled: usize,
    hash: PromptHash,
}

impl PromptHasher {
    /// A hasher at the start of a body.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next bytes of the body.
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

    /// Returns the hash of the bytes so far.
    pub fn finish(self) -> PromptHash {
        self.hash
    }
}
