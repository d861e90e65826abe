//! Starts, reloads and stops the whole agent.
//!
//! Takes a validated configuration and returns a running [`Agent`]. Everything that can fail at start fails in
//! [`Agent::start`], before a request is accepted. Workers, the admin server and the kernel events run on their own
//! threads. An agent that takes over from another one starts without accepting, by [`Agent::start_waiting`].

mod listening;
mod outlive;
mod sockets;
mod workers;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use caps::errors::CapsError;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use self::{
    listening::{Listening, worker_count},
    sockets::Sockets,
    workers::{Spawner, WorkerGates, WorkerThread},
};
use crate::{
    admin::{self, AdminHandle, Inside},
    capability,
    config::{Config, Limits},
    inference_pools::{self, DiscoveryGates, Known, Wanted},
    kubernetes::{self, KubernetesDiscovery},
    ladder::Ladder,
    listeners::Listeners,
    live::Live,
    metrics::Metrics,
    panics::PanicWatch,
    probe::Probe,
    readiness::Readiness,
    reload::ReloadError,
    reserve,
    room::Room,
    shared::{Shared, names},
    steer::SteeringSupport,
    takeover::{Inherited, Loan, Passed, Role},
    telemetry::{Exporter, Telemetry},
    tls::Certificate,
};

/// A running agent. Dropping it aborts running requests.
pub struct Agent {
    live: Arc<Live>,
    /// None without a Gateway or pools that are InferencePools.
    kubernetes: Mutex<Option<KubernetesDiscovery>>,
    readiness: Readiness,
    admin: AdminHandle,
    /// The service manager has the admin socket, too.
    admin_held: bool,
    listening: Mutex<Listening>,
    room: Arc<Room>,
    /// Held during a reload.
    reloading: Mutex<()>,
    /// Cancelled when the admin port is asked to drain.
    stop: CancellationToken,
    /// What the sockets that this agent took over from another one are for.
    taken: Vec<Role>,
    /// Keeps adopted flows.
    keeper: Option<JoinHandle<()>>,
    watch: PanicWatch,
    ladder: Ladder,
    /// Flows of path `wire` are left to the next agent at the stop.
    leaves: bool,
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
        let agent = Self::start_waiting(file, probe, Inherited::default())?;
        agent.accept()?;
        Ok(agent)
    }

    /// Starts the agent with these sockets, without accepting from them; [`accept`](Self::accept) begins to.
    pub(crate) fn start_waiting(file: Config, probe: Probe, mut inherited: Inherited) -> Result<Self> {
        let known = kubernetes::last_known(&file);
        let config = inference_pools::merged(&file, &known);
        let count = worker_count(&config.listen);
        reserve::raise_limit();
        let metrics = Metrics::new(&names(&config));
        let readiness = Readiness::new();
        let watch = PanicWatch::new(&readiness, probe);
        let gates = WorkerGates::of(&config, count, &readiness);

        let mut ladder = Ladder::climb(&config.steering);
        let leaves = outlive::leaves(&ladder, &config.steering);
        let keeper = outlive::adopt(&mut ladder, leaves);
        ladder.announce(&metrics);
        let (admin, admin_held) = sockets::open_admin(config.admin.address, &mut inherited)?;
        let mut sockets = Sockets::open(&config.listen, count, &mut inherited)?;
        let taken = inherited.used();
        let own = sockets.own(&admin)?;

        // Everything is loaded and bound. From here on only the workers, and this thread until it has started them,
        // keep capabilities.
        if ladder.forces_buffers {
            sockets.set_send_buffer(config.steering.client_send_buffer)?;
        }
        let privileges = Privileges::drop();
        let services = capability::with(&[], || Services::start(file, known, metrics, &readiness, own, &watch))?;
        let Services { live, kubernetes, exporter, certificate } = services;
        let shared = live.shared();
        let room = Room::new(config.listen.max_connections);
        shared.metrics.set_connections_limit(config.listen.max_connections);
        let status = ladder.lines().into_iter().chain(no_spill(&config.limits)).chain(privileges.lines()).collect();
        let steering = ladder.steering();
        let stop = CancellationToken::new();
        let inside = Inside::new(live.updates(), steering.wire().map(|wire| wire.flows()), stop.clone());
        let admin = capability::with(&[], || start_admin(admin, &live, &readiness, &room, status, inside, &watch))?;

        supervise(&steering, &mut sockets, &shared.metrics, &watch)?;
        if let Some(certificate) = certificate {
            let http2 = config.listen.http2_max_streams > 0;
            sockets.secure(certificate.acceptor(http2, config.listen.tls_handshakes)?);
        }
        let updates = live.updates();
        let mut spawner = Spawner { updates, steering, room: Arc::clone(&room), watch: watch.clone(), next: 0 };
        let workers = gates.into_iter().map(|gates| spawner.start(gates)).collect::<io::Result<_>>()?;
        let listening = Listening::new(sockets, workers, spawner, !ladder.forces_buffers);
        let keeper = keeper.map(|keeper| outlive::keep(keeper, live.updates(), watch.clone())).transpose()?;
        // Threads that this one starts at a later reload have no capabilities either.
        let _ = capability::keep(&[]);
        privileges.log();
        Ok(Self {
            live,
            kubernetes: Mutex::new(kubernetes),
            readiness,
            admin,
            admin_held,
            listening: Mutex::new(listening),
            room,
            reloading: Mutex::default(),
            stop,
            taken,
            keeper,
            watch,
            ladder,
            leaves,
            exporter,
        })
    }

    /// Begins to accept connections.
    pub(crate) fn accept(&self) -> Result<()> {
        let mut listening = self.listening.lock();
        listening.accept().context("cannot listen")?;
        self.admin.accept();
        let (address, workers, admin) = (listening.address(), listening.workers(), self.admin.local_addr());
        let tls = listening.tls_address().map(tracing::field::display);
        tracing::info!(%address, tls, %admin, workers, "penstock {}", env!("CARGO_PKG_VERSION"));
        Ok(())
    }

    /// Duplicates of the listening sockets, for the agent after this one.
    pub(crate) fn passed(&self) -> io::Result<(Vec<Passed>, Loan)> {
        let (mut passed, loan) = self.listening.lock().passed()?;
        let admin = self.admin.socket()?.map(|socket| Passed { role: Role::Admin, held: self.admin_held, socket });
        passed.extend(admin);
        Ok((passed, loan))
    }

    /// What the sockets are for that were taken over from the agent before this one.
    pub(crate) fn taken(&self) -> &[Role] {
        &self.taken
    }

    /// Leaves the sockets of `roles` to the agent after this one: accepts no more connections from them, and does not close them.
    pub(crate) fn hand_over(&self, roles: &[Role]) {
        self.listening.lock().release(roles);
        if roles.contains(&Role::Admin) {
            self.admin.release();
        }
    }

    /// The longest time that a worker has not come round to its own work, which it does every second.
    pub(crate) fn silence(&self) -> Duration {
        self.listening.lock().silence()
    }

    /// The address of the plain listener, with the port that was bound.
    pub fn address(&self) -> SocketAddr {
        self.listening.lock().address()
    }

    /// The address of the TLS listener, if there is one.
    pub fn tls_address(&self) -> Option<SocketAddr> {
        self.listening.lock().tls_address()
    }

    /// The address of the admin listener, with the port that was bound.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.local_addr()
    }

    /// What the self-test has proven about the kernel.
    pub fn ladder(&self) -> &Ladder {
        &self.ladder
    }

    /// The metrics that `/metrics` shows, of all workers.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.live.shared().metrics)
    }

    /// What `/readyz` answers from.
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
        let _alone = self.reloading.lock();
        let outcome = self.apply(config);
        self.metrics().reloaded(if outcome.is_ok() { "applied" } else { "refused" });
        outcome
    }

    fn apply(&self, config: Config) -> Result<(), ReloadError> {
        let (wanted, limit) = (Wanted::of(&config), config.listen.max_connections);
        let has_gateway = config.kubernetes.gateway.is_some();
        self.live.needs_restart(&config)?;
        // Bound first, because the configuration is not known to work before. No lock is held while it changes, which may take long.
        let change = self.listening.lock().prepare(&config.listen).map_err(ReloadError::Listen)?;
        let own = Sockets::own_after(&change, self.admin.local_addr());
        let before = (self.live.file(), self.live.shared().own.clone());
        self.live.reload(config, own)?;
        let applied = self.listening.lock().apply(change);
        if let Err(error) = applied {
            let (config, own) = before;
            self.live.reload(config, own)?;
            return Err(ReloadError::Listen(error));
        }
        self.room.set_limit(limit);
        self.metrics().set_connections_limit(limit);
        self.follow(wanted, has_gateway)
    }

    /// Has the discovery watch what the configuration names.
    fn follow(&self, wanted: Wanted, has_gateway: bool) -> Result<(), ReloadError> {
        let mut kubernetes = self.kubernetes.lock();
        match &*kubernetes {
            Some(running) => running.follow(wanted),
            None if wanted.is_empty() && !has_gateway => {}
            None => {
                let started = KubernetesDiscovery::start(&self.live, wanted, DiscoveryGates::default(), &self.watch);
                *kubernetes = Some(started.map_err(ReloadError::Background)?);
            }
        }
        Ok(())
    }

    /// Resolves when the admin port has been asked to drain and end the agent. Cancel-safe.
    pub(crate) async fn told_to_stop(&self) {
        self.stop.cancelled().await;
    }

    /// Makes the agent unready. It still accepts connections, and asks each of them to end after its current request.
    pub fn leave(&self) {
        self.readiness.draining();
        self.live.shared().leaving.cancel();
    }

    /// Stops accepting connections; running requests may finish.
    pub fn drain(&self) {
        self.leave();
        self.listening.lock().close();
        self.live.shared().draining.cancel();
        if let Some(wire) = self.ladder.steering().wire().filter(|_| self.leaves) {
            wire.leave();
        }
    }

    /// Aborts running requests.
    pub fn force(&self) {
        self.drain();
        self.live.shared().force.cancel();
    }

    /// Whether every worker has ended.
    pub fn is_done(&self) -> bool {
        self.listening.lock().is_done() && self.keeper.as_ref().is_none_or(JoinHandle::is_finished)
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
        let workers = self.listening.lock().take_workers();
        workers.into_iter().for_each(WorkerThread::join);
        if let Some(keeper) = self.keeper.take() {
            // Its panic has been logged already.
            let _ = keeper.join();
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
    kubernetes: Option<KubernetesDiscovery>,
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
        watch: &PanicWatch,
    ) -> Result<Self> {
        let config = inference_pools::merged(&file, &known);
        let (telemetry, exporter) = Telemetry::start(&config.tracing, &metrics, watch)?.unzip();
        let shared = Shared::new(config, metrics, telemetry)?.listening(own);
        let shared = Arc::new(Shared { probe: watch.probe.clone(), ..shared });
        let certificate = shared.config.listen.tls.as_ref().map(Certificate::read).transpose()?;
        let wanted = Wanted::of(&file);
        let gateway = file.kubernetes.gateway.clone();
        let is_used = !wanted.is_empty() || gateway.is_some();
        let gates = DiscoveryGates {
            pools: wanted.pools.iter().map(|pool| readiness.gate(format!("InferencePool {pool}"))).collect(),
            sections: wanted
                .sections
                .iter()
                .map(|section| readiness.gate(format!("InferencePools {section}")))
                .collect(),
            gateway: gateway.map(|gateway| readiness.gate(format!("Gateway {gateway}"))),
        };
        let live = Live::start(shared, file, known, certificate.clone(), readiness, watch)?;
        let kubernetes = is_used.then(|| KubernetesDiscovery::start(&live, wanted, gates, watch)).transpose()?;
        Ok(Self { live, kubernetes, exporter, certificate })
    }
}

