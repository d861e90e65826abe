//! One worker: a core, its current-thread runtime, its listener, its endpoint connections and its channels to the EPPs.
//! Nothing of a request crosses to another worker.

use std::{
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use http::{HeaderName, StatusCode};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    bbr::ModelHeaders,
    config::{self, Config},
    connection,
    endpoint::{budget::RetryBudget, http2::Http2Pool, pool::Pool, set::EndpointSet},
    metrics::Metrics,
    picker::{builtin::BuiltinPicker, client::EppClient, replica::Replicas},
    route::Router,
    steer::WorkerSteering,
    telemetry::Telemetry,
};

/// What all workers share.
pub struct Shared {
    pub config: Config,
    pub router: Router,
    pub metrics: Arc<Metrics>,
    /// Where tracing is on.
    pub telemetry: Option<Telemetry>,
    /// One for each pool.
    pub endpoints: Vec<Arc<EndpointSet>>,
    /// One for each pool.
    pub retries: Vec<RetryBudget>,
    /// One for each pool: picks for `builtin` and for fail-open.
    pub pickers: Vec<BuiltinPicker>,
    /// One for each pool that asks an EPP.
    pub replicas: Vec<Option<Arc<Replicas>>>,
    /// The headers in which EPPs name their picks: `picker.header` of every pool, and the protocol's own.
    pub pick_headers: Vec<HeaderName>,
    pub model_headers: ModelHeaders,
    /// No new connections or requests; what runs may finish.
    pub draining: CancellationToken,
    /// Break off what still runs.
    pub force: CancellationToken,
    /// A worker could not start or go on.
    pub failed: AtomicBool,
}

impl Shared {
    /// A request got no answer from `address`.
    pub fn endpoint_failed(&self, pool: usize, address: SocketAddr) {
        if self.endpoints[pool].failed(address, Instant::now()) {
            self.metrics.pool(pool).ejected();
            tracing::warn!(pool = self.config.pools[pool].name, %address, "endpoint ejected");
        }
    }

    /// `address` answered with `status`.
    pub fn endpoint_answered(&self, pool: usize, address: SocketAddr, status: StatusCode) {
        if status.is_server_error() && self.endpoints[pool].counts_server_errors() {
            self.endpoint_failed(pool, address);
        } else {
            self.endpoints[pool].succeeded(address);
        }
    }

    /// Whether a request may still go to `address`. If not, idle connections to it are of no use.
    fn is_dialled(&self, address: SocketAddr) -> bool {
        let listed =
            |endpoints: &Arc<EndpointSet>| endpoints.snapshot().get(address).is_some_and(|endpoint| !endpoint.draining);
        let named = |pool: &config::Pool| pool.passthrough || pool.default_upstream == Some(address);
        self.endpoints.iter().any(listed) || self.config.pools.iter().any(named)
    }
}

/// Where clients connect to a worker.
pub struct Listener {
    pub socket: TcpListener,
    /// For clients that speak TLS.
    pub tls: Option<TlsAcceptor>,
}

pub struct Worker {
    pub shared: Arc<Shared>,
    /// One for each pool that asks an EPP.
    pub epps: Vec<Option<EppClient>>,
    pub endpoints: Pool,
    /// For pools whose endpoints speak HTTP/2.
    pub http2_endpoints: Http2Pool,
}

impl Worker {
    /// Must be called on the worker's runtime.
    pub fn new(shared: Arc<Shared>, steering: Option<Rc<WorkerSteering>>) -> Rc<Self> {
        let config = &shared.config;
        let epps = shared.replicas.iter().map(|replicas| replicas.clone().map(EppClient::new)).collect();
        let (timeouts, receive_buffer) = (&config.timeouts, config.steering.endpoint_receive_buffer);
        let endpoints = Pool::new(
            Arc::clone(&shared.metrics),
            steering,
            timeouts.endpoint_keep_alive,
            timeouts.connect,
            receive_buffer,
        );
        let http2_endpoints = Http2Pool::new(timeouts.connect);
        Rc::new(Self { epps, endpoints, http2_endpoints, shared })
    }

    /// Serves until drained: returns when the last connection has ended after `draining`, or all are broken off by `force`.
    /// The connections of all listeners together are at most `max_connections`.
    pub async fn serve(self: Rc<Self>, listeners: Vec<Listener>, max_connections: usize) {
        let permits = Arc::new(Semaphore::new(max_connections));
        let connections = TaskTracker::new();
        let serve = async |Listener { socket, tls }: &Listener| {
            loop {
                let (stream, peer) = accept(socket).await;
                // Beyond the limit this one waits, and the others in the kernel's queue.
                let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
                let (worker, tls) = (Rc::clone(&self), tls.clone());
                connections.spawn_local(async move {
                    worker.connection(stream, peer, tls).await;
                    drop(permit);
                });
            }
        };
        let sweep = async {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                self.endpoints.sweep(|address| self.shared.is_dialled(address));
                let keep_alive = self.shared.config.timeouts.endpoint_keep_alive;
                self.http2_endpoints.sweep(keep_alive, |address| self.shared.is_dialled(address));
                if let Some(steering) = self.endpoints.steering() {
                    self.shared.metrics.steer_events_missed(steering.take_missed_events());
                }
            }
        };
        tokio::select! {
            _ = join_all(listeners.iter().map(&serve)) => {}
            () = sweep => {}
            () = self.shared.draining.cancelled() => {}
        }
        // What the kernel has accepted for us already is served too; the socket itself says what there is.
        for Listener { socket, tls } in listeners {
            let Ok(socket) = socket.into_std() else { continue };
            while let Ok((stream, peer)) = socket.accept() {
                let adopted = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
                let Ok(stream) = adopted else { continue };
                let (worker, tls) = (Rc::clone(&self), tls.clone());
                connections.spawn_local(async move { worker.connection(stream, peer, tls).await });
            }
        }
        connections.close();
        connections.wait().await;
    }

    async fn connection(self: Rc<Self>, stream: TcpStream, peer: SocketAddr, tls: Option<TlsAcceptor>) {
        let _open = self.shared.metrics.client_connection();
        let serve = async {
            match &tls {
                None => connection::serve(&self, stream, peer).await,
                Some(tls) => connection::serve_tls(&self, tls, stream, peer).await,
            }
        };
        tokio::select! {
            biased;
            () = self.shared.force.cancelled() => {}
            () = serve => {}
        }
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
