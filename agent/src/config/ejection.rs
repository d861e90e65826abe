//! `[pools.ejection]`: when an endpoint that fails requests is avoided (passive health).

use std::time::Duration;

use super::{
    document::Section,
    settings::settings,
    value::{boolean, duration, integer},
};

settings! {
    /// When an endpoint that fails requests is avoided for a time (passive health).
    pub struct Ejection {
        /// Failed requests in a row (no connection or no response) after which an endpoint is ejected. 0 disables ejection.
        pub failures: u32 = 3 => integer(0..=1000),
        /// How long the first ejection lasts. After it, one request is sent to the endpoint as a probe.
        pub base: Duration = Duration::from_secs(5) => duration(),
        /// The longest ejection. Each ejection in a row lasts twice as long as the one before, up to this.
        pub max: Duration = Duration::from_secs(60) => duration(),
        /// Percentage of the endpoints of the pool that may be ejected at once. The last available endpoint is never ejected.
        pub max_percent: u32 = 50 => integer(0..=100),
        /// Whether a response with a 5xx status counts as a failure, too.
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
