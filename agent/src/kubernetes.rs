//! Follows the pools with `inference_pool`, and a Gateway with its routes, through the Kubernetes API, on a thread of its own, and tells
//! [`Live`] what they are.
//!
//! `query` says what is asked, `watch` keeps a `store` of `objects` up to date, `follow` combines those of one pool, `translate` says
//! what they mean, and `state` keeps that in a file. `gateway` follows the Gateway. Whatever fails, the last known state stays in force.

mod access;
mod aimed;
mod client;
mod failure;
mod follow;
mod gateway;
mod objects;
mod query;
mod state;
mod store;
mod translate;
mod watch;

use std::{
    collections::BTreeMap, convert::Infallible, path::PathBuf, pin::pin, sync::Arc, thread::JoinHandle, time::Duration,
};

use anyhow::{Context as _, Result};
use kube::Client;
use tokio::{
    sync::{mpsc, oneshot, watch as channel},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

pub use access::try_pools;

use self::{follow::Follower, gateway::GatewayFollower};
use crate::{
    config::{self, Config, GatewayRef, InferencePoolRef},
    gateway::{GatewayObjects, KnownGateway},
    inference_pools::{self, DiscoveryGates, InferencePool, Known, KnownPools},
    live::Live,
    panics::PanicWatch,
    readiness::Gate,
};

const THREAD: &str = "kubernetes";
/// Pause before the credentials are read again.
const CREDENTIALS_RETRY: Duration = Duration::from_secs(2);
/// Pools whose state waits to be applied.
const QUEUE: usize = 16;
/// How long routes wait until the pools that they refer to have been read.
const POOLS_WAIT: Duration = Duration::from_secs(5);

/// The running discovery. Dropping it ends its tasks and joins the thread.
pub struct KubernetesDiscovery {
    followed: channel::Sender<Vec<InferencePoolRef>>,
    running: Option<KubernetesThread>,
}

struct KubernetesThread {
    /// The thread stops when this sender is dropped.
    stop: oneshot::Sender<Infallible>,
    thread: JoinHandle<()>,
}

impl KubernetesDiscovery {
    /// Follows `pools` and the Gateway of the configuration. Each gate belongs to the pool at its index and opens when the pool has
    /// been read.
    pub fn start(
        live: &Arc<Live>,
        pools: Vec<InferencePoolRef>,
        gates: DiscoveryGates,
        watch: &PanicWatch,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let DiscoveryGates { pools: gates, gateway } = gates;
        let gates = pools.iter().cloned().zip(gates).collect();
        let (followed, changes) = channel::channel(pools);
        let discovery = DiscoveryTask::new(live, gates, gateway);
        let work = move || {
            runtime.block_on(async {
                tokio::select! {
                    never = discovery.run(changes) => match never {},
                    _ = stopped => {}
                }
            });
            // Does not wait for a disk that hangs.
            runtime.shutdown_background();
        };
        let watch = watch.clone();
        let thread = std::thread::Builder::new().name(THREAD.to_owned()).spawn(move || watch.run(THREAD, work));
        let thread = thread.context("cannot start the thread of the Kubernetes discovery")?;
        Ok(Self { followed, running: Some(KubernetesThread { stop, thread }) })
    }

    /// Follows these pools instead. Pools that stay are not read again.
    pub fn follow(&self, pools: Vec<InferencePoolRef>) {
        self.followed.send_replace(pools);
    }
}

impl Drop for KubernetesDiscovery {
    fn drop(&mut self) {
        if let Some(KubernetesThread { stop, thread }) = self.running.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

/// What is known about the pools and the Gateway of the configuration from an earlier run.
pub fn last_known(config: &Config) -> Known {
    let (named, gateway) = (inference_pools::named(config), config.kubernetes.gateway.as_ref());
    let is_used = !named.is_empty() || gateway.is_some();
    let Some(folder) = config.kubernetes.state_dir.as_ref().filter(|_| is_used) else {
        return Known::default();
    };
    match state::load(folder, gateway) {
        Ok(Known { pools, gateway }) => {
            let used = inference_pools::used(config, gateway.as_ref());
            Known { pools: pools.into_iter().filter(|(pool, _)| used.contains(pool)).collect(), gateway }
        }
        Err(error) => {
            tracing::warn!(%error, "the last known state of the pools cannot be used");
            Known::default()
        }
    }
}

struct DiscoveryTask {
    live: Arc<Live>,
    settings: config::Kubernetes,
    /// Of the pools that have not been read.
    gates: BTreeMap<InferencePoolRef, Gate>,
    /// None once the routes and their pools have been read.
    gateway_gate: Option<Gate>,
    /// What was read of each followed pool. A reload may drop a pool and another one bring it back meanwhile.
    read: KnownPools,
    /// Routes that wait until their pools have been read.
    pending: Option<PendingGateway>,
    /// The pools to which the routes in force refer.
    referred: Vec<InferencePoolRef>,
    saver: Option<Saver>,
}

/// A Gateway that was read, and is not in force yet.
struct PendingGateway {
    gateway: KnownGateway,
    until: Instant,
}

/// The tasks that follow objects.
#[derive(Default)]
struct Followers {
    pools: BTreeMap<InferencePoolRef, AbortOnDropHandle<()>>,
    gateway: Option<AbortOnDropHandle<()>>,
}

impl DiscoveryTask {
    fn new(live: &Arc<Live>, gates: BTreeMap<InferencePoolRef, Gate>, gateway_gate: Option<Gate>) -> Self {
        let referred = live.known().gateway.map(|gateway| gateway.meaning.pools).unwrap_or_default();
        Self {
            live: Arc::clone(live),
            settings: live.file().kubernetes,
            gates,
            gateway_gate,
            read: KnownPools::new(),
            pending: None,
            referred,
            saver: None,
        }
    }

    async fn run(mut self, mut pools: channel::Receiver<Vec<InferencePoolRef>>) -> Infallible {
        let gateway = self.settings.gateway.clone();
        self.saver = self.settings.state_dir.clone().map(|folder| Saver::start(folder, gateway));
        let (sender, mut results) = mpsc::channel(QUEUE);
        let (gateway_sender, mut gateways) = mpsc::channel(1);
        let mut followers = Followers::default();
        let mut connecting = pin!(connected(self.settings.clone()));
        let mut client: Option<Client> = None;
        let mut patience = pin!(sleep(self.settings.start_wait.unwrap_or_default()));
        let mut is_patient = true;
        loop {
            let wanted = self.wanted(&pools.borrow());
            if let Some(client) = &client {
                self.update(client, &wanted, &mut followers.pools, &sender);
                self.follow_gateway(client, &mut followers.gateway, &gateway_sender);
            }
            let until = self.pending.as_ref().map(|pending| pending.until);
            tokio::select! {
                connected = &mut connecting, if client.is_none() => client = Some(connected),
                () = &mut patience, if is_patient => {
                    is_patient = false;
                    self.open_known();
                }
                Some((named, pool)) = results.recv() => {
                    if wanted.contains(&named) {
                        self.apply(&named, pool);
                    }
                }
                Some(objects) = gateways.recv() => self.gateway_read(objects),
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => self.apply_gateway(),
                // Cannot fail, because the sender outlives the thread.
                _ = pools.changed() => {
                    let file = pools.borrow().clone();
                    self.wanted_changed(&file);
                }
            }
        }
    }

    /// The pools that the file names, and those to which routes refer.
    fn wanted(&self, file: &[InferencePoolRef]) -> Vec<InferencePoolRef> {
        let pending = self.pending.iter().flat_map(|pending| &pending.gateway.meaning.pools);
        let mut wanted: Vec<_> = file.iter().chain(&self.referred).chain(pending).cloned().collect();
        wanted.sort();
        wanted.dedup();
        wanted
    }

    /// Another configuration of the file is in force, which names these pools.
    fn wanted_changed(&mut self, file: &[InferencePoolRef]) {
        let wanted = self.wanted(file);
        self.read.retain(|named, _| wanted.contains(named));
        for (named, pool) in self.read.clone() {
            self.put(&named, pool);
        }
        let (gates, not_wanted) =
            std::mem::take(&mut self.gates).into_iter().partition(|(named, _)| wanted.contains(named));
        self.gates = gates;
        BTreeMap::into_values(not_wanted).for_each(Gate::open);
    }

    /// Begins to follow the pools that are new, and ends following those that are not wanted any more.
    fn update(
        &mut self,
        client: &Client,
        wanted: &[InferencePoolRef],
        followers: &mut BTreeMap<InferencePoolRef, AbortOnDropHandle<()>>,
        results: &mpsc::Sender<(InferencePoolRef, InferencePool)>,
    ) {
        followers.retain(|named, _| wanted.contains(named));
        self.read.retain(|named, _| wanted.contains(named));
        for named in wanted {
            followers.entry(named.clone()).or_insert_with(|| {
                let metrics = Arc::clone(&self.live.shared().metrics);
                let follower = Follower::new(client.clone(), named.clone(), metrics, &self.settings);
                let results = results.clone();
                AbortOnDropHandle::new(tokio::spawn(async move { match follower.keep_running(results).await {} }))
            });
        }
    }

    fn follow_gateway(
        &self,
        client: &Client,
        follower: &mut Option<AbortOnDropHandle<()>>,
        results: &mpsc::Sender<GatewayObjects>,
    ) {
        if follower.is_none()
            && let Some(named) = self.settings.gateway.clone()
        {
            let metrics = Arc::clone(&self.live.shared().metrics);
            let gateway = GatewayFollower::new(client.clone(), named, metrics, &self.settings);
            let results = results.clone();
            let task = tokio::spawn(async move { match gateway.keep_running(results).await {} });
            *follower = Some(AbortOnDropHandle::new(task));
        }
    }

    fn apply(&mut self, named: &InferencePoolRef, pool: InferencePool) {
        match &pool {
            InferencePool::Absent => tracing::warn!(inference_pool = %named, "the InferencePool does not exist"),
            InferencePool::Invalid(why) => tracing::warn!(inference_pool = %named, why, "the InferencePool is invalid"),
            InferencePool::Usable(_) => {}
        }
        self.read.insert(named.clone(), pool.clone());
        if self.put(named, pool)
            && let Some(gate) = self.gates.remove(named)
        {
            gate.open();
        }
        if self.pending.as_ref().is_some_and(|pending| self.has_read(&pending.gateway.meaning.pools)) {
            self.apply_gateway();
        }
        self.open_gateway_gate();
        self.save();
    }

    /// Puts the state of a pool in force. Returns false if that is not possible.
    fn put(&self, named: &InferencePoolRef, pool: InferencePool) -> bool {
        let outcome = self.live.discovered(named, pool);
        if let Err(error) = &outcome {
            tracing::error!(inference_pool = %named, %error, "the InferencePool cannot be applied, keeping the previous state");
        }
        outcome.is_ok()
    }

    /// The routes that these objects mean are put in force as soon as their pools have been read, so that no request finds a pool
    /// that is not known yet.
    fn gateway_read(&mut self, objects: GatewayObjects) {
        let Some(named) = &self.settings.gateway else { return };
        if objects.gateway.is_none() {
            tracing::warn!(gateway = %named, "the Gateway does not exist");
        }
        let gateway = KnownGateway::new(named, objects);
        if gateway.meaning.left_out > 0 {
            let left_out = gateway.meaning.left_out;
            tracing::error!(gateway = %named, left_out, "too many routes, leaving out those of the least precedence");
        }
        let is_whole = self.has_read(&gateway.meaning.pools);
        let until = self.pending.as_ref().map_or_else(|| Instant::now() + POOLS_WAIT, |pending| pending.until);
        self.pending = Some(PendingGateway { gateway, until });
        if is_whole {
            self.apply_gateway();
        }
    }

    fn has_read(&self, pools: &[InferencePoolRef]) -> bool {
        pools.iter().all(|pool| self.read.contains_key(pool))
    }

    /// Puts the routes that wait in force.
    fn apply_gateway(&mut self) {
        let (Some(PendingGateway { gateway, .. }), Some(named)) = (self.pending.take(), &self.settings.gateway) else {
            return;
        };
        let pools = gateway.meaning.pools.clone();
        let known = self.read.iter().filter(|(pool, _)| pools.contains(pool));
        let known = known.map(|(pool, known)| (pool.clone(), known.clone())).collect();
        let routes = gateway.meaning.routes.len();
        match self.live.routes_discovered(gateway, &known) {
            Ok(()) => {
                tracing::info!(gateway = %named, routes, pools = pools.len(), "routes updated");
                self.referred = pools;
            }
            Err(error) => {
                tracing::error!(gateway = %named, %error, "the routes cannot be applied, keeping the previous ones");
            }
        }
        self.open_gateway_gate();
        self.save();
    }

    fn open_gateway_gate(&mut self) {
        let is_in_force = self.pending.is_none() && self.live.known().gateway.is_some();
        if is_in_force
            && self.has_read(&self.referred)
            && let Some(gate) = self.gateway_gate.take()
        {
            gate.open();
        }
    }

    fn save(&self) {
        if let Some(saver) = &self.saver {
            saver.save(self.live.known());
        }
    }

    /// Opens the gates of what is known from an earlier run.
    fn open_known(&mut self) {
        let known = self.live.known();
        let (open, closed) =
            std::mem::take(&mut self.gates).into_iter().partition(|(named, _)| known.pools.contains_key(named));
        self.gates = closed;
        let open: BTreeMap<InferencePoolRef, Gate> = open;
        for (named, gate) in open {
            tracing::warn!(inference_pool = %named, "not read in the start time, counting as ready with the last known state");
            gate.open();
        }
        if known.gateway.is_some()
            && let Some(gate) = self.gateway_gate.take()
        {
            tracing::warn!("Gateway not read in the start time, counting as ready with the last known state");
            gate.open();
        }
    }
}

/// Reads the credentials until that succeeds.
async fn connected(settings: config::Kubernetes) -> Client {
    let mut last = String::new();
    loop {
        match client::client(&settings).await {
            Ok(client) => return client,
            Err(error) => {
                let error = format!("{error:#}");
                if error != last {
                    tracing::error!(error, "no access to the Kubernetes API");
                }
                last = error;
            }
        }
        sleep(CREDENTIALS_RETRY).await;
    }
}

/// Writes the state to the disk, apart from everything that must not wait for the disk. States in between may be left out.
struct Saver {
    latest: channel::Sender<Known>,
    _task: AbortOnDropHandle<()>,
}

impl Saver {
    fn start(folder: PathBuf, gateway: Option<GatewayRef>) -> Self {
        let (latest, mut changes) = channel::channel(Known::default());
        let write = async move {
            while changes.changed().await.is_ok() {
                let (known, folder) = (changes.borrow_and_update().clone(), folder.clone());
                let gateway = gateway.clone();
                let saved = tokio::task::spawn_blocking(move || state::save(&folder, gateway.as_ref(), &known)).await;
                if let Ok(Err(error)) = saved {
                    tracing::warn!(%error, "the state of the pools cannot be kept");
                }
            }
        };
        Self { latest, _task: AbortOnDropHandle::new(tokio::spawn(write)) }
    }

    fn save(&self, known: Known) {
        self.latest.send_replace(known);
    }
}
