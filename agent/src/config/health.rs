//! `[pools.health]`: active health checks of endpoints.

use std::time::Duration;

use http::uri::PathAndQuery;

use super::{
    settings::settings,
    value::{duration, integer, path_and_query},
};

settings! {
    /// Active health checks of each endpoint. Off unless the section is present.
    pub struct HealthCheck {
        /// Path that is requested with GET. An endpoint whose status is 2xx is healthy.
        pub path: PathAndQuery = PathAndQuery::from_static("/")
            => path_and_query().required(r#"the path to ask for, such as "/health""#, "/health"),
        /// Interval between two checks of an endpoint.
        pub interval: Duration = Duration::from_secs(5) => duration(),
        /// How long one check may take, from connecting to the response head.
        pub timeout: Duration = Duration::from_secs(2) => duration(),
        /// Failed checks in a row after which the endpoint is avoided.
        pub unhealthy_after: u32 = 3 => integer(1..=100),
        /// Successful checks in a row after which it is used again.
        pub healthy_after: u32 = 1 => integer(1..=100),
    }
}

impl HealthCheck {
    /// GET `path` every five seconds.
    pub fn new(path: PathAndQuery) -> Self {
        Self { path, ..Self::default() }
    }
}
