//! loom's atomic as the word of the slots. Unordered accesses are relaxed.

use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[derive(Default)]
pub struct Word(AtomicU64);

impl Word {
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    pub fn atomic(&self) -> &AtomicU64 {
        &self.0
    }
}
