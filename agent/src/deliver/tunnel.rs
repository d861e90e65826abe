//! Delivers a tunnel: a connection after `101 Switching Protocols`, or a pinned one (`pick_per = "connection"`). Bytes go both ways
//! until both sides have ended theirs; the kernel carries what it can.
//!
//! The end of one direction is passed on and leaves the other open. An error on either side ends both; the caller has made sure
//! that each peer sees a reset. Asked to stop, a tunnel waits until nothing moves; cut, it ends at once. The account is right however it
//! ended.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use penstock_common::framing::Framing;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

use super::{End, written};
use crate::{
    client::{ClientIo, ClientSocket, ledger::Ledger, patience::Patience, reach::ReachWatch},
    endpoint::{connection::EndpointConnection, tls::EndpointWriter},
    kernel::socket::{self, monotonic_ns},
    steer::{
        eligibility::Upstream,
        reader::Reader,
        session::{Ended, Outlet, Session},
    },
};

const READ: usize = 16 * 1024;
/// How often to check the peers' acknowledgements within a time limit.
const LOOKS: u64 = 4;
/// How long nothing has to move before a stop.
const QUIET: Duration = Duration::from_secs(1);
/// Time between two checks whether the other side has acknowledged everything.
const LOOK: Duration = Duration::from_millis(10);

pub struct Tunnel<'a> {
    pub client: &'a mut ClientSocket,
    pub endpoint: &'a mut EndpointConnection,
    /// The response head.
    pub lead: BytesMut,
    /// The bytes that were read after it.
    pub pending: BytesMut,
    /// Longest time without a byte either way.
    pub idle: Option<Duration>,
    /// Carries what the endpoint sends. Its account becomes the tunnel's: `relayed`, `steered` and `local` went to the client.
    pub down: Session<'a>,
    /// Set if the kernel may carry what the client sends.
    pub up: Option<Upstream>,
}

