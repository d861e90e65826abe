//! A client's HTTP/1.1 connection: reads, and writes behind whatever the kernel has redirected to it.

use std::{io, rc::Rc, time::Duration};

use bytes::BytesMut;
use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use super::ledger::Ledger;
use crate::{
    kernel::socket,
    steer::{RegisterError, Source, WorkerSteering},
};

/// How long the kernel's worker may take to hand over what was redirected, before a close is a reset.
const SETTLE: Duration = Duration::from_secs(30);
/// How long, and for how many bytes, a closed connection is still read: a client that is answered before it has sent all of a
/// large body usually looks for the answer only afterwards.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 20;
/// What a client may have sent before its connection became something else, for the kernel to look at what follows.
const EARLY: usize = 256 * 1024;
/// Read at once of what is not asked for yet.
const AHEAD: usize = 4096;

pub struct ClientSocket {
    stream: Stream,
    /// Read and not yet used: the rest of a request, or the beginning of the next.
    pub buf: BytesMut,
    ledger: Ledger,
    key: Option<u64>,
    resets: bool,
    /// Something has been written since the last [`begin_answer`](Self::begin_answer).
    answered: bool,
    /// What the kernel knows of what the client sends. Behind `stream`: a slot outlives its socket.
    source: Option<Source>,
}

/// A connection, what has been read of it, and what the kernel knows of it.
pub(super) type TunnelEnd<'a> = (&'a TcpStream, BytesMut, Option<&'a Source>);

enum Stream {
    Plain(TcpStream),
    /// Cannot be a target of the kernel's, which would send plain bytes.
    Tls(Box<TlsStream<TcpStream>>),
}

impl ClientSocket {
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Self::of(Stream::Plain(stream))
    }

    pub fn tls(stream: TlsStream<TcpStream>) -> io::Result<Self> {
        Self::of(Stream::Tls(Box::new(stream)))
    }

    fn of(stream: Stream) -> io::Result<Self> {
        stream.tcp().set_nodelay(true)?;
        let ledger = Ledger::begin(stream.tcp())?;
        Ok(Self { stream, buf: BytesMut::new(), ledger, key: None, resets: false, answered: false, source: None })
    }

    /// The connection, and what has been read of it; `None` for TLS, where the protocol has been agreed on before.
    pub fn into_plain(self) -> Option<(TcpStream, BytesMut)> {
        match self.stream {
            Stream::Plain(stream) => Some((stream, self.buf)),
            Stream::Tls(_) => None,
        }
    }

    pub fn stream(&self) -> &TcpStream {
        self.stream.tcp()
    }

    /// The answer to the next request is to come, or its final one after an interim one.
    pub fn begin_answer(&mut self) {
        self.answered = false;
    }

    pub fn is_answered(&self) -> bool {
        self.answered
    }

    pub fn is_tls(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
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
        match &mut self.stream {
            Stream::Plain(stream) => stream.read_buf(&mut self.buf).await,
            Stream::Tls(stream) => stream.read_buf(&mut self.buf).await,
        }
    }

    /// As [`read`](Self::read), without waiting.
    pub fn read_now(&mut self, room: usize) -> io::Result<usize> {
        self.make_room(room);
        match &mut self.stream {
            Stream::Plain(stream) => socket::receive_into(&*stream, &mut self.buf),
            Stream::Tls(stream) => {
                stream.read_buf(&mut self.buf).now_or_never().unwrap_or(Err(io::ErrorKind::WouldBlock.into()))
            }
        }
    }

    fn make_room(&mut self, room: usize) {
        if self.buf.capacity() - self.buf.len() < room / 4 {
            self.buf.reserve(room);
        }
    }

    /// Writes all of it, behind whatever the kernel has redirected. Not cancel-safe: after a cancelled write the
    /// connection can only be broken off.
    pub async fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.answered = true;
        self.settle().await?;
        match &mut self.stream {
            Stream::Plain(stream) => stream.write_all(buf).await?,
            Stream::Tls(stream) => {
                stream.write_all(buf).await?;
                stream.flush().await?;
            }
        }
        self.ledger.add_written(buf.len() as u64);
        Ok(())
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
        Ok((self.stream.tcp(), early, self.source.as_ref()))
    }

    /// Both directions at once, and what has been read already. The kernel's account ends here: no more is to be redirected.
    pub fn split(&mut self) -> (Box<dyn AsyncRead + Unpin + '_>, BytesMut, Box<dyn AsyncWrite + Unpin + '_>) {
        let read = std::mem::take(&mut self.buf);
        match &mut self.stream {
            Stream::Plain(stream) => {
                let (reader, writer) = stream.split();
                (Box::new(reader), read, Box::new(writer))
            }
            Stream::Tls(stream) => {
                let (reader, writer) = tokio::io::split(stream);
                (Box::new(reader), read, Box::new(writer))
            }
        }
    }

    /// Books bytes that the kernel has redirected here.
    pub fn add_redirected(&mut self, bytes: u64) {
        self.ledger.add_redirected(bytes);
    }

    /// As [`Ledger::forgive`].
    pub fn forgive(&mut self) -> io::Result<u64> {
        self.ledger.forgive(self.stream.tcp())
    }

    /// Bytes that the client has not acknowledged yet.
    pub fn send_queue(&self) -> io::Result<u32> {
        socket::send_queue(self.stream())
    }

    /// As [`Ledger::settle`].
    pub async fn settle(&mut self) -> io::Result<()> {
        self.ledger.settle(self.stream.tcp()).await
    }

    /// Resolves when the client has left: closed, closed its writing side, or reset, and also when that lies behind bytes that
    /// nobody has read yet (the rest of a body, the next request). Cancel-safe.
    pub async fn gone(&mut self) {
        if let Stream::Plain(_) = self.stream {
            return self.left().await;
        }
        // What is decrypted may tell sooner. What is read ahead of time is kept.
        while self.buf.is_empty() {
            if !matches!(self.read(AHEAD).await, Ok(1..)) {
                return;
            }
        }
        self.left().await;
    }

    /// As [`gone`](Self::gone), by the end of the TCP stream alone.
    pub async fn left(&self) {
        // Nothing is urgent on these sockets: what this waits for is the end of the stream, which tokio remembers.
        let _ = self.stream().ready(Interest::PRIORITY).await;
    }

    /// Ends the connection in order: everything written arrives, then FIN. Reads on for a moment, because closing with
    /// bytes unread would send RST and take what is on its way from the client.
    pub async fn close(mut self) {
        if !matches!(tokio::time::timeout(SETTLE, self.settle()).await, Ok(Ok(()))) {
            // What was redirected has not all arrived at the socket, and the close would drop it: not without a sign.
            socket::set_reset_on_close(self.stream(), true);
            return;
        }
        if self.resets {
            socket::set_reset_on_close(self.stream(), false);
        }
        let linger = async {
            match &mut self.stream {
                Stream::Plain(stream) => stream.shutdown().await?,
                Stream::Tls(stream) => stream.shutdown().await?,
            }
            let mut taken = 0;
            while taken < LINGER_BYTES {
                self.buf.clear();
                match self.read(AHEAD).await? {
                    0 => break,
                    n => taken += n,
                }
            }
            io::Result::Ok(())
        };
        // The client may take its time with what is queued: the kernel delivers that after the close too.
        let _ = tokio::time::timeout(LINGER, linger).await;
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

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }
}
