//! How long connections to endpoints are kept, and how long they are waited for. A reload may change it while connections live.

use std::time::Duration;

#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// A connection that has been idle for so long is closed.
    pub keep_alive: Duration,
    pub connect: Option<Duration>,
    /// As [`crate::kernel::socket::detect_unreachable`] takes it.
    pub unreachable: Option<Duration>,
}
