//! The configuration in force, and the only place that replaces it: after a reload of the file, and after Kubernetes has said
//! something else about a pool.
//!
//! Endpoints and EPP replicas that Kubernetes names go into the present state; only a change of a pool's settings makes a new one.
//! Either way requests keep the state that they began with, and endpoints and replicas that stay keep their connections.

use std::sync::{Arc, Weak};

use anyhow::{Context as _, Result};
use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    config::{Config, InferencePoolRef, SteeringMode},
    control::{self, Control},
    dns::DnsResolver,
    endpoint::discovery::Discovery,
    inference_pools::{self, InferencePool, Known, KnownPools, Wanted},
    listeners::Listeners,
    panics::PanicWatch,
    picker::{
        replica::Replicas,
        tend::{Means, tend, tend_while_used},
    },
    readiness::Readiness,
    reload::{self, ReloadError},
    shared::Shared,
    tls::Certificate,
};

pub struct Live {
    /// Sent to the workers.
    shared: watch::Sender<Arc<Shared>>,
    certificate: Option<Arc<Certificate>>,
    watch: PanicWatch,
    /// The mode for which kernel programs were loaded.
    started: SteeringMode,
    /// Held while the configuration changes.
    parts: Mutex<LiveParts>,
}

/// What the configuration is made from, and what runs under it.
struct LiveParts {
    file: Config,
    known: Known,
    background: Option<BackgroundTasks>,
    /// The EPPs of previous configurations, which requests that began under them may still ask.
    retired: Vec<Weak<Replicas>>,
}

/// The tasks that run in the background under one configuration.
struct BackgroundTasks {
    _discovery: Discovery,
    _control: Control,
}

impl Live {
    /// Starts the background tasks of the first configuration, which `shared` has. With `readiness`, the agent becomes ready only
    /// after they have their first result. `file` is the configuration without what is `known` about InferencePools.
    pub fn start(
        shared: Arc<Shared>,
        file: Config,
        known: Known,
        certificate: Option<Arc<Certificate>>,
        readiness: &Readiness,
        watch: &PanicWatch,
    ) -> Result<Arc<Self>> {
        inference_pools::fill(&shared, &known.pools);
        let background = start_background(&shared, &[], certificate.as_ref(), Some(readiness), watch)?;
        let started = file.steering.mode;
        let parts = Mutex::new(LiveParts { file, known, background: Some(background), retired: Vec::new() });
        Ok(Arc::new(Self { shared: watch::Sender::new(shared), certificate, watch: watch.clone(), started, parts }))
    }

    /// Receives every new state.
    pub fn updates(&self) -> watch::Receiver<Arc<Shared>> {
        self.shared.subscribe()
    }

    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared.borrow())
    }

    /// The configuration of the file.
    pub fn file(&self) -> Config {
        self.parts.lock().file.clone()
    }

    /// What is known from Kubernetes.
    #[cfg_attr(not(feature = "kubernetes"), expect(dead_code, reason = "only the discovery calls it"))]
    pub fn known(&self) -> Known {
        self.parts.lock().known.clone()
    }

    /// Fails if `file` changes settings that need a restart, and names them.
    pub fn needs_restart(&self, file: &Config) -> Result<(), ReloadError> {
        let fixed = reload::needs_restart(self.started, &self.parts.lock().file, file);
        if fixed.is_empty() { Ok(()) } else { Err(ReloadError::NeedsRestart(fixed)) }
    }

    /// Puts another configuration of the file in force, under which the agent listens at `own`. Changes nothing if that needs a
    /// restart. Blocks until the previous background threads have ended.
    pub fn reload(&self, file: Config, own: Listeners) -> Result<(), ReloadError> {
        self.needs_restart(&file)?;
        self.reload_parts(&mut self.parts.lock(), file, own)
    }

    fn reload_parts(&self, parts: &mut LiveParts, file: Config, own: Listeners) -> Result<(), ReloadError> {
        let mut known = parts.known.clone();
        let Wanted { sections, .. } = Wanted::of(&file);
        known.selected.retain(|section, _| sections.contains(section));
        let used = inference_pools::used(&file, &known);
        known.pools.retain(|pool, _| used.contains(pool));
        self.put(parts, inference_pools::merged(&file, &known), &known.pools, own)?;
        (parts.file, parts.known) = (file, known);
        Ok(())
    }

    /// Applies what Kubernetes says about a pool. Blocks as [`reload`](Self::reload) does if settings of the pool change.
    #[cfg_attr(not(feature = "kubernetes"), expect(dead_code, reason = "only the discovery calls it"))]
    pub fn discovered(&self, named: &InferencePoolRef, pool: InferencePool) -> Result<(), ReloadError> {
        let mut parts = self.parts.lock();
        let is_used = inference_pools::used(&parts.file, &parts.known).contains(named);
        if parts.known.pools.get(named) == Some(&pool) || !is_used {
            return Ok(());
        }
        let mut known = parts.known.clone();
        known.pools.insert(named.clone(), pool);
        self.learned(&mut parts, known)
    }

    /// Applies what Kubernetes says about the Gateway and the sections that select InferencePools, as far as it is given, with the pools
    /// that follow from it, as far as they are known.
    #[cfg_attr(not(feature = "kubernetes"), expect(dead_code, reason = "only the discovery calls it"))]
    pub fn all_discovered(&self, given: Known) -> Result<(), ReloadError> {
        let mut parts = self.parts.lock();
        let mut known = parts.known.clone();
        let Wanted { sections, .. } = Wanted::of(&parts.file);
        known.gateway = given.gateway.or(known.gateway);
        known.selected.extend(given.selected);
        known.selected.retain(|section, _| sections.contains(section));
        known.pools.extend(given.pools);
        let used = inference_pools::used(&parts.file, &known);
        known.pools.retain(|pool, _| used.contains(pool));
        self.learned(&mut parts, known)
    }

    fn learned(&self, parts: &mut LiveParts, known: Known) -> Result<(), ReloadError> {
        let config = inference_pools::merged(&parts.file, &known);
        let shared = self.shared();
        if config == shared.config {
            inference_pools::fill(&shared, &known.pools);
            inference_pools::fill_retired(&shared, &in_use(&parts.retired), &known.pools);
        } else {
            let outcome = self.put(parts, config, &known.pools, shared.own.clone());
            shared.metrics.reloaded(if outcome.is_ok() { "discovered" } else { "refused" });
            outcome?;
        }
        parts.known = known;
        Ok(())
    }

    fn put(
        &self,
        parts: &mut LiveParts,
        config: Config,
        known: &KnownPools,
        own: Listeners,
    ) -> Result<(), ReloadError> {
        let before = self.shared();
        let shared = Arc::new(before.after(config).map_err(ReloadError::Pools)?.listening(own));
        parts.retire(&before, &shared);
        let retired = in_use(&parts.retired);
        // Until the next tasks run, requests leave connecting to them.
        let epps = before.replicas.iter().chain(&shared.replicas).flatten().chain(&retired);
        let _tended: Vec<_> = epps.map(Replicas::tended).collect();
        // The previous tasks stop first, because both would feed the same endpoints, and report the same metrics.
        parts.background = None;
        shared.take_effect(&before.config);
        inference_pools::fill(&shared, known);
        inference_pools::fill_retired(&shared, &retired, known);
        let next = start_background(&shared, &retired, self.certificate.as_ref(), None, &self.watch);
        self.shared.send_replace(shared);
        parts.background = Some(next.map_err(ReloadError::Background)?);
        Ok(())
    }

    /// Ends the background tasks. Called when no worker needs them any more.
    pub fn stop(&self) {
        self.parts.lock().background = None;
    }
}

