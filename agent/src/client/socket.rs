//! A client's HTTP/1.1 connection: reads, and writes behind whatever the kernel has redirected to it.

use std::{future::poll_fn, io, rc::Rc, time::Duration};

use bytes::BytesMut;
use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite, Interest},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use super::{
    close::{self, Cut, Linger},
    ledger::Ledger,
    patience::{self, Patience},
    reach::Watch,
    wire::Wire,
};
use crate::{
    config::HalfClose,
    kernel::socket,
    steer::{RegisterError, Source, WorkerSteering},
};

/// How long a client may acknowledge nothing while what was redirected is handed over, before a close is a reset.
const SETTLE: Duration = Duration::from_secs(30);
/// What a client may have sent before its connection became something else, for the kernel to look at what follows.
const EARLY: usize = 256 * 1024;
/// Read at once of what is not asked for yet.
const AHEAD: usize = 4096;

pub struct ClientSocket {
    wire: Wire,
    /// Read and not yet used: the rest of a request, or the beginning of the next.
    pub buf: BytesMut,
    ledger: Ledger,
    key: Option<u64>,
    resets: bool,
    /// Something has been written since the last [`begin_answer`](Self::begin_answer).
    answered: bool,
    /// Of the last request something may be on its way that nobody will read.
    pub unread: bool,
    stalled: bool,
    /// How long the client may take nothing.
    idle: Option<Duration>,
    half_close: HalfClose,
    /// After so long without an acknowledgement that is due its machine is gone.
    unreachable: Option<Duration>,
    watch: Watch,
    /// What the kernel knows of what the client sends. Behind `wire`: a slot outlives its socket.
    source: Option<Source>,
}

/// A connection, what has been read of it, and what the kernel knows of it.
pub(super) type TunnelEnd<'a> = (&'a TcpStream, BytesMut, Option<&'a Source>);

