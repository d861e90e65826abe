//! One span in the kernel: arm, sleep, take back.
//!
//! The order is what keeps bytes in order. Arm first, then read once more: the read waits for any verdict in progress, so
//! when it finds nothing, every later verdict sees the arming, and every stop sends an event. When it finds bytes, the
//! kernel refuses the arming by itself (they count as passed) or has stopped already, and user space goes on.
//!
//! On the local path nothing arrives while the kernel carries, so the endpoint's socket is read as ever. Whatever does
//! arrive, bytes or an end, was sent over the connection, and then no redirect can follow.

use std::{future::poll_fn, io, time::Duration};

use super::{Armed, BEHIND, Delivery, End, MAX_FRUITLESS, MIN_BUFFER, SHORT_SPAN, Target, written};
use crate::kernel::{slots::SpanRef, socket::monotonic_ns};
use bytes::BytesMut;
use penstock_common::{path::Path, slot::stop, tail};

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
        written(self.client.settle().await)?;
        let span = self.kernel_span(target.path)?;
        self.armed = Some(Armed {
            path: target.path,
            redirected: span.redirected(),
            segments: span.segments(),
            payload: self.framing.payload,
            since: monotonic_ns(),
        });
        let slot = self.endpoint.source().ok_or(End::Broken)?.slot();
        slot.arm(target.path, target.key, self.framing, self.endpoint.consumed, self.tee.is_some());
        self.make_room();
        let result = match self.endpoint.read_now(&mut self.pending) {
            Ok(0) => Ok(Wake::Endpoint),
            Ok(n) => {
                self.received(n);
                Ok(Wake::Bytes)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => match target.path {
                Path::Ingress => self.sleep().await,
                _ => self.listen().await,
            },
            Err(error) => Err(error),
        };
        let span = self.kernel_span(target.path)?;
        if !span.is_released() {
            span.disarm();
            // Waits for a verdict in progress, which may have seen the slot armed.
            self.endpoint.wait_for_verdict();
        }
        let steered = self.take_back()?;
        if target.path == Path::Local && steered {
            self.arrived().await?;
        }
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

    fn kernel_span(&self, path: Path) -> Result<SpanRef<'_>, End> {
        self.endpoint.source().and_then(|source| source.slot().span(path)).ok_or(End::Broken)
    }

    /// Waits until what the endpoint's `sendmsg` was let redirect has reached the client's send queue. An endpoint that does not
    /// wait may have been told that only a part was taken (the queue can fill while a message is being put into it), and then
    /// sends the rest over its connection: those bytes come next, and the framing is behind them already.
    async fn arrived(&mut self) -> Result<(), End> {
        let mut patience = self.client.patience();
        loop {
            match tokio::time::timeout(BEHIND, self.client.settle()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => return written(Err(error)),
                // An error that a look finds is gone with it, and what follows would seem to be an end in order.
                Err(_) if !self.pending.is_empty() || self.endpoint.has_more().map_err(|_| End::Broken)? => break,
                Err(_) => {
                    let client = self.client.stream();
                    written(patience.begin(client).and_then(|()| patience.look(client)))?;
                }
            }
        }
        self.rest = self.client.forgive().map_err(|_| End::ClientGone)?;
        self.account.local -= self.rest;
        if self.framing.is_until_close() {
            // Nothing is counted there.
            self.rest = 0;
        }
        Ok(())
    }

    /// Takes the flow back after `run` was dropped, for the account's sake; the connections can only be closed.
    pub fn abandon(&mut self) {
        if let Some(armed) = &self.armed
            && let Ok(span) = self.kernel_span(armed.path)
        {
            span.disarm();
            self.endpoint.wait_for_verdict();
            let _ = self.take_back();
        }
    }

    /// Enters the kernel's books into ours; true when it carried something. The slot is released.
    fn take_back(&mut self) -> Result<bool, End> {
        let before = self.armed.take().ok_or(End::Broken)?;
        let span = self.kernel_span(before.path)?;
        let steered = span.redirected().saturating_sub(before.redirected);
        let segments = span.segments().saturating_sub(before.segments);
        let (framing, stop, stamps) = (span.framing(), span.stop(), span.stamps());
        tracing::trace!(path = ?before.path, steered, stop = stop::label(stop), "taken back");
        self.framing = framing;
        self.client.add_redirected(steered);
        match before.path {
            Path::Ingress => self.account.steered += steered,
            _ => self.account.local += steered,
        }
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
        if matches!(stop, stop::TARGET | stop::ACCOUNT | stop::SHARED) || self.fruitless >= MAX_FRUITLESS {
            self.fruitless = 0;
            self.target = self.target.take().and_then(Target::next);
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
        if self.endpoint.source().is_some_and(|source| source.slot().ingress().is_released()) {
            return Ok(Wake::Released);
        }
        // Let through before the arming, and not handed over yet (memory pressure): no event will tell of them.
        if self.endpoint.unread() {
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
            () = poll_fn(|cx| source.poll_released(Path::Ingress, cx)) => Wake::Released,
            () = self.client.left() => Wake::Client,
            () = self.endpoint.broken() => Wake::Endpoint,
            () = idle_since_last(self.idle, source.slot().ingress()) => Wake::Idle,
        }
    }

    /// As [`sleep`](Self::sleep), on the local path.
    async fn listen(&mut self) -> io::Result<Wake> {
        let (endpoint, pending, client) = (&mut *self.endpoint, &mut self.pending, &*self.client);
        let Some((source, mut reader)) = endpoint.listen()? else { return Ok(Wake::Endpoint) };
        let span = source.slot().local();
        let received = tokio::select! {
            biased;
            () = poll_fn(|cx| source.poll_released(Path::Local, cx)) => return Ok(Wake::Released),
            () = client.left() => return Ok(Wake::Client),
            received = reader.read(pending) => received?,
            () = idle_since_last(self.idle, span) => return Ok(Wake::Idle),
        };
        if received == 0 {
            return Ok(Wake::Endpoint);
        }
        self.received(received);
        Ok(Wake::Bytes)
    }
}

/// Resolves when the kernel has redirected nothing for the idle time.
async fn idle_since_last(idle: Option<Duration>, span: SpanRef<'_>) {
    let Some(idle) = idle else { return std::future::pending().await };
    let idle = idle.as_nanos() as u64;
    let armed = monotonic_ns();
    loop {
        let passed = monotonic_ns().saturating_sub(span.stamps().1.max(armed));
        if passed >= idle {
            return;
        }
        tokio::time::sleep(Duration::from_nanos(idle - passed)).await;
    }
}