/// Starts the admin server. `status` are lines of `/readyz?verbose`.
fn start_admin(
    listener: TcpListener,
    live: &Live,
    readiness: &Readiness,
    room: &Arc<Room>,
    status: Vec<String>,
    inside: Inside,
    watch: &PanicWatch,
) -> Result<AdminHandle> {
    let room = Arc::clone(room);
    let verbose = move || status.iter().cloned().chain([room.describe()]).collect();
    let metrics = Arc::clone(&live.shared().metrics);
    let admin = admin::start(listener, metrics, readiness.clone(), verbose, inside, watch);
    admin.context("cannot start the admin server")
}

/// Lets `watch` see the threads that steering has started and `metrics` its slots, and prepares the sockets for steered connections.
fn supervise(
    steering: &SteeringSupport,
    sockets: &mut Sockets,
    metrics: &Metrics,
    watch: &PanicWatch,
) -> io::Result<()> {
    if let SteeringSupport::Active(kernel) = steering {
        kernel.events().watch(watch.clone());
        let slots = Arc::downgrade(kernel.slots());
        metrics.count_slots(move || slots.upgrade().map(|slots| slots.in_use()).unwrap_or_default());
        sockets.keep_account()?;
    }
    if let Some(wire) = steering.wire() {
        wire.supervise(watch.clone());
    }
    Ok(())
}

