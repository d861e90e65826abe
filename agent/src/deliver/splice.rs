//! Path `wire` in the delivery of a response: relays until the flow begins, then waits for its end.
//!
//! Between [`Watched::arm`] and the next byte that is read nothing is written to either side. Once the flow has begun, the bytes pass
//! neither socket, so nothing is read or written any more.

use std::time::Duration;

use penstock_common::{framing::state, wire::flow::mark};

use super::{Delivery, End};
use crate::kernel::{
    socket::monotonic_ns,
    wire::{Seen, Watched},
};

impl Delivery<'_> {
    /// Lets the flow begin, or reads more of the body. The error is the end of the delivery.
    pub(super) async fn splice(&mut self) -> Result<(), End> {
        let Some(watched) = self.wire.clone() else { return self.read().await };
        // The EPP has yet to learn that the body has begun.
        if self.session.tee.is_some_and(|tee| tee.borrow().wants_begin()) {
            return self.read().await;
        }
        watched.advance(self.session.account.relayed, &self.session.framing);
        let armed = match self.endpoint.stream().map(|endpoint| watched.arm(self.client.stream(), &*endpoint)) {
            Ok(Ok(armed)) => armed,
            Ok(Err(broken)) => return Err(if broken.is_client() { End::ClientGone } else { End::Broken }),
            Err(_) => false,
        };
        if !armed {
            return self.read().await;
        }
        let read = tokio::select! {
            biased;
            () = watched.begun() => None,
            read = self.read() => Some(read),
        };
        match read {
            Some(Ok(())) => Ok(()),
            Some(Err(end)) if watched.disarm() => Err(end),
            Some(Err(end)) => Err(self.conclude(Some(end))),
            None => Err(self.follow(&watched).await),
        }
    }

    /// Waits for the end of a flow that has begun.
    async fn follow(&mut self, watched: &Watched) -> End {
        if let Ok(endpoint) = self.endpoint.stream() {
            watched.freeze(self.client.stream(), &*endpoint);
        }
        // The flow carries the client's FIN to the endpoint, so it does not end the wait.
        let is_over = |watched: &Watched| watched.seen().has_ended() || watched.is_to_be_left();
        let end = tokio::select! {
            biased;
            () = watched.changed(is_over) => None,
            () = silent(watched, self.session.idle) => Some(End::Idle),
        };
        let is_left = end.is_none() && watched.is_to_be_left() && !watched.seen().has_ended();
        if is_left { self.leave() } else { self.conclude(end) }
    }

    /// Leaves a flow that has begun to the next agent, which counts what the kernel has carried.
    fn leave(&mut self) -> End {
        if let Some(watched) = self.wire.take() {
            if let Ok(endpoint) = self.endpoint.stream() {
                watched.close(self.client.stream(), &*endpoint);
            }
            watched.leave();
        }
        End::Left
    }

    /// Closes the agent's part of a flow that has begun and records the bytes. `end`: why the flow is ended, if it has not ended by
    /// itself. Must run before the connections are closed.
    pub(super) fn conclude(&mut self, end: Option<End>) -> End {
        let Some(watched) = self.wire.take() else { return end.unwrap_or(End::Broken) };
        if let Ok(endpoint) = self.endpoint.stream() {
            watched.close(self.client.stream(), &*endpoint);
        }
        let seen = watched.seen();
        if end.is_some() || !seen.is_orderly() {
            watched.reset();
        }
        watched.counted();
        let account = &mut self.session.account;
        account.wire += seen.bytes;
        account.segments += seen.segments;
        if seen.first_ns > 0 {
            account.stamp(seen.first_ns, seen.last_ns);
        }
        end.unwrap_or_else(|| judge(&seen, self.session.framing.state, self.session.framing.left))
    }
}

/// What the end of a flow means for the response, given state and rest of the body's framing when the flow began. User space has not
/// seen the bytes: a chunked body is complete if its last bytes are those of the last chunk.
pub fn judge(seen: &Seen, framing: u32, left: u64) -> End {
    const LAST_CHUNK: u64 = u64::from_be_bytes(*b"\0\0\x000\r\n\r\n");
    let client_closed = seen.marks & (mark::CLIENT_CLOSED_FIRST | mark::CLIENT_RESET) != 0;
    let endpoint_closed = seen.finished && seen.marks & mark::CLIENT_CLOSED_FIRST == 0;
    let is_whole = match framing {
        state::LENGTH => seen.told_all && seen.bytes == left,
        state::UNTIL_CLOSE => endpoint_closed,
        _ => seen.told_all && seen.last == LAST_CHUNK,
    };
    match () {
        () if is_whole => End::Complete { reusable: false },
        () if client_closed => End::ClientGone,
        () => End::Broken,
    }
}

/// Resolves when no payload has passed for the idle time.
async fn silent(watched: &Watched, idle: Option<Duration>) {
    let Some(idle) = idle else { return std::future::pending().await };
    let (idle, begin) = (idle.as_nanos() as u64, monotonic_ns());
    loop {
        let passed = monotonic_ns().saturating_sub(watched.seen().last_ns.max(begin));
        if passed >= idle {
            return;
        }
        tokio::time::sleep(Duration::from_nanos(idle - passed)).await;
    }
}
