//! A client's HTTP/1.1 connection. Writes wait until bytes that the kernel redirected have reached the socket.

use std::{
    future::{Future as _, poll_fn},
    io,
    pin::pin,
    rc::Rc,
    task::Poll,
    time::Duration,
};

use bytes::BytesMut;
use futures_util::FutureExt as _;
use http::Version;
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite, Interest},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use super::{
    close::{self, Cut, Linger},
    ledger::Ledger,
    patience::{self, Patience},
    reach::ReachWatch,
    wire::ClientIo,
};
use crate::{
    config::HalfClose,
    kernel::socket,
    steer::{
        RegisterError, Source, WorkerSteering,
        session::{Ended, Outlet},
    },
};

/// How long redirected bytes may stay unacknowledged before a close becomes a reset.
const SETTLE: Duration = Duration::from_secs(30);
/// How long an aborted connection whose client takes queued bytes is kept.
const DRAIN: Duration = Duration::from_secs(60);
/// Longest pause between two looks at the queue of such a connection.
const LOOK: Duration = Duration::from_millis(250);
/// A tunnel's client side is steered only if fewer bytes than this were waiting when the tunnel began.
const EARLY: usize = 256 * 1024;
/// Bytes per read ahead of time.
const AHEAD: usize = 4096;

/// A client's HTTP/1.1 connection, with or without TLS. Keeps account of what was written and redirected to it, so that it is never
/// closed before both have arrived ([`settle`](Self::settle)).
pub struct ClientSocket {
    wire: ClientIo,
    /// Bytes read but not used: the rest of a request, or the beginning of the next.
    pub buf: BytesMut,
    ledger: Ledger,
    key: Option<u64>,
    resets: bool,
    /// Something other than interim heads was written since the last [`begin_answer`](Self::begin_answer).
    answered: bool,
    version: Version,
    /// Unread bytes of the last request may still arrive.
    pub unread: bool,
    stalled: bool,
    /// The last write was cancelled in its middle, so whatever followed would be read as a part of it.
    is_cut: bool,
    /// How long the client may go without acknowledging data.
    idle: Option<Duration>,
    half_close: HalfClose,
    /// How long a due acknowledgement may be missing before the client's machine counts as gone.
    unreachable: Option<Duration>,
    watch: ReachWatch,
    /// The kernel's slot for what the client sends. Declared after `wire`, because a slot must outlive its socket.
    source: Option<Source>,
}

/// A connection, the bytes already read from it, and its slot in the kernel.
pub(super) type TunnelEnd<'a> = (&'a TcpStream, BytesMut, Option<&'a Source>);

