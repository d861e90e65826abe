//! The agent as a whole: from a checked configuration to running threads, and down again.
//!
//! Everything that can fail at start fails in [`Agent::start`], before a request is taken. Workers, the admin server and
//! the kernel's events have threads of their own.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use anyhow::{Context as _, Result};
use futures_util::FutureExt;
use http::HeaderName;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{self, AdminHandle},
    bbr::ModelHeaders,
    config::{self, Config, Picker},
    control::{self, Control},
    dns::Dns,
    endpoint::{budget::RetryBudget, discovery::Discovery, set::EndpointSet},
    metrics::{self, Metrics},
    picker::{builtin::BuiltinPicker, replica::Replicas, tend::tend},
    readiness::{Gate, Readiness},
    route::Router,
    selftest,
    steer::Steering,
    telemetry::{Exporter, Telemetry},
    tls::Certificate,
    worker::{Listener, Shared, Worker},
};

/// Connections that the kernel holds for us until a worker accepts them.
const BACKLOG: i32 = 4096;

/// A running agent. Dropping it breaks off what runs.
pub struct Agent {
    shared: Arc<Shared>,
    readiness: Readiness,
    admin: AdminHandle,
    _discovery: Discovery,
    workers: Vec<JoinHandle<()>>,
    /// Ends after the workers.
    _control: Control,
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    steering: Steering,
    /// Outlives the workers, whose last spans it sends.
    exporter: Option<Exporter>,
}

impl Agent {
    /// Blocks while the kernel proves itself (some tens of milliseconds), on a runtime of its own: not to be called on one.
    pub fn start(config: Config) -> Result<Self> {
        let count = match config.listen.workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            count => count,
        };
        raise_descriptor_limit();
        let names: Vec<String> = config.pools.iter().map(|pool| pool.name.clone()).collect();
        let metrics = Metrics::new(&names);
        let readiness = Readiness::new();
        let gates: Vec<Gate> = (0..count).map(|number| readiness.gate(format!("worker {number}"))).collect();

        let endpoints: Vec<_> =
            config.pools.iter().map(|pool| Arc::new(EndpointSet::new(pool, &config.node))).collect();
        for (pool, endpoints) in endpoints.iter().enumerate() {
            let endpoints = Arc::clone(endpoints);
            metrics.count_endpoints(pool, move || endpoints.states());
        }
        let discovery = Discovery::start(&config, &endpoints, &metrics, &readiness)?;

        let replicas: Vec<_> = config.pools.iter().map(replicas).collect::<Result<_>>()?;

        let steering = selftest::start(&config.steering);
        metrics.set_steering_path(
            metrics::Path::Ingress,
            matches!(steering, Steering::Active(_)),
            &steering.describe(),
        );
        match &steering {
            Steering::Unavailable(_) => tracing::warn!("{}", steering.describe()),
            _ => tracing::info!("{}", steering.describe()),
        }

        let listening = |address| listen(address, count).with_context(|| format!("listening on {address}"));
        let plain = listening(config.listen.address)?;
        let address = plain[0].local_addr()?;
        let mut listeners: Vec<Vec<_>> = plain.into_iter().map(|socket| vec![(socket, None)]).collect();
        let mut tls_address = None;
        if let Some(settings) = &config.listen.tls {
            let certificate = Certificate::read(settings)?;
            let acceptor = certificate.acceptor(config.listen.http2_max_streams > 0)?;
            let sockets = listening(settings.address)?;
            tls_address = Some(sockets[0].local_addr()?);
            for (worker, socket) in listeners.iter_mut().zip(sockets) {
                worker.push((socket, Some(acceptor.clone())));
            }
        }
        let status = steering.describe();
        let admin =
            admin::start(config.admin.address, Arc::clone(&metrics), readiness.clone(), move || vec![status.clone()])
                .with_context(|| format!("the admin server on {}", config.admin.address))?;

