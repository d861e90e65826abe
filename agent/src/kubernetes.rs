//! Follows the pools with `inference_pool` through the Kubernetes API, on a thread of its own, and tells [`Live`] what they are.
//!
//! `query` says what is asked, `watch` keeps a `store` of `objects` up to date, `follow` combines those of one pool, `translate` says
//! what they mean, and `state` keeps that in a file. Whatever fails, the last known state stays in force.

mod access;
mod client;
mod failure;
mod follow;
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
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;

pub use access::try_pools;

use self::follow::Follower;
use crate::{
    config::{self, Config, InferencePoolRef},
    inference_pools::{self, InferencePool, KnownPools},
    live::Live,
    panics::PanicWatch,
    readiness::Gate,
};

const THREAD: &str = "kubernetes";
/// Pause before the credentials are read again.
const CREDENTIALS_RETRY: Duration = Duration::from_secs(2);
/// Pools whose state waits to be applied.
const QUEUE: usize = 16;

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
    /// Follows `pools`. Each gate belongs to the pool at its index and opens when the pool has been read.
    pub fn start(live: &Arc<Live>, pools: Vec<InferencePoolRef>, gates: Vec<Gate>, watch: &PanicWatch) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let gates = pools.iter().cloned().zip(gates).collect();
        let (followed, changes) = channel::channel(pools);
        let settings = live.file().kubernetes;
        let discovery = DiscoveryTask { live: Arc::clone(live), settings, gates, read: KnownPools::new(), saver: None };
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

/// What is known about the pools of the configuration from an earlier run.
pub fn last_known(config: &Config) -> KnownPools {
    let named = inference_pools::named(config);
    let Some(folder) = config.kubernetes.state_dir.as_ref().filter(|_| !named.is_empty()) else {
        return KnownPools::new();
    };
    match state::load(folder) {
        Ok(known) => known.into_iter().filter(|(pool, _)| named.contains(pool)).collect(),
        Err(error) => {
            tracing::warn!(%error, "the last known state of the pools cannot be used");
            KnownPools::new()
        }
    }
}

struct DiscoveryTask {
    live: Arc<Live>,
    settings: config::Kubernetes,
    /// Of the pools that have not been read.
    gates: BTreeMap<InferencePoolRef, Gate>,
    /// What was read of each followed pool. A reload may drop a pool and another one bring it back meanwhile.
    read: KnownPools,
    saver: Option<Saver>,
}

impl DiscoveryTask {
    async fn run(mut self, mut pools: channel::Receiver<Vec<InferencePoolRef>>) -> Infallible {
        self.saver = self.settings.state_dir.clone().map(Saver::start);
        let (sender, mut results) = mpsc::channel(QUEUE);
        let mut followers = BTreeMap::new();
        let mut connecting = pin!(connected(self.settings.clone()));
        let mut client: Option<Client> = None;
        let mut patience = pin!(sleep(self.settings.start_wait.unwrap_or_default()));
        let mut is_patient = true;
        loop {
            if let Some(client) = &client {
                self.update(client, &pools.borrow(), &mut followers, &sender);
            }
            tokio::select! {
                connected = &mut connecting, if client.is_none() => client = Some(connected),
                () = &mut patience, if is_patient => {
                    is_patient = false;
                    self.open_known();
                }
                Some((named, pool)) = results.recv() => {
                    if pools.borrow().contains(&named) {
                        self.apply(&named, pool);
                    }
                }
                // Cannot fail, because the sender outlives the thread.
                _ = pools.changed() => self.wanted_changed(&pools.borrow().clone()),
            }
        }
    }

    /// Another configuration of the file is in force.
    fn wanted_changed(&mut self, wanted: &[InferencePoolRef]) {
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
        &self,
        client: &Client,
        wanted: &[InferencePoolRef],
        followers: &mut BTreeMap<InferencePoolRef, AbortOnDropHandle<()>>,
        results: &mpsc::Sender<(InferencePoolRef, InferencePool)>,
    ) {
        followers.retain(|named, _| wanted.contains(named));
        for named in wanted {
            followers.entry(named.clone()).or_insert_with(|| {
                let metrics = Arc::clone(&self.live.shared().metrics);
                let follower = Follower::new(client.clone(), named.clone(), metrics, &self.settings);
                let results = results.clone();
                AbortOnDropHandle::new(tokio::spawn(async move { match follower.keep_running(results).await {} }))
            });
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
        if let Some(saver) = &self.saver {
            saver.save(self.live.known());
        }
    }

    /// Puts the state of a pool in force. Returns false if that is not possible.
    fn put(&self, named: &InferencePoolRef, pool: InferencePool) -> bool {
        let outcome = self.live.discovered(named, pool);
        if let Err(error) = &outcome {
            tracing::error!(inference_pool = %named, %error, "the InferencePool cannot be applied, keeping the previous state");
        }
        outcome.is_ok()
    }

    /// Opens the gates of pools that are known from an earlier run.
    fn open_known(&mut self) {
        let known = self.live.known();
        let (open, closed) =
            std::mem::take(&mut self.gates).into_iter().partition(|(named, _)| known.contains_key(named));
        self.gates = closed;
        let open: BTreeMap<InferencePoolRef, Gate> = open;
        for (named, gate) in open {
            tracing::warn!(inference_pool = %named, "not read in the start time, counting as ready with the last known state");
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
    latest: channel::Sender<KnownPools>,
    _task: AbortOnDropHandle<()>,
}

impl Saver {
    fn start(folder: PathBuf) -> Self {
        let (latest, mut changes) = channel::channel(KnownPools::new());
        let write = async move {
            while changes.changed().await.is_ok() {
                let (known, folder) = (changes.borrow_and_update().clone(), folder.clone());
                let saved = tokio::task::spawn_blocking(move || state::save(&folder, &known)).await;
                if let Ok(Err(error)) = saved {
                    tracing::warn!(%error, "the state of the pools cannot be kept");
                }
            }
        };
        Self { latest, _task: AbortOnDropHandle::new(tokio::spawn(write)) }
    }

    fn save(&self, known: KnownPools) {
        self.latest.send_replace(known);
    }
}
