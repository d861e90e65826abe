//! One span in the kernel: arm, sleep, take back.
//!
//! The order is what keeps bytes in order. Arm first, then read once more: the read waits for any verdict in progress, so
//! when it finds nothing, every later verdict sees the arming, and every stop sends an event. When it finds bytes, the
//! kernel refuses the arming by itself (they count as passed) or has stopped already, and user space goes on.

use std::{future::poll_fn, io, time::Duration};

use bytes::BytesMut;

use penstock_common::{slot::stop, tail};

use super::{Armed, Delivery, End, MAX_FRUITLESS, MIN_BUFFER, SHORT_SPAN, Target, within};
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
        // The kernel's account of the target begins with the arming: nothing may be on its way from an earlier span.
        within(self.idle, self.client.settle()).await?;
        let slot = self.slot()?;
        self.armed = Some(Armed {
            redirected: slot.redirected(),
            segments: slot.segments(),
            payload: self.framing.payload,
            since: monotonic_ns(),
        });
        self.slot()?.arm(target.key, self.framing, self.endpoint.consumed, self.tee.is_some());
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
            // Waits for a verdict in progress, which may have seen the slot armed.
            self.endpoint.wait_for_verdict();
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

    fn slot(&self) -> Result<SlotRef<'_>, End> {
        self.endpoint.source().map(|source| source.slot()).ok_or(End::Broken)
    }

    /// Takes the flow back after `run` was dropped, for the account's sake; the connections can only be closed.
    pub fn abandon(&mut self) {
        if self.armed.is_some()
            && let Ok(slot) = self.slot()
        {
            slot.disarm();
            self.endpoint.wait_for_verdict();
            let _ = self.take_back();
        }
    }

    /// Enters the kernel's books into ours; true when it carried something. The slot is released.
    fn take_back(&mut self) -> Result<bool, End> {
        let before = self.armed.take().ok_or(End::Broken)?;
        let slot = self.slot()?;
        let steered = slot.redirected().saturating_sub(before.redirected);
        let segments = slot.segments().saturating_sub(before.segments);
        let (framing, stop, stamps) = (slot.framing(), slot.stop(), slot.stamps());
        self.framing = framing;
        self.client.add_redirected(steered);
        self.account.steered += steered;
        self.account.segments += segments;
        if steered > 0 {
            self.account.stamp(stamps.0, stamps.1);
            self.read_ring(before.payload, steered);
        }
        if stop != 0 {
            if let Some(count) = self.account.stops.get_mut(stop as usize) {
                *count += 1;
            }
            self.hold = stop == stop::ROOM;
        }
        // A flow that stops every span at once is bulk: it outruns the client, and user space carries it better.
        let short = monotonic_ns().saturating_sub(before.since) < SHORT_SPAN.as_nanos() as u64;
        self.fruitless = if stop != 0 && (steered == 0 || short) { self.fruitless + 1 } else { 0 };
        if stop == stop::TARGET || self.fruitless >= MAX_FRUITLESS {
            self.target = None;
        }
        Ok(steered > 0)
    }

    /// Hands the end of what the kernel has redirected to the tee: `steered` bytes with their framing, from the payload byte
    /// with the number `begin` on.
    fn read_ring(&self, begin: u32, steered: u64) {
        let (Some(tee), Some(source)) = (self.tee, self.endpoint.source()) else { return };
        let mut tee = tee.borrow_mut();
        let end = self.framing.payload;
        // Numbers wrap, so those of a long span say nothing about its length.
        let length = if steered > u64::from(u32::MAX) { u32::MAX } else { end.wrapping_sub(begin) };
        if length > tail::TAIL {
            tee.skipped();
        }
        match source.ring() {
            Ok(ring) => {
                let (older, newer) = tail::last(&ring, end, length);
                tee.take(older);
                tee.take(newer);
            }
            Err(error) => {
                tracing::debug!(%error, "the end of a steered response cannot be read");
                tee.skipped();
            }
        }
    }

    /// Sleeps until the kernel lets go of the slot, or one of the peers or the idle time ends it.
    async fn sleep(&mut self) -> io::Result<Wake> {
        // A short rest may be through already.
        if self.endpoint.source().is_some_and(|source| source.slot().is_released()) {
            return Ok(Wake::Released);
        }
        // Let through before the arming, and not handed over yet (memory pressure): no event will tell of them.
        if self.endpoint.source().is_some_and(|source| source.slot().passed() != self.endpoint.consumed) {
            return Ok(Wake::Endpoint);
        }
        // Nothing is read before the kernel lets go.
        self.pending = BytesMut::new();
        self.buffer = MIN_BUFFER;
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
            () = self.client.left() => Wake::Client,
            () = self.endpoint.broken() => Wake::Endpoint,
            () = self.idle_since_last(source.slot()) => Wake::Idle,
        }
    }

    /// Resolves when the kernel has redirected nothing for the idle time.
    async fn idle_since_last(&self, slot: SlotRef<'_>) {
        let Some(idle) = self.idle else { return std::future::pending().await };
        let idle = idle.as_nanos() as u64;
        let armed = monotonic_ns();
        loop {
            let passed = monotonic_ns().saturating_sub(slot.stamps().1.max(armed));
            if passed >= idle {
                return;
            }
            tokio::time::sleep(Duration::from_nanos(idle - passed)).await;
        }
    }
}
