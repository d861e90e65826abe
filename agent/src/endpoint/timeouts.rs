//! The timeouts of connections to endpoints. A reload may change them while connections are open.

use std::time::Duration;

/// Timeouts of connections to endpoints.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionTimeouts {
    /// How long an idle connection is kept.
    pub keep_alive: Duration,
    /// How long connecting may take; `None` leaves it to the kernel.
    pub connect: Option<Duration>,
    /// See [`crate::kernel::socket::detect_unreachable`].
    pub unreachable: Option<Duration>,
}
