//! The HTTP/2 connections to an EPP replica, shared by all requests of a worker and opened on demand: one, and more while those that
//! are open have as many streams as the server takes, since a stream lasts as long as its response. `get` returns an open
//! connection or the result of the running attempt: all requests that wait for it fail together. While the replica is
//! unreachable, `get` fails at once: `reach` connects again for all.
//! A connection that failed a stream, or whose server sent GOAWAY, is not used for new streams; its open streams finish.
//! (tonic's own channel fails queued requests one after the other, each after its own timeout, and may return a broken connection.)

use std::{
    io::{self, ErrorKind},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt, Shared};
use h2::client::SendRequest;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    address::ReplicaAddress,
    handshake::{self, Opened},
    replica::{Replica, Replicas},
};
use crate::{endpoint::local_fault::local_fault, metrics::EppConnections};

/// Most connections of a worker to one replica. Beyond that, streams are queued.
pub(super) const MAX_CONNECTIONS: usize = 64;
/// `ConnectionsInner::idle`, except in tests.
const IDLE: Duration = Duration::from_secs(60);
/// How long streams are queued after another connection could not be made, before the next attempt.
const REFUSED: Duration = Duration::from_secs(1);

/// The shared connections to one replica. Clones share them.
#[derive(Clone)]
pub struct ReplicaConnections(Arc<ConnectionsInner>);

struct ConnectionsInner {
    replicas: Arc<Replicas>,
    replica: Arc<Replica>,
    address: ReplicaAddress,
    tls: bool,
    /// Whether requests are sent to this address, whose reachability the replica keeps.
    is_asked: bool,
    /// Whether requests are sent over this connection.
    carries_requests: bool,
    /// How long a connection that is not the only one may be idle.
    idle: Duration,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    /// Streams go to the first one with room, so that the others become idle.
    connections: Vec<Http2>,
    /// The connection that is being made.
    dialling: Option<ConnectAttempt>,
    /// Whether a connection was lost since the first one was made.
    lost: bool,
    /// Until then no connection is made beside those that are open.
    refused_until: Option<Instant>,
}

type ConnectAttempt = Shared<BoxFuture<'static, Result<Http2, Arc<io::Error>>>>;

impl ReplicaConnections {
    /// A connection to the replica's ext_proc service. Does not connect yet.
    pub fn new(replicas: &Arc<Replicas>, replica: &Arc<Replica>) -> Self {
        Self::to(replicas, replica, replica.address.clone(), replicas.tls.is_some(), [true; 2])
    }

    /// A connection to the replica's health service. Does not connect yet.
    pub fn to_health(replicas: &Arc<Replicas>, replica: &Arc<Replica>) -> Self {
        let settings = &replicas.settings;
        let address =
            settings.health_port.map_or_else(|| replica.address.clone(), |port| replica.address.at_port(port));
        let tls = replicas.tls.is_some() && (settings.health_port.is_none() || settings.health_tls);
        // At the same port the checks tell whether requests can connect.
        let is_asked = address == replica.address;
        Self::to(replicas, replica, address, tls, [is_asked, false])
    }

    fn to(
        replicas: &Arc<Replicas>,
        replica: &Arc<Replica>,
        address: ReplicaAddress,
        tls: bool,
        [is_asked, carries_requests]: [bool; 2],
    ) -> Self {
        let (replicas, replica) = (Arc::clone(replicas), Arc::clone(replica));
        let (idle, open) = (IDLE, Mutex::default());
        Self(Arc::new(ConnectionsInner { replicas, replica, address, tls, is_asked, carries_requests, idle, open }))
    }

    /// The URI of a method.
    pub fn method(&self, path: &'static str) -> http::Uri {
        let scheme = if self.0.tls { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP };
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(scheme);
        parts.authority = Some(self.0.replica.authority.clone());
        parts.path_and_query = Some(http::uri::PathAndQuery::from_static(path));
        // The parts are complete, so this cannot fail.
        http::Uri::from_parts(parts).unwrap_or_default()
    }

    /// Returns an open connection or connects, unless the replica is known to be unreachable. Cancel-safe: an attempt continues in
    /// the background.
    pub async fn get(&self) -> Result<Http2, Arc<io::Error>> {
        let attempt = {
            let mut open = self.0.open.lock();
            open.prune();
            match open.connections.first() {
                Some(http2) => return Ok(http2.clone()),
                None => self.dial(&mut open)?,
            }
        };
        attempt.await
    }

    /// A stream on an open connection; `None` if [`stream`](Self::stream) has to connect.
    pub fn try_stream(&self) -> Option<ReplicaStream> {
        let mut open = self.0.open.lock();
        open.prune();
        open.stream()
    }

