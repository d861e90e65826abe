//! The state of one worker: the configuration, connections to endpoints, and channels to the EPPs. A request keeps the
//! state it began with and never moves to another worker.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use tokio::sync::{Notify, Semaphore};

use crate::{
    config::Config,
    endpoint::{http2::Http2Pool, pool::Http1Pool, timeouts::ConnectionTimeouts},
    http::head::HeadLimits,
    kernel::wire::Wire,
    picker::{client::EppClient, keep::Start, replica::Replicas},
    room::Idle,
    shared::Shared,
    steer::WorkerSteering,
    turns::Turns,
};

/// The most endpoints that a worker asks for their models at once.
const LISTS: usize = 64;

/// The state with which requests are served.
pub struct Worker {
    pub shared: Arc<Shared>,
    /// One per pool; None if the pool does not use an EPP.
    pub epps: Vec<Option<Rc<EppClient>>>,
    pub endpoints: Rc<Http1Pool>,
    /// With `steering.mode = "wire"`, if it is ready.
    pub wire: Option<Arc<Wire>>,
    /// For pools whose endpoints speak HTTP/2.
    pub http2_endpoints: Http2Pool,
    /// TLS handshakes with clients.
    pub handshakes: Rc<Turns>,
    /// Bounds the endpoints that are asked for their models at once.
    pub lists: Rc<Semaphore>,
}

impl Worker {
    /// Must be called on the worker's runtime. `starts` are the pools' gates that open once their EPP is connected.
    pub fn new(
        shared: Arc<Shared>,
        steering: Option<Rc<WorkerSteering>>,
        wire: Option<Arc<Wire>>,
        starts: Vec<Option<Start>>,
    ) -> Self {
        let config = &shared.config;
        let receive_buffer = config.steering.endpoint_receive_buffer;
        let endpoints = Http1Pool::new(steering, times(config), receive_buffer);
        let http2_endpoints = Http2Pool::new(times(config), HeadLimits::of(&config.limits));
        let epp = |(replicas, start): (&Option<Arc<Replicas>>, Option<Start>)| match replicas {
            Some(replicas) => Some(Rc::new(EppClient::connected(Arc::clone(replicas), start))),
            None => {
                // Kubernetes has taken the EPP away since the gate was made.
                if let Some(start) = start {
                    start.gate.open();
                }
                None
            }
        };
        let epps = shared.replicas.iter().zip(starts).map(epp).collect();
        let (handshakes, lists) = (Rc::default(), Rc::new(Semaphore::new(LISTS)));
        Self { epps, endpoints: Rc::new(endpoints), wire, http2_endpoints, handshakes, lists, shared }
    }

    /// The same worker under another configuration. Keeps its connections.
    pub fn after(&self, shared: Arc<Shared>) -> Self {
        let config = &shared.config;
        let (endpoints, http2_endpoints) = (Rc::clone(&self.endpoints), self.http2_endpoints.clone());
        endpoints.set_times(times(config));
        http2_endpoints.set(times(config), HeadLimits::of(&config.limits));
        let epp = |replicas: &Option<Arc<Replicas>>| {
            let replicas = replicas.as_ref()?;
            let kept = self.epps.iter().flatten().find(|epp| epp.asks(replicas));
            Some(kept.map_or_else(|| Rc::new(EppClient::connected(Arc::clone(replicas), None)), Rc::clone))
        };
        let epps: Vec<_> = shared.replicas.iter().map(epp).collect();
        let is_kept = |one: &Rc<EppClient>| epps.iter().flatten().any(|kept| Rc::ptr_eq(kept, one));
        self.epps.iter().flatten().filter(|one| !is_kept(one)).for_each(|one| one.retire());
        let wire = self.wire.clone();
        let (handshakes, lists) = (Rc::clone(&self.handshakes), Rc::clone(&self.lists));
        Self { epps, endpoints, wire, http2_endpoints, handshakes, lists, shared }
    }

    /// Closes connections that are no longer needed. Called about once a second.
    pub fn sweep(&self) {
        let is_dialled = |address| self.shared.is_dialled(address);
        self.endpoints.sweep(is_dialled);
        self.http2_endpoints.sweep(self.shared.config.timeouts.endpoint_keep_alive, is_dialled);
        if let Some(steering) = self.endpoints.steering() {
            self.shared.metrics.steer_events_missed(steering.take_missed_events());
        }
        if let Some(wire) = &self.wire {
            self.shared.metrics.steer_events_missed(wire.take_missed_events());
        }
    }
}

fn times(config: &Config) -> ConnectionTimeouts {
    let timeouts = &config.timeouts;
    ConnectionTimeouts {
        keep_alive: timeouts.endpoint_keep_alive,
        connect: timeouts.connect,
        unreachable: timeouts.endpoint_unreachable,
    }
}

/// The worker under the current configuration.
pub struct Current {
    worker: RefCell<Rc<Worker>>,
    replaced: Notify,
    /// The client connections of this worker that have no request.
    pub idle: Rc<Idle>,
}

impl Current {
    pub fn new(worker: Worker, idle: Rc<Idle>) -> Self {
        Self { worker: RefCell::new(Rc::new(worker)), replaced: Notify::new(), idle }
    }

    /// The state for a request that begins now. What lasts longer than a request does not hold it, because it keeps all that belongs
    /// to its configuration, such as connections to EPPs.
    pub fn worker(&self) -> Rc<Worker> {
        Rc::clone(&self.worker.borrow())
    }

    pub fn replace(&self, worker: Worker) {
        self.worker.replace(Rc::new(worker));
        self.replaced.notify_waiters();
    }

    /// Resolves at the next replacement after the first poll. Cancel-safe.
    pub async fn replaced(&self) {
        self.replaced.notified().await;
    }
}
