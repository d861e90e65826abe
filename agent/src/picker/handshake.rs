//! Connects to a gRPC server: TCP, TLS if set, and HTTP/2 up to the server's SETTINGS. A server that accepts connections without
//! serving them is found here and not by requests. If the server speaks another protocol, the error says which setting is wrong.

use std::{
    future::poll_fn,
    io,
    path::Path,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use h2::{Ping, PingPong, client::SendRequest};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_rustls::TlsConnector;

use super::{address::ReplicaAddress, gathered::gathered};
use crate::{
    endpoint::local_fault::connect_error,
    http::{empty_data::WithoutEmptyData, frame_heads::MAX_FRAME_ERRORS},
};

/// Bytes of replies that a stream may send before they are read. A replaced body of the common sizes waits for no window update.
const STREAM_WINDOW: u32 = 1 << 20;
/// Room for every stream's window: replies that wait for a slow client must not hold up other streams.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MOST_STREAMS;
/// Most streams on a connection, whatever the server's limit is.
const MOST_STREAMS: u32 = 2000;
/// Streams until the server has told its limit.
const INITIAL_STREAMS: usize = 100;
/// Longest head or trailers of a response, in bytes.
const HEAD: u32 = 16 << 10;
/// Bytes that are read from a connection at once: a replaced body comes in frames of 16 KiB.
const READ: usize = 64 << 10;
/// Bytes of a stream that wait for the server's window.
const SEND_BUFFER: usize = 1 << 20;
/// Streams that h2 remembers for a second after their reset. Late frames of others are answered with another reset.
const RESET_STREAMS: usize = 4096;
/// gRPC servers written in Go close connections that ping more often than every five minutes. So pings only detect a stuck peer;
/// TCP detects an unreachable one.
const PING: Duration = Duration::from_secs(310);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// TCP_USER_TIMEOUT: how long sent bytes may stay unacknowledged.
const GONE: Duration = Duration::from_secs(15);

/// The pause before connecting again to a Unix socket whose backlog is full.
const BACKLOG: Duration = Duration::from_millis(10);

/// The server speaks another protocol than the settings say. The inner error of an [`io::Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}; {}", self.answer(), self.advice())]
pub enum Mismatch {
    Tls,
    NoTls,
    Http1,
    Unknown,
    Closed,
}

impl Mismatch {
    /// The mismatch that an error of [`connect`] reports.
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }

    /// What the server did.
    pub fn answer(self) -> &'static str {
        match self {
            Self::Tls => "the server answered with TLS",
            Self::NoTls => "the server answered without TLS",
            Self::Http1 => "the server answered with HTTP/1.1",
            Self::Unknown => "the server answered with neither HTTP/2 nor TLS",
            Self::Closed => "the server closed the connection before the HTTP/2 handshake",
        }
    }

    /// Which setting of the pool's EPP mends it.
    pub fn advice(self) -> &'static str {
        match self {
            Self::Tls => "set `tls` in the pool's `picker` section",
            Self::NoTls => {
                "set `tls = \"off\"` in the pool's `picker` section; or, if this is the EPP's port for health checks, set `address` \
                 to its ext_proc port (9002 by default)"
            }
            Self::Http1 => {
                "set `address` in the pool's `picker` section to the EPP's ext_proc port (9002 by default); this port speaks HTTP, \
                 like an EPP's port for metrics"
            }
            Self::Unknown => "set `address` in the pool's `picker` section to the EPP's gRPC port",
            Self::Closed => "check `address` and `tls` in the pool's `picker` section",
        }
    }

    /// An error with this cause.
    pub fn error(self) -> io::Error {
        // A lost connection may be repeated, another protocol may not.
        let kind = if self == Self::Closed { io::ErrorKind::ConnectionAborted } else { io::ErrorKind::InvalidData };
        io::Error::new(kind, self)
    }
}

