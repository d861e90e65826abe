//! Starts, reloads and stops the whole agent.
//!
//! Takes a validated configuration and returns a running [`Agent`]. Everything that can fail at start fails in
//! [`Agent::start`], before a request is accepted. Workers, the admin server and the kernel events run on their own
//! threads.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, thread::JoinHandle};

use anyhow::{Context as _, Result};
use caps::errors::CapsError;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    admin::{self, AdminHandle},
    capability,
    config::{Config, FailureMode, Limits, Picker, Pool},
    inference_pools::{self, Known},
    kernel::socket,
    kubernetes::{self, Kubernetes},
    ladder::Ladder,
    listeners::Listeners,
    live::Live,
    metrics::Metrics,
    panics::Watch,
    picker::keep::Start,
    probe::Probe,
    readiness::{Gate, Readiness},
    reload::ReloadError,
    room::{Idle, Room},
    server::{self, Listener},
    shared::{Shared, names},
    steer::Steering,
    telemetry::{Exporter, Telemetry},
    tls::{Acceptor, Certificate},
    worker::Worker,
};

/// Accept backlog of each listener, in connections.
const BACKLOG: i32 = 4096;

/// A running agent. Dropping it aborts running requests.
pub struct Agent {
    live: Arc<Live>,
    /// None without pools that are InferencePools.
    kubernetes: Mutex<Option<Kubernetes>>,
    readiness: Readiness,
    admin: AdminHandle,
    workers: Vec<JoinHandle<()>>,
    watch: Watch,
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    ladder: Ladder,
    /// Outlives the workers, because it exports their last spans.
    exporter: Option<Exporter>,
}

impl Agent {
    /// Starts the agent. Blocks for some tens of milliseconds while the self-test runs on a runtime of its own, so it
    /// must not be called from within a runtime. Afterwards the calling thread has no capabilities (see
    /// [`capability`]).
    pub fn start(config: Config) -> Result<Self> {
        Self::start_with(config, Probe::default())
    }

    /// Like [`start`](Self::start), with a probe that makes the agent fail; for tests.
    pub fn start_with(file: Config, probe: Probe) -> Result<Self> {
        let known = kubernetes::last_known(&file);
        let config = inference_pools::merged(&file, &known);
        let count = match config.listen.workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            count => count,
        };
        raise_descriptor_limit();
        let metrics = Metrics::new(&names(&config));
        let readiness = Readiness::new();
        let watch = Watch::new(&readiness, probe);
        let gate = |number| WorkerGates {
            worker: readiness.gate(format!("worker {number}")),
            epps: config.pools.iter().map(|pool| epp_gate(pool, &readiness)).collect(),
        };
        let gates: Vec<WorkerGates> = (0..count).map(gate).collect();

        let ladder = Ladder::climb(&config.steering);
        ladder.announce(&metrics);
        let admin = std::net::TcpListener::bind(config.admin.address);
        let admin = admin.with_context(|| format!("cannot start the admin server on {}", config.admin.address))?;
        let binding = |address| bind(address, count).with_context(|| format!("cannot listen on {address}"));
        let plain = binding(config.listen.address)?;
        let secured = config.listen.tls.as_ref().map(|tls| binding(tls.address)).transpose()?;

        let mut bound = vec![plain[0].local_addr()?, admin.local_addr()?];
        if let Some(secured) = &secured {
            bound.push(secured[0].local_addr()?);
        }
        let own = Listeners::new(bound);

        // Everything is loaded and bound. From here on only the workers, and this thread until it has started them,
        // keep capabilities.
        if ladder.forces_buffers {
            // Accepted connections inherit the buffer size, so that workers do not need a capability to set it.
            let buffer = config.steering.client_send_buffer;
            plain.iter().try_for_each(|listener| socket::set_send_buffer(listener, buffer))?;
        }
        let dropped = capability::keep(&[]);
        let capabilities = capabilities(&dropped);
        let services = capability::with(&[], || Services::start(file, known, metrics, &readiness, own, &watch))?;
        let Services { live, kubernetes, exporter, certificate } = services;
        let shared = live.shared();
        let (config, metrics) = (&shared.config, &shared.metrics);
        let mut status = ladder.lines();
        status.extend(no_spill(&config.limits));
        let user = capability::user();
        status.extend([capabilities.clone(), user.clone()]);
        let room = Room::new(config.listen.max_connections, count);
        metrics.set_connections_limit(config.listen.max_connections);
        let admin = {
            let (metrics, readiness, room) = (Arc::clone(metrics), readiness.clone(), Arc::clone(&room));
            let verbose = move || status.iter().cloned().chain([room.describe()]).collect();
            capability::with(&[], || admin::start(admin, metrics, readiness, verbose, &watch))
        };
        let admin = admin.context("cannot start the admin server")?;