        let (telemetry, exporter) = Telemetry::start(&config.tracing, &metrics)?.unzip();
        let shared = Arc::new(Shared {
            router: Router::new(&config),
            pickers: endpoints.iter().map(|endpoints| BuiltinPicker::new(Arc::clone(endpoints))).collect(),
            endpoints,
            replicas,
            pick_headers: pick_headers(&config),
            model_headers: ModelHeaders::new(&config.bbr),
            retries: config.pools.iter().map(|pool| RetryBudget::new(&pool.retry, Instant::now())).collect(),
            metrics,
            telemetry,
            draining: CancellationToken::new(),
            force: CancellationToken::new(),
            failed: AtomicBool::new(false),
            config,
        });
        let control = Control::start(beside_requests(&shared)).context("the control thread")?;
        let mut workers = Vec::with_capacity(count);
        for (number, (listeners, gate)) in listeners.into_iter().zip(gates).enumerate() {
            let (shared, steering) = (Arc::clone(&shared), steering.clone());
            let run = move || {
                if let Err(error) = work(Arc::clone(&shared), &steering, count, listeners, gate) {
                    tracing::error!(number, "worker: {error:#}");
                    // Better none than some: whoever watches the process starts it again.
                    shared.failed.store(true, Ordering::Relaxed);
                    shared.force.cancel();
                }
            };
            workers.push(std::thread::Builder::new().name(format!("penstock-{number}")).spawn(run)?);
        }
        tracing::info!(%address, admin = %admin.local_addr(), workers = count, "penstock {}", env!("CARGO_PKG_VERSION"));
        Ok(Self {
            shared,
            readiness,
            admin,
            _discovery: discovery,
            workers,
            _control: control,
            address,
            tls_address,
            steering,
            exporter,
        })
    }

    /// Where clients connect; the port is the one that was bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where clients that speak TLS connect.
    pub fn tls_address(&self) -> Option<SocketAddr> {
        self.tls_address
    }

    pub fn admin_address(&self) -> SocketAddr {
        self.admin.local_addr()
    }

    pub fn steering(&self) -> &Steering {
        &self.steering
    }

    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// Not ready any more, no new connections; what runs may finish.
    pub fn drain(&self) {
        self.readiness.draining();
        self.shared.draining.cancel();
    }

    /// Breaks off what still runs.
    pub fn force(&self) {
        self.drain();
        self.shared.force.cancel();
    }

    /// Every worker has ended.
    pub fn is_done(&self) -> bool {
        self.workers.iter().all(JoinHandle::is_finished)
    }

    /// A worker could not start or go on, so the agent is going down.
    pub fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// Waits for the workers to end, after [`drain`](Self::drain).
    pub fn join(mut self) {
        self.join_workers();
    }

    fn join_workers(&mut self) {
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so already.
            let _ = worker.join();
        }
        self.exporter = None;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.force();
        self.join_workers();
    }
}

/// A worker's thread.
fn work(
    shared: Arc<Shared>,
    steering: &Steering,
    count: usize,
    listeners: Vec<(std::net::TcpListener, Option<TlsAcceptor>)>,
    gate: Gate,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let connections = shared.config.listen.max_connections.div_ceil(count);
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let steering = steering.worker()?;
        let worker = Worker::new(shared, steering);
        let listener = |(socket, tls)| Ok(Listener { socket: tokio::net::TcpListener::from_std(socket)?, tls });
        let listeners = listeners.into_iter().map(listener).collect::<io::Result<_>>()?;
        gate.open();
        worker.serve(listeners, connections).await;
        Ok(())
    })
}

fn replicas(pool: &config::Pool) -> Result<Option<Arc<Replicas>>> {
    match &pool.picker {
        Picker::Builtin => Ok(None),
        Picker::Epp(epp) => {
            let replicas = Replicas::new(epp).with_context(|| format!("the EPP of the pool {}", pool.name))?;
            Ok(Some(Arc::new(replicas)))
        }
    }
}

/// What the control thread does.
fn beside_requests(shared: &Shared) -> Vec<control::Task> {
    let dns = Dns::new(&shared.config.dns);
    let epps = shared.replicas.iter().enumerate().filter_map(|(pool, replicas)| Some((pool, replicas.clone()?)));
    epps.map(|(pool, replicas)| tend(replicas, dns.clone(), Arc::clone(&shared.metrics), pool).boxed()).collect()
}

fn pick_headers(config: &Config) -> Vec<HeaderName> {
    let configured = config.pools.iter().filter_map(|pool| match &pool.picker {
        Picker::Epp(epp) => Some(epp.header.clone()),
        Picker::Builtin => None,
    });
    let mut headers: Vec<_> = configured.chain([HeaderName::from_static("x-gateway-destination-endpoint")]).collect();
    headers.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    headers.dedup();
    headers
}

/// One listener for each worker, on the same address (SO_REUSEPORT).
fn listen(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let mut listeners: Vec<std::net::TcpListener> = Vec::with_capacity(count);
    for _ in 0..count {
        // Port 0 is chosen once.
        let address = listeners.first().map_or(Ok(address), std::net::TcpListener::local_addr)?;
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        listeners.push(socket.into());
    }
    Ok(listeners)
}

/// Each request may hold two descriptors.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "the limit of open files stays low");
    }
}
