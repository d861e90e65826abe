//! One direction of a connection that has become something else: bytes from one socket to the other until the first ends its
//! side, which is passed on. The kernel carries what it can, by the same handshake as a response body (`span`): arm, read once
//! more, wait, take back.

use std::{cell::Cell, future::poll_fn, io, time::Duration};

use bytes::BytesMut;
use penstock_common::{framing::Framing, path::Path, slot::stop};
use tokio::{io::Interest, net::TcpStream};
use tokio_util::sync::CancellationToken;

use super::{Account, BEHIND, MAX_FRUITLESS, SHORT_SPAN, Target};
use crate::{
    client::{ledger::Ledger, patience::Patience},
    endpoint::connection::Reader,
    kernel::{
        slots::SpanRef,
        socket::{self, monotonic_ns},
    },
    steer::Source,
};

const READ: usize = 16 * 1024;
/// How often is looked whether the other side has acknowledged everything.
const LOOK: Duration = Duration::from_millis(10);

pub(super) struct Pipe<'a> {
    pub(super) from: Reader<'a>,
    pub(super) to: &'a TcpStream,
    pub(super) ledger: Ledger,
    /// Set when the kernel is to carry what it can.
    pub(super) target: Option<Target>,
    /// Read and not yet written.
    pub(super) pending: BytesMut,
    /// When a byte has last been moved by user space, CLOCK_MONOTONIC ns.
    pub(super) moved: &'a Cell<u64>,
    pub(super) account: Account,
    /// After a stop for want of room: relay until the other side has caught up.
    pub(super) hold: bool,
    pub(super) fruitless: u32,
}

/// Why a direction broke.
#[derive(Debug, Clone, Copy)]
pub(super) enum Broken {
    /// The side that bytes come from.
    From,
    /// The side that they go to.
    To,
}

/// What a wait came to.
enum Wake {
    Bytes,
    /// There may be bytes or the end.
    Look,
    Released,
    Stopped,
}