        let steering = ladder.steering();
        if let Steering::Active(kernel) = &steering {
            kernel.events().watch(watch.clone());
            // Accepted connections inherit this option. If such a connection comes from another agent on this machine,
            // that agent knows from the start that its endpoint is an agent.
            plain.iter().try_for_each(socket::keep_account)?;
        }
        if let Some(wire) = steering.wire() {
            wire.supervise(watch.clone());
        }
        let address = plain[0].local_addr()?;
        let mut listeners: Vec<Vec<_>> = plain.into_iter().map(|socket| vec![(socket, None)]).collect();
        let mut tls_address = None;
        if let (Some(sockets), Some(certificate)) = (secured, &certificate) {
            let acceptor = certificate.acceptor(config.listen.http2_max_streams > 0, config.listen.tls_handshakes)?;
            tls_address = Some(sockets[0].local_addr()?);
            for (worker, socket) in listeners.iter_mut().zip(sockets) {
                worker.push((socket, Some(acceptor.clone())));
            }
        }

        // Nothing can fail any more but a thread.
        for (socket, _) in listeners.iter().flatten() {
            socket2::SockRef::from(socket).listen(BACKLOG)?;
        }
        let mut workers = Vec::with_capacity(count);
        for (number, (listeners, gates)) in listeners.into_iter().zip(gates).enumerate() {
            let (updates, steering) = (live.updates(), steering.clone());
            let (room, watch, name) = (Arc::clone(&room), watch.clone(), format!("penstock-{number}"));
            let thread = std::thread::Builder::new().name(name.clone());
            let run = move || {
                let idle = Idle::new(room, number);
                watch.run(&name, || {
                    if let Err(error) = work(updates, &steering, idle, listeners, gates) {
                        watch.fail(&name, &format!("{error:#}"));
                    }
                });
            };
            workers.push(thread.spawn(run)?);
        }
        // Threads that this one starts at a later reload have no capabilities either.
        let _ = capability::keep(&[]);
        match dropped {
            Ok(()) => tracing::info!("{capabilities}; {user}"),
            Err(_) => tracing::warn!("{capabilities}; {user}"),
        }
        let tls = tls_address.map(tracing::field::display);
        let admin_address = admin.local_addr();
        tracing::info!(%address, tls, admin = %admin_address, workers = count, "penstock {}", env!("CARGO_PKG_VERSION"));
        Ok(Self {
            live,
            kubernetes: Mutex::new(kubernetes),
            readiness,
            admin,
            workers,
            watch,
            address,
            tls_address,
            ladder,
            exporter,
        })
    }

    /// The address of the plain listener, with the port that was bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of the TLS listener, if there is one.
    pub fn tls_address(&self) -> Option<SocketAddr> {
        self.tls_address
    }

    pub fn admin_address(&self) -> SocketAddr {
        self.admin.local_addr()
    }

    pub fn steering(&self) -> Steering {
        self.ladder.steering()
    }

    /// What the self-test has proven about the kernel.
    pub fn ladder(&self) -> &Ladder {
        &self.ladder
    }

    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.live.shared().metrics)
    }

    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// The current configuration, as in the file.
    pub fn config(&self) -> Config {
        self.live.file()
    }

    /// Serves requests that begin from now on under `config`. Connections stay open, and running requests keep the
    /// configuration they began with. Returns an error and changes nothing if `config` changes a setting that needs a
    /// restart. Blocks until the previous background threads have ended.
    pub fn reload(&self, config: Config) -> Result<(), ReloadError> {
        let pools = inference_pools::named(&config);
        self.live.reload(config)?;
        let mut kubernetes = self.kubernetes.lock();
        match &*kubernetes {
            Some(running) => running.follow(pools),
            None if pools.is_empty() => {}
            None => {
                let started = Kubernetes::start(&self.live, pools, Vec::new(), &self.watch);
                *kubernetes = Some(started.map_err(ReloadError::Background)?);
            }
        }
        Ok(())
    }

    /// Makes the agent unready. It still accepts connections, and asks each of them to end after its current request.
    pub fn leave(&self) {
        self.readiness.draining();
        self.live.shared().leaving.cancel();
    }

    /// Stops accepting connections; running requests may finish.
    pub fn drain(&self) {
        self.leave();
        self.live.shared().draining.cancel();
    }

    /// Aborts running requests.
    pub fn force(&self) {
        self.drain();
        self.live.shared().force.cancel();
    }

    /// Whether every worker has ended.
    pub fn is_done(&self) -> bool {
        self.workers.iter().all(JoinHandle::is_finished)
    }

    /// Whether a worker or another thread failed. The agent is then unready and should be drained.
    pub fn has_failed(&self) -> bool {
        self.watch.has_failed()
    }

    /// Resolves when [`has_failed`](Self::has_failed) holds. Cancel-safe.
    pub async fn failed(&self) {
        self.watch.failed().await;
    }

    /// Waits for the workers to end; call it after [`drain`](Self::drain).
    pub fn join(mut self) {
        self.join_workers();
    }

    fn join_workers(&mut self) {
        for worker in self.workers.drain(..) {
            // A worker's panic has been logged already.
            let _ = worker.join();
        }
        *self.kubernetes.lock() = None;
        self.live.stop();
        self.exporter = None;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.force();
        self.join_workers();
    }
}

