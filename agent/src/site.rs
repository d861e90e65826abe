//! A worker's place: a core, its current-thread runtime and its listeners. What requests are served with comes with the
//! configuration; the connections stay when that is replaced.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

use crate::{
    connection,
    shared::Shared,
    worker::{Current, Worker},
};

/// Where clients connect to a worker.
pub struct Listener {
    pub socket: TcpListener,
    /// For clients that speak TLS.
    pub tls: Option<TlsAcceptor>,
}

/// Serves until drained: returns when the last connection has ended after `draining`, or all are broken off by `force`. The
/// connections of all listeners together are at most `max_connections`. `updates`: what holds after a reload.
pub async fn serve(
    worker: Worker,
    listeners: Vec<Listener>,
    max_connections: usize,
    updates: watch::Receiver<Arc<Shared>>,
) {
    let draining = worker.shared.draining.clone();
    let current = Rc::new(Current::new(worker));
    let permits = Arc::new(Semaphore::new(max_connections));
    let connections = TaskTracker::new();
    let accept_all = async |Listener { socket, tls }: &Listener| {
        loop {
            let (stream, peer) = accept(socket).await;
            // Beyond the limit this one waits, and the others in the kernel's queue.
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            let (current, tls) = (Rc::clone(&current), tls.clone());
            connections.spawn_local(async move {
                connection(&current, stream, peer, tls).await;
                drop(permit);
            });
        }
    };
    let sweep = async {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            current.worker().sweep();
        }
    };
    tokio::select! {
        _ = join_all(listeners.iter().map(&accept_all)) => {}
        () = sweep => {}
        () = follow(&current, updates) => {}
        () = draining.cancelled() => {}
    }
    // What the kernel has accepted for us already is served too; the socket itself says what there is.
    for Listener { socket, tls } in listeners {
        let Ok(socket) = socket.into_std() else { continue };
        while let Ok((stream, peer)) = socket.accept() {
            let adopted = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
            let Ok(stream) = adopted else { continue };
            let (current, tls) = (Rc::clone(&current), tls.clone());
            connections.spawn_local(async move { connection(&current, stream, peer, tls).await });
        }
    }
    connections.close();
    connections.wait().await;
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

async fn connection(current: &Rc<Current>, stream: TcpStream, peer: SocketAddr, tls: Option<TlsAcceptor>) {
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

/// Accepts; errors (no descriptors left, a client gone already) are waited out.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let mut wait = Duration::from_millis(5);
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(1));
            }
        }
    }
}
