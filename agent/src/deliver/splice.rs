//! Path `wire` in the delivery of a response: relays until the flow begins, then waits for its end.
//!
//! Between [`Watched::arm`] and the next byte that is read nothing is written to either side. Once the flow has begun, the bytes pass
//! neither socket, so nothing is read or written any more.

use std::time::Duration;

use super::{Delivery, End, ending::judge};
use crate::kernel::{socket::monotonic_ns, wire::Watched};

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
            why = watched.stopped() => Some(End::Stopped(why)),
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

    /// Closes the agent's part of a flow that has begun, records the bytes, and gives the tee the end of a whole body. `end`: why the
    /// flow is ended, if it has not ended by itself. Must run before the connections are closed.
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
        if let Some(end) = end {
            return end;
        }
        let last = watched.last_bytes();
        let (end, payload) = judge(&seen, self.session.framing.state, self.session.framing.left, &last);
        if let Some(tee) = self.session.tee {
            let mut tee = tee.borrow_mut();
            if !last.are_all || payload.is_none() {
                tee.skipped();
            }
            tee.take(&payload.unwrap_or_default());
        }
        end
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
