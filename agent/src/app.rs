//! The agent as a whole: from a checked configuration to running threads, and down again.
//!
//! Everything that can fail at start fails in [`Agent::start`], before a request is taken. Workers, the admin server and
//! the kernel's events have threads of their own.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, thread::JoinHandle};

use anyhow::{Context as _, Result};
use caps::errors::CapsError;
use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    admin::{self, AdminHandle},
    capability,
    config::Config,
    control::{self, Control},
    dns::Dns,
    endpoint::discovery::Discovery,
    kernel::socket,
    ladder::Ladder,
    listeners::Listeners,
    metrics::Metrics,
    panics::Watch,
    picker::tend::tend,
    probe::Probe,
    readiness::{Gate, Readiness},
    reload::{self, ReloadError},
    room::{Idle, Room},
    shared::{Shared, names},
    site::{self, Listener},
    steer::Steering,
    telemetry::{Exporter, Telemetry},
    tls::{Acceptor, Certificate},
    worker::Worker,
};

/// Connections that the kernel holds for us until a worker accepts them.
const BACKLOG: i32 = 4096;

/// A running agent. Dropping it breaks off what runs.
pub struct Agent {
    /// What holds now, and goes to the workers when it changes.
    shared: watch::Sender<Arc<Shared>>,
    readiness: Readiness,
    admin: AdminHandle,
    workers: Vec<JoinHandle<()>>,
    watch: Watch,
    /// Ends after the workers.
    beside: Mutex<Option<Beside>>,
    certificate: Option<Arc<Certificate>>,
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    ladder: Ladder,
    /// Outlives the workers, whose last spans it sends.
    exporter: Option<Exporter>,
}

/// What goes on beside requests under one configuration.
struct Beside {
    _discovery: Discovery,
    _control: Control,
}

impl Agent {
    /// Blocks while the kernel proves itself (some tens of milliseconds), on a runtime of its own: not to be called on one. The
    /// calling thread has no capabilities afterwards ([`capability`]).
    pub fn start(config: Config) -> Result<Self> {
        Self::start_with(config, Probe::default())
    }

    /// As [`start`](Self::start), with a probe that makes the agent fail; for tests.
    pub fn start_with(config: Config, probe: Probe) -> Result<Self> {
        let count = match config.listen.workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            count => count,
        };
        raise_descriptor_limit();
        let metrics = Metrics::new(&names(&config));
        let readiness = Readiness::new();
        let watch = Watch::new(&readiness, probe);
        let gates: Vec<Gate> = (0..count).map(|number| readiness.gate(format!("worker {number}"))).collect();

        let ladder = Ladder::climb(&config.steering);
        ladder.announce(&metrics);
        let listening = |address| listen(address, count).with_context(|| format!("listening on {address}"));
        let plain = listening(config.listen.address)?;
        let secured = config.listen.tls.as_ref().map(|tls| listening(tls.address)).transpose()?;
        let admin = std::net::TcpListener::bind(config.admin.address);
        let admin = admin.with_context(|| format!("the admin server on {}", config.admin.address))?;

        let mut bound = vec![plain[0].local_addr()?, admin.local_addr()?];
        if let Some(secured) = &secured {
            bound.push(secured[0].local_addr()?);
        }
        let own = Listeners::new(bound);

        // Everything is loaded and bound. From here on only workers can do what an ordinary process cannot, and this thread
        // until it has started them.
        if ladder.forces_buffers {
            // Connections inherit it, so that no worker needs a capability for it.
            let buffer = config.steering.client_send_buffer;
            plain.iter().try_for_each(|listener| socket::set_send_buffer(listener, buffer))?;
        }
        let given_up = capability::keep(&[]);
        let capabilities = capabilities(&given_up);
        let around = capability::with(&[], || Around::start(config, metrics, &readiness, own, &watch))?;
        let Around { shared, exporter, certificate, beside } = around;
        let (config, metrics) = (&shared.config, &shared.metrics);
        let mut status = ladder.lines();
        let user = capability::user();
        status.extend([capabilities.clone(), user.clone()]);
        let room = Room::new(config.listen.max_connections, count);
        metrics.set_connections_limit(config.listen.max_connections);
        let admin = {
            let (metrics, readiness, room) = (Arc::clone(metrics), readiness.clone(), Arc::clone(&room));
            let verbose = move || status.iter().cloned().chain([room.describe()]).collect();
            capability::with(&[], || admin::start(admin, metrics, readiness, verbose, &watch))
        };
        let admin = admin.context("the admin server")?;

