//! The accept loop of one worker: accepts connections on its listeners and serves them on the worker's current-thread
//! runtime. A reload replaces the configuration; connections stay.

mod refusal;

use std::{cell::Cell, net::SocketAddr, pin::pin, rc::Rc, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _, future::join_all, stream::FuturesUnordered};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::task::TaskTracker;

use self::refusal::LogLimit;
use crate::{
    connection,
    kernel::socket,
    probe::Point,
    reserve::{Reserve, is_exhausted, is_of_the_connection},
    room::Idle,
    shared::Shared,
    tls::Acceptor,
    worker::{Current, Worker},
};

/// Maximum number of a worker's connections that are being refused or wait for an idle one to close. Further ones are
/// closed immediately.
const REFUSALS: usize = 128;
/// Pause after a connection that was closed immediately, and after a failed `accept`.
const PAUSE: Duration = Duration::from_millis(1);
const EXHAUSTED: Duration = Duration::from_millis(10);
/// How long the requests of a connection may take to end when the agent stops.
const FORCED: Duration = Duration::from_secs(1);
/// Time limit for handshakes in progress once new ones are refused.
const HANDSHAKES: Duration = Duration::from_millis(200);

/// A listening socket of a worker, which must not block.
pub struct Listener {
    pub socket: std::net::TcpListener,
    /// Set for clients that speak TLS.
    pub tls: Option<Acceptor>,
    pub stop: watch::Receiver<Stop>,
}

/// Whether a listening socket is accepted from, and what happens to the connections in its queue afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    No,
    /// They are accepted before the socket closes.
    Closed,
    /// Another process has the socket, too, and accepts them.
    Released,
}

/// Serves until drained: returns when the last connection has ended after `draining` or after the end of `listeners`, or when `force`
/// aborts them all. `listeners` yields the sockets to accept from, also later ones. `idle` limits the connections, shared with the
/// other workers.
/// `updates` yields the state after each reload. `pulse` is called about once a second.
pub async fn serve(
    worker: Worker,
    listeners: mpsc::UnboundedReceiver<Listener>,
    idle: Rc<Idle>,
    updates: watch::Receiver<Arc<Shared>>,
    pulse: impl Fn(),
) {
    let current = Rc::new(Current::new(worker, idle));
    let accept_loop = AcceptLoop::new(&current);
    let sweep = async {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            current.worker().shared.probe.at(Point::Worker);
            current.worker().sweep();
            pulse();
        }
    };
    let served = async {
        accept_loop.accept_everywhere(listeners).await;
        accept_loop.connections.close();
        accept_loop.connections.wait().await;
    };
    let serving = async {
        // A worker without sockets still gets new configurations, and closes idle connections for others.
        tokio::select! {
            () = served => {}
            () = follow(&current, updates) => {}
            () = current.idle.serve_others() => {}
        }
        let worker = current.worker();
        let epps_finished = join_all(worker.epps.iter().flatten().map(|epp| epp.finished()));
        tokio::select! {
            _ = epps_finished => {}
            () = worker.shared.force.cancelled() => {}
        }
    };
    // Also during the drain.
    tokio::select! {
        () = serving => {}
        () = sweep => {}
    }
}

/// Applies every reload. Never returns.
async fn follow(current: &Current, mut updates: watch::Receiver<Arc<Shared>>) {
    while updates.changed().await.is_ok() {
        let shared = Arc::clone(&updates.borrow_and_update());
        current.replace(current.worker().after(shared));
    }
    std::future::pending::<()>().await;
}

struct AcceptLoop {
    current: Rc<Current>,
    connections: TaskTracker,
    /// Current number of refusals; see [`REFUSALS`].
    refusals: Rc<Cell<usize>>,
    /// A descriptor for refusing a connection when the process has run out of them.
    reserve: Reserve,
    log_limit: LogLimit,
}

impl AcceptLoop {
    fn new(current: &Rc<Current>) -> Self {
        Self {
            current: Rc::clone(current),
            connections: TaskTracker::new(),
            refusals: Rc::default(),
            reserve: Reserve::new(1),
            log_limit: LogLimit::default(),
        }
    }

    /// Accepts from all of `listeners`. Returns after the agent has begun to drain, or `listeners` has ended, and the last socket is
    /// closed.
    async fn accept_everywhere(&self, mut listeners: mpsc::UnboundedReceiver<Listener>) {
        let draining = self.current.worker().shared.draining.clone();
        let mut open = FuturesUnordered::new();
        let mut is_retired = false;
        while !(draining.is_cancelled() || is_retired) || !open.is_empty() {
            tokio::select! {
                listener = listeners.recv(), if !is_retired => match listener {
                    Some(listener) => open.push(self.accept_until_stopped(listener)),
                    None => is_retired = true,
                },
                Some(()) = open.next() => {}
                () = draining.cancelled(), if !draining.is_cancelled() => {}
                else => {}
            }
        }
    }

