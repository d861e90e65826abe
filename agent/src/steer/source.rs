//! A connection whose received bytes the kernel programs see: its slot and its entries in the maps.

use std::{
    cell::Cell,
    future::poll_fn,
    os::fd::{AsFd, AsRawFd as _},
    rc::Rc,
    time::Duration,
};

use penstock_common::{path::Path, slot::admission};

use super::{RegisterError, WorkerSteering};
use crate::kernel::{
    Ring,
    slots::{SlotRef, SpanRef},
    socket::monotonic_ns,
};

/// The slot of a connection. Drop it only after the socket is closed, so that no verdict can access the slot any more.
pub struct Source {
    pub(super) index: u32,
    pub(super) cookie: u64,
    /// The connection has a ring.
    pub(super) ring: Cell<bool>,
    /// The endpoint's own socket is in the map.
    pub(super) admitted: Cell<bool>,
    pub(super) steering: Rc<WorkerSteering>,
}

impl Source {
    /// Inserts the socket after the connection was made: from now on the kernel sees what arrives. Nothing may have arrived yet.
    pub fn insert(&self, endpoint: impl AsFd) -> Result<(), RegisterError> {
        Ok(self.steering.maps.borrow_mut().sources.insert(self.cookie, endpoint.as_fd().as_raw_fd(), 0)?)
    }

    pub(super) fn slot(&self) -> SlotRef<'_> {
        self.steering.kernel.slots().get(self.index)
    }

    pub(super) fn span(&self, path: Path) -> Option<SpanRef<'_>> {
        self.slot().span(path)
    }

    /// Starts a message: resets the times of its redirects.
    pub(super) fn begin_message(&self) {
        self.slot().ingress().begin_message();
        self.slot().local().begin_message();
    }

    /// Sets the client that the next response may be steered to.
    pub fn announce(&self, target: u64) {
        self.slot().announce(target);
    }

    /// Stops redirects from this connection, which is about to be closed.
    pub fn leave(&self) {
        self.slot().disarm();
    }

    /// Bytes passed to user space since the connection was made.
    pub fn passed(&self) -> u64 {
        self.slot().passed()
    }

    /// Whether the kernel lost count of the stream: nothing read from it can be trusted.
    pub(super) fn is_astray(&self) -> bool {
        self.slot().is_astray()
    }

    /// The time of the message's last redirect, CLOCK_MONOTONIC ns; 0 if there was none.
    pub fn last_redirect(&self) -> u64 {
        self.slot().ingress().stamps().1.max(self.slot().local().stamps().1)
    }

    pub(super) fn is_released(&self, path: Path) -> bool {
        self.span(path).is_none_or(|span| span.is_released())
    }

    /// Resolves when the kernel has disarmed the slot on this path. Cancel-safe.
    pub(super) async fn released(&self, path: Path) {
        let Some(span) = self.span(path) else { return };
        poll_fn(|cx| self.steering.kernel.events().poll_released(self.index, span, cx)).await;
    }

    /// Resolves when nothing was redirected for the idle time, counted from now on.
    pub(super) async fn idle(&self, path: Path, idle: Option<Duration>) {
        let (Some(idle), Some(span)) = (idle, self.span(path)) else { return std::future::pending().await };
        let (idle, begin) = (idle.as_nanos() as u64, monotonic_ns());
        loop {
            let passed = monotonic_ns().saturating_sub(span.stamps().1.max(begin));
            if passed >= idle {
                return;
            }
            tokio::time::sleep(Duration::from_nanos(idle - passed)).await;
        }
    }

    /// Allocates the ring for copies of the last payload bytes, once. Fails if kernel memory or the map is exhausted.
    pub fn make_ring(&self) -> Result<(), RegisterError> {
        if !self.ring.get() {
            self.steering.maps.borrow_mut().tails.insert(self.index, [0; size_of::<Ring>()], 0)?;
            self.ring.set(true);
        }
        Ok(())
    }

    /// Reads the ring. Only while the slot is released.
    pub(super) fn ring(&self) -> Result<Ring, RegisterError> {
        Ok(self.steering.maps.borrow().tails.get(&self.index, 0)?)
    }

    /// Whether the endpoint's own `sendmsg` can carry a response to the announced client with this key.
    pub fn is_local_to(&self, target: u64) -> bool {
        self.slot().peer().is_some() && self.slot().has_found(target)
    }

    /// Puts the endpoint's own socket into the map until the end of a response, if the endpoint has read the whole request.
    pub fn admit(&self) -> bool {
        if !self.admitted.get() {
            let outcome = self.steering.kernel.admit(self.cookie, false);
            match &outcome {
                Ok(admission::DONE) => self.admitted.set(true),
                Ok(why) => tracing::debug!(reason = admission::label(*why), "endpoint socket not admitted"),
                Err(error) => tracing::debug!(%error, "endpoint socket not admitted"),
            }
        }
        self.admitted.get()
    }

    /// Removes the endpoint's own socket from the map. Returns false if the endpoint could still notice that it was in the map; then
    /// nothing may be written to this connection.
    pub fn dismiss(&self) -> bool {
        if !self.admitted.get() {
            return true;
        }
        let outcome = self.steering.kernel.admit(self.cookie, true);
        match &outcome {
            Ok(admission::DONE) => {
                self.admitted.set(false);
                return true;
            }
            Ok(why) => tracing::debug!(reason = admission::label(*why), "endpoint socket not dismissed"),
            Err(error) => tracing::debug!(%error, "endpoint socket not dismissed"),
        }
        false
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.dismiss();
        // The entry is missing if the registration failed.
        let mut maps = self.steering.maps.borrow_mut();
        let _ = maps.index.remove(&self.cookie);
        if self.ring.get() {
            let _ = maps.tails.remove(&self.index);
        }
        let slots = self.steering.kernel.slots();
        match self.slot().peer() {
            Some(peer) => {
                let _ = maps.locals.remove(&peer);
                slots.retire(self.index);
            }
            None => slots.give_back(self.index),
        }
    }
}
