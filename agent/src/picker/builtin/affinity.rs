//! Remembers which endpoint last got a prefix, in a table of fixed size, so that neither memory nor the time under the lock depends
//! on traffic. The table is 4-way set-associative and evicts the least recently used entry of a set.

use super::prompt::PromptHash;

const SETS: usize = 16384;
const WAYS: usize = 4;

#[derive(Debug, Clone, Copy, Default)]
struct PrefixEntry {
    hash: u64,
    /// The endpoint's id in its set.
    endpoint: u32,
    /// The pick that used the entry last. 0 means that the entry is empty.
    used: u32,
}

#[derive(Debug)]
pub(super) struct Affinity {
    /// 1 MiB.
    sets: Box<[[PrefixEntry; WAYS]]>,
    clock: u32,
}

impl Affinity {
    pub(super) fn new() -> Self {
        Self { sets: vec![[PrefixEntry::default(); WAYS]; SETS].into_boxed_slice(), clock: 0 }
    }

    /// The endpoint that knows the longest prefix of `prompt`, among those for which `suits` is true.
    pub(super) fn longest(&self, prompt: &PromptHash, suits: impl Fn(u32) -> bool) -> Option<u32> {
        prompt.blocks.iter().rev().filter_map(|&hash| self.get(hash)).find(|&endpoint| suits(endpoint))
    }

    /// Records that `endpoint` gets `prompt`.
    pub(super) fn learn(&mut self, prompt: &PromptHash, endpoint: u32) {
        // When the clock wraps, some recent entries look old for a while, which is harmless.
        self.clock = self.clock.wrapping_add(1).max(1);
        for &hash in &prompt.blocks {
            let set = &mut self.sets[set_of(hash)];
            let known = set.iter().position(|entry| entry.used != 0 && entry.hash == hash);
            let oldest = || (0..WAYS).min_by_key(|&way| set[way].used).unwrap_or(0);
            let way = known.unwrap_or_else(oldest);
            set[way] = PrefixEntry { hash, endpoint, used: self.clock };
        }
    }

    fn get(&self, hash: u64) -> Option<u32> {
        self.sets[set_of(hash)].iter().find(|entry| entry.used != 0 && entry.hash == hash).map(|entry| entry.endpoint)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.sets.iter().flatten().filter(|entry| entry.used != 0).count()
    }
}

#[cfg(test)]
pub(super) const CAPACITY: usize = SETS * WAYS;

fn set_of(hash: u64) -> usize {
    hash as usize % SETS
}
