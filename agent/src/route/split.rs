//! Splits the requests of a route between its pools by weight. Each request is drawn independently, so the shares hold on average
//! and workers share no state.

use super::NotRouted;
use crate::config::{Config, RefusedRoute, WeightedPool};

#[derive(Debug, Clone)]
pub(super) struct Split {
    /// The pools with a weight above zero.
    shares: Vec<WeightedShare>,
    total: u64,
}

/// Where the requests of a share go.
#[derive(Debug, Clone)]
enum RouteShare {
    /// `None` if the named pool does not exist, which configuration parsing rules out.
    Pool(Option<usize>),
    Refused(RefusedRoute),
}

#[derive(Debug, Clone)]
struct WeightedShare {
    pool: RouteShare,
    /// Rolls from the previous share's `below` up to this number, exclusive, select this pool.
    below: u64,
}

impl Split {
    pub(super) fn new(pools: &[WeightedPool], config: &Config) -> Self {
        let mut total = 0;
        let mut shares = Vec::with_capacity(pools.len());
        for weighted in pools.iter().filter(|weighted| weighted.weight > 0) {
            total += u64::from(weighted.weight);
            let named = || config.pools.iter().position(|pool| pool.name == weighted.name);
            let pool = weighted.refused.clone().map_or_else(|| RouteShare::Pool(named()), RouteShare::Refused);
            shares.push(WeightedShare { pool, below: total });
        }
        Self { shares, total }
    }

    /// Draws a pool. `roll` is called with the sum of the weights, and only if there are several pools.
    pub(super) fn draw(&self, roll: impl FnOnce(u64) -> u64) -> Result<usize, NotRouted<'_>> {
        let share = match self.shares.as_slice() {
            [only] => only,
            shares => {
                let at = if self.total == 0 { return Err(NotRouted::NoRoute) } else { roll(self.total) };
                shares.iter().find(|share| at < share.below).ok_or(NotRouted::NoRoute)?
            }
        };
        match &share.pool {
            RouteShare::Pool(pool) => pool.ok_or(NotRouted::NoRoute),
            RouteShare::Refused(why) => Err(NotRouted::Refused(why)),
        }
    }
}