impl Tunnel<'_> {
    /// Runs until both sides have ended, one broke, nothing moved for the idle time, `over` resolved and nothing moves, or `cut`
    /// resolved.
    pub async fn run(&mut self, over: impl Future<Output = ()>, cut: impl Future<Output = ()>) -> End {
        let (first, mut cut) = (monotonic_ns(), pin!(cut));
        let begun = tokio::select! {
            biased;
            begun = self.begin() => begun,
            () = cut.as_mut() => Err(End::Over),
        };
        if let Err(end) = begun {
            return end;
        }
        self.down.account.relayed += self.pending.len() as u64;
        self.down.account.first_ns = first;
        let is_tls = self.client.is_tls() || self.endpoint.is_tls();
        let end = if is_tls { self.relay(over, cut).await } else { self.plain(over, cut).await };
        self.down.account.last_ns = monotonic_ns();
        end.unwrap_or(End::Broken)
    }

    /// Sends the head and what was read after it.
    async fn begin(&mut self) -> Result<(), End> {
        self.lead.extend_from_slice(&self.pending);
        written(self.client.write_all(&self.lead).await)?;
        if !self.client.is_tls() && self.client.settle().await.is_err() {
            return Err(End::ClientGone);
        }
        Ok(())
    }

    async fn plain(&mut self, over: impl Future<Output = ()>, cut: impl Future<Output = ()>) -> io::Result<End> {
        let watch = ReachWatch::new(self.client.unreachable());
        let (moved, stop, idle) = (Cell::new(monotonic_ns()), CancellationToken::new(), self.idle);
        let steering = self.up.as_ref().map(|up| &up.steering);
        let Ok((client, early, source)) = self.client.tunnel(steering) else { return Ok(End::ClientGone) };
        let (from, endpoint) = self.endpoint.split()?;
        let sources = [from.source, source];
        let last = || sources.iter().flatten().map(|source| source.last_redirect()).fold(moved.get(), u64::max);
        let taken = || acknowledged(client) + acknowledged(endpoint);
        let mut up = match &self.up {
            Some(up) => up.open(source, endpoint),
            None => Session::relayed(Framing::until_close()),
        };
        let Ok(ledger) = Ledger::begin(client) else { return Ok(End::ClientGone) };
        let to = Peer { stream: client, ledger, stop: &stop };
        let mut down = Direction { from, to, session: &mut self.down, pending: BytesMut::new(), moved: &moved };
        let from = Reader { stream: client, source, tls: None, consumed: &mut 0 };
        let to = Peer { stream: endpoint, ledger: Ledger::begin(endpoint)?, stop: &stop };
        let mut up_way = Direction { from, to, session: &mut up, pending: early, moved: &moved };
        let both = async {
            let down = async { down.run().await.map_err(End::from) };
            let up = async {
                up_way.run().await.map_err(|ended| match ended {
                    Ended::From => End::ClientGone,
                    Ended::To(_) => End::Broken,
                    ended => ended.into(),
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
            () = cut => End::Over,
        };
        // The kernel may still have a flow: nothing more may reach either side.
        down.session.abandon(&down.from, &mut down.to);
        up_way.session.abandon(&up_way.from, &mut up_way.to);
        self.down.account.upstream = up.account.relayed + up.account.steered;
        self.down.account.upstream_steered = up.account.steered;
        Ok(end)
    }

    /// Relays both directions if a side speaks TLS.
    async fn relay(&mut self, over: impl Future<Output = ()>, cut: impl Future<Output = ()>) -> io::Result<End> {
        let (up, down, moved) = (Cell::new(0), Cell::new(0), Cell::new(monotonic_ns()));
        let watch = ReachWatch::new(self.client.unreachable());
        let (wire, early) = self.client.raw();
        let wire = RefCell::new(wire);
        let (mut read, mut write) = (Half(&wire), Half(&wire));
        let writer = self.endpoint.writer()?;
        let (from, to) = self.endpoint.split()?;
        let note = |count: &Cell<u64>, n: usize| {
            moved.set(monotonic_ns());
            count.set(count.get() + n as u64);
        };
        let both = async {
            let up = client_to_endpoint(&mut read, early, &writer, |n| note(&up, n));
            let down = endpoint_to_client(from, &mut write, |n| note(&down, n));
            tokio::try_join!(up, down)
        };
        let last = || moved.get();
        let taken = || acknowledged(wire.borrow().tcp()) + acknowledged(to);
        let quiet = async {
            over.await;
            unmoved(&last, &taken, Some(QUIET)).await;
            let queued = |stream: &TcpStream| socket::send_queue(stream).unwrap_or_default();
            while queued(wire.borrow().tcp()) > 0 || queued(to) > 0 {
                tokio::time::sleep(LOOK).await;
            }
        };
        let end = tokio::select! {
            biased;
            ended = both => ended.map_or_else(|end| end, |_| End::Complete { reusable: false }),
            () = unmoved(&last, &taken, self.idle) => End::Idle,
            () = poll_fn(|cx| watch.poll_gone(wire.borrow().tcp(), cx)) => End::ClientGone,
            () = quiet => End::Over,
            () = cut => End::Over,
        };
        self.down.account.relayed += down.get();
        self.down.account.upstream = up.get();
        Ok(end)
    }
}

/// One direction: forwards bytes until the sender ends its side, and passes that end on.
struct Direction<'a, 's> {
    from: Reader<'a>,
    to: Peer<'a>,
    session: &'a mut Session<'s>,
    /// Read and not yet written.
    pending: BytesMut,
    /// When a byte was last moved by user space, CLOCK_MONOTONIC ns.
    moved: &'a Cell<u64>,
}

impl Direction<'_, '_> {
    /// Returns true when the first side has ended and the other one was told. Returns false when it was asked to stop: everything
    /// read is written and acknowledged, and both sides are open.
    async fn run(&mut self) -> Result<bool, Ended> {
        loop {
            if !self.pending.is_empty() {
                self.write().await?;
            }
            self.pending.reserve(READ);
            let read = match self.session.carry(&mut self.from, &mut self.to, &mut self.pending).await {
                Ok(true) => continue,
                Ok(false) => tokio::select! {
                    biased;
                    read = self.from.read(&mut self.pending) => read.map_err(|_| Ended::From),
                    ended = self.to.interrupted() => Err(ended),
                },
                Err(ended) => Err(ended),
            };
            match read {
                Ok(0) => {
                    self.to.settle().await?;
                    return socket::shut_down(self.to.stream).map(|()| true).map_err(Ended::To);
                }
                Ok(_) => {}
                Err(Ended::Asked) => return self.last().await,
                Err(ended) => return Err(ended),
            }
        }
    }

    /// Forwards what has come until now, while the kernel has nothing.
    async fn last(&mut self) -> Result<bool, Ended> {
        loop {
            self.pending.reserve(READ);
            match self.from.read_now(&mut self.pending) {
                Ok(1..) => self.write().await?,
                // The caller closes both sides.
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Err(Ended::From),
            }
        }
        self.to.settle().await?;
        while self.to.send_queue().map_err(Ended::To)? > 0 {
            tokio::time::sleep(LOOK).await;
        }
        Ok(false)
    }

    async fn write(&mut self) -> Result<(), Ended> {
        self.to.settle().await?;
        socket::write_all(self.to.stream, &self.pending).await.map_err(Ended::To)?;
        self.to.ledger.add_written(self.pending.len() as u64);
        self.session.account.add_relayed(self.pending.len());
        self.moved.set(monotonic_ns());
        self.pending.clear();
        Ok(())
    }
}

/// The connection that a direction's bytes go to. Time limits are those of the whole tunnel.
struct Peer<'a> {
    stream: &'a TcpStream,
    ledger: Ledger,
    stop: &'a CancellationToken,
}

impl Peer<'_> {
    async fn settle(&mut self) -> Result<(), Ended> {
        self.settle_unless(|| false).await.map_err(Ended::To).map(drop)
    }
}

