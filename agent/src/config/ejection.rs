//! `[pools.ejection]`: when an endpoint is avoided because of what requests see of it.

use std::time::Duration;

use super::{
    document::Section,
    settings::settings,
    value::{boolean, duration, integer},
};

settings! {
    /// Passive health: an endpoint that fails requests is avoided for a time.
    pub struct Ejection {
        /// An endpoint that failed this many requests in a row (no connection, no answer) is avoided. 0 is off.
        pub failures: u32 = 3 => integer(0..=1000),
        /// How long the first ejection lasts. Then one request is let through as a probe.
        pub base: Duration = Duration::from_secs(5) => duration(),
        /// Each ejection in a row lasts twice as long as the one before, up to this.
        pub max: Duration = Duration::from_secs(60) => duration(),
        /// Percentage of the pool that may be ejected at once; never the last endpoint.
        pub max_percent: u32 = 50 => integer(0..=100),
        /// Whether a response with a 5xx status is a failure, too.
        pub server_errors: bool = false => boolean(),
    }
}

impl Ejection {
    pub(super) fn check(&self, section: &Section<'_>) {
        if self.base > self.max {
            let key = if section.has("base") { "base" } else { "max" };
            section.reject(key, "a base above max", "base up to max");
        }
    }
}
