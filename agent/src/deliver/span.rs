//! One span in the kernel: find a quiet moment, arm, sleep, take back.
//!
//! The order is what keeps bytes in order. Arm first, then read once more: the read waits for any verdict in progress, so
//! when it finds nothing, every later verdict sees the arming, and every stop sends an event. When it finds bytes, the
//! kernel refuses the arming by itself (they count as passed) or has stopped already, and user space goes on.
//!
//! A stream that never pauses has no quiet moment, so one is made: behind the gate (SO_RCVLOWAT) new bytes stay in the TCP
//! queue, before the verdict, while user space forwards what was let through; opened, they all meet the armed slot.

use std::{future::poll_fn, io};

use penstock_common::slot::stop;
use tokio::time::Instant;

use super::{Delivery, End, Target};
use crate::kernel::{slots::SlotRef, socket::monotonic_ns};

/// What ended the wait for the kernel.
enum Wake {
    /// Nothing to wait for: bytes were let through, and have been read.
    Bytes,
    Released,
    Endpoint,
    Client,
    Idle,
}

impl Delivery<'_> {
    /// Lets the kernel carry what it can. False: nothing came of it, user space has to read.
    pub(super) async fn span(&mut self, target: Target) -> Result<bool, End> {
        if self.slot()?.passed() != self.endpoint.consumed && !self.catch_up().await? {
            return Ok(self.framing.is_done() || self.framing.is_invalid());
        }
        // The kernel's account of the target begins with the arming: nothing may be on its way from an earlier span.
        self.client.settle().await.map_err(|_| End::ClientGone)?;
        self.armed = Some((self.slot()?.redirected(), self.slot()?.segments()));
        self.slot()?.arm(target.key, self.framing, self.endpoint.consumed, true);
        self.endpoint.gate(false).map_err(|_| End::Broken)?;
        self.make_room();
        let result = match self.endpoint.read_now(&mut self.pending) {
            Ok(0) => Ok(Wake::Endpoint),
            Ok(n) => {
                self.received(n);
                Ok(Wake::Bytes)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.sleep().await,
            Err(error) => Err(error),
        };
        let slot = self.slot()?;
        if !slot.is_released() {
            slot.disarm();
        }
        let steered = self.take_back()?;
        match result {
            Ok(Wake::Bytes) => Ok(true),
            // An error or the end: reading tells which. What was redirected is on its way.
            Ok(Wake::Endpoint) => Ok(false),
            Ok(Wake::Released) => Ok(steered || self.framing.is_done()),
            Ok(Wake::Client) => Err(End::ClientGone),
            Ok(Wake::Idle) => Err(End::Idle),
            Err(_) => Err(End::Broken),
        }
    }

    /// Forwards what was let through while the gate keeps more from coming. False: the kernel cannot be armed now, because
    /// the message or the stream is over, the client has fallen behind, or the gate did not hold (it yields to memory
    /// pressure and to FIN).
    async fn catch_up(&mut self) -> Result<bool, End> {
        self.endpoint.gate(true).map_err(|_| End::Broken)?;
        let quiet = loop {
            self.make_room();
            match self.endpoint.read_now(&mut self.pending) {
                Ok(0) => {
                    self.end_of_stream().await?;
                    break false;
                }
                Ok(n) => self.received(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    break self.slot()?.passed() == self.endpoint.consumed;
                }
                Err(_) => return Err(End::Broken),
            }
            self.forward().await?;
            if self.framing.is_done() || self.framing.is_invalid() || self.armable().is_none() {
                break false;
            }
        };
        if !quiet {
            self.endpoint.gate(false).map_err(|_| End::Broken)?;
        }
        Ok(quiet)
    }

    fn slot(&self) -> Result<SlotRef<'_>, End> {
        self.endpoint.source().map(|source| source.slot()).ok_or(End::Broken)
    }

    /// Takes the flow back after `run` was dropped, for the account's sake; the connections can only be closed. A segment
    /// that the kernel is just looking at may be missing.
    pub fn abandon(&mut self) {
        if self.armed.is_some()
            && let Ok(slot) = self.slot()
        {
            slot.disarm();
            let _ = self.take_back();
        }
    }

    /// Enters the kernel's books into ours; true when it carried something. The slot is released.
    fn take_back(&mut self) -> Result<bool, End> {
        let (before, segments) = self.armed.take().ok_or(End::Broken)?;
        let slot = self.slot()?;
        let (steered, segments) = (slot.redirected() - before, slot.segments() - segments);
        let (framing, stop, stamps) = (slot.framing(), slot.stop(), slot.stamps());
        self.framing = framing;
        self.client.add_redirected(steered);
        self.account.steered += steered;
        self.account.segments += segments;
        if steered > 0 {
            self.account.stamp(stamps.0, stamps.1);
        }
        if stop != 0 {
            self.account.stops.push(stop);
            self.hold = stop == stop::ROOM;
        }
        if stop == stop::TARGET {
            self.target = None;
        }
        Ok(steered > 0)
    }

    /// Sleeps until the kernel lets go of the slot, or one of the peers or the idle time ends it.
    async fn sleep(&mut self) -> io::Result<Wake> {
        // Often the rest was waiting behind the gate and is through already.
        if self.endpoint.source().is_some_and(|source| source.slot().is_released()) {
            return Ok(Wake::Released);
        }
        // Let through before the arming, and not handed over yet (memory pressure): no event will tell of them.
        if self.endpoint.source().is_some_and(|source| source.slot().passed() != self.endpoint.consumed) {
            return Ok(Wake::Endpoint);
        }
        self.endpoint.quiet()?;
        let wake = self.wake().await;
        self.endpoint.attentive()?;
        Ok(wake)
    }

    async fn wake(&self) -> Wake {
        let Some(source) = self.endpoint.source() else { return Wake::Endpoint };
        tokio::select! {
            biased;
            () = poll_fn(|cx| source.poll_released(cx)) => Wake::Released,
            () = self.client.gone() => Wake::Client,
            () = self.endpoint.broken() => Wake::Endpoint,
            () = self.idle_since_last(source.slot()) => Wake::Idle,
        }
    }

    /// Resolves when the kernel has redirected nothing for the idle time.
    async fn idle_since_last(&self, slot: SlotRef<'_>) {
        let Some(idle) = self.idle else { return std::future::pending().await };
        let mut since = monotonic_ns();
        loop {
            tokio::time::sleep_until(Instant::now() + idle).await;
            let last = slot.stamps().1.max(since);
            if monotonic_ns() - last >= idle.as_nanos() as u64 {
                return;
            }
            since = last;
        }
    }
}
