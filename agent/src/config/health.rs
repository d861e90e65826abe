//! `[pools.health]`: asking endpoints for their health.

use std::time::Duration;

use http::uri::PathAndQuery;

use super::{
    settings::settings,
    value::{duration, integer, path_and_query},
};

settings! {
    /// Active checks of each endpoint.
    pub struct HealthCheck {
        /// What is asked for with GET; a 2xx status is healthy.
        pub path: PathAndQuery = PathAndQuery::from_static("/")
            => path_and_query().required(r#"the path to ask for, such as "/health""#, "/health"),
        /// From one check to the next.
        pub interval: Duration = Duration::from_secs(5) => duration(),
        /// From the connect to the response head.
        pub timeout: Duration = Duration::from_secs(2) => duration(),
        /// Failures in a row until the endpoint is avoided.
        pub unhealthy_after: u32 = 3 => integer(1..=100),
        /// Successes in a row until it is used again.
        pub healthy_after: u32 = 1 => integer(1..=100),
    }
}

impl HealthCheck {
    /// GET `path` every five seconds.
    pub fn new(path: PathAndQuery) -> Self {
        Self { path, ..Self::default() }
    }
}
