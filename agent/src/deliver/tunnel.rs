//! A connection that has become something else (101 Switching Protocols), or that stays with its endpoint
//! (`pick_per = "connection"`): bytes both ways until both sides have ended theirs. What the endpoint sends goes through the kernel
//! where that can carry it.
//!
//! The end of one direction is passed on and leaves the other as it is. An error on either side breaks both off: the caller has
//! made sure that each sees a reset. Asked to stop, it waits for a moment in which nothing moves.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use penstock_common::path::Path;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

use super::{
    Account, End, Target,
    pipe::{Broken, Pipe},
    written,
};
use crate::{
    client::{ClientSocket, Wire, ledger::Ledger, reach::Watch},
    endpoint::connection::{EndpointConnection, Reader},
    kernel::socket::{self, monotonic_ns},
    steer::{Source, WorkerSteering},
};

const READ: usize = 16 * 1024;
/// Looks at what the peers have acknowledged, within a limit.
const LOOKS: u64 = 4;
/// How long nothing has to move for a stop.
const QUIET: Duration = Duration::from_secs(1);

pub struct Tunnel<'a> {
    pub client: &'a mut ClientSocket,
    pub endpoint: &'a mut EndpointConnection,
    /// The response head.
    pub lead: BytesMut,
    /// Read behind it.
    pub pending: BytesMut,
    /// Longest time without a byte either way.
    pub idle: Option<Duration>,
    /// Set when the kernel is to carry what it can of what the endpoint sends, and of what the client sends.
    pub down: Option<Target>,
    pub up: Option<Up>,
    /// `relayed` and its like are what went to the client.
    pub account: Account,
}

/// What it takes for the kernel to carry what a client sends.
pub struct Up {
    pub steering: Rc<WorkerSteering>,
    pub send_buffer: u32,
}

impl Tunnel<'_> {
    /// Until both have ended, one broke, nothing moved for the idle time, or `over` resolved and a quiet moment came.
    pub async fn run(&mut self, over: impl Future<Output = ()>) -> End {
        self.lead.extend_from_slice(&self.pending);
        let first = monotonic_ns();
        if let Err(end) = written(self.client.write_all(&self.lead).await) {
            return end;
        }
        self.account.relayed += self.pending.len() as u64;
        let end = if self.client.is_tls() { self.by_hand().await } else { self.plain(over).await };
        self.account.stamp(first, monotonic_ns());
        end.unwrap_or(End::Broken)
    }

    async fn plain(&mut self, over: impl Future<Output = ()>) -> io::Result<End> {
        if self.client.settle().await.is_err() {
            return Ok(End::ClientGone);
        }
        let watch = Watch::new(self.client.unreachable());
        let (moved, stop, idle) = (Cell::new(monotonic_ns()), CancellationToken::new(), self.idle);
        let steering = self.up.as_ref().map(|up| &up.steering);
        let Ok((client, early, source)) = self.client.tunnel(steering) else { return Ok(End::ClientGone) };
        let (from, endpoint) = self.endpoint.split()?;
        let mut up_target = None;
        if let (Some(up), Some(_)) = (&self.up, source) {
            let send_buffer = up.send_buffer;
            match up.steering.register_target(endpoint, send_buffer) {
                Ok(key) => up_target = Some(Target { key, send_buffer, path: Path::Ingress }),
                Err(error) => tracing::debug!(%error, "what a client sends cannot be steered"),
            }
        }
        let slots = [from.source, source].map(|source| source.map(Source::slot));
        for slot in slots.iter().flatten() {
            slot.ingress().begin_message();
            slot.local().begin_message();
        }
        let last = || {
            let slots = slots.iter().flatten();
            let stamps = slots.flat_map(|slot| [slot.ingress(), slot.local()].map(|span| span.stamps().1));
            stamps.fold(moved.get(), u64::max)
        };
        let taken = || acknowledged(client) + acknowledged(endpoint);
        let Ok(ledger) = Ledger::begin(client) else { return Ok(End::ClientGone) };
        let pipe = |from, to, ledger, pending, target| {
            let account = Account::default();
            Pipe { from, to, ledger, target, pending, moved: &moved, account, hold: false, fruitless: 0 }
        };
        let mut consumed = 0;
        let mut down = pipe(from, client, ledger, BytesMut::new(), self.down);
        let from = Reader { stream: client, source, consumed: &mut consumed };
        let mut up = pipe(from, endpoint, Ledger::begin(endpoint)?, early, up_target);
        let both = async {
            let down = async {
                down.run(&stop).await.map_err(|broken| match broken {
                    Broken::From => End::Broken,
                    Broken::To => End::ClientGone,
                })
            };
            let up = async {
                up.run(&stop).await.map_err(|broken| match broken {
                    Broken::From => End::ClientGone,
                    Broken::To => End::Broken,
                })
            };
            tokio::try_join!(down, up)
        };
        let quiet = async {
            over.await;
            unmoved(&last, &taken, Some(QUIET)).await;
            stop.cancel();
            std::future::pending::<()>().await;
        };
        let end = tokio::select! {
            biased;
            ended = both => match ended {
                Ok((true, true)) => End::Complete { reusable: false },
                Ok(_) => End::Over,
                Err(end) => end,
            },
            () = unmoved(&last, &taken, idle) => End::Idle,
            () = poll_fn(|cx| watch.poll_gone(client, cx)) => End::ClientGone,
            () = quiet => End::Over,
        };
        // Dropped in the middle of a span: nothing more may reach either side.
        for slot in slots.iter().flatten() {
            slot.disarm();
        }
        let (down, up) = (down.account, up.account);
        let account = &mut self.account;
        account.relayed += down.relayed;
        account.steered += down.steered;
        account.local += down.local;
        account.pieces += down.pieces;
        account.segments += down.segments;
        account.stops = down.stops;
        account.upstream = up.relayed + up.steered;
        account.upstream_steered = up.steered;
        Ok(end)
    }

    /// As user space has to where the client speaks TLS.
    async fn by_hand(&mut self) -> io::Result<End> {
        let (up, down, moved) = (Cell::new(0), Cell::new(0), Cell::new(monotonic_ns()));
        let watch = Watch::new(self.client.unreachable());
        let (wire, early) = self.client.raw();
        let wire = RefCell::new(wire);
        let (mut read, mut write) = (Half(&wire), Half(&wire));
        let (from, to) = self.endpoint.split()?;
        let note = |count: &Cell<u64>, n: usize| {
            moved.set(monotonic_ns());
            count.set(count.get() + n as u64);
        };
        let both = async {
            let up = client_to_endpoint(&mut read, early, to, |n| note(&up, n));
            let down = endpoint_to_client(from, &mut write, |n| note(&down, n));
            tokio::try_join!(up, down)
        };
        let last = || moved.get();
        let taken = || acknowledged(wire.borrow().tcp()) + acknowledged(to);
        let end = tokio::select! {
            biased;
            ended = both => ended.map_or_else(|end| end, |_| End::Complete { reusable: false }),
            () = unmoved(&last, &taken, self.idle) => End::Idle,
            () = poll_fn(|cx| watch.poll_gone(wire.borrow().tcp(), cx)) => End::ClientGone,
        };
        self.account.relayed += down.get();
        self.account.upstream = up.get();
        Ok(end)
    }
}