    /// As [`get`](Self::get), for one stream. If the open connections have as many streams as the server takes, makes another one,
    /// up to a bound; if that is reached or the attempt fails, the stream is queued.
    pub async fn stream(&self) -> Result<ReplicaStream, Arc<io::Error>> {
        loop {
            let attempt = {
                let mut open = self.0.open.lock();
                open.prune();
                match open.stream() {
                    Some(stream) => return Ok(stream),
                    None => self.dial(&mut open)?,
                }
            };
            match attempt.await {
                // The stream fails as others on the connection do.
                Ok(http2) if !http2.is_usable() => return Ok(ReplicaStream::queued(http2)),
                Ok(http2) => {
                    if let Some(stream) = ReplicaStream::begin(&http2) {
                        return Ok(stream);
                    }
                }
                Err(error) => return self.0.open.lock().least_loaded().ok_or(error),
            }
        }
    }

    /// The attempt in progress, or a new one.
    fn dial(&self, open: &mut Open) -> Result<ConnectAttempt, Arc<io::Error>> {
        if let Some(dialling) = open.dialling.as_ref().filter(|dialling| dialling.peek().is_none()) {
            return Ok(dialling.clone());
        }
        if open.connections.is_empty()
            && let Some(error) = self.0.unreachable()
        {
            return Err(error);
        }
        Ok(open.dialling.insert(self.attempt()).clone())
    }

