//! One steered flow, from eligibility to reclaim: the bytes that one connection sends to another.
//!
//! ```text
//!              carry: settle, arm             the kernel disarms, bytes arrive, a side or the idle time ends it
//!   relayed ─────────────────────────▶ armed ───────────────────────────────────────────────────▶ stopped
//!      ▲                                 │ abandon: the caller dropped `carry`                        │
//!      └─────────────────────────────────┴──── reclaim: disarm, wait for the verdict, take the books ─┘
//! ```
//!
//! - *Relayed*: user space reads and writes. Every session begins here, and one on `Path::Relay` stays.
//! - *Armed*: the kernel has the flow. Nobody writes to the receiver, and the slot belongs to the kernel.
//! - *Stopped*: the kernel writes nothing of the slot any more, so user space may read it.
//!
//! [`carry`](Session::carry) makes one round of this diagram. Its steps keep the bytes in order. It settles first, because the
//! kernel's account of the receiver begins with the arming. It arms, then reads once more: the read waits for any verdict in
//! progress, so if it finds nothing, every later verdict sees the arming and every stop sends an event. If it finds bytes, the
//! kernel refuses the arming by itself (they count as passed) or has stopped already.
//!
//! `deliver` calls `carry` and `abandon`, and relays in between; nothing outside `steer` accesses a slot. A path without sockets in
//! a map differs in `arm`, `wait` and `take`, which match on the path, and nowhere else.

use std::{cell::RefCell, io, time::Duration};

use bytes::BytesMut;
use penstock_common::{framing::Framing, path::Path, slot::stop, tail};

use super::{account::Account, reader::Reader, source::Source};
use crate::{kernel::socket::monotonic_ns, tee::Tee};

/// After this many short spans in a row the flow moves to the next path: it outruns its receiver, and a relay costs less.
const MAX_SHORT_SPANS: u32 = 4;
const SHORT_SPAN: Duration = Duration::from_millis(10);

/// The connection that bytes come from.
pub trait Inlet {
    fn source(&self) -> Option<&Source>;

    /// The reading side. Fails while quiet.
    fn reader(&mut self) -> io::Result<Reader<'_>>;

    /// Waits until no verdict of this connection is in progress.
    fn wait_for_verdict(&self);

