//! Follows the pools with `inference_pool`, and a Gateway with its routes, through the Kubernetes API, on a thread of its own, and tells
//! [`Live`] what they are.
//!
//! `query` says what is asked, `watch` keeps a `store` of `objects` up to date, `follow` combines those of one pool, `translate` says
//! what they mean, and `state` keeps that in a file. `gateway` follows the Gateway,
//! `selection` the InferencePools of a label selector, and `task` puts it all in force. Whatever fails, the last known state stays in force.

mod access;
mod aimed;
mod client;
mod failure;
mod follow;
mod gateway;
mod objects;
mod query;
mod selection;
mod state;
mod store;
mod task;
mod translate;
mod watch;

use std::{convert::Infallible, sync::Arc, thread::JoinHandle};

use anyhow::{Context as _, Result};
use tokio::sync::{oneshot, watch as channel};

pub use access::try_pools;

use self::task::DiscoveryTask;
use crate::{
    config::Config,
    inference_pools::{self, DiscoveryGates, Known, Wanted},
    live::Live,
    panics::PanicWatch,
};

const THREAD: &str = "kubernetes";

/// The running discovery. Dropping it ends its tasks and joins the thread.
pub struct KubernetesDiscovery {
    followed: channel::Sender<Wanted>,
    running: Option<KubernetesThread>,
}

struct KubernetesThread {
    /// The thread stops when this sender is dropped.
    stop: oneshot::Sender<Infallible>,
    thread: JoinHandle<()>,
}

impl KubernetesDiscovery {
    /// Follows what is wanted and the Gateway of the configuration. Each gate belongs to the pool or the section at its index and opens
    /// when that has been read.
    pub fn start(live: &Arc<Live>, wanted: Wanted, gates: DiscoveryGates, watch: &PanicWatch) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let discovery = DiscoveryTask::new(live, &wanted, gates);
        let (followed, changes) = channel::channel(wanted);
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

    /// Follows these instead. What stays is not read again.
    pub fn follow(&self, wanted: Wanted) {
        self.followed.send_replace(wanted);
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
    let (wanted, gateway) = (Wanted::of(config), config.kubernetes.gateway.as_ref());
    let is_used = !wanted.is_empty() || gateway.is_some();
    let Some(folder) = config.kubernetes.state_dir.as_ref().filter(|_| is_used) else {
        return Known::default();
    };
    match state::load(folder, gateway) {
        Ok(mut known) => {
            known.selected.retain(|section, _| wanted.sections.contains(section));
            let used = inference_pools::used(config, &known);
            known.pools.retain(|pool, _| used.contains(pool));
            known
        }
        Err(error) => {
            tracing::warn!(%error, "the last known state of the pools cannot be used");
            Known::default()
        }
    }
}