/// An open connection.
pub struct Opened {
    pub send: SendRequest<Bytes>,
    /// The limit of concurrent streams: the server's, or `MOST_STREAMS`.
    pub limit: Arc<AtomicUsize>,
    /// The caller counts its streams here. A connection without any is not pinged.
    pub streams: Arc<AtomicUsize>,
}

/// Connects to a server, with TLS if `tls` has the connector and the server's name. Must be called on a tokio runtime, which
/// drives the connection. `ended` is called at the end of the connection, with whether it ended without an error.
pub async fn connect(
    address: &ReplicaAddress,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    ended: impl FnOnce(bool) + Send + 'static,
) -> io::Result<Opened> {
    let address = match address {
        ReplicaAddress::Tcp(address) => address,
        ReplicaAddress::Unix(path) => return over(connect_unix(path).await?, tls, ended).await,
    };
    let tcp = TcpStream::connect(address).await.map_err(|error| connect_error(error, *address))?;
    tcp.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&tcp);
    let (time, interval) = (Duration::from_secs(5), Duration::from_secs(5));
    socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(2))?;
    socket.set_tcp_user_timeout(Some(GONE))?;
    over(tcp, tls, ended).await
}

/// Waits while the socket's backlog is full, as TCP does by repeating the SYN. The kernel waits only in a blocking connect, and
/// otherwise returns EAGAIN.
async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(BACKLOG).await,
            connected => return connected,
        }
    }
}

async fn over(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    ended: impl FnOnce(bool) + Send + 'static,
) -> io::Result<Opened> {
    match tls {
        None => open(io, ended).await,
        Some((connector, name)) => {
            let (io, first) = Sniffed::new(io);
            match connector.connect(name, io).await {
                Ok(stream) => open(stream, ended).await,
                Err(error) => Err(not_tls(first).map_or(error, Mismatch::error)),
            }
        }
    }
}

/// Whether the server at `address` answers a TLS handshake, whatever its certificate.
pub async fn answers_tls(address: &ReplicaAddress, connector: TlsConnector, name: ServerName<'static>) -> bool {
    match address {
        ReplicaAddress::Tcp(address) => match TcpStream::connect(address).await {
            Ok(tcp) => speaks_tls(tcp, connector, name).await,
            Err(_) => false,
        },
        ReplicaAddress::Unix(path) => match connect_unix(path).await {
            Ok(unix) => speaks_tls(unix, connector, name).await,
            Err(_) => false,
        },
    }
}

async fn speaks_tls(
    io: impl AsyncRead + AsyncWrite + Unpin,
    connector: TlsConnector,
    name: ServerName<'static>,
) -> bool {
    let (io, first) = Sniffed::new(io);
    let connected = connector.connect(name, io).await;
    connected.is_ok() || first.await.is_ok_and(|first| first.is_ok_and(|first| is_tls(&first)))
}

async fn open(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ended: impl FnOnce(bool) + Send + 'static,
) -> io::Result<Opened> {
    let (io, first) = Sniffed::new(io);
    let (io, outgoing) = gathered(WithoutEmptyData::new(BufReader::with_capacity(READ, io)));
    let (send, mut connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEAD)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false)
        // The connection carries other requests than those whose replies are wrong or late.
        .max_local_error_reset_streams(Some(MAX_FRAME_ERRORS))
        .max_concurrent_reset_streams(RESET_STREAMS)
        .handshake(io)
        .await
        .map_err(with_kind)?;
    let bounded = |streams: usize| streams.min(MOST_STREAMS as usize);
    let (limit, streams) = (Arc::new(AtomicUsize::new(INITIAL_STREAMS)), Arc::default());
    let current = Arc::clone(&limit);
    let pings = connection.ping_pong();
    let stuck = stuck(pings, Arc::clone(&streams));
    tokio::spawn(async move {
        let mut connection = pin!(connection);
        let over = poll_fn(|cx| {
            let ended = connection.as_mut().poll(cx);
            // The server's settings may have come.
            current.store(bounded(connection.max_concurrent_send_streams()), Ordering::Relaxed);
            match outgoing.poll_flush(cx) {
                Poll::Ready(Err(error)) if ended.is_pending() => Poll::Ready(Err(error)),
                _ => ended.map_err(with_kind),
            }
        });
        let over = tokio::select! {
            over = over => over,
            () = stuck => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer to a ping")),
        };
        if let Err(error) = &over {
            tracing::debug!(?error, "connection to the EPP ended");
        }
        let orderly = over.is_ok();
        ended(orderly);
    });
    match first.await {
        Ok(Ok(first)) if is_settings(&first) => Ok(Opened { send, limit, streams }),
        Ok(Ok(first)) if first.is_empty() => Err(Mismatch::Closed.error()),
        Ok(Ok(first)) if is_tls(&first) => Err(Mismatch::Tls.error()),
        Ok(Ok(first)) if first.starts_with(b"HTTP/") => Err(Mismatch::Http1.error()),
        Ok(Ok(_)) => Err(Mismatch::Unknown.error()),
        Ok(Err(kind)) => Err(kind.into()),
        Err(_) => Err(Mismatch::Closed.error()),
    }
}