    /// Only an attempt that ends while no connection is open tells whether the replica is reachable.
    fn attempt(&self) -> ConnectAttempt {
        let (inner, idle) = (Arc::clone(&self.0), self.0.idle);
        let connect = tokio::spawn(async move {
            let connected = inner.connect().await.map_err(Arc::new);
            let mut open = inner.open.lock();
            open.dialling = None;
            open.prune();
            let is_first = open.connections.is_empty();
            match &connected {
                Ok(http2) => {
                    open.connections.push(http2.clone());
                    if !is_first {
                        let (inner, load, retired) = (Arc::downgrade(&inner), &http2.load, http2.retired.clone());
                        tokio::spawn(close_idle(inner, Arc::clone(load), retired, idle));
                    }
                }
                Err(_) => open.refused_until = (!is_first).then(|| Instant::now() + REFUSED),
            }
            let lost = is_first && std::mem::take(&mut open.lost);
            drop(open);
            if is_first && inner.is_asked {
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

impl Open {
    /// Removes connections that take no more streams.
    fn prune(&mut self) {
        let before = self.connections.len();
        self.connections.retain(Http2::is_usable);
        self.lost |= self.connections.len() < before;
    }

    /// A stream on a connection with room, or a queued one if there may be no more connections.
    fn stream(&self) -> Option<ReplicaStream> {
        let free = self.connections.iter().find_map(ReplicaStream::begin);
        free.or_else(|| self.least_loaded().filter(|_| self.connections.len() >= MAX_CONNECTIONS || self.is_refused()))
    }

    fn is_refused(&self) -> bool {
        self.refused_until.is_some_and(|until| Instant::now() < until)
    }

    fn least_loaded(&self) -> Option<ReplicaStream> {
        let least = self.connections.iter().min_by_key(|http2| http2.load.streams.load(Ordering::Relaxed));
        least.cloned().map(ReplicaStream::queued)
    }
}

/// Closes a connection that is not the only one after it was idle for this time.
async fn close_idle(
    inner: Weak<ConnectionsInner>,
    load: Arc<ConnectionLoad>,
    retired: CancellationToken,
    idle: Duration,
) {
    loop {
        tokio::select! {
            () = retired.cancelled() => return,
            () = sleep(idle) => {}
        }
        let Some(inner) = inner.upgrade() else { return };
        let mut open = inner.open.lock();
        if open.connections.len() > 1 && load.is_idle(idle) {
            open.connections.retain(|http2| !Arc::ptr_eq(&http2.load, &load));
            // Whoever else has it learns that it is out of use.
            return retired.cancel();
        }
    }
}

impl ConnectionsInner {
    /// Why the replica is not connected now.
    fn unreachable(&self) -> Option<Arc<io::Error>> {
        if self.is_asked && self.replicas.is_tended() { self.replica.why_unreachable() } else { None }
    }

    /// Connects. A connection that breaks meanwhile may have reached a server that was ending, so a second one is tried.
    async fn connect(&self) -> io::Result<Http2> {
        let counts = self.carries_requests.then_some(&self.replicas.connections);
        let connect = || connect(&self.replicas, &self.replica, &self.address, self.tls, counts);
        match connect().await {
            Err(error) if is_loss(error.kind()) => connect().await,
            result => result,
        }
    }
}

/// Whether an error means that a connection was lost that had been there.
pub fn is_loss(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe)
}

/// Connects to a replica within `connect_timeout`. `counts` counts the connection as long as it is open.
pub(super) async fn connect(
    replicas: &Replicas,
    replica: &Replica,
    address: &ReplicaAddress,
    tls: bool,
    counts: Option<&EppConnections>,
) -> io::Result<Http2> {
    let tls = replicas.tls.as_ref().filter(|_| tls).map(|tls| (tls.current().tls, replica.name.clone()));
    let timeout = io::Error::new(ErrorKind::TimedOut, "connect timeout");
    let (went_away, retired) = (Arc::new(AtomicBool::new(false)), CancellationToken::new());
    let (flag, end) = (Arc::clone(&went_away), retired.clone());
    let open = Arc::new(OnceLock::new());
    let counted = Arc::clone(&open);
    let ended = move |orderly| {
        drop(counted);
        // Waiting requests notice the end of the connection after this flag is set.
        flag.store(orderly, Ordering::Relaxed);
        end.cancel();
    };
    let connect = handshake::connect(address, tls, ended);
    let connected = tokio::time::timeout(replicas.settings.connect_timeout, connect).await.unwrap_or(Err(timeout));
    let Opened { send, limit, streams } = connected.inspect_err(|error| {
        if let Some(fault) = local_fault(error) {
            tracing::warn!(%address, authority = %replica.authority, %error, "connecting to the EPP failed, local fault");
            replicas.connections.local_fault(fault);
        }
    })?;
    // If the connection has ended by now, this is the last reference.
    let _ = open.set(counts.map(EppConnections::opened));
    Ok(Http2 { send, retired, went_away, load: Arc::new(ConnectionLoad::new(limit, streams)) })
}

/// An open connection. Clones share it.
#[derive(Clone)]
pub struct Http2 {
    send: SendRequest<Bytes>,
    /// Cancelled when the connection must not be used for new streams.
    retired: CancellationToken,
    /// Whether the connection ended by GOAWAY.
    went_away: Arc<AtomicBool>,
    load: Arc<ConnectionLoad>,
}

/// The streams of one connection.
struct ConnectionLoad {
    streams: Arc<AtomicUsize>,
    /// The server's limit.
    limit: Arc<AtomicUsize>,
    idle_since: Mutex<Instant>,
}

impl ConnectionLoad {
    fn new(limit: Arc<AtomicUsize>, streams: Arc<AtomicUsize>) -> Self {
        Self { streams, limit, idle_since: Mutex::new(Instant::now()) }
    }

    fn is_idle(&self, time: Duration) -> bool {
        self.streams.load(Ordering::Relaxed) == 0 && self.idle_since.lock().elapsed() >= time
    }
}

/// One stream of a connection. Dropping it frees the stream.
pub struct ReplicaStream {
    pub http2: Http2,
    /// Whether the connection had as many streams as the server takes. Then this one may not have been sent.
    pub is_queued: bool,
}

impl ReplicaStream {
    /// Returns `None` if the connection has as many streams as the server takes.
    fn begin(http2: &Http2) -> Option<Self> {
        let most = http2.load.limit.load(Ordering::Relaxed);
        let more = |streams| (streams < most).then_some(streams + 1);
        http2.load.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self { http2: http2.clone(), is_queued: false })
    }

    fn queued(http2: Http2) -> Self {
        http2.load.streams.fetch_add(1, Ordering::Relaxed);
        Self { http2, is_queued: true }
    }
}

impl Drop for ReplicaStream {
    fn drop(&mut self) {
        *self.http2.load.idle_since.lock() = Instant::now();
        self.http2.load.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Http2 {
    fn is_usable(&self) -> bool {
        !self.retired.is_cancelled()
    }

    /// Takes the connection out of use for new streams. Open streams continue.
    pub fn retire(&self) {
        self.retired.cancel();
    }

    /// Resolves when the connection has ended or is not used for new streams any more. Cancel-safe.
    pub async fn ended(&self) {
        self.retired.cancelled().await;
    }

    /// What opens streams.
    pub(super) fn sender(&self) -> SendRequest<Bytes> {
        self.send.clone()
    }

    /// How a stream was lost that could not be opened.
    pub fn loss_at_open(&self, error: &h2::Error) -> Loss {
        let loss = self.loss(error);
        if self.went_away.load(Ordering::Relaxed) { Loss::NotTaken } else { loss }
    }

    /// How the transport lost a stream. A loss that is not limited to the stream retires the connection.
    pub fn loss(&self, error: &h2::Error) -> Loss {
        if !error.is_reset() {
            self.retire();
        }
        let not_taken = match error.reason() {
            // GOAWAY ends the streams that the server did not process with this error.
            Some(h2::Reason::NO_ERROR) => error.is_remote() && error.is_go_away(),
            Some(h2::Reason::REFUSED_STREAM) => error.is_remote(),
            _ => false,
        };
        if not_taken { Loss::NotTaken } else { Loss::Broken }
    }
}

/// How the transport, and not the server's code, ended a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The server did not process the stream.
    NotTaken,
    Broken,
}

#[cfg(test)]
mod tests;