impl LiveParts {
    /// Remembers the EPPs of `before` that `after` does not have.
    fn retire(&mut self, before: &Shared, after: &Shared) {
        let is_kept = |one: &&Arc<Replicas>| after.replicas.iter().flatten().any(|kept| Arc::ptr_eq(kept, one));
        let retired = before.replicas.iter().flatten().filter(|one| !is_kept(one));
        self.retired.retain(|one| one.strong_count() > 0);
        self.retired.extend(retired.map(Arc::downgrade));
    }
}

/// Those of the retired EPPs that still exist.
fn in_use(retired: &[Weak<Replicas>]) -> Vec<Arc<Replicas>> {
    retired.iter().filter_map(Weak::upgrade).collect()
}

/// Starts the background tasks: endpoint discovery, endpoint counts, EPP replica checks and certificate reloads. With
/// `readiness`, the agent becomes ready only after discovery has its first result.
fn start_background(
    shared: &Shared,
    retired: &[Arc<Replicas>],
    certificate: Option<&Arc<Certificate>>,
    readiness: Option<&Readiness>,
    watch: &PanicWatch,
) -> Result<BackgroundTasks> {
    let counts = shared.endpoints.iter().cloned().map(|set| Box::new(move || set.states()) as _);
    shared.metrics.count_endpoints(counts);
    let Shared { config, endpoints, endpoint_tls, metrics, own, .. } = shared;
    let discovery = Discovery::start(config, endpoints, endpoint_tls, metrics, own, readiness, watch)?;

    let dns = DnsResolver::new(&shared.config.dns);
    let epps = shared.replicas.iter().enumerate().filter_map(|(pool, replicas)| Some((pool, replicas.clone()?)));
    let means = |metrics| Means { dns: dns.clone(), own: shared.own.clone(), metrics, probe: shared.probe.clone() };
    let counted = |pool| means(Some((Arc::clone(&shared.metrics), pool)));
    let mut tasks: Vec<control::Task> = epps.map(|(pool, replicas)| tend(replicas, counted(pool)).boxed()).collect();
    tasks.extend(retired.iter().map(|replicas| tend_while_used(Arc::clone(replicas), means(None)).boxed()));
    let tls = shared.endpoint_tls.iter().flatten().cloned();
    tasks.extend(tls.map(|tls| async move { tls.follow_files().await }.boxed()));
    tasks.extend(certificate.map(|certificate| Arc::clone(certificate).follow().boxed()));
    let control = Control::start(tasks, watch).context("cannot start the control thread")?;
    Ok(BackgroundTasks { _discovery: discovery, _control: control })
}
