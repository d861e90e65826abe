//! `[pools.retry]`: when a request that an endpoint took and did not answer goes to the next one.

use super::{Retry, document::Section, value};

pub(super) fn retry(section: &mut Section<'_>) -> Retry {
    let default = Retry::default();
    Retry {
        attempts: section.read("attempts", value::integer(0..=10)).unwrap_or(default.attempts),
        budget_percent: section.read("budget_percent", value::integer(0..=100)).unwrap_or(default.budget_percent),
        budget_min_per_second: section
            .read("budget_min_per_second", value::integer(0..=100_000))
            .unwrap_or(default.budget_min_per_second),
    }
}
