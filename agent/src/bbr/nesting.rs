//! Tracks which open brackets are braces: one bit per level, so the depth limit is also the memory limit.

use super::MAX_DEPTH;

#[derive(Debug, Default)]
pub(super) struct Nesting {
    depth: u8,
    /// Bit 0 is the innermost level; set for an object.
    objects: u128,
}

impl Nesting {
    pub(super) fn depth(&self) -> u8 {
        self.depth
    }

    pub(super) fn in_object(&self) -> bool {
        self.objects & 1 == 1
    }

    /// Opens a level. Returns false and opens nothing at the depth limit.
    #[must_use]
    pub(super) fn open(&mut self, object: bool) -> bool {
        if self.depth == MAX_DEPTH {
            return false;
        }
        self.depth += 1;
        self.objects = self.objects << 1 | u128::from(object);
        true
    }

    pub(super) fn close(&mut self) {
        self.depth -= 1;
        self.objects >>= 1;
    }
}
