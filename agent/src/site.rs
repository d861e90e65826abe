//! A worker's place: a core, its current-thread runtime and its listeners. What requests are served with comes with the
//! configuration; the connections stay when that is replaced.

mod refusal;

use std::{cell::Cell, io, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::join_all};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tokio_util::task::TaskTracker;

use self::refusal::Seldom;
use crate::{
    connection,
    kernel::socket,
    probe::Point,
    reserve::{Reserve, is_exhausted},
    room::Idle,
    shared::Shared,
    tls::Acceptor,
    worker::{Current, Worker},
};

/// Connections of a worker that are being refused, or wait for an idle one to end. Those beyond are closed at once.
const REFUSALS: usize = 128;
/// Pause after a connection that is closed at once, and after an `accept` that failed.
const PAUSE: Duration = Duration::from_millis(1);
const EXHAUSTED: Duration = Duration::from_millis(10);
/// How long handshakes that have begun may take to end, once no others may begin.
const HANDSHAKES: Duration = Duration::from_millis(200);

/// Where clients connect to a worker.
pub struct Listener {
    pub socket: TcpListener,
    /// For clients that speak TLS.
    pub tls: Option<Acceptor>,
}

/// Serves until drained: returns when the last connection has ended after `draining`, or all are broken off by `force`. `idle`
/// bounds the connections, with those of the other workers. `updates`: what holds after a reload.
pub async fn serve(worker: Worker, listeners: Vec<Listener>, idle: Rc<Idle>, updates: watch::Receiver<Arc<Shared>>) {
    let draining = worker.shared.draining.clone();
    let current = Rc::new(Current::new(worker, idle));
    let site = Site::new(&current);
    let sweep = async {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            current.worker().shared.probe.at(Point::Worker);
            current.worker().sweep();
        }
    };
    tokio::select! {
        _ = join_all(listeners.iter().map(|listener| site.accept_all(listener))) => {}
        () = sweep => {}
        () = follow(&current, updates) => {}
        () = current.idle.serve_others() => {}
        () = draining.cancelled() => {}
    }
    // Who has begun to connect is served; who begins now is not heard, where that can be, and refused when it tries again.
    for listener in &listeners {
        if let Err(error) = socket::refuse_handshakes(&listener.socket) {
            // Since Linux 6.16 this takes CAP_NET_ADMIN. Without it, only a handshake that ends between the last look at the queue
            // and the close is reset.
            tracing::debug!(%error, "new handshakes go on until the port closes");
        }
    }
    let _ = timeout(HANDSHAKES, join_all(listeners.iter().map(|listener| site.accept_all(listener)))).await;
    // The socket itself says what there is.
    for Listener { socket, tls } in listeners {
        let Ok(socket) = socket.into_std() else { continue };
        while let Ok((stream, peer)) = socket.accept() {
            let adopted = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
            let Ok(stream) = adopted else { continue };
            site.take(stream, peer, tls.clone());
        }
    }
    site.connections.close();
    site.connections.wait().await;
    let worker = current.worker();
    let told = join_all(worker.epps.iter().flatten().map(|epp| epp.finished()));
    tokio::select! {
        _ = told => {}
        () = worker.shared.force.cancelled() => {}
    }
}

/// Takes every update. Never returns.
async fn follow(current: &Current, mut updates: watch::Receiver<Arc<Shared>>) {
    while updates.changed().await.is_ok() {
        let shared = Arc::clone(&updates.borrow_and_update());
        current.replace(current.worker().after(shared));
    }
    std::future::pending::<()>().await;
}

struct Site {
    current: Rc<Current>,
    connections: TaskTracker,
    /// Of [`REFUSALS`].
    refusals: Rc<Cell<usize>>,
    /// A descriptor to refuse a connection with, when there is no other.
    reserve: Reserve,
    said: Seldom,
}

impl Site {
    fn new(current: &Rc<Current>) -> Self {
        Self {
            current: Rc::clone(current),
            connections: TaskTracker::new(),
            refusals: Rc::default(),
            reserve: Reserve::new(1),
            said: Seldom::default(),
        }
    }