impl Pipe<'_> {
    /// True: the first side has ended, and the other been told. False: it was asked to stop, everything read is written and has
    /// been acknowledged, and both sides are as they were.
    pub(super) async fn run(&mut self, stop: &CancellationToken) -> Result<bool, Broken> {
        loop {
            if !self.pending.is_empty() {
                self.write().await?;
            }
            if let Some(target) = self.armable() {
                match self.span(target, stop).await? {
                    Wake::Bytes | Wake::Released => continue,
                    Wake::Stopped => return self.last().await,
                    Wake::Look => {}
                }
            }
            self.pending.reserve(READ);
            let read = tokio::select! {
                biased;
                read = self.from.read(&mut self.pending) => read.map_err(|_| Broken::From)?,
                () = stop.cancelled() => return self.last().await,
                () = broken(self.to) => return Err(Broken::To),
            };
            if read == 0 {
                self.ledger.settle(self.to, Patience::new(None, None)).await.map_err(|_| Broken::To)?;
                socket::shut_down(self.to).map_err(|_| Broken::To)?;
                return Ok(true);
            }
        }
    }

    /// Writes on what has come until now. The kernel has let go.
    async fn last(&mut self) -> Result<bool, Broken> {
        loop {
            self.pending.reserve(READ);
            match self.from.read_now(&mut self.pending) {
                Ok(1..) => self.write().await?,
                // The end is for whoever closes to tell.
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Err(Broken::From),
            }
        }
        self.ledger.settle(self.to, Patience::new(None, None)).await.map_err(|_| Broken::To)?;
        while socket::send_queue(self.to).map_err(|_| Broken::To)? > 0 {
            tokio::time::sleep(LOOK).await;
        }
        Ok(false)
    }

    async fn write(&mut self) -> Result<(), Broken> {
        self.ledger.settle(self.to, Patience::new(None, None)).await.map_err(|_| Broken::To)?;
        socket::write_all(self.to, &self.pending).await.map_err(|_| Broken::To)?;
        self.ledger.add_written(self.pending.len() as u64);
        self.account.relayed += self.pending.len() as u64;
        self.account.pieces += 1;
        self.moved.set(monotonic_ns());
        self.pending.clear();
        Ok(())
    }

    fn armable(&mut self) -> Option<Target> {
        let target = self.target?;
        if self.from.is_behind() {
            return None;
        }
        if self.hold && socket::send_queue(self.to).is_ok_and(|queued| queued > target.send_buffer / 4) {
            return None;
        }
        self.hold = false;
        Some(target)
    }

    /// As `Delivery::span`.
    async fn span(&mut self, target: Target, stop: &CancellationToken) -> Result<Wake, Broken> {
        self.ledger.settle(self.to, Patience::new(None, None)).await.map_err(|_| Broken::To)?;
        let source = self.from.source.ok_or(Broken::From)?;
        let span = source.slot().span(target.path).ok_or(Broken::From)?;
        let before = (span.redirected(), span.segments(), monotonic_ns());
        source.slot().arm(target.path, target.key, Framing::until_close(), *self.from.consumed, false);
        self.pending.reserve(READ);
        let wake = match self.from.read_now(&mut self.pending) {
            Ok(0) => Ok(Wake::Look),
            Ok(_) => Ok(Wake::Bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.listen(source, target.path, stop).await,
            Err(_) => Err(Broken::From),
        };
        if !span.is_released() {
            span.disarm();
            // Waits for a verdict in progress, which may have seen the slot armed.
            let _ = socket::bytes_written(self.from.stream);
        }
        self.take_back(target.path, span, before).await?;
        wake
    }

    async fn listen(&mut self, source: &Source, path: Path, stop: &CancellationToken) -> Result<Wake, Broken> {
        tokio::select! {
            biased;
            () = poll_fn(|cx| source.poll_released(path, cx)) => Ok(Wake::Released),
            read = self.from.read(&mut self.pending) => match read {
                Ok(0) => Ok(Wake::Look),
                Ok(_) => Ok(Wake::Bytes),
                Err(_) => Err(Broken::From),
            },
            () = broken(self.to) => Err(Broken::To),
            () = stop.cancelled() => Ok(Wake::Stopped),
        }
    }

    /// Enters the kernel's books into ours; `before` is what they and the clock said at the arming. The span is released.
    async fn take_back(&mut self, path: Path, span: SpanRef<'_>, before: (u64, u64, u64)) -> Result<(), Broken> {
        let (redirected, segments, since) = before;
        let steered = span.redirected().saturating_sub(redirected);
        self.ledger.add_redirected(steered);
        self.account.segments += span.segments().saturating_sub(segments);
        if steered > 0 {
            self.moved.set(self.moved.get().max(span.stamps().1));
            match path {
                Path::Ingress => self.account.steered += steered,
                _ => {
                    self.account.local += steered;
                    self.account.local -= self.arrived().await?;
                }
            }
        }
        let why = span.stop();
        if why != 0
            && let Some(count) = self.account.stops.get_mut(why as usize)
        {
            *count += 1;
        }
        self.hold = why == stop::ROOM;
        let short = monotonic_ns().saturating_sub(since) < SHORT_SPAN.as_nanos() as u64;
        self.fruitless = if why != 0 && (steered == 0 || short) { self.fruitless + 1 } else { 0 };
        if why == stop::TARGET || why == stop::ACCOUNT || self.fruitless >= MAX_FRUITLESS {
            self.fruitless = 0;
            self.target = self.target.take().and_then(Target::next);
        }
        Ok(())
    }

    /// Waits for what a `sendmsg` was let redirect. What it was not able to take comes over the connection; returns how much.
    async fn arrived(&mut self) -> Result<u64, Broken> {
        loop {
            match tokio::time::timeout(BEHIND, self.ledger.settle(self.to, Patience::new(None, None))).await {
                Ok(settled) => return settled.map(|()| 0).map_err(|_| Broken::To),
                Err(_)
                    if !self.pending.is_empty() || socket::has_more(self.from.stream).map_err(|_| Broken::From)? =>
                {
                    return self.ledger.forgive(self.to).map_err(|_| Broken::To);
                }
                Err(_) => {}
            }
        }
    }
}

/// Resolves when the connection has met an error; an end in order is none.
async fn broken(stream: &TcpStream) {
    let _ = stream.ready(Interest::ERROR).await;
}