impl Outlet for Peer<'_> {
    async fn settle_unless(&mut self, unless: impl FnMut() -> bool) -> io::Result<bool> {
        self.ledger.settle_unless(self.stream, Patience::new(None, None), unless).await
    }

    fn add_redirected(&mut self, bytes: u64) {
        self.ledger.add_redirected(bytes);
    }

    fn write_off_unsettled(&mut self) -> io::Result<u64> {
        self.ledger.write_off_unsettled(self.stream)
    }

    fn send_queue(&self) -> io::Result<u32> {
        socket::send_queue(self.stream)
    }

    /// An orderly close of this side does not count as one.
    async fn interrupted(&self) -> Ended {
        tokio::select! {
            biased;
            _ = self.stream.ready(Interest::ERROR) => Ended::To(io::ErrorKind::ConnectionReset.into()),
            () = self.stop.cancelled() => Ended::Asked,
        }
    }
}

async fn client_to_endpoint(
    client: &mut (impl AsyncRead + Unpin),
    mut early: BytesMut,
    endpoint: &EndpointWriter,
    note: impl Fn(usize),
) -> Result<(), End> {
    loop {
        if !early.is_empty() {
            note(early.len());
            endpoint.write_all(&early).await.map_err(|_| End::Broken)?;
            early.clear();
        }
        early.reserve(READ);
        if client.read_buf(&mut early).await.map_err(|_| End::ClientGone)? == 0 {
            return endpoint.shut_down().await.map_err(|_| End::Broken);
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

/// One direction of a client's connection; both are used in one task.
struct Half<'a>(&'a RefCell<&'a mut ClientIo>);

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

/// Bytes that this peer has acknowledged; 0 if it is gone, which the reader finds.
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
