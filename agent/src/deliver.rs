//! Delivering a response body: from the endpoint's connection to the client's, through the kernel where that was chosen and
//! through user space where not, with the same bytes either way.
//!
//! Given both connections, the framing, and the bytes read behind the head, it ends when the message does or when something
//! breaks. In between it hands the flow to the kernel whenever user space holds nothing, and takes it back when the kernel
//! stops. Dropping the future breaks the delivery off: both connections can then only be closed.

mod frames;
mod pipe;
mod span;
mod tunnel;

pub use frames::{Coding, Frames};
pub use tunnel::{Tunnel, Up};

use std::{cell::RefCell, io, time::Duration};

use bytes::BytesMut;
use penstock_common::{framing::Framing, path::Path, slot::stop};
use tokio::time::Instant;

use crate::{
    client::{ClientSocket, patience},
    endpoint::connection::EndpointConnection,
    kernel::socket::monotonic_ns,
    tee::Tee,
};

/// First read buffer; it grows towards the largest while reads fill it.
const MIN_BUFFER: usize = 16 * 1024;
const MAX_BUFFER: usize = 256 * 1024;
/// After so many spans in a row that the kernel stopped before they had lasted this long, the rest of the body is relayed.
const MAX_FRUITLESS: u32 = 4;
const SHORT_SPAN: Duration = Duration::from_millis(10);
/// Long for what is in the hands of a `sendmsg` that does not wait.
const BEHIND: Duration = Duration::from_millis(100);

/// How a delivery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Every byte of the message is written or redirected. `reusable`: the endpoint connection may take another request.
    Complete { reusable: bool },
    /// The client has left or its connection broke.
    ClientGone,
    /// The endpoint closed or reset inside the message, or sent something that is no message.
    Broken,
    /// No byte came for the idle time, or the client acknowledged none.
    Idle,
    /// A tunnel was asked to stop, and nothing was on its way.
    Over,
}

impl End {
    /// Label for metrics and logs.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Complete { .. } => "ok",
            Self::ClientGone => "client_gone",
            Self::Broken => "endpoint_broke",
            Self::Idle => "idle_timeout",
            Self::Over => "over",
        }
    }
}

/// What was carried, and by whom.
#[derive(Debug, Default, Clone)]
pub struct Account {
    pub relayed: u64,
    /// By the verdict on what had arrived, and by the endpoint's own `sendmsg`.
    pub steered: u64,
    pub local: u64,
    /// Bytes from the client to the endpoint behind a switch of protocols.
    pub upstream: u64,
    /// Of these, what the kernel has carried.
    pub upstream_steered: u64,
    /// Pieces that user space wrote, and segments that the kernel redirected.
    pub pieces: u64,
    pub segments: u64,
    /// How often the kernel gave the flow back before the end, by reason (`penstock_common::slot::stop`).
    pub stops: [u32; stop::COUNT],
    /// First and last byte of the body, CLOCK_MONOTONIC ns; 0: none.
    pub first_ns: u64,
    pub last_ns: u64,
}

impl Account {
    /// Bytes that have gone this way to the client.
    pub fn carried(&self, path: Path) -> u64 {
        match path {
            Path::Local => self.local,
            Path::Ingress => self.steered,
            Path::Relay => self.relayed,
        }
    }

    fn stamp(&mut self, first: u64, last: u64) {
        if self.first_ns == 0 {
            self.first_ns = first;
        }
        self.last_ns = self.last_ns.max(last);
    }
}

/// What the kernel needs for its part.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The client's key in the target map.
    pub key: u64,
    /// Its send buffer, bytes.
    pub send_buffer: u32,
    pub path: Path,
}

impl Target {
    /// What is left to try when the kernel cannot carry the flow this way.
    fn next(self) -> Option<Self> {
        let path = self.path.next();
        (path != Path::Relay).then_some(Self { path, ..self })
    }
}

/// Counts at the moment when the kernel gets a flow.
struct Armed {
    path: Path,
    redirected: u64,
    segments: u64,
    payload: u32,
    since: u64,
}

pub struct Delivery<'a> {
    pub client: &'a mut ClientSocket,
    pub endpoint: &'a mut EndpointConnection,
    /// The body, from the first byte of `pending` on.
    pub framing: Framing,
    /// The response head, or nothing: goes out before the body, with its first bytes where there are any.
    pub lead: BytesMut,
    /// Read from the endpoint and not yet written.
    pub pending: BytesMut,
    /// Set when the kernel is to carry what it can.
    pub target: Option<Target>,
    /// Decode chunked for a client that does not know it.
    pub decode: bool,
    /// Learns the payload, whoever carries it.
    pub tee: Option<&'a RefCell<Tee>>,
    pub idle: Option<Duration>,
    pub account: Account,
    /// While the kernel has the flow: what was so when it got it.
    armed: Option<Armed>,
    /// Bytes that come next and that the framing is behind already.
    rest: u64,
    /// After a stop for want of room: relay until the client has caught up.
    hold: bool,
    /// Spans in a row that were stopped at once.
    fruitless: u32,
    /// Size of the next read, and whether the last one filled it.
    buffer: usize,
    filled: bool,
}

