//! `[pools.retry]`: when a request that may have been executed is sent to the next endpoint.

use http::Method;

use super::{
    settings::settings,
    value::{integer, method},
};

settings! {
    /// When a request is sent to the next endpoint of its pick although the failed one may have executed it. These limits do not
    /// apply to a request of which the endpoint acknowledged no byte, or that it declared unprocessed (HTTP/2): it is always sent
    /// again. A request that exceeds `timeouts.first_byte` is never sent again.
    pub struct Retry {
        /// Maximum number of retries of one request. 0: it is executed at most once.
        pub attempts: u32 = 2 => integer(0..=10),
        /// Methods that may be retried. The default is the idempotent methods (RFC 9110 §9.2.2). With `POST` in this list, a
        /// generation may run twice.
        pub methods: Vec<Method> =
            vec![Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE]
            => method(|method| *method != Method::CONNECT).list("an array of methods"),
        /// Maximum number of retries in ten seconds, as a percentage of the pool's requests in those ten seconds.
        pub budget_percent: u32 = 20 => integer(0..=100),
        /// Retries per second that are allowed in addition to `budget_percent`.
        pub budget_min_per_second: u32 = 10 => integer(0..=100_000),
    }
}
