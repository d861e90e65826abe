//! Starts the workers, each on a thread of its own.

use std::{
    io,
    rc::Rc,
    sync::{Arc, atomic::AtomicBool},
    thread::JoinHandle,
};

use anyhow::Result;
use tokio::sync::watch;

use super::sockets::WorkerListener;
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

/// Starts a worker for each of `listeners`.
pub(super) fn start(
    listeners: Vec<Vec<WorkerListener>>,
    gates: Vec<WorkerGates>,
    live: &Live,
    steering: &SteeringSupport,
    room: &Arc<Room>,
    watch: &PanicWatch,
) -> io::Result<Vec<JoinHandle<()>>> {
    let start = |(number, (listeners, gates))| {
        let (updates, steering) = (live.updates(), steering.clone());
        let (room, watch, name) = (Arc::clone(room), watch.clone(), format!("penstock-{number}"));
        let thread = std::thread::Builder::new().name(name.clone());
        thread.spawn(move || {
            let idle = Idle::new(room, number);
            watch.run(&name, || {
                if let Err(error) = work(updates, &steering, idle, listeners, gates) {
                    watch.fail(&name, &format!("{error:#}"));
                }
            });
        })
    };
    listeners.into_iter().zip(gates).enumerate().map(start).collect()
}

/// Runs a worker on the current thread until it has drained.
fn work(
    updates: watch::Receiver<Arc<Shared>>,
    steering: &SteeringSupport,
    idle: Rc<Idle>,
    listeners: Vec<WorkerListener>,
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
