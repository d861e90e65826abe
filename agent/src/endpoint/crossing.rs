//! Whether an endpoint took what crossed with its FIN.
//!
//! An endpoint that has closed answers it with a reset; one that has closed its sending side alone may still read it, and its kernel
//! acknowledges it. So after a FIN one of the two is waited for, for a while.

use std::time::Duration;

use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

use crate::kernel::socket;

/// How long an endpoint's kernel has for that, and how often to look. Linux delays an acknowledgement by 200 ms at most, and what was
/// lost is sent again after as long at first.
const LIMIT: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// More has been acknowledged, or never will be.
    Decided(bool),
    Undecided,
}

/// The endpoint has ended its side, and something that it was sent is not acknowledged.
pub(super) fn may_follow(stream: &TcpStream) -> bool {
    socket::is_half_closed(stream) && socket::send_queue(stream).is_ok_and(|bytes| bytes > 0)
}

/// Whether more than `before` has been acknowledged. `None`: not known.
pub(super) fn look(stream: &TcpStream, before: u64) -> Option<Look> {
    // In this order: what breaks between the two has acknowledged all that it will.
    let may_follow = may_follow(stream);
    let more = socket::acknowledged(stream).ok()? > before;
    Some(if more || !may_follow { Look::Decided(more) } else { Look::Undecided })
}

/// Looks until it is decided. `None`: not known.
pub(super) async fn decided(mut look: impl FnMut() -> Option<Look>) -> Option<bool> {
    let until = Instant::now() + LIMIT;
    loop {
        match look()? {
            Look::Decided(more) => return Some(more),
            Look::Undecided if Instant::now() >= until => return None,
            Look::Undecided => sleep(PAUSE).await,
        }
    }
}
