//! Starts the workers, each on a thread of its own.

use std::{
    io,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::sync::{mpsc, watch};

use crate::{
    config::{Config, FailureMode, Picker, Pool},
    panics::PanicWatch,
    picker::keep::Start,
    readiness::{Gate, Readiness},
    room::{Idle, Room},
    server::{self, Listener},
    shared::Shared,
    steer::SteeringSupport,
    worker::Worker,
};

/// What readiness waits for in one worker.
pub(super) struct WorkerGates {
    worker: Gate,
    /// One per pool; None if the pool's EPP does not hold back readiness.
    epps: Vec<Option<Start>>,
}

impl WorkerGates {
    /// The gates of `count` workers.
    pub(super) fn of(config: &Config, count: usize, readiness: &Readiness) -> Vec<Self> {
        let reported: Vec<_> = config.pools.iter().map(|_| Arc::new(AtomicBool::new(false))).collect();
        let epps = || config.pools.iter().zip(&reported).map(|(pool, reported)| epp_gate(pool, readiness, reported));
        let gates = |number| Self { worker: readiness.gate(format!("worker {number}")), epps: epps().collect() };
        (0..count).map(gates).collect()
    }
}

/// The gate of a pool that cannot serve a request without its EPP.
fn epp_gate(pool: &Pool, readiness: &Readiness, reported: &Arc<AtomicBool>) -> Option<Start> {
    let Picker::Epp(epp) = &pool.picker else { return None };
    let wait = epp.start_wait.filter(|_| pool.failure_mode == FailureMode::Closed)?;
    let gate = readiness.gate(format!("EPP of pool {}", pool.name));
    Some(Start { gate, wait, pool: pool.name.clone(), reported: Arc::clone(reported) })
}

/// The thread of a worker.
pub(super) struct WorkerThread {
    handle: JoinHandle<()>,
    /// Sends it sockets to accept from; `None` if it gets no more.
    listeners: Option<mpsc::UnboundedSender<Listener>>,
    pulse: Arc<Pulse>,
}

impl WorkerThread {
    /// Has it accept from these sockets, too.
    pub(super) fn accept_from(&self, listeners: Vec<Listener>) {
        let Some(sender) = &self.listeners else { return };
        // A worker that has failed has no use for them.
        listeners.into_iter().for_each(|listener| drop(sender.send(listener)));
    }

    /// Gives it no more sockets: it ends after its last connection.
    #[must_use]
    pub(super) fn retire(self) -> Self {
        Self { listeners: None, ..self }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// How long the thread has not come round to its own work.
    pub(super) fn silence(&self) -> Duration {
        if self.is_finished() { Duration::ZERO } else { self.pulse.age() }
    }

    pub(super) fn join(self) {
        // A worker's panic has been logged already.
        let _ = self.handle.join();
    }
}

/// When a worker last came round to its own work.
struct Pulse {
    start: Instant,
    last_ms: AtomicU64,
}

impl Pulse {
    fn new() -> Arc<Self> {
        Arc::new(Self { start: Instant::now(), last_ms: AtomicU64::new(0) })
    }

    fn beat(&self) {
        self.last_ms.store(self.start.elapsed().as_millis() as u64, Relaxed);
    }

    fn age(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.last_ms.load(Relaxed)))
    }
}

/// Starts workers.
pub(super) struct Spawner {
    pub updates: watch::Receiver<Arc<Shared>>,
    pub steering: SteeringSupport,
    pub room: Arc<Room>,
    pub watch: PanicWatch,
    /// The number of the next one.
    pub next: usize,
}

impl Spawner {
    /// Starts a worker without sockets, for which readiness waits. The agent fails if the worker does.
    pub(super) fn start(&mut self, gates: WorkerGates) -> io::Result<WorkerThread> {
        self.spawn(Some(gates), None)
    }

    /// Starts a worker without sockets, and waits until it runs. The agent goes on if it does not.
    pub(super) fn start_later(&mut self) -> Result<WorkerThread> {
        let (tell, told) = std::sync::mpsc::channel();
        let worker = self.spawn(None, Some(tell)).context("cannot start a worker")?;
        told.recv().context("a worker has ended")?.context("cannot start a worker")?;
        Ok(worker)
    }

    fn spawn(&mut self, gates: Option<WorkerGates>, tell: Option<Tell>) -> io::Result<WorkerThread> {
        let name = format!("penstock-{}", self.next);
        let (updates, steering, room) = (self.updates.clone(), self.steering.clone(), Arc::clone(&self.room));
        let (watch, thread) = (self.watch.clone(), std::thread::Builder::new().name(name.clone()));
        let (listeners, received) = mpsc::unbounded_channel();
        let pulse = Pulse::new();
        let beating = Arc::clone(&pulse);
        let handle = thread.spawn(move || {
            let idle = Idle::new(room);
            watch.run(&name, || {
                let begun = || drop(tell.as_ref().map(|tell| tell.send(Ok(()))));
                let work = work(updates, &steering, idle, received, gates, begun, || beating.beat());
                match (work, &tell) {
                    (Ok(()), _) => {}
                    (Err(error), Some(tell)) => drop(tell.send(Err(error))),
                    (Err(error), None) => watch.fail(&name, &format!("{error:#}")),
                }
            });
        })?;
        self.next += 1;
        Ok(WorkerThread { handle, listeners: Some(listeners), pulse })
    }
}

/// Where a worker says whether it runs.
type Tell = std::sync::mpsc::Sender<Result<()>>;

/// Runs a worker on the current thread until it has drained. Fails before `begun` is called, if at all.
fn work(
    updates: watch::Receiver<Arc<Shared>>,
    steering: &SteeringSupport,
    idle: Rc<Idle>,
    listeners: mpsc::UnboundedReceiver<Listener>,
    gates: Option<WorkerGates>,
    begun: impl FnOnce(),
    pulse: impl Fn(),
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (steering, wire) = (steering.worker()?, steering.wire());
        let shared = Arc::clone(&updates.borrow());
        let (gate, epps) = gates.map(|gates| (gates.worker, gates.epps)).unzip();
        let epps = epps.unwrap_or_else(|| shared.replicas.iter().map(|_| None).collect());
        let worker = Worker::new(shared, steering, wire, epps);
        if let Some(gate) = gate {
            gate.open();
        }
        begun();
        server::serve(worker, listeners, idle, updates, pulse).await;
        Ok(())
    })
}