impl ClientSocket {
    /// A connection without TLS. Fails if an option of the socket cannot be set or read.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Self::of(ClientIo::Plain(stream))
    }

    /// A connection after its TLS handshake.
    pub(crate) fn tls(stream: TlsStream<TcpStream>) -> io::Result<Self> {
        Self::of(ClientIo::Tls(Box::new(stream)))
    }

    fn of(wire: ClientIo) -> io::Result<Self> {
        wire.tcp().set_nodelay(true)?;
        let ledger = Ledger::begin(wire.tcp())?;
        Ok(Self {
            wire,
            buf: BytesMut::new(),
            ledger,
            key: None,
            resets: false,
            answered: false,
            version: Version::HTTP_11,
            unread: false,
            stalled: false,
            is_cut: false,
            idle: None,
            half_close: HalfClose::Cancel,
            unreachable: None,
            watch: ReachWatch::new(None),
            source: None,
        })
    }

    /// The connection and the bytes already read from it.
    pub fn into_parts(self) -> (ClientIo, BytesMut) {
        (self.wire, self.buf)
    }

    /// The TCP connection, below TLS if there is any.
    pub(crate) fn stream(&self) -> &TcpStream {
        self.wire.tcp()
    }

    /// Resets `is_answered` for the next request, whose client speaks this version.
    pub fn begin_answer(&mut self, version: Version) {
        (self.answered, self.version) = (false, version);
    }

    /// The version of HTTP of the current request.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Whether a byte of the response was written since [`begin_answer`](Self::begin_answer).
    pub(crate) fn is_answered(&self) -> bool {
        self.answered
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.wire.is_tls()
    }

    /// Sets when the client counts as gone.
    pub fn set_leaving(&mut self, half_close: HalfClose, unreachable: Option<Duration>) {
        self.half_close = half_close;
        if self.unreachable != unreachable {
            self.unreachable = unreachable;
            self.watch = ReachWatch::new(unreachable);
        }
    }

    /// The time limits for one wait.
    pub fn patience(&self) -> Patience {
        Patience::new(self.idle, self.unreachable)
    }

    /// How long a due acknowledgement may be missing; `None` without a limit.
    pub(crate) fn unreachable(&self) -> Option<Duration> {
        self.unreachable
    }

    /// Whether the client has closed its side of a plain connection and still gets an answer.
    pub fn is_half_closed(&self) -> bool {
        self.half_close == HalfClose::Answer && socket::is_half_closed(self.stream())
    }

    /// Whether clients that close their side are answered.
    pub fn answers_half_closed(&self) -> bool {
        self.half_close == HalfClose::Answer
    }

    /// Sets how long the client may go without acknowledging data.
    pub fn set_idle(&mut self, idle: Option<Duration>) {
        self.idle = idle;
    }

    /// Registers the connection as a target, once; returns its key.
    pub fn make_target(&mut self, steering: &WorkerSteering, send_buffer: u32) -> Result<u64, RegisterError> {
        if let Some(key) = self.key {
            return Ok(key);
        }
        let key = steering.register_target(self.stream(), send_buffer)?;
        self.key = Some(key);
        Ok(key)
    }

    /// Reads available bytes into `buf`, which grows by up to about `room`; returns 0 at the end of the stream.
    /// Cancel-safe.
    pub async fn read(&mut self, room: usize) -> io::Result<usize> {
        self.make_room(room);
        self.wire.read_buf(&mut self.buf).await
    }

    /// Like [`read`](Self::read), without waiting.
    pub fn read_now(&mut self, room: usize) -> io::Result<usize> {
        self.make_room(room);
        match &mut self.wire {
            ClientIo::Plain(stream) => socket::receive_into(&*stream, &mut self.buf),
            ClientIo::Tls(stream) => {
                stream.read_buf(&mut self.buf).now_or_never().unwrap_or(Err(io::ErrorKind::WouldBlock.into()))
            }
        }
    }

    fn make_room(&mut self, room: usize) {
        if self.buf.capacity() - self.buf.len() < room / 4 {
            self.buf.reserve(room);
        }
    }

    /// Writes all of `buf`, after redirected bytes have settled. If the client stalls, fails with an error for which
    /// [`patience::is_over`] is true, and the close becomes a reset. Not cancel-safe: after a cancelled write the
    /// connection can only be aborted.
    pub async fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.answered = true;
        if self.is_cut {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.settle().await?;
        let (mut rest, mut patience) = (buf, self.patience());
        while !rest.is_empty() {
            match patience.step(&mut self.wire, |wire, cx| wire.poll_write(cx, rest)).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    rest = &rest[n..];
                    self.is_cut = !rest.is_empty();
                }
                Err(error) => return Err(self.stalled(error)),
            }
        }
        // Plain bytes are in the kernel now; TLS may still buffer some.
        if let Err(error) = patience.step(&mut self.wire, AsyncWrite::poll_flush).await {
            return Err(self.stalled(error));
        }
        self.ledger.add_written(buf.len() as u64);
        Ok(())
    }

    /// Writes an interim head as [`write_all`](Self::write_all) does. The answer has not begun with it.
    pub async fn interim(&mut self, head: &[u8]) -> io::Result<()> {
        self.write_all(head).await?;
        self.answered = false;
        Ok(())
    }

    /// Makes the close a reset if the client stalled, so that the kernel drops the queued bytes.
    fn stalled(&mut self, error: io::Error) -> io::Error {
        if patience::is_over(&error) {
            self.stalled = true;
            self.reset_on_close();
        }
        error
    }

    /// Whether the client has stalled.
    pub fn has_stalled(&self) -> bool {
        self.stalled
    }

    /// The plain connection, the bytes already read from it, and its slot, for a caller that keeps its own account.
    /// With `steering`, the kernel inspects what the client sends from now on, if possible. Fails with `Unsupported`
    /// for TLS.
    pub fn tunnel(&mut self, steering: Option<&Rc<WorkerSteering>>) -> io::Result<TunnelEnd<'_>> {
        if self.is_tls() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if let Some(steering) = steering {
            // Everything that has arrived must be read first: the kernel would deliver a partly read segment a second
            // time.
            while self.buf.len() < EARLY {
                match self.read_now(AHEAD) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // Without this, the next reader would take the error for an orderly close.
                    Err(error) => return Err(error),
                }
            }
            let drained = self.buf.len() < EARLY;
            self.source = if drained { steering.announce_source(self.stream()).ok() } else { None };
            // Fails for a client that has already closed its side.
            self.source = self.source.take().filter(|source| source.insert(self.stream()).is_ok());
            // This check passes on what arrived between the read and the insertion.
            socket::has_more(self.stream())?;
        }
        let early = std::mem::take(&mut self.buf);
        Ok((self.wire.tcp(), early, self.source.as_ref()))
    }

    /// The connection for both directions, and the bytes already read. The ledger ends here: nothing may be redirected
    /// afterwards.
    pub fn raw(&mut self) -> (&mut ClientIo, BytesMut) {
        (&mut self.wire, std::mem::take(&mut self.buf))
    }

    /// Like [`Ledger::settle_unless`], with this client's time limits and without a condition.
    pub async fn settle(&mut self) -> io::Result<()> {
        self.settle_unless(|| false).await.map(drop)
    }

    /// Resolves when the client is gone: closed, reset, unreachable or, unless `listen.half_close` keeps answering,
    /// half-closed. Also sees an end that follows unread bytes (the rest of a body, the next request). Cancel-safe.
    pub async fn gone(&mut self) {
        if !self.is_tls() {
            return self.left().await;
        }
        // The end may be visible earlier in the decrypted stream. Bytes read ahead are kept.
        while self.buf.is_empty() {
            match self.read_unless_unreachable(AHEAD).await {
                Some(Ok(1..)) => {}
                Some(Ok(0)) if self.half_close == HalfClose::Answer => break,
                // The client did not send close_notify, but the request's own framing shows that it is complete.
                Some(Err(error))
                    if self.half_close == HalfClose::Answer && error.kind() == io::ErrorKind::UnexpectedEof =>
                {
                    break;
                }
                Some(Ok(0) | Err(_)) | None => return,
            }
        }
        self.left().await;
    }

    /// Like [`read`](Self::read). `None` when the client has become unreachable.
    async fn read_unless_unreachable(&mut self, room: usize) -> Option<io::Result<usize>> {
        self.make_room(room);
        let (wire, buf, watch) = (&mut self.wire, &mut self.buf, &self.watch);
        poll_fn(|cx| match watch.poll_gone(wire.tcp(), cx) {
            Poll::Ready(()) => Poll::Ready(None),
            // Each poll may begin a new read: a pending one has taken nothing.
            Poll::Pending => pin!(wire.read_buf(buf)).poll(cx).map(Some),
        })
        .await
    }

    /// Like [`gone`](Self::gone), using only the TCP stream.
    pub async fn left(&self) {
        let end = async {
            // These sockets carry no urgent data, so this readiness means the end of the stream, which tokio remembers.
            let end = match self.half_close {
                HalfClose::Cancel => Interest::PRIORITY,
                HalfClose::Answer => Interest::ERROR,
            };
            let _ = self.stream().ready(end).await;
        };
        tokio::select! {
            biased;
            () = end => {}
            () = poll_fn(|cx| self.watch.poll_gone(self.stream(), cx)) => {}
        }
    }

    /// Closes the connection orderly: everything written arrives, then FIN. The client is then read on, because closing
    /// with unread bytes would send RST and discard data in transit. `Err` if the client had not closed its side.
    pub async fn close(mut self, linger: Linger) -> Result<(), Cut> {
        self.idle = Some(self.idle.map_or(SETTLE, |idle| idle.min(SETTLE)));
        if self.settle().await.is_err() {
            // Some redirected bytes have not reached the socket and the close drops them, so the client must see a
            // reset.
            socket::set_reset_on_close(self.stream(), true);
            return Ok(());
        }
        if self.resets {
            socket::set_reset_on_close(self.stream(), false);
        }
        // The client may be slow to take what is queued: the kernel delivers it after the close.
        close::discard(self.wire, self.buf, linger).await
    }

    /// Makes any end of the connection a reset, including the end of the process: the response body ends only by close,
    /// and an early FIN would look like its end. [`close`](Self::close) reverts this.
    pub fn reset_on_close(&mut self) {
        self.resets = true;
        socket::set_reset_on_close(self.stream(), true);
    }

    /// Aborts the connection in the middle of a message. Bytes already sent still arrive. If only a reset tells the client that the
    /// message is incomplete, it follows when the client has acknowledged them, acknowledges nothing more for its time limit, or
    /// after [`DRAIN`]: a reset drops what is queued.
    pub async fn abort(mut self) {
        self.idle = Some(self.idle.map_or(SETTLE, |idle| idle.min(SETTLE)));
        let limit = match (self.resets, self.stalled) {
            (false, _) => Duration::from_secs(1),
            (true, false) => DRAIN,
            (true, true) => return,
        };
        // In any case the connection is closed now.
        let _ = tokio::time::timeout(limit, self.sent()).await;
    }

    /// Waits until the socket has taken everything and, if the close is a reset, until the client has acknowledged it. Fails if the
    /// client is gone or stalls.
    async fn sent(&mut self) -> io::Result<()> {
        self.settle().await?;
        let (mut patience, mut wait) = (self.patience(), Duration::ZERO);
        while self.resets && socket::send_queue(self.stream())? > 0 {
            socket::has_more(self.stream())?;
            patience.begin(self.stream())?;
            patience.look(self.stream())?;
            wait = pause_after(wait);
            tokio::select! {
                () = self.left() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
        }
        Ok(())
    }
}

