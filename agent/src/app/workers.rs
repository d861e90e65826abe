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

use anyhow::Result;
use tokio::sync::{mpsc, watch};

use crate::{
    config::{Config, FailureMode, Picker, Pool},
    live::Live,
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
    /// The sockets that it accepts from.
    pub listeners: mpsc::UnboundedSender<Listener>,
    pulse: Arc<Pulse>,
}

impl WorkerThread {
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

/// Starts a worker for each of `gates`. They have no sockets yet.
pub(super) fn start(
    gates: Vec<WorkerGates>,
    live: &Live,
    steering: &SteeringSupport,
    room: &Arc<Room>,
    watch: &PanicWatch,
) -> io::Result<Vec<WorkerThread>> {
    let start = |(number, gates)| {
        let (updates, steering) = (live.updates(), steering.clone());
        let (room, watch, name) = (Arc::clone(room), watch.clone(), format!("penstock-{number}"));
        let thread = std::thread::Builder::new().name(name.clone());
        let (listeners, received) = mpsc::unbounded_channel();
        let pulse = Pulse::new();
        let beating = Arc::clone(&pulse);
        let handle = thread.spawn(move || {
            let idle = Idle::new(room, number);
            watch.run(&name, || {
                if let Err(error) = work(updates, &steering, idle, received, gates, || beating.beat()) {
                    watch.fail(&name, &format!("{error:#}"));
                }
            });
        })?;
        Ok(WorkerThread { handle, listeners, pulse })
    };
    gates.into_iter().enumerate().map(start).collect()
}

/// Runs a worker on the current thread until it has drained.
fn work(
    updates: watch::Receiver<Arc<Shared>>,
    steering: &SteeringSupport,
    idle: Rc<Idle>,
    listeners: mpsc::UnboundedReceiver<Listener>,
    gates: WorkerGates,
    pulse: impl Fn(),
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (steering, wire) = (steering.worker()?, steering.wire());
        let shared = Arc::clone(&updates.borrow());
        let worker = Worker::new(shared, steering, wire, gates.epps);
        gates.worker.open();
        server::serve(worker, listeners, idle, updates, pulse).await;
        Ok(())
    })
}