    /// Watches the connection for errors only. Returns false if others read from it too.
    fn quiet(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// Watches the connection for bytes again.
    fn attentive(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Resolves when a quiet connection breaks.
    fn broken(&self) -> impl Future<Output = ()> {
        std::future::pending()
    }
}

/// The connection that bytes go to, with the account of what has been written to it.
pub trait Outlet {
    /// Waits until all redirected bytes have reached the send queue. Calls `unless` repeatedly; returns false if it returned true
    /// before that.
    fn settle_unless(&mut self, unless: impl FnMut() -> bool) -> impl Future<Output = io::Result<bool>>;

    /// Adds bytes that the kernel has redirected here to the account.
    fn add_redirected(&mut self, bytes: u64);

    /// Removes redirected bytes that have not arrived from the account and returns their number.
    fn write_off_unsettled(&mut self) -> io::Result<u64>;

    /// Bytes that the receiver has not acknowledged.
    fn send_queue(&self) -> io::Result<u32>;

    /// Resolves when the session has to end: the receiver has left, or the caller wants the flow back.
    fn interrupted(&self) -> impl Future<Output = Ended>;
}

/// Why a session ended before its message did.
#[derive(Debug)]
pub enum Ended {
    /// The connection that bytes come from broke.
    From,
    /// The connection that they go to broke, or its peer took nothing for too long.
    To(io::Error),
    /// Nothing was redirected for the idle time.
    Idle,
    /// The caller asked for the flow.
    Asked,
}

/// What ended the wait for the kernel.
enum Wake {
    /// Bytes were passed to user space, and have been read.
    Bytes,
    /// Bytes, an error or the end arrived; the next read tells which.
    Readable,
    /// The kernel disarmed the slot.
    Released,
}

/// The receiver of a steered flow.
#[derive(Debug, Clone, Copy, Default)]
pub struct Target {
    /// Its key in the target map.
    pub key: u64,
    /// Its send buffer, bytes.
    pub send_buffer: u32,
}

/// The slot's counts at the arming.
struct Armed {
    redirected: u64,
    segments: u64,
    payload: u32,
    since: u64,
}

/// What was reclaimed.
struct Taken {
    /// Redirected bytes.
    steered: u64,
    /// The payload's count at the arming.
    payload: u32,
}

/// Owns one flow, from the choice of its path to the last byte: arms the slot, waits for the kernel and reclaims the flow.
pub struct Session<'a> {
    /// The path that the flow takes now.
    pub path: Path,
    target: Target,
    /// The rest of the message, from the first byte that user space has not written.
    pub framing: Framing,
    /// Bytes that come next and that the framing has counted already.
    pub rest: u64,
    /// Which path carried how many bytes so far.
    pub account: Account,
    /// Gets a copy of the payload, on every path.
    pub tee: Option<&'a RefCell<Tee>>,
    /// Longest time without a redirect while the kernel has the flow.
    pub idle: Option<Duration>,
    /// Set while armed.
    armed: Option<Armed>,
    /// Set by a stop for lack of room: relay until the receiver has caught up.
    hold: bool,
    /// Short spans in a row.
    short_spans: u32,
}

impl<'a> Session<'a> {
    /// Starts a message on this path.
    pub fn new(path: Path, target: Target, framing: Framing, source: Option<&Source>) -> Self {
        if let (Path::Local | Path::Ingress, Some(source)) = (path, source) {
            source.begin_message();
        }
        let (account, tee, idle, armed) = (Account::default(), None, None, None);
        Self { path, target, framing, rest: 0, account, tee, idle, armed, hold: false, short_spans: 0 }
    }

    /// Starts a message that user space relays.
    pub fn relayed(framing: Framing) -> Self {
        Self::new(Path::Relay, Target::default(), framing, None)
    }

    /// Lets the kernel carry what it can. Returns false if user space has to read. `pending` is empty and has room for a read.
    ///
    /// Dropping the future leaves the flow with the kernel: then [`abandon`](Self::abandon) it and close both connections.
    pub async fn carry(
        &mut self,
        from: &mut impl Inlet,
        to: &mut impl Outlet,
        pending: &mut BytesMut,
    ) -> Result<bool, Ended> {
        if !self.may_arm(from, to) {
            return Ok(false);
        }
        to.settle_unless(|| false).await.map_err(Ended::To)?;
        self.arm(from)?;
        let woken = self.wait(from, to, pending).await;
        let steered = self.reclaim(from, to, pending).await?;
        Ok(match woken? {
            Wake::Bytes => true,
            Wake::Readable => false,
            Wake::Released => steered || self.framing.is_done(),
        })
    }

    /// Reclaims the flow after [`carry`](Self::carry) was dropped, so that the account is complete.
    pub fn abandon(&mut self, from: &impl Inlet, to: &mut impl Outlet) {
        if let Some(Taken { steered, payload }) = self.take(from, to) {
            self.read_ring(from, payload, steered, 0);
        }
    }

    /// Whether everything passed has been read, the tee needs none of the next bytes, and the receiver has caught up since the last
    /// stop for lack of room. A stream that never pauses stays in user space, which carries bulk equally well.
    fn may_arm(&mut self, from: &mut impl Inlet, to: &impl Outlet) -> bool {
        let relays =
            self.path == Path::Relay || self.rest > 0 || self.tee.is_some_and(|tee| tee.borrow().wants_begin());
        if relays || from.reader().is_ok_and(|reader| reader.is_behind()) {
            return false;
        }
        self.hold = self.hold && to.send_queue().is_ok_and(|queued| queued > self.target.send_buffer / 4);
        !self.hold
    }