/// The capabilities that the agent has kept, and its user.
struct Privileges {
    dropped: Result<(), CapsError>,
    capabilities: String,
    user: String,
}

impl Privileges {
    /// Drops what no thread needs from here on.
    fn drop() -> Self {
        let dropped = capability::keep(&[]);
        Self { capabilities: capabilities(&dropped), user: capability::user(), dropped }
    }

    fn lines(&self) -> [String; 2] {
        [self.capabilities.clone(), self.user.clone()]
    }

    fn log(&self) {
        let Self { capabilities, user, .. } = self;
        match self.dropped {
            Ok(()) => tracing::info!("{capabilities}; {user}"),
            Err(_) => tracing::warn!("{capabilities}; {user}"),
        }
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

/// Why large request bodies cannot be stored, if they cannot. It is logged, too.
fn no_spill(limits: &Limits) -> Option<String> {
    let error = (limits.total_spill_bytes > 0).then(tempfile::tempfile)?.err()?;
    let (folder, kept) = (std::env::temp_dir(), limits.body_memory_bytes);
    let folder = folder.display();
    tracing::warn!(%folder, %error, "no file can be made for request bodies: those of more than limits.body_memory_bytes get 500");
    Some(format!("bodies of more than {kept} bytes: failing, {folder}: {error}"))
}