async fn client_to_endpoint(
    client: &mut (impl AsyncRead + Unpin),
    mut early: BytesMut,
    endpoint: &TcpStream,
    note: impl Fn(usize),
) -> Result<(), End> {
    loop {
        if !early.is_empty() {
            note(early.len());
            socket::write_all(endpoint, &early).await.map_err(|_| End::Broken)?;
            early.clear();
        }
        early.reserve(READ);
        if client.read_buf(&mut early).await.map_err(|_| End::ClientGone)? == 0 {
            return socket::shut_down(endpoint).map_err(|_| End::Broken);
        }
    }
}

async fn endpoint_to_client(
    mut endpoint: Reader<'_>,
    client: &mut (impl AsyncWrite + Unpin),
    note: impl Fn(usize),
) -> Result<(), End> {
    let mut buf = BytesMut::new();
    let written = |done: io::Result<()>| done.map_err(|_| End::ClientGone);
    loop {
        buf.reserve(READ);
        if endpoint.read(&mut buf).await.map_err(|_| End::Broken)? == 0 {
            return written(client.shutdown().await);
        }
        note(buf.len());
        written(client.write_all(&buf).await)?;
        written(client.flush().await)?;
        buf.clear();
    }
}

/// One direction of a client's connection, of which both are used in one task.
struct Half<'a>(&'a RefCell<&'a mut Wire>);

impl AsyncRead for Half<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_read(cx, buf)
    }
}

impl AsyncWrite for Half<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_shutdown(cx)
    }
}

/// Bytes that this peer has acknowledged. One that is gone is found by whoever reads.
fn acknowledged(socket: &TcpStream) -> u64 {
    socket::bytes_acked(socket).unwrap_or_default()
}

/// Resolves when nothing has moved for so long, neither on our side, `last` tells when it did (CLOCK_MONOTONIC ns), nor on the
/// peers', which have acknowledged `taken` bytes.
async fn unmoved(last: &impl Fn() -> u64, taken: &impl Fn() -> u64, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    let limit = limit.as_nanos() as u64;
    let (mut before, mut since) = (taken(), 0);
    loop {
        let passed = monotonic_ns().saturating_sub(last().max(since));
        if passed >= limit {
            return;
        }
        tokio::time::sleep(Duration::from_nanos((limit - passed).min(limit / LOOKS))).await;
        let now = taken();
        if now != before {
            (before, since) = (now, monotonic_ns());
        }
    }
}
