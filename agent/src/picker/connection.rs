//! The HTTP/2 connection to an EPP replica, shared by all requests of a worker and opened on demand. `get` returns the open
//! connection or the result of the running attempt: all requests that wait for it fail together, and the next one connects again.
//! A connection that failed a stream, or whose server sent GOAWAY, is not used for new streams; its open streams finish.
//! (tonic's own channel fails queued requests one after the other, each after its own timeout, and may return a broken connection.)

use std::{
    error::Error,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::{BoxFuture, FutureExt, Shared};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tonic::body::Body;

use super::replica::{Replica, Replicas};

/// Replies are at most a few pieces per stream. The window has room for a replaced body in one round trip.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// gRPC servers written in Go close connections that ping more often than every five minutes. So pings only detect a stuck peer;
/// TCP detects an unreachable one.
const PING: Duration = Duration::from_secs(310);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// TCP_USER_TIMEOUT: how long sent bytes may stay unacknowledged.
const GONE: Duration = Duration::from_secs(15);

/// A shared connection to one replica. Clones share it.
#[derive(Clone)]
pub struct Connection(Arc<Inner>);

struct Inner {
    replicas: Arc<Replicas>,
    replica: Arc<Replica>,
    address: SocketAddr,
    tls: bool,
    current: Mutex<Option<Attempt>>,
}

type Attempt = Shared<BoxFuture<'static, Result<Http2, Arc<io::Error>>>>;

impl Connection {
    /// A connection to the replica's ext_proc service. Does not connect yet.
    pub fn new(replicas: &Arc<Replicas>, replica: &Arc<Replica>) -> Self {
        Self::to(replicas, replica, replica.address, replicas.tls.is_some())
    }

    /// A connection to the replica's health service. Does not connect yet.
    pub fn to_health(replicas: &Arc<Replicas>, replica: &Arc<Replica>) -> Self {
        let settings = &replicas.settings;
        let port = settings.health_port.unwrap_or(replica.address.port());
        let tls = replicas.tls.is_some() && (settings.health_port.is_none() || settings.health_tls);
        Self::to(replicas, replica, SocketAddr::new(replica.address.ip(), port), tls)
    }

    fn to(replicas: &Arc<Replicas>, replica: &Arc<Replica>, address: SocketAddr, tls: bool) -> Self {
        let (replicas, replica) = (Arc::clone(replicas), Arc::clone(replica));
        Self(Arc::new(Inner { replicas, replica, address, tls, current: Mutex::new(None) }))
    }

    /// The URI under which streams are opened.
    pub fn origin(&self) -> http::Uri {
        let scheme = if self.0.tls { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP };
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(scheme);
        parts.authority = Some(self.0.replica.authority.clone());
        parts.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
        // The parts are complete, so this cannot fail.
        http::Uri::from_parts(parts).unwrap_or_default()
    }

    /// Returns the open connection or connects. Cancel-safe: an attempt continues in the background.
    pub async fn get(&self) -> Result<Http2, Arc<io::Error>> {
        let attempt = {
            let mut current = self.0.current.lock();
            let usable = current.as_ref().filter(|attempt| match attempt.peek() {
                None => true,
                Some(Ok(http2)) => http2.is_usable(),
                Some(Err(_)) => false,
            });
            match usable {
                Some(attempt) => attempt.clone(),
                None => current.insert(self.attempt()).clone(),
            }
        };
        attempt.await
    }

    fn attempt(&self) -> Attempt {
        let inner = self.0.clone();
        let connect = tokio::spawn(async move {
            let timeout = io::Error::new(io::ErrorKind::TimedOut, "connect timeout");
            tokio::time::timeout(inner.replicas.settings.connect_timeout, inner.connect())
                .await
                .unwrap_or(Err(timeout))
                .map_err(Arc::new)
        });
        async move { connect.await.unwrap_or_else(|error| Err(Arc::new(io::Error::other(error)))) }.boxed().shared()
    }
}

impl Inner {
    async fn connect(&self) -> io::Result<Http2> {
        let tcp = TcpStream::connect(self.address).await?;
        tcp.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&tcp);
        let (time, interval) = (Duration::from_secs(5), Duration::from_secs(5));
        socket
            .set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(2))?;
        socket.set_tcp_user_timeout(Some(GONE))?;
        match self.replicas.tls.as_ref().filter(|_| self.tls) {
            None => handshake(TokioIo::new(tcp)).await,
            Some(tls) => {
                let name = self.replica.name.clone();
                handshake(TokioIo::new(tls.connector().connect(name, tcp).await?)).await
            }
        }
    }
}

async fn handshake(io: impl hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static) -> io::Result<Http2> {
    let (send, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING_TIMEOUT)
        .handshake(io)
        .await
        .map_err(|error| {
            // Keep the kind, because a reset is retried. The I/O error is wrapped by h2, or bare if h2 had not begun.
            let io = error.source().and_then(|source| {
                source.downcast_ref::<io::Error>().or_else(|| source.downcast_ref::<h2::Error>()?.get_io())
            });
            let kind = io.map_or(io::ErrorKind::Other, io::Error::kind);
            io::Error::new(kind, error)
        })?;
    let http2 = Http2 { send, retired: Arc::default(), went_away: Arc::default() };
    let went_away = Arc::clone(&http2.went_away);
    tokio::spawn(async move {
        // Waiting requests notice the end of the connection after this flag is set.
        match connection.await {
            Ok(()) => went_away.store(true, Ordering::Relaxed),
            Err(error) => tracing::debug!(?error, "connection to the EPP ended"),
        }
    });
    Ok(http2)
}

/// An open connection. Clones share it.
#[derive(Clone)]
pub struct Http2 {
    send: http2::SendRequest<Body>,
    /// Whether the connection must not be used for new streams.
    retired: Arc<AtomicBool>,
    /// Whether the connection ended by GOAWAY.
    went_away: Arc<AtomicBool>,
}

impl Http2 {
    fn is_usable(&self) -> bool {
        !self.retired.load(Ordering::Relaxed) && !self.send.is_closed()
    }

    /// Takes the connection out of use for new streams. Open streams continue.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// How the transport lost a stream that ended with this status. Returns `None` if the server ended it. A loss that is not
    /// limited to the stream retires the connection at once, because hyper may notice it later.
    pub fn loss(&self, status: &tonic::Status) -> Option<Loss> {
        let mut error = status.source()?;
        let (mut stream_only, mut not_taken) = (false, false);
        loop {
            if let Some(error) = error.downcast_ref::<h2::Error>() {
                stream_only |= error.is_reset();
                not_taken |= match error.reason() {
                    // GOAWAY ends the streams that the server did not process with this error.
                    Some(h2::Reason::NO_ERROR) => error.is_remote() && error.is_go_away(),
                    Some(h2::Reason::REFUSED_STREAM) => error.is_remote(),
                    _ => false,
                };
            }
            // hyper cancels requests that are still in its queue.
            let canceled = error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled);
            not_taken |= canceled && self.went_away.load(Ordering::Relaxed);
            match error.source() {
                Some(source) => error = source,
                None => break,
            }
        }
        if !stream_only {
            self.retire();
        }
        Some(if not_taken { Loss::NotTaken } else { Loss::Broken })
    }
}

/// How the transport, and not the server's code, ended a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The server did not process the stream.
    NotTaken,
    Broken,
}

impl tonic::codegen::Service<http::Request<Body>> for Http2 {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    /// Always ready: hyper queues requests above the server's limit of streams.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.send.send_request(request))
    }
}