        let steering = ladder.steering();
        if let Steering::Active(kernel) = &steering {
            kernel.events().watch(watch.clone());
            // Inherited by every connection: another agent on this machine, whose endpoint this one is, knows it from the start.
            plain.iter().try_for_each(socket::keep_account)?;
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

        let (updates, _) = watch::channel(Arc::clone(&shared));
        let mut workers = Vec::with_capacity(count);
        for (number, (listeners, gate)) in listeners.into_iter().zip(gates).enumerate() {
            let (updates, steering) = (updates.subscribe(), steering.clone());
            let (room, watch, name) = (Arc::clone(&room), watch.clone(), format!("penstock-{number}"));
            let thread = std::thread::Builder::new().name(name.clone());
            let run = move || {
                let idle = Idle::new(room, number);
                watch.run(&name, || {
                    if let Err(error) = work(updates, &steering, idle, listeners, gate) {
                        watch.fail(&name, &format!("{error:#}"));
                    }
                });
            };
            workers.push(thread.spawn(run)?);
        }
        // What this thread starts later, at a reload, has none either.
        let _ = capability::keep(&[]);
        match given_up {
            Ok(()) => tracing::info!("{capabilities}; {user}"),
            Err(_) => tracing::warn!("{capabilities}; {user}"),
        }
        let tls = tls_address.map(tracing::field::display);
        let admin_address = admin.local_addr();
        tracing::info!(%address, tls, admin = %admin_address, workers = count, "penstock {}", env!("CARGO_PKG_VERSION"));
        Ok(Self {
            shared: updates,
            readiness,
            admin,
            workers,
            watch,
            beside: Mutex::new(Some(beside)),
            certificate,
            address,
            tls_address,
            ladder,
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

    pub fn steering(&self) -> Steering {
        self.ladder.steering()
    }

    /// What the kernel has proven.
    pub fn ladder(&self) -> &Ladder {
        &self.ladder
    }

    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.shared.borrow().metrics)
    }

    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// The configuration that holds now.
    pub fn config(&self) -> Config {
        self.shared.borrow().config.clone()
    }

    /// Requests that begin from now on are served under `config`; connections stay, and requests that run go on as they began.
    /// Refused as a whole where it changes what only a start can: nothing has changed then. Blocks on threads that end.
    pub fn reload(&self, config: Config) -> Result<(), ReloadError> {
        let before = Arc::clone(&self.shared.borrow());
        let outcome = self.reloaded(&before, config);
        before.metrics.reloaded(if outcome.is_ok() { "applied" } else { "refused" });
        outcome
    }

    fn reloaded(&self, before: &Shared, config: Config) -> Result<(), ReloadError> {
        let fixed = reload::needs_restart(&before.config, &config);
        if !fixed.is_empty() {
            return Err(ReloadError::NeedsRestart(fixed));
        }
        let shared = Arc::new(before.after(config).map_err(ReloadError::Pools)?);
        let mut running = self.beside.lock();
        // One after the other: both tell the same metrics of the same replicas.
        *running = None;
        let next = beside(&shared, self.certificate.as_ref(), None, &self.watch);
        self.shared.send_replace(shared);
        *running = Some(next.map_err(ReloadError::Beside)?);
        Ok(())
    }

    /// Not ready any more; connections are still accepted, and asked to end with the request that they carry.
    pub fn leave(&self) {
        self.readiness.draining();
        self.shared.borrow().leaving.cancel();
    }

    /// No new connections; what runs may finish.
    pub fn drain(&self) {
        self.leave();
        self.shared.borrow().draining.cancel();
    }

    /// Breaks off what still runs.
    pub fn force(&self) {
        self.drain();
        self.shared.borrow().force.cancel();
    }

    /// Every worker has ended.
    pub fn is_done(&self) -> bool {
        self.workers.iter().all(JoinHandle::is_finished)
    }

    /// A worker or another thread could not start or go on: the agent is unready and to be drained.
    pub fn has_failed(&self) -> bool {
        self.watch.has_failed()
    }

    /// Resolves when [`has_failed`](Self::has_failed) holds. Cancel-safe.
    pub async fn failed(&self) {
        self.watch.failed().await;
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
        *self.beside.lock() = None;
        self.exporter = None;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.force();
        self.join_workers();
    }
}

/// What there is around the workers.
struct Around {
    shared: Arc<Shared>,
    exporter: Option<Exporter>,
    certificate: Option<Arc<Certificate>>,
    beside: Beside,
}

impl Around {
    fn start(
        config: Config,
        metrics: Arc<Metrics>,
        readiness: &Readiness,
        own: Listeners,
        watch: &Watch,
    ) -> Result<Self> {
        let (telemetry, exporter) = Telemetry::start(&config.tracing, &metrics, watch)?.unzip();
        let shared = Shared::new(config, metrics, telemetry)?.listening(own);
        let shared = Arc::new(Shared { probe: watch.probe.clone(), ..shared });
        let certificate = shared.config.listen.tls.as_ref().map(Certificate::read).transpose()?;
        let beside = beside(&shared, certificate.as_ref(), Some(readiness), watch)?;
        Ok(Self { shared, exporter, certificate, beside })
    }
}

/// What this thread has kept, and all others will have; for the log and `/readyz?verbose`.
fn capabilities(given_up: &Result<(), CapsError>) -> String {
    let held = capability::held().join(", ");
    match given_up {
        Err(error) => format!("capabilities: cannot be given up: {error}; held: {held}"),
        Ok(()) if held.is_empty() => "capabilities: none kept".to_owned(),
        Ok(()) => format!("capabilities: kept {held}"),
    }
}

/// Starts what goes on beside requests: endpoints are followed and counted, the replicas of EPPs looked after, files read again.
/// Without `readiness`, nobody waits for it.
fn beside(
    shared: &Shared,
    certificate: Option<&Arc<Certificate>>,
    readiness: Option<&Readiness>,
    watch: &Watch,
) -> Result<Beside> {
    let counts = shared.endpoints.iter().cloned().map(|set| Box::new(move || set.states()) as _);
    shared.metrics.count_endpoints(counts);
    let discovery = Discovery::start(&shared.config, &shared.endpoints, &shared.metrics, readiness, watch)?;

    let dns = Dns::new(&shared.config.dns);
    let epps = shared.replicas.iter().enumerate().filter_map(|(pool, replicas)| Some((pool, replicas.clone()?)));
    let mut tasks: Vec<control::Task> =
        epps.map(|(pool, replicas)| tend(replicas, dns.clone(), Arc::clone(&shared.metrics), pool).boxed()).collect();
    tasks.extend(certificate.map(|certificate| Arc::clone(certificate).follow().boxed()));
    let control = Control::start(tasks, watch).context("the control thread")?;
    Ok(Beside { _discovery: discovery, _control: control })
}

/// A worker's thread.
fn work(
    updates: watch::Receiver<Arc<Shared>>,
    steering: &Steering,
    idle: Rc<Idle>,
    listeners: Vec<(std::net::TcpListener, Option<Acceptor>)>,
    gate: Gate,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let steering = steering.worker()?;
        let shared = Arc::clone(&updates.borrow());
        let worker = Worker::new(shared, steering);
        let listener = |(socket, tls)| Ok(Listener { socket: tokio::net::TcpListener::from_std(socket)?, tls });
        let listeners = listeners.into_iter().map(listener).collect::<io::Result<_>>()?;
        gate.open();
        site::serve(worker, listeners, idle, updates).await;
        Ok(())
    })
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
