//! Generates the lengths of a plan.

use super::plan::Lengths;
use crate::random::Random;

/// The lengths that a [`Lengths`] describes, each at least one.
pub(crate) struct Sequence {
    lengths: Lengths,
    random: Random,
}

impl Sequence {
    pub(crate) fn new(lengths: Lengths) -> Self {
        let seed = if let Lengths::Random { seed, .. } = lengths { seed } else { 0 };
        Self { lengths, random: Random::new(seed) }
    }

    pub(crate) fn next(&mut self) -> u64 {
        match self.lengths {
            Lengths::Fixed(n) => n.max(1),
            Lengths::Random { max, .. } => 1 + self.random.below(max),
            Lengths::OneByte => 1,
        }
    }
}
