//! The HTTP/2 connection to a replica of an EPP: one, shared by all requests of a worker, opened when it is needed.
//!
//! Given where it goes, `get` gives the connection that is open, or the outcome of the attempt that is under way: all who wait
//! for it fail together, and the next one tries again. A connection that has failed a stream through its own fault, or whose
//! server is going away, is not handed out again; streams that it carries run to their end. There is no limit on streams but
//! the server's.
//!
//! tonic's own channel queues requests behind a connect and lets them fail one after the other, each after a timeout of its
//! own; and it may hand out a broken connection once more.

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

/// Replies are at most a few pieces per stream; the window leaves room for a replaced body in one round trip.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// gRPC servers written in Go close connections that ping more often than every five minutes, so pings only find a peer that
/// is stuck; one that is gone is found by TCP.
const PING: Duration = Duration::from_secs(310);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
const GONE: Duration = Duration::from_secs(15);

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
    /// To the replica's ext_proc service. Opens nothing.
    pub fn new(replicas: &Arc<Replicas>, replica: &Arc<Replica>) -> Self {
        Self::to(replicas, replica, replica.address, replicas.tls.is_some())
    }

    /// To where its health is served. Opens nothing.
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

    /// The URI that streams are opened under.
    pub fn origin(&self) -> http::Uri {
        let scheme = if self.0.tls { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP };
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(scheme);
        parts.authority = Some(self.0.replica.authority.clone());
        parts.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
        // Of these parts nothing is missing.
        http::Uri::from_parts(parts).unwrap_or_default()
    }

    /// Cancel-safe: an attempt goes on without those who waited for it.
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
            let timeout = io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
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
            // Keeps the kind: a reset is worth another attempt. It comes wrapped by h2, or bare when h2 had not begun.
            let io = error.source().and_then(|source| {
                source.downcast_ref::<io::Error>().or_else(|| source.downcast_ref::<h2::Error>()?.get_io())
            });
            let kind = io.map_or(io::ErrorKind::Other, io::Error::kind);
            io::Error::new(kind, error)
        })?;
    let http2 = Http2 { send, lost: Arc::default(), went_away: Arc::default() };
    let went_away = Arc::clone(&http2.went_away);
    tokio::spawn(async move {
        // Requests that wait for it learn of its end after this.
        match connection.await {
            Ok(()) => went_away.store(true, Ordering::Relaxed),
            Err(error) => tracing::debug!(?error, "connection to the EPP ended"),
        }
    });
    Ok(http2)
}

/// An open connection; clones are the same one.
#[derive(Clone)]
pub struct Http2 {
    send: http2::SendRequest<Body>,
    /// Not to be handed out again.
    lost: Arc<AtomicBool>,
    /// It has ended in order: by GOAWAY.
    went_away: Arc<AtomicBool>,
}

impl Http2 {
    fn is_usable(&self) -> bool {
        !self.lost.load(Ordering::Relaxed) && !self.send.is_closed()
    }

    /// Its peer does not answer in time: streams that it carries may go on, and no other begins on it.
    pub fn retire(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// What became of a stream that ended with this status. A loss that is not about the stream alone takes the connection
    /// out of use at once; hyper may take a moment longer to notice.
    pub fn loss(&self, status: &tonic::Status) -> Option<Loss> {
        let mut error = status.source()?;
        let (mut stream_only, mut not_taken) = (false, false);
        loop {
            if let Some(error) = error.downcast_ref::<h2::Error>() {
                stream_only |= error.is_reset();
                not_taken |= match error.reason() {
                    // GOAWAY ends the streams that the server had not looked at with this error.
                    Some(h2::Reason::NO_ERROR) => error.is_remote() && error.is_go_away(),
                    Some(h2::Reason::REFUSED_STREAM) => error.is_remote(),
                    _ => false,
                };
            }
            // Never sent: it waited in hyper's queue.
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

/// How the transport, rather than the server's code, ended a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The server has not looked at it.
    NotTaken,
    Broken,
}

impl tonic::codegen::Service<http::Request<Body>> for Http2 {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    /// hyper holds back what exceeds the server's limit of streams.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.send.send_request(request))
    }
}
