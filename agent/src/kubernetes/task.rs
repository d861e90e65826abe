//! Follows the pools and the Gateway that the file wants, and puts what was read in force.

use std::{collections::BTreeMap, convert::Infallible, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use kube::Client;
use tokio::{
    sync::{mpsc, watch as channel},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

use super::{client, follow::Follower, gateway::GatewayFollower, selection::SelectionFollower, state};
use crate::{
    config::{self, GatewayRef, InferencePoolRef, InferencePools},
    gateway::{GatewayObjects, KnownGateway, MAX_POOLS},
    inference_pools::{DiscoveryGates, InferencePool, Known, KnownPools, SelectedPools, Wanted},
    live::Live,
    readiness::Gate,
};

/// Pause before the credentials are read again.
const CREDENTIALS_RETRY: Duration = Duration::from_secs(2);
/// Pools whose state waits to be applied.
const QUEUE: usize = 16;
/// How long routes and selections wait until the pools that they name have been read.
const POOLS_WAIT: Duration = Duration::from_secs(5);

pub(super) struct DiscoveryTask {
    live: Arc<Live>,
    settings: config::Kubernetes,
    /// Of the pools that have not been read.
    gates: BTreeMap<InferencePoolRef, Gate>,
    /// Of the sections that have not been read, or whose pools have not.
    section_gates: BTreeMap<InferencePools, Gate>,
    /// None once the routes and their pools have been read.
    gateway_gate: Option<Gate>,
    /// What was read of each followed pool. A reload may drop a pool and another one bring it back meanwhile.
    read: KnownPools,
    /// The same of each followed section.
    selected: SelectedPools,
    /// What waits until its pools have been read.
    pending: Option<Pending>,
    /// The pools of the routes and sections in force.
    referred: Vec<InferencePoolRef>,
    saver: Option<Saver>,
}

/// What was read, and is not in force yet.
struct Pending {
    /// Without pools. The Gateway and the sections that have not changed are not in it.
    known: Known,
    until: Instant,
}

/// The tasks that follow objects.
#[derive(Default)]
struct Followers {
    pools: BTreeMap<InferencePoolRef, AbortOnDropHandle<()>>,
    sections: BTreeMap<InferencePools, AbortOnDropHandle<()>>,
    gateway: Option<AbortOnDropHandle<()>>,
}

/// Where followers send what they have read.
#[derive(Clone)]
struct Senders {
    pools: mpsc::Sender<(InferencePoolRef, InferencePool)>,
    sections: mpsc::Sender<(InferencePools, Vec<InferencePoolRef>)>,
    gateway: mpsc::Sender<GatewayObjects>,
}

/// The InferencePools of routes and sections.
fn referred(known: &Known) -> impl Iterator<Item = &InferencePoolRef> {
    let of_gateway = known.gateway.iter().flat_map(|gateway| &gateway.meaning.pools);
    of_gateway.chain(known.selected.values().flatten())
}

impl DiscoveryTask {
    pub(super) fn new(live: &Arc<Live>, wanted: &Wanted, gates: DiscoveryGates) -> Self {
        let DiscoveryGates { pools, sections, gateway } = gates;
        Self {
            live: Arc::clone(live),
            settings: live.file().kubernetes,
            gates: wanted.pools.iter().cloned().zip(pools).collect(),
            section_gates: wanted.sections.iter().cloned().zip(sections).collect(),
            gateway_gate: gateway,
            read: KnownPools::new(),
            selected: SelectedPools::new(),
            pending: None,
            referred: referred(&live.known()).cloned().collect(),
            saver: None,
        }
    }

    pub(super) async fn run(mut self, mut file: channel::Receiver<Wanted>) -> Infallible {
        let gateway = self.settings.gateway.clone();
        self.saver = self.settings.state_dir.clone().map(|folder| Saver::start(folder, gateway));
        let (pools, mut pools_read) = mpsc::channel(QUEUE);
        let (sections, mut sections_read) = mpsc::channel(QUEUE);
        let (gateway, mut gateways_read) = mpsc::channel(1);
        let senders = Senders { pools, sections, gateway };
        let mut followers = Followers::default();
        let mut connecting = pin!(connected(self.settings.clone()));
        let mut client: Option<Client> = None;
        let mut patience = pin!(sleep(self.settings.start_wait.unwrap_or_default()));
        let mut is_patient = true;
        // One state of the file for everything until the next one is noticed, so that what was read is dropped together with what
        // follows it.
        let mut in_force = file.borrow_and_update().clone();
        loop {
            let Wanted { pools, sections } = &in_force;
            let wanted = self.wanted(pools);
            if let Some(client) = &client {
                self.update(client, &wanted, sections, &mut followers, &senders);
            }
            let until = self.pending.as_ref().map(|pending| pending.until);
            tokio::select! {
                connected = &mut connecting, if client.is_none() => client = Some(connected),
                () = &mut patience, if is_patient => {
                    is_patient = false;
                    self.open_known();
                }
                Some((named, pool)) = pools_read.recv() => {
                    if wanted.contains(&named) {
                        self.apply(&named, pool);
                    }
                }
                Some((section, pools)) = sections_read.recv() => {
                    if sections.contains(&section) {
                        self.section_read(section, pools);
                    }
                }
                Some(objects) = gateways_read.recv() => self.gateway_read(objects),
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => self.apply_pending(),
                // Cannot fail, because the sender outlives the thread.
                _ = file.changed() => {
                    in_force = file.borrow_and_update().clone();
                    self.wanted_changed(&in_force);
                }
            }
        }
    }

    /// The pools that the file names, and those of routes and sections.
    fn wanted(&self, file: &[InferencePoolRef]) -> Vec<InferencePoolRef> {
        let pending = self.pending.iter().flat_map(|pending| referred(&pending.known));
        let mut wanted: Vec<_> = file.iter().chain(&self.referred).chain(pending).cloned().collect();
        wanted.sort();
        wanted.dedup();
        wanted
    }

    /// Another configuration of the file is in force, which wants these.
    fn wanted_changed(&mut self, file: &Wanted) {
        if let Some(pending) = &mut self.pending {
            pending.known.selected.retain(|section, _| file.sections.contains(section));
        }
        let known = self.live.known();
        self.referred = referred(&known).cloned().collect();
        self.selected.retain(|section, _| file.sections.contains(section));
        for (section, pools) in self.selected.clone() {
            if known.selected.get(&section) != Some(&pools) {
                self.pending().selected.insert(section, pools);
            }
        }
        let wanted = self.wanted(&file.pools);
        self.read.retain(|named, _| wanted.contains(named));
        for (named, pool) in self.read.clone() {
            self.put(&named, pool);
        }
        self.apply_if_whole();
        open_all(&mut self.gates, |named| !wanted.contains(named));
        open_all(&mut self.section_gates, |section| !file.sections.contains(section));
    }

    /// Begins to follow what is new, and ends following what is not wanted any more.
    fn update(
        &mut self,
        client: &Client,
        wanted: &[InferencePoolRef],
        sections: &[InferencePools],
        followers: &mut Followers,
        senders: &Senders,
    ) {
        let settings = &self.settings;
        let metrics = || Arc::clone(&self.live.shared().metrics);
        followers.pools.retain(|named, _| wanted.contains(named));
        followers.sections.retain(|section, _| sections.contains(section));
        self.read.retain(|named, _| wanted.contains(named));
        self.selected.retain(|section, _| sections.contains(section));
        for named in wanted {
            followers.pools.entry(named.clone()).or_insert_with(|| {
                let follower = Follower::new(client.clone(), named.clone(), metrics(), settings);
                let results = senders.pools.clone();
                AbortOnDropHandle::new(tokio::spawn(async move { match follower.keep_running(results).await {} }))
            });
        }
        for section in sections {
            followers.sections.entry(section.clone()).or_insert_with(|| {
                let follower = SelectionFollower::new(client.clone(), section.clone(), metrics(), settings);
                let results = senders.sections.clone();
                AbortOnDropHandle::new(tokio::spawn(async move { match follower.keep_running(results).await {} }))
            });
        }
        if followers.gateway.is_none()
            && let Some(named) = settings.gateway.clone()
        {
            let follower = GatewayFollower::new(client.clone(), named, metrics(), settings);
            let results = senders.gateway.clone();
            let task = tokio::spawn(async move { match follower.keep_running(results).await {} });
            followers.gateway = Some(AbortOnDropHandle::new(task));
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
        self.apply_if_whole();
        self.open_gates();
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

    fn gateway_read(&mut self, objects: GatewayObjects) {
        let Some(named) = self.settings.gateway.clone() else { return };
        if objects.gateway.is_none() {
            tracing::warn!(gateway = %named, "the Gateway does not exist");
        }
        let gateway = KnownGateway::new(&named, objects);
        if gateway.meaning.left_out > 0 {
            let left_out = gateway.meaning.left_out;
            tracing::error!(gateway = %named, left_out, "too many routes, leaving out those of the least precedence");
        }
        self.pending().gateway = Some(Arc::new(gateway));
        self.apply_if_whole();
    }

    fn section_read(&mut self, section: InferencePools, mut pools: Vec<InferencePoolRef>) {
        let left_out = pools.len().saturating_sub(MAX_POOLS);
        if left_out > 0 {
            tracing::error!(inference_pools = %section, left_out, "too many InferencePools, using the first names");
        }
        pools.truncate(MAX_POOLS);
        self.selected.insert(section.clone(), pools.clone());
        self.pending().selected.insert(section, pools);
        self.apply_if_whole();
    }

    fn pending(&mut self) -> &mut Known {
        let begin = || Pending { known: Known::default(), until: Instant::now() + POOLS_WAIT };
        &mut self.pending.get_or_insert_with(begin).known
    }

    /// What was read is put in force as soon as its pools have been read, so that no request finds a pool that is not known yet.
    fn apply_if_whole(&mut self) {
        let is_whole = |pending: &Pending| referred(&pending.known).all(|pool| self.read.contains_key(pool));
        if self.pending.as_ref().is_some_and(is_whole) {
            self.apply_pending();
        }
    }

    /// Puts what waits in force.
    fn apply_pending(&mut self) {
        let Some(Pending { mut known, .. }) = self.pending.take() else { return };
        let pools = referred(&known).filter_map(|pool| Some((pool.clone(), self.read.get(pool)?.clone())));
        known.pools = pools.collect();
        let routes = known.gateway.as_ref().map_or(0, |gateway| gateway.meaning.routes.len());
        let pools = known.pools.len();
        match self.live.all_discovered(known) {
            Ok(()) => {
                tracing::info!(routes, pools, "discovered routes and pools updated");
                self.referred = referred(&self.live.known()).cloned().collect();
            }
            Err(error) => {
                tracing::error!(%error, "what was discovered cannot be applied, keeping the previous state");
            }
        }
        self.open_gates();
        self.save();
    }

    /// Opens the gates of the Gateway and the sections that are in force, with all of their pools.
    fn open_gates(&mut self) {
        if self.pending.is_some() || (self.gateway_gate.is_none() && self.section_gates.is_empty()) {
            return;
        }
        let (known, read) = (self.live.known(), &self.read);
        let has_read = |pools: &[InferencePoolRef]| pools.iter().all(|pool| read.contains_key(pool));
        if known.gateway.as_ref().is_some_and(|gateway| has_read(&gateway.meaning.pools))
            && let Some(gate) = self.gateway_gate.take()
        {
            gate.open();
        }
        open_all(&mut self.section_gates, |section| known.selected.get(section).is_some_and(|pools| has_read(pools)));
    }

    fn save(&self) {
        if let Some(saver) = &self.saver {
            saver.save(self.live.known());
        }
    }

    /// Opens the gates of what is known from an earlier run.
    fn open_known(&mut self) {
        let known = self.live.known();
        for named in open_all(&mut self.gates, |named| known.pools.contains_key(named)) {
            tracing::warn!(inference_pool = %named, "not read in the start time, counting as ready with the last known state");
        }
        for section in open_all(&mut self.section_gates, |section| known.selected.contains_key(section)) {
            tracing::warn!(inference_pools = %section, "not read in the start time, counting as ready with the last known state");
        }
        if known.gateway.is_some()
            && let Some(gate) = self.gateway_gate.take()
        {
            tracing::warn!("Gateway not read in the start time, counting as ready with the last known state");
            gate.open();
        }
    }
}

/// Opens the gates for which `may_open` returns true, and removes them. Returns their keys.
fn open_all<K: Ord + Clone>(gates: &mut BTreeMap<K, Gate>, may_open: impl Fn(&K) -> bool) -> Vec<K> {
    let keys: Vec<K> = gates.keys().filter(|key| may_open(key)).cloned().collect();
    keys.iter().filter_map(|key| gates.remove(key)).for_each(Gate::open);
    keys
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