    fn arm(&mut self, from: &mut impl Inlet) -> Result<(), Ended> {
        let reader = from.reader().map_err(|_| Ended::From)?;
        let (source, consumed) = (reader.source.ok_or(Ended::From)?, *reader.consumed);
        let span = source.span(self.path).ok_or(Ended::From)?;
        self.armed = Some(Armed {
            redirected: span.redirected(),
            segments: span.segments(),
            payload: self.framing.payload,
            since: monotonic_ns(),
        });
        let keep = self.tee.is_some_and(|tee| tee.borrow().wants_end());
        source.slot().arm(self.path, self.target.key, self.framing, consumed, keep);
        Ok(())
    }

    /// Reads once more, then waits until the kernel disarms, bytes arrive, or a side or the idle time ends the session.
    async fn wait(&self, from: &mut impl Inlet, to: &impl Outlet, pending: &mut BytesMut) -> Result<Wake, Ended> {
        let broken = |_| Ended::From;
        match from.reader().and_then(|mut reader| reader.read_now(pending)) {
            Ok(0) => return Ok(Wake::Readable),
            Ok(_) => return Ok(Wake::Bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(broken(error)),
        }
        // On path `ingress`, each redirected segment would wake a reader for nothing. On path `local` nothing arrives while the
        // kernel carries; bytes that do arrive were sent over the connection, and then no redirect can follow.
        let quiet = match self.path {
            Path::Ingress => {
                let reader = from.reader().map_err(broken)?;
                // A short rest of the message may have been redirected already.
                if reader.source.is_some_and(|source| source.is_released(self.path)) {
                    return Ok(Wake::Released);
                }
                // Passed before the arming but not delivered yet (memory pressure): no event will report these bytes.
                if reader.is_behind() {
                    return Ok(Wake::Readable);
                }
                from.quiet().map_err(broken)?
            }
            Path::Local | Path::Wire | Path::Relay => false,
        };
        if quiet {
            // Nothing is read before the kernel disarms, so the memory is not needed.
            *pending = BytesMut::new();
            let source = from.source().ok_or(Ended::From)?;
            let woken = tokio::select! {
                biased;
                () = source.released(self.path) => Ok(Wake::Released),
                ended = to.interrupted() => Err(ended),
                () = from.broken() => Ok(Wake::Readable),
                () = source.idle(self.path, self.idle) => Err(Ended::Idle),
            };
            from.attentive().map_err(broken)?;
            return woken;
        }
        let mut reader = from.reader().map_err(broken)?;
        let source = reader.source.ok_or(Ended::From)?;
        tokio::select! {
            biased;
            () = source.released(self.path) => Ok(Wake::Released),
            ended = to.interrupted() => Err(ended),
            read = reader.read(pending) => match read {
                Ok(0) => Ok(Wake::Readable),
                Ok(_) => Ok(Wake::Bytes),
                Err(error) => Err(broken(error)),
            },
            () = source.idle(self.path, self.idle) => Err(Ended::Idle),
        }
    }

    /// Reclaims the flow. Returns whether the kernel carried something.
    async fn reclaim(
        &mut self,
        from: &mut impl Inlet,
        to: &mut impl Outlet,
        pending: &BytesMut,
    ) -> Result<bool, Ended> {
        let path = self.path;
        let Taken { steered, payload } = self.take(from, to).ok_or(Ended::From)?;
        let arrived = if path == Path::Local && steered > 0 { self.arrived(from, to, pending).await } else { Ok(0) };
        self.read_ring(from, payload, steered, arrived.as_ref().copied().unwrap_or(0));
        arrived.map(|_| steered > 0)
    }

    /// Disarms and enters what the kernel carried into the account.
    fn take(&mut self, from: &impl Inlet, to: &mut impl Outlet) -> Option<Taken> {
        let before = self.armed.take()?;
        let source = from.source()?;
        let span = source.span(self.path)?;
        if !span.is_released() {
            span.disarm();
            // A verdict in progress may have seen the slot armed.
            from.wait_for_verdict();
        }
        let steered = span.redirected().saturating_sub(before.redirected);
        let stop = span.stop();
        tracing::trace!(path = self.path.label(), steered, stop = stop::label(stop), "flow reclaimed");
        self.framing = span.framing();
        to.add_redirected(steered);
        self.account.add_steered(self.path, steered, span.segments().saturating_sub(before.segments), stop);
        if steered > 0 {
            let (first, last) = span.stamps();
            self.account.stamp(first, last);
        }
        let short = monotonic_ns().saturating_sub(before.since) < SHORT_SPAN.as_nanos() as u64;
        self.judge(stop, steered > 0 && !short);
        Some(Taken { steered, payload: before.payload })
    }

    /// Decides by the end of a span when and on which path the next one may begin. `worthwhile`: the span carried something, and
    /// lasted.
    fn judge(&mut self, stop: u32, worthwhile: bool) {
        self.hold = stop == stop::ROOM;
        self.short_spans = if stop != 0 && !worthwhile { self.short_spans + 1 } else { 0 };
        if matches!(stop, stop::TARGET | stop::ACCOUNT | stop::SHARED) || self.short_spans >= MAX_SHORT_SPANS {
            self.short_spans = 0;
            self.path = self.path.next();
        }
    }

    /// Waits until the bytes that the endpoint's `sendmsg` redirected have reached the receiver's send queue. A non-blocking
    /// `sendmsg` may have taken only a part (the queue can fill while a message is put into it), and then the endpoint sends the
    /// rest over its connection: those bytes come next, and the framing has counted them already. Returns how many of them will be
    /// counted again.
    async fn arrived(&mut self, from: &mut impl Inlet, to: &mut impl Outlet, pending: &BytesMut) -> Result<u64, Ended> {
        let mut broken = false;
        let come = || {
            if !pending.is_empty() {
                return true;
            }
            // The check consumes the socket's error, and the next read would report an orderly close.
            let more = from.reader().and_then(|reader| reader.has_more());
            broken = more.is_err();
            more.unwrap_or(true)
        };
        if to.settle_unless(come).await.map_err(Ended::To)? {
            return Ok(0);
        }
        if broken {
            return Err(Ended::From);
        }
        let missing = to.write_off_unsettled().map_err(Ended::To)?;
        self.account.local -= missing;
        if self.framing.is_until_close() {
            // Every byte is payload: they are relayed as the next ones.
            self.framing.payload = self.framing.payload.wrapping_sub(missing as u32);
            return Ok(missing);
        }
        self.rest = missing;
        Ok(0)
    }

    /// Gives the tee the end of what the kernel redirected: `steered` bytes with their framing, from payload byte `begin` on, without
    /// the last `again` ones, which the tee will get when they are relayed.
    fn read_ring(&self, from: &impl Inlet, begin: u32, steered: u64, again: u64) {
        let (Some(tee), Some(source)) = (self.tee, from.source()) else { return };
        let mut tee = tee.borrow_mut();
        if steered == 0 || !tee.wants_end() {
            return;
        }
        let end = self.framing.payload;
        // Payload numbers wrap, so those of a long span do not give its length.
        let length = if steered > u64::from(u32::MAX) { u32::MAX } else { end.wrapping_sub(begin) };
        // The bytes that come again were copied after the others.
        let kept = tail::TAIL.saturating_sub(again.try_into().unwrap_or(u32::MAX));
        if length > kept {
            tee.skipped();
        }
        match source.ring() {
            Ok(ring) => {
                let (older, newer) = tail::last(&ring, end, length.min(kept));
                tee.take(older);
                tee.take(newer);
            }
            Err(error) => {
                tracing::debug!(%error, "the end of a steered response cannot be read");
                tee.skipped();
            }
        }
    }
}