/// Resolves when the server has not answered a ping in time.
async fn stuck(pings: Option<PingPong>, streams: Arc<AtomicUsize>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(PING).await;
        if streams.load(Ordering::Relaxed) > 0
            && !matches!(timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await, Ok(Ok(_)))
        {
            return;
        }
    }
}

/// Keeps the kind of the I/O error, which is wrapped by h2. A reset is retried.
fn with_kind(error: h2::Error) -> io::Error {
    let kind = error.get_io().map_or(io::ErrorKind::Other, io::Error::kind);
    io::Error::new(kind, error)
}

/// What the server speaks instead of TLS, if it does not.
fn not_tls(mut first: oneshot::Receiver<First>) -> Option<Mismatch> {
    let first = first.try_recv().ok()?.ok().filter(|first| !first.is_empty() && !is_tls(first))?;
    Some(match &*first {
        first if is_settings(first) => Mismatch::NoTls,
        first if first.starts_with(b"HTTP/") => Mismatch::Http1,
        _ => Mismatch::Unknown,
    })
}

/// The type and version of a TLS record: an alert or a handshake of TLS 1.x.
fn is_tls(first: &[u8]) -> bool {
    matches!(first, [21 | 22, 3, ..])
}

/// The length, type and flags of an HTTP/2 SETTINGS frame (RFC 9113 §6.5).
fn is_settings(first: &[u8]) -> bool {
    matches!(first, [0, _, _, 4, 0, ..])
}

/// How many bytes tell the protocol.
const FIRST: usize = 5;

/// The first [`FIRST`] bytes from the peer, fewer if it sent fewer before the end, or why reading failed.
type First = Result<Vec<u8>, io::ErrorKind>;

/// A stream that reports the first bytes that are read from it.
struct Sniffed<S> {
    inner: S,
    first: Vec<u8>,
    report: Option<oneshot::Sender<First>>,
}

impl<S> Sniffed<S> {
    fn new(inner: S) -> (Self, oneshot::Receiver<First>) {
        let (report, first) = oneshot::channel();
        (Self { inner, first: Vec::new(), report: Some(report) }, first)
    }

    fn report(&mut self, failed: Option<io::ErrorKind>) {
        if let Some(report) = self.report.take() {
            let _ = report.send(failed.map_or_else(|| Ok(std::mem::take(&mut self.first)), Err));
        }
    }
}

impl<S> Drop for Sniffed<S> {
    fn drop(&mut self) {
        self.report(None);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sniffed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        if self.report.is_some()
            && let Poll::Ready(read) = &read
        {
            let new = &buf.filled()[before..];
            let missing = FIRST - self.first.len();
            self.first.extend_from_slice(&new[..new.len().min(missing)]);
            match read {
                Err(error) if self.first.is_empty() => self.report(Some(error.kind())),
                Ok(()) if !new.is_empty() && self.first.len() < FIRST => {}
                _ => self.report(None),
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sniffed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