impl<'a> Delivery<'a> {
    pub fn new(
        client: &'a mut ClientSocket,
        endpoint: &'a mut EndpointConnection,
        framing: Framing,
        pending: BytesMut,
        idle: Option<Duration>,
    ) -> Self {
        let account = Account::default();
        let lead = BytesMut::new();
        let (target, decode, tee, armed) = (None, false, None, None);
        let (rest, hold, fruitless, buffer, filled) = (0, false, 0, MIN_BUFFER, false);
        Self {
            client,
            endpoint,
            framing,
            lead,
            pending,
            target,
            decode,
            tee,
            idle,
            account,
            armed,
            rest,
            hold,
            fruitless,
            buffer,
            filled,
        }
    }

    /// Delivers the whole body.
    pub async fn run(&mut self) -> End {
        if let (Some(_), Some(source)) = (self.target, self.endpoint.source()) {
            source.slot().ingress().begin_message();
            source.slot().local().begin_message();
        }
        loop {
            let step = match self.forward().await {
                Err(end) => Err(end),
                Ok(()) if self.framing.is_invalid() => Err(End::Broken),
                Ok(()) if self.is_complete() => Err(End::Complete { reusable: self.pending.is_empty() }),
                Ok(()) => self.more().await,
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// More of the body: through the kernel, else what can be read.
    async fn more(&mut self) -> Result<(), End> {
        match self.armable() {
            Some(target) if self.span(target).await? => Ok(()),
            _ => self.read().await,
        }
    }

    /// The last byte of the message is written or redirected.
    fn is_complete(&self) -> bool {
        self.rest == 0 && self.framing.is_done()
    }

    /// Writes what user space holds, up to the end of the message. What lies behind that stays in `pending`.
    async fn forward(&mut self) -> Result<(), End> {
        let mut lead = std::mem::take(&mut self.lead);
        if self.rest > 0 {
            let rest = self.pending.split_to(self.pending.len().min(self.rest.try_into().unwrap_or(usize::MAX)));
            written(self.client.write_all(&rest).await)?;
            self.rest -= rest.len() as u64;
            self.account.relayed += rest.len() as u64;
            if self.rest > 0 {
                return Ok(());
            }
        }
        while !self.pending.is_empty() && !self.framing.is_done() && !self.framing.is_invalid() {
            let begin = self.framing;
            let (taken, payload) = if self.decode {
                let (taken, payload) = self.framing.next(&self.pending);
                (taken, payload.unwrap_or_default())
            } else {
                let taken = self.framing.feed(&self.pending);
                (taken, &self.pending[..taken])
            };
            if let Some(tee) = self.tee {
                // Before the write, which waits for the client; the picker need not.
                tee.borrow_mut().take_framed(begin, &self.pending[..taken]);
            }
            let out = if lead.is_empty() {
                payload
            } else {
                lead.extend_from_slice(payload);
                &lead
            };
            written(self.client.write_all(out).await)?;
            lead.clear();
            let _ = self.pending.split_to(taken);
            let now = monotonic_ns();
            self.account.stamp(now, now);
            self.account.relayed += taken as u64;
            self.account.pieces += 1;
        }
        if lead.is_empty() { Ok(()) } else { written(self.client.write_all(&lead).await) }
    }

    /// The target, when the kernel may take over: nothing that it let through is unread, and the client has caught up since
    /// the last stop for want of room. A stream that never pauses stays in user space, which carries bulk no worse.
    fn armable(&mut self) -> Option<Target> {
        let target = self.target?;
        // A request that is still being sent needs the connection as it is.
        if self.rest > 0 || self.endpoint.unread() || !self.endpoint.is_sent() {
            return None;
        }
        if self.hold && self.client.send_queue().is_ok_and(|queued| queued > target.send_buffer / 4) {
            return None;
        }
        self.hold = false;
        Some(target)
    }

    /// Reads more, as user space.
    async fn read(&mut self) -> Result<(), End> {
        self.make_room();
        let (client, endpoint, pending) = (&mut *self.client, &mut *self.endpoint, &mut self.pending);
        let idle = async {
            match self.idle {
                Some(idle) => tokio::time::sleep_until(Instant::now() + idle).await,
                None => std::future::pending().await,
            }
        };
        let received = tokio::select! {
            biased;
            received = endpoint.read(pending) => received,
            () = client.gone() => return Err(End::ClientGone),
            () = idle => return Err(End::Idle),
        };
        match received {
            Ok(0) if self.rest == 0 && self.framing.may_close() => Err(End::Complete { reusable: false }),
            Ok(0) => Err(End::Broken),
            Ok(n) => {
                self.received(n);
                Ok(())
            }
            Err(_) => Err(End::Broken),
        }
    }

    /// Spare capacity for the next read: more than before when the last one filled what there was.
    fn make_room(&mut self) {
        debug_assert!(self.pending.is_empty() || self.is_complete());
        if self.filled {
            self.buffer = (self.buffer * 4).min(MAX_BUFFER);
        }
        if self.pending.capacity() - self.pending.len() < self.buffer {
            self.pending.reserve(self.buffer);
        }
    }

    /// Takes note of a read into the room that was made.
    fn received(&mut self, n: usize) {
        self.filled = n >= self.buffer;
    }
}

/// What became of a write to the client.
fn written(done: io::Result<()>) -> Result<(), End> {
    done.map_err(|error| if patience::is_over(&error) { End::Idle } else { End::ClientGone })
}