    /// Accepts from one socket, and closes it when it is stopped.
    async fn accept_until_stopped(&self, Listener { socket, tls, mut stop }: Listener) {
        let socket = match TcpListener::from_std(socket) {
            Ok(socket) => socket,
            Err(error) => return tracing::error!(%error, "cannot accept from a listening socket"),
        };
        let stopped = async {
            // Without the agent there is nothing to wait for.
            stop.wait_for(|stop| *stop != Stop::No).await.map_or(Stop::Closed, |stop| *stop)
        };
        let stopped = tokio::select! {
            stopped = stopped => stopped,
            () = self.accept_all(&socket, tls.as_ref()) => return,
        };
        if stopped == Stop::Released {
            return;
        }
        // Connections in progress are still accepted. New handshakes are dropped if possible, so that the client is refused
        // when it tries again.
        if let Err(error) = socket::refuse_handshakes(&socket) {
            // Since Linux 6.16 this needs CAP_NET_ADMIN. Without it, a handshake that ends between the last check of
            // the queue and the close is reset.
            tracing::debug!(%error, "could not drop new handshakes, accepting them until the port closes");
        }
        let _ = timeout(HANDSHAKES, self.accept_all(&socket, tls.as_ref())).await;
        // The raw socket shows whether a connection is left.
        let Ok(socket) = socket.into_std() else { return };
        while let Ok((stream, peer)) = socket.accept() {
            let adopted = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
            let Ok(stream) = adopted else { continue };
            self.take(stream, peer, tls.clone());
        }
    }

    /// Accepts connections. Never returns.
    async fn accept_all(&self, socket: &TcpListener, tls: Option<&Acceptor>) {
        loop {
            let (stream, peer) = self.accept(socket, tls.is_some()).await;
            if !self.take(stream, peer, tls.cloned()) {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Serves the connection if there is room, or refuses it. Returns false if it had to be closed without an answer.
    fn take(&self, stream: TcpStream, peer: SocketAddr, tls: Option<Acceptor>) -> bool {
        let current = Rc::clone(&self.current);
        if let Some(place) = current.idle.room().try_enter() {
            self.connections.spawn_local(async move {
                connection(&current, stream, peer, tls).await;
                drop(place);
            });
            return true;
        }
        if self.refusals.get() >= REFUSALS {
            refusal::count(&current.worker(), "max_connections");
            return false;
        }
        let refusal = RefusalInProgress::new(&self.refusals);
        let may_log = self.log_limit.allows();
        self.connections.spawn_local(async move {
            if let Some(place) = current.idle.enter().await {
                drop(refusal);
                connection(&current, stream, peer, tls).await;
                drop(place);
                return;
            }
            let worker = current.worker();
            refusal::count(&worker, "max_connections");
            if may_log {
                let limit = worker.shared.config.listen.max_connections;
                tracing::warn!(limit, "connection limit reached, refusing new connections");
            }
            if tls.is_none() {
                refusal::answer(&worker, stream).await;
            }
        });
        true
    }

    /// Accepts the next connection. If the process is out of descriptors, an idle connection is closed for it; if none
    /// is idle, the new one is refused.
    async fn accept(&self, listener: &TcpListener, tls: bool) -> (TcpStream, SocketAddr) {
        loop {
            self.reserve.refill();
            match listener.accept().await {
                Ok(accepted) => return accepted,
                // The kernel allocates the descriptor before it checks for a connection, so the retry can find no
                // connection waiting.
                Err(error) if is_exhausted(&error) && self.reserve.release() => {
                    if let Some(Ok(accepted)) = listener.accept().now_or_never() {
                        let worker = self.current.worker();
                        worker.shared.metrics.accept_failed("listen");
                        if self.log_limit.allows() {
                            tracing::warn!(%error, "accept failed, closing idle connections and refusing new ones");
                        }
                        if self.current.idle.make_room() {
                            return accepted;
                        }
                        self.refuse(&worker, accepted.0, tls);
                        tokio::time::sleep(EXHAUSTED).await;
                    }
                }
                // The descriptor in reserve is in use: the next attempt gets that of an idle connection.
                Err(error) if is_exhausted(&error) => {
                    self.current.idle.make_room();
                    tokio::time::sleep(EXHAUSTED).await;
                }
                // The client or its network is gone already: accept(2), "Error handling".
                Err(error) if is_of_the_connection(&error) => {}
                Err(error) => {
                    if self.log_limit.allows() {
                        tracing::warn!(%error, "accept failed");
                    }
                    tokio::time::sleep(EXHAUSTED).await;
                }
            }
        }
    }

    /// Refuses a connection that uses the reserved descriptor.
    fn refuse(&self, worker: &Worker, stream: TcpStream, tls: bool) {
        refusal::count(worker, "descriptors");
        if !tls {
            refusal::answer_at_once(worker, &stream);
        }
        self.reserve.reclaim(stream);
    }
}

/// A refusal in progress, counted until dropped.
struct RefusalInProgress(Rc<Cell<usize>>);

impl RefusalInProgress {
    fn new(count: &Rc<Cell<usize>>) -> Self {
        count.set(count.get() + 1);
        Self(Rc::clone(count))
    }
}

impl Drop for RefusalInProgress {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

async fn connection(current: &Rc<Current>, stream: TcpStream, peer: SocketAddr, tls: Option<Acceptor>) {
    let (_open, force) = {
        let worker = current.worker();
        (worker.shared.metrics.client_connection(), worker.shared.force.clone())
    };
    let announces = {
        let worker = current.worker();
        let listen = &worker.shared.config.listen;
        if tls.is_some() { listen.tls.as_ref().is_some_and(|tls| tls.proxy_protocol) } else { listen.proxy_protocol }
    };
    let mut serve = pin!(async {
        match &tls {
            None => connection::serve(current, stream, peer, announces).await,
            Some(tls) => connection::serve_tls(current, tls, stream, peer, announces).await,
        }
    });
    tokio::select! {
        biased;
        () = serve.as_mut() => {}
        () = force.cancelled() => {
            // Its requests end by themselves, and are accounted for.
            let _ = tokio::time::timeout(FORCED, serve).await;
        }
    }
}