/// The parts of an agent other than its workers.
struct Services {
    live: Arc<Live>,
    kubernetes: Option<Kubernetes>,
    exporter: Option<Exporter>,
    certificate: Option<Arc<Certificate>>,
}

impl Services {
    fn start(
        file: Config,
        known: Known,
        metrics: Arc<Metrics>,
        readiness: &Readiness,
        own: Listeners,
        watch: &Watch,
    ) -> Result<Self> {
        let config = inference_pools::merged(&file, &known);
        let (telemetry, exporter) = Telemetry::start(&config.tracing, &metrics, watch)?.unzip();
        let shared = Shared::new(config, metrics, telemetry)?.listening(own);
        let shared = Arc::new(Shared { probe: watch.probe.clone(), ..shared });
        let certificate = shared.config.listen.tls.as_ref().map(Certificate::read).transpose()?;
        let pools = inference_pools::named(&file);
        let gates = pools.iter().map(|pool| readiness.gate(format!("InferencePool {pool}"))).collect();
        let live = Live::start(shared, file, known, certificate.clone(), readiness, watch)?;
        let kubernetes = (!pools.is_empty()).then(|| Kubernetes::start(&live, pools, gates, watch)).transpose()?;
        Ok(Self { live, kubernetes, exporter, certificate })
    }
}

/// Describes the capabilities that this thread has kept and all others will have, for the log and `/readyz?verbose`.
fn capabilities(dropped: &Result<(), CapsError>) -> String {
    let held = capability::held().join(", ");
    match dropped {
        Err(error) => format!("capabilities: failed to drop: {error}; held: {held}"),
        Ok(()) if held.is_empty() => "capabilities: none kept".to_owned(),
        Ok(()) => format!("capabilities: kept {held}"),
    }
}

/// What readiness waits for in one worker.
struct WorkerGates {
    worker: Gate,
    /// One per pool; None if the pool's EPP does not hold back readiness.
    epps: Vec<Option<Start>>,
}

/// The gate of a pool that cannot serve a request without its EPP.
fn epp_gate(pool: &Pool, readiness: &Readiness) -> Option<Start> {
    let Picker::Epp(epp) = &pool.picker else { return None };
    let wait = epp.start_wait.filter(|_| pool.failure_mode == FailureMode::Closed)?;
    Some(Start { gate: readiness.gate(format!("EPP of pool {}", pool.name)), wait, pool: pool.name.clone() })
}

/// Runs a worker on the current thread until it has drained.
fn work(
    updates: watch::Receiver<Arc<Shared>>,
    steering: &Steering,
    idle: Rc<Idle>,
    listeners: Vec<(std::net::TcpListener, Option<Acceptor>)>,
    gates: WorkerGates,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (steering, wire) = (steering.worker()?, steering.wire());
        let shared = Arc::clone(&updates.borrow());
        let worker = Worker::new(shared, steering, wire, gates.epps);
        let listener = |(socket, tls)| Ok(Listener { socket: tokio::net::TcpListener::from_std(socket)?, tls });
        let listeners = listeners.into_iter().map(listener).collect::<io::Result<_>>()?;
        gates.worker.open();
        server::serve(worker, listeners, idle, updates).await;
        Ok(())
    })
}

/// Binds a socket for each worker to the same address (SO_REUSEPORT). They do not listen yet: a listening socket gets a share of
/// the connections, and resets them if the start fails afterwards.
fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
    if is_shared(address) {
        tracing::warn!(%address, "another process listens on this address, too, and gets a share of the connections");
    }
    let mut listeners: Vec<std::net::TcpListener> = Vec::with_capacity(count);
    for _ in 0..count {
        // Port 0 is resolved by the first listener.
        let address = listeners.first().map_or(Ok(address), std::net::TcpListener::local_addr)?;
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        listeners.push(socket.into());
    }
    Ok(listeners)
}

/// Whether another process listens on the address.
fn is_shared(address: SocketAddr) -> bool {
    let alone = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())
    };
    address.port() != 0 && alone().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::AddrInUse)
}

/// Why large request bodies cannot be stored, if they cannot. It is logged, too.
fn no_spill(limits: &Limits) -> Option<String> {
    let error = (limits.total_spill_bytes > 0).then(tempfile::tempfile)?.err()?;
    let (folder, kept) = (std::env::temp_dir(), limits.body_memory_bytes);
    let folder = folder.display();
    tracing::warn!(%folder, %error, "no file can be made for request bodies: those of more than limits.body_memory_bytes get 500");
    Some(format!("bodies of more than {kept} bytes: failing, {folder}: {error}"))
}

/// Raises RLIMIT_NOFILE to its hard limit, because each request may hold two descriptors.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "could not raise RLIMIT_NOFILE");
    }
}