/// The pause before the next look at a queue, as nothing wakes a task when the queue is empty. It grows with the time waited.
fn pause_after(last: Duration) -> Duration {
    (last * 2).clamp(Duration::from_millis(1), LOOK)
}

impl Outlet for ClientSocket {
    async fn settle_unless(&mut self, unless: impl FnMut() -> bool) -> io::Result<bool> {
        let patience = self.patience();
        let settled = self.ledger.settle_unless(self.wire.tcp(), patience, unless).await;
        settled.map_err(|error| self.stalled(error))
    }

    fn add_redirected(&mut self, bytes: u64) {
        self.ledger.add_redirected(bytes);
    }

    fn write_off_unsettled(&mut self) -> io::Result<u64> {
        self.ledger.write_off_unsettled(self.wire.tcp())
    }

    fn send_queue(&self) -> io::Result<u32> {
        socket::send_queue(self.stream())
    }

    async fn interrupted(&self) -> Ended {
        self.left().await;
        Ended::To(io::ErrorKind::NotConnected.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_queue_is_noticed_soon_with_few_looks() {
        let pauses = std::iter::successors(Some(pause_after(Duration::ZERO)), |&last| Some(pause_after(last)));
        let (mut waited, mut looks) = (Duration::ZERO, 0);
        for pause in pauses {
            // Never longer than what has been waited already, and never longer than a quarter of a second.
            assert!(pause <= (waited + Duration::from_millis(1)).min(LOOK), "{pause:?} after {waited:?}");
            (waited, looks) = (waited + pause, looks + 1);
            if waited >= DRAIN {
                break;
            }
        }
        assert!(looks < 260, "{looks}");
    }
}
