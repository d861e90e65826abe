//! `[pools.retry]`: when a request that an endpoint took and did not answer goes to the next one.

use http::Method;

use super::{
    settings::settings,
    value::{integer, method},
};

settings! {
    /// A request that an endpoint may have executed and of whose answer nothing was seen goes to the next endpoint of its list. One
    /// of which the endpoint's kernel has acknowledged nothing (no connection, or a kept one that had been closed), or that the
    /// endpoint says it has not looked at (HTTP/2), does so whatever is said here; one that was not answered in time
    /// (`timeouts.first_byte`) does not.
    pub struct Retry {
        /// How often one request may be executed again. 0: it is executed once at most.
        pub attempts: u32 = 2 => integer(0..=10),
        /// Methods that may be executed again. By default the idempotent ones (RFC 9110 §9.2.2); `POST` in this list may run a
        /// generation twice.
        pub methods: Vec<Method> =
            vec![Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE]
            => method(|method| *method != Method::CONNECT).list("an array of methods"),
        /// Percentage of the pool's requests of the last ten seconds that may be sent again in them.
        pub budget_percent: u32 = 20 => integer(0..=100),
        /// And besides this many a second.
        pub budget_min_per_second: u32 = 10 => integer(0..=100_000),
    }
}