    /// Never returns.
    async fn accept_all(&self, Listener { socket, tls }: &Listener) {
        loop {
            let (stream, peer) = self.accept(socket, tls.is_some()).await;
            if !self.take(stream, peer, tls.clone()) {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Serves the connection where there is room, or refuses it; false if it had to be closed without a word.
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
        let refusal = Refusal::new(&self.refusals);
        let said = self.said.may();
        self.connections.spawn_local(async move {
            if let Some(place) = current.idle.enter().await {
                drop(refusal);
                connection(&current, stream, peer, tls).await;
                drop(place);
                return;
            }
            let worker = current.worker();
            refusal::count(&worker, "max_connections");
            if said {
                let limit = worker.shared.config.listen.max_connections;
                tracing::warn!(limit, "no room for further connections, refusing new ones");
            }
            if tls.is_none() {
                refusal::answer(&worker, stream).await;
            }
        });
        true
    }

    /// The next connection. If there is no descriptor for it, an idle connection gives up its own; if none is idle, it is refused.
    async fn accept(&self, listener: &TcpListener, tls: bool) -> (TcpStream, SocketAddr) {
        loop {
            self.reserve.refill();
            match listener.accept().await {
                Ok(accepted) => return accepted,
                // The kernel looks for a descriptor before it looks for a connection: there may be none.
                Err(error) if is_exhausted(&error) && self.reserve.release() => {
                    if let Some(Ok(accepted)) = listener.accept().now_or_never() {
                        let worker = self.current.worker();
                        worker.shared.metrics.accept_failed("listen");
                        if self.said.may() {
                            tracing::warn!(%error, "accept failed, closing idle connections and refusing new ones");
                        }
                        if self.current.idle.make_room() {
                            return accepted;
                        }
                        self.refuse(&worker, accepted.0, tls);
                        tokio::time::sleep(EXHAUSTED).await;
                    }
                }
                Err(error) if is_exhausted(&error) => tokio::time::sleep(EXHAUSTED).await,
                // The client has left already, or its network has: accept(2), "Error handling".
                Err(error) if is_of_the_connection(&error) => {}
                Err(error) => {
                    if self.said.may() {
                        tracing::warn!(%error, "accept failed");
                    }
                    tokio::time::sleep(EXHAUSTED).await;
                }
            }
        }
    }

    /// Refuses a connection that has the descriptor of the reserve.
    fn refuse(&self, worker: &Worker, stream: TcpStream, tls: bool) {
        refusal::count(worker, "descriptors");
        if !tls {
            refusal::answer_at_once(worker, &stream);
        }
        self.reserve.reclaim(stream);
    }
}

/// One of [`REFUSALS`], until it is dropped.
struct Refusal(Rc<Cell<usize>>);

impl Refusal {
    fn new(count: &Rc<Cell<usize>>) -> Self {
        count.set(count.get() + 1);
        Self(Rc::clone(count))
    }
}

impl Drop for Refusal {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

async fn connection(current: &Rc<Current>, stream: TcpStream, peer: SocketAddr, tls: Option<Acceptor>) {
    let shared = Arc::clone(&current.worker().shared);
    let _open = shared.metrics.client_connection();
    let serve = async {
        match &tls {
            None => connection::serve(current, stream, peer).await,
            Some(tls) => connection::serve_tls(current, tls, stream, peer).await,
        }
    };
    tokio::select! {
        biased;
        () = shared.force.cancelled() => {}
        () = serve => {}
    }
}

/// Whether the error says something of the connection in the queue, and nothing of the listener.
fn is_of_the_connection(error: &io::Error) -> bool {
    use nix::libc::{
        ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, EINTR, ENETDOWN, ENETUNREACH, ENONET, ENOPROTOOPT, EOPNOTSUPP, EPROTO,
    };
    let of_it =
        [ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, EINTR, ENETDOWN, ENETUNREACH, ENONET, ENOPROTOOPT, EOPNOTSUPP, EPROTO];
    error.raw_os_error().is_some_and(|number| of_it.contains(&number))
}
