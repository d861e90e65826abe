//! The pools of one route and their shares of its requests. Each request is drawn for itself, so shares hold on the average
//! and workers need not agree.

use crate::config::{Config, WeightedPool};

#[derive(Debug, Clone)]
pub(super) struct Split {
    /// Those with a share. `None` names a pool that does not exist, which a parsed configuration has no way to do: nothing
    /// may be sent there.
    shares: Vec<Share>,
    total: u64,
}

#[derive(Debug, Clone)]
struct Share {
    pool: Option<usize>,
    /// Rolls below this, and not below that of the share before.
    below: u64,
}

impl Split {
    pub(super) fn new(pools: &[WeightedPool], config: &Config) -> Self {
        let mut total = 0;
        let mut shares = Vec::with_capacity(pools.len());
        for weighted in pools.iter().filter(|weighted| weighted.weight > 0) {
            total += u64::from(weighted.weight);
            let pool = config.pools.iter().position(|pool| pool.name == weighted.name);
            shares.push(Share { pool, below: total });
        }
        Self { shares, total }
    }

    /// `roll` is given the sum of the weights; it is not asked where there is nothing to choose.
    pub(super) fn draw(&self, roll: impl FnOnce(u64) -> u64) -> Option<usize> {
        let share = match self.shares.as_slice() {
            [only] => only,
            shares => {
                let at = if self.total == 0 { return None } else { roll(self.total) };
                shares.iter().find(|share| at < share.below)?
            }
        };
        share.pool
    }
}