impl ClientSocket {
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Self::of(Wire::Plain(stream))
    }

    pub fn tls(stream: TlsStream<TcpStream>) -> io::Result<Self> {
        Self::of(Wire::Tls(Box::new(stream)))
    }

    fn of(wire: Wire) -> io::Result<Self> {
        wire.tcp().set_nodelay(true)?;
        let ledger = Ledger::begin(wire.tcp())?;
        Ok(Self {
            wire,
            buf: BytesMut::new(),
            ledger,
            key: None,
            resets: false,
            answered: false,
            unread: false,
            stalled: false,
            idle: None,
            half_close: HalfClose::default(),
            unreachable: None,
            watch: Watch::new(None),
            source: None,
        })
    }

    /// The connection, and what has been read of it.
    pub fn into_parts(self) -> (Wire, BytesMut) {
        (self.wire, self.buf)
    }

    pub fn stream(&self) -> &TcpStream {
        self.wire.tcp()
    }

    /// The answer to the next request is to come, or its final one after an interim one.
    pub fn begin_answer(&mut self) {
        self.answered = false;
    }

    pub fn is_answered(&self) -> bool {
        self.answered
    }

    pub fn is_tls(&self) -> bool {
        self.wire.is_tls()
    }

    /// What counts as having left, from now on.
    pub fn set_leaving(&mut self, half_close: HalfClose, unreachable: Option<Duration>) {
        self.half_close = half_close;
        if self.unreachable != unreachable {
            self.unreachable = unreachable;
            self.watch = Watch::new(unreachable);
        }
    }

    /// For a wait for this client.
    pub fn patience(&self) -> Patience {
        Patience::new(self.idle, self.unreachable)
    }

    pub fn unreachable(&self) -> Option<Duration> {
        self.unreachable
    }

    /// The client has ended its side of a plain connection, and is to be answered all the same.
    pub fn is_half_closed(&self) -> bool {
        self.half_close == HalfClose::Answer && socket::is_half_closed(self.stream())
    }

    /// From now on the client may take nothing for so long at most.
    pub fn set_idle(&mut self, idle: Option<Duration>) {
        self.idle = idle;
    }

    /// Makes the connection a possible target, once; returns its key.
    pub fn make_target(&mut self, steering: &WorkerSteering, send_buffer: u32) -> Result<u64, RegisterError> {
        if let Some(key) = self.key {
            return Ok(key);
        }
        let key = steering.register_target(self.stream(), send_buffer)?;
        self.key = Some(key);
        Ok(key)
    }

    /// Reads what is there into `buf`, which grows by up to about `room`; 0 is the end of the stream. Cancel-safe.
    pub async fn read(&mut self, room: usize) -> io::Result<usize> {
        self.make_room(room);
        self.wire.read_buf(&mut self.buf).await
    }

    /// As [`read`](Self::read), without waiting.
    pub fn read_now(&mut self, room: usize) -> io::Result<usize> {
        self.make_room(room);
        match &mut self.wire {
            Wire::Plain(stream) => socket::receive_into(&*stream, &mut self.buf),
            Wire::Tls(stream) => {
                stream.read_buf(&mut self.buf).now_or_never().unwrap_or(Err(io::ErrorKind::WouldBlock.into()))
            }
        }
    }

    fn make_room(&mut self, room: usize) {
        if self.buf.capacity() - self.buf.len() < room / 4 {
            self.buf.reserve(room);
        }
    }

    /// Writes all of it, behind whatever the kernel has redirected: fails as [`patience::is_over`] knows it when the client
    /// takes nothing for too long, and then the close is a reset. Not cancel-safe: after a cancelled write the connection can only be
    /// broken off.
    pub async fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.answered = true;
        self.settle().await?;
        let (mut rest, mut patience) = (buf, self.patience());
        while !rest.is_empty() {
            match patience.step(&mut self.wire, |wire, cx| wire.poll_write(cx, rest)).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => rest = &rest[n..],
                Err(error) => return self.stalled(error),
            }
        }
        // Plain bytes are with the kernel; of TLS a part may be with us.
        if let Err(error) = patience.step(&mut self.wire, AsyncWrite::poll_flush).await {
            return self.stalled(error);
        }
        self.ledger.add_written(buf.len() as u64);
        Ok(())
    }

    /// What is queued for a client that takes nothing need not be kept.
    fn stalled(&mut self, error: io::Error) -> io::Result<()> {
        if patience::is_over(&error) {
            self.stalled = true;
            self.reset_on_close();
        }
        Err(error)
    }

    /// The client has taken nothing for too long.
    pub fn has_stalled(&self) -> bool {
        self.stalled
    }

    /// The connection as it is, unless it speaks TLS, and what has been read of it already, for someone who keeps an account of
    /// their own. With `steering` what the client sends from now on is looked at by the kernel, where that can be.
    pub fn tunnel(&mut self, steering: Option<&Rc<WorkerSteering>>) -> io::Result<TunnelEnd<'_>> {
        if self.is_tls() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if let Some(steering) = steering {
            // What has arrived has to be read whole before: the kernel would send what is read in part a second time.
            while self.buf.len() < EARLY {
                match self.read_now(AHEAD) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // Whoever reads next would take it for an end in order.
                    Err(error) => return Err(error),
                }
            }
            let drained = self.buf.len() < EARLY;
            self.source = if drained { steering.announce_source(self.stream()).ok() } else { None };
            // A client that has closed its side already is refused.
            self.source = self.source.take().filter(|source| source.insert(self.stream()).is_ok());
            // What has come between the read and the insertion is let through now, by this look.
            socket::has_more(self.stream())?;
        }
        let early = std::mem::take(&mut self.buf);
        Ok((self.wire.tcp(), early, self.source.as_ref()))
    }

    /// The connection, for both directions at once, and what has been read already. The kernel's account ends here: no more is
    /// to be redirected.
    pub fn raw(&mut self) -> (&mut Wire, BytesMut) {
        (&mut self.wire, std::mem::take(&mut self.buf))
    }

    /// Books bytes that the kernel has redirected here.
    pub fn add_redirected(&mut self, bytes: u64) {
        self.ledger.add_redirected(bytes);
    }

    /// As [`Ledger::forgive`].
    pub fn forgive(&mut self) -> io::Result<u64> {
        self.ledger.forgive(self.wire.tcp())
    }

    /// Bytes that the client has not acknowledged yet.
    pub fn send_queue(&self) -> io::Result<u32> {
        socket::send_queue(self.stream())
    }

    /// As [`Ledger::settle`], as long as the client takes something.
    pub async fn settle(&mut self) -> io::Result<()> {
        let patience = self.patience();
        let settled = self.ledger.settle(self.wire.tcp(), patience).await;
        settled.or_else(|error| self.stalled(error))
    }

    /// Resolves when the client has left: closed or reset, its machine gone, or, unless it is answered all the same
    /// (`listen.half_close`), closed its writing side; and also when that lies behind bytes that nobody has read yet (the rest of a
    /// body, the next request). Cancel-safe.
    pub async fn gone(&mut self) {
        if !self.is_tls() {
            return self.left().await;
        }
        // What is decrypted may tell sooner. What is read ahead of time is kept.
        while self.buf.is_empty() {
            match self.read(AHEAD).await {
                Ok(1..) => {}
                Ok(0) if self.half_close == HalfClose::Answer => break,
                // It has not said so in TLS; the request is whole by its own framing.
                Err(error) if self.half_close == HalfClose::Answer && error.kind() == io::ErrorKind::UnexpectedEof => {
                    break;
                }
                Ok(0) | Err(_) => return,
            }
        }
        self.left().await;
    }

    /// As [`gone`](Self::gone), by the TCP stream alone.
    pub async fn left(&self) {
        let end = async {
            // Nothing is urgent on these sockets: what this waits for is the end of the stream, which tokio remembers.
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

    /// Ends the connection in order: everything written arrives, then FIN; then the client is read on, because closing with
    /// bytes unread would send RST and take what is on its way from the client. `Err`: the client had not ended its side.
    pub async fn close(mut self, linger: Linger) -> Result<(), Cut> {
        self.idle = Some(self.idle.map_or(SETTLE, |idle| idle.min(SETTLE)));
        if self.settle().await.is_err() {
            // What was redirected has not all arrived at the socket, and the close would drop it: not without a sign.
            socket::set_reset_on_close(self.stream(), true);
            return Ok(());
        }
        if self.resets {
            socket::set_reset_on_close(self.stream(), false);
        }
        // The client may take its time with what is queued: the kernel delivers that after the close too.
        close::discard(self.wire, self.buf, linger).await
    }

    /// From here on, any end of the connection, that of the process included, is a reset: the body being sent ends only by
    /// close, and an early FIN would look like its end. [`close`](Self::close) in order takes it back.
    pub fn reset_on_close(&mut self) {
        self.resets = true;
        socket::set_reset_on_close(self.stream(), true);
    }

    /// Breaks the connection off in the middle of a message. What has been sent of it still arrives, except where only a
    /// reset tells the client that it is not the whole.
    pub async fn abort(mut self) {
        if !self.resets {
            let _ = tokio::time::timeout(Duration::from_secs(1), self.settle()).await;
        }
    }
}
