//! The HTTP/2 connection to an EPP replica, shared by all requests of a worker and opened on demand. `get` returns the open
//! connection or the result of the running attempt: all requests that wait for it fail together. While the replica is
//! unreachable, `get` fails at once: `reach` connects again for all.
//! A connection that failed a stream, or whose server sent GOAWAY, is not used for new streams; its open streams finish.
//! (tonic's own channel fails queued requests one after the other, each after its own timeout, and may return a broken connection.)

use std::{
    error::Error,
    io::{self, ErrorKind},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::future::{BoxFuture, FutureExt, Shared};
use hyper::{body::Incoming, client::conn::http2};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;

use super::{
    handshake,
    replica::{Replica, Replicas},
};

/// A shared connection to one replica. Clones share it.
#[derive(Clone)]
pub struct Connection(Arc<Inner>);

struct Inner {
    replicas: Arc<Replicas>,
    replica: Arc<Replica>,
    address: SocketAddr,
    tls: bool,
    /// Whether requests are sent to this address, whose reachability the replica keeps.
    is_asked: bool,
    /// Whether requests are sent over this connection.
    carries_requests: bool,
    current: Mutex<Option<Attempt>>,
}

type Attempt = Shared<BoxFuture<'static, Result<Http2, Arc<io::Error>>>>;

impl Connection {
    /// A connection to the replica's ext_proc service. Does not connect yet.
    pub fn new(replicas: &Arc<Replicas>, replica: &Arc<Replica>) -> Self {
        Self::to(replicas, replica, replica.address, replicas.tls.is_some(), [true; 2])
    }

    /// A connection to the replica's health service. Does not connect yet.
    pub fn to_health(replicas: &Arc<Replicas>, replica: &Arc<Replica>) -> Self {
        let settings = &replicas.settings;
        let port = settings.health_port.unwrap_or(replica.address.port());
        let tls = replicas.tls.is_some() && (settings.health_port.is_none() || settings.health_tls);
        // At the same port the checks tell whether requests can connect.
        let is_asked = settings.health_port.is_none_or(|port| port == replica.address.port());
        Self::to(replicas, replica, SocketAddr::new(replica.address.ip(), port), tls, [is_asked, false])
    }

    fn to(
        replicas: &Arc<Replicas>,
        replica: &Arc<Replica>,
        address: SocketAddr,
        tls: bool,
        [is_asked, carries_requests]: [bool; 2],
    ) -> Self {
        let (replicas, replica) = (Arc::clone(replicas), Arc::clone(replica));
        Self(Arc::new(Inner { replicas, replica, address, tls, is_asked, carries_requests, current: Mutex::new(None) }))
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

    /// Returns the open connection or connects, unless the replica is known to be unreachable. Cancel-safe: an attempt continues
    /// in the background.
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
                None => match self.0.unreachable() {
                    Some(error) => return Err(error),
                    None => {
                        let lost = current.as_ref().is_some_and(|attempt| matches!(attempt.peek(), Some(Ok(_))));
                        current.insert(self.attempt(lost)).clone()
                    }
                },
            }
        };
        attempt.await
    }

    /// `lost`: there was a connection before.
    fn attempt(&self, lost: bool) -> Attempt {
        let inner = Arc::clone(&self.0);
        let connect = tokio::spawn(async move {
            let connected = inner.connect().await.map_err(Arc::new);
            if inner.is_asked {
                match &connected {
                    Ok(_) => {
                        inner.replica.reached();
                        // Health checks also give up a connection on which a stuck server does not answer.
                        if lost && inner.carries_requests {
                            inner.replica.renewed();
                        }
                    }
                    Err(error) => inner.replica.unreachable(error),
                }
            }
            connected
        });
        async move { connect.await.unwrap_or_else(|error| Err(Arc::new(io::Error::other(error)))) }.boxed().shared()
    }
}

impl Inner {
    /// Why the replica is not connected now.
    fn unreachable(&self) -> Option<Arc<io::Error>> {
        if self.is_asked && self.replicas.is_tended() { self.replica.why_unreachable() } else { None }
    }

    /// Connects. A connection that breaks meanwhile may have reached a server that was ending, so a second one is tried.
    async fn connect(&self) -> io::Result<Http2> {
        let tls = self.tls;
        match connect(&self.replicas, &self.replica, self.address, tls).await {
            Err(error) if is_loss(error.kind()) => connect(&self.replicas, &self.replica, self.address, tls).await,
            result => result,
        }
    }
}

/// Whether an error means that a connection was lost that had been there.
pub fn is_loss(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe)
}

/// Connects to a replica within `connect_timeout`.
pub(super) async fn connect(
    replicas: &Replicas,
    replica: &Replica,
    address: SocketAddr,
    tls: bool,
) -> io::Result<Http2> {
    let tls = replicas.tls.as_ref().filter(|_| tls).map(|tls| (tls.connector(), replica.name.clone()));
    let timeout = io::Error::new(ErrorKind::TimedOut, "connect timeout");
    let (went_away, retired) = (Arc::new(AtomicBool::new(false)), CancellationToken::new());
    let (flag, end) = (Arc::clone(&went_away), retired.clone());
    let ended = move |orderly| {
        // Waiting requests notice the end of the connection after this flag is set.
        flag.store(orderly, Ordering::Relaxed);
        end.cancel();
    };
    let connect = handshake::connect(address, tls, ended);
    let send = tokio::time::timeout(replicas.settings.connect_timeout, connect).await.unwrap_or(Err(timeout))?;
    Ok(Http2 { send, retired, went_away })
}

/// An open connection. Clones share it.
#[derive(Clone)]
pub struct Http2 {
    send: http2::SendRequest<Body>,
    /// Cancelled when the connection must not be used for new streams.
    retired: CancellationToken,
    /// Whether the connection ended by GOAWAY.
    went_away: Arc<AtomicBool>,
}

impl Http2 {
    fn is_usable(&self) -> bool {
        !self.retired.is_cancelled() && !self.send.is_closed()
    }

    /// Takes the connection out of use for new streams. Open streams continue.
    pub fn retire(&self) {
        self.retired.cancel();
    }

    /// Resolves when the connection has ended or is not used for new streams any more. Cancel-safe.
    pub async fn ended(&self) {
        self.retired.cancelled().await;
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
