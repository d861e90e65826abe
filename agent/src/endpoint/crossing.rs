//! Decides whether an endpoint received bytes that crossed with its FIN.
//!
//! An endpoint that has closed both sides responds with a reset. One that has closed only its sending side may still read the
//! bytes, and its kernel acknowledges them. So after a FIN this waits for a reset or an acknowledgement, for at most `LIMIT`.

use std::time::Duration;

use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

use crate::kernel::socket;

/// How long to wait. Linux delays an acknowledgement by at most 200 ms, and first retransmits a lost segment after as long.
const LIMIT: Duration = Duration::from_secs(1);
/// The time between two looks.
const PAUSE: Duration = Duration::from_millis(2);

/// The result of one look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// Whether more was acknowledged. This will not change.
    Decided(bool),
    Undecided,
}

/// Whether an acknowledgement may still follow: the endpoint has closed its sending side and sent bytes are unacknowledged.
pub(super) fn may_follow(stream: &TcpStream) -> bool {
    socket::is_half_closed(stream) && socket::send_queue(stream).is_ok_and(|bytes| bytes > 0)
}

/// Looks whether more than `before` bytes were acknowledged. Returns `None` if that is unknown.
pub(super) fn look(stream: &TcpStream, before: u64) -> Option<Look> {
    // In this order: if the connection breaks between the two reads, the count read second is final.
    let may_follow = may_follow(stream);
    let more = socket::acknowledged(stream).ok()? > before;
    Some(if more || !may_follow { Look::Decided(more) } else { Look::Undecided })
}

/// Looks until the result is decided. Returns `None` if it stays unknown.
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
