//! Takes the place of `kubernetes` in a build without that feature, whose configuration accepts neither `inference_pool` nor `kubernetes.gateway`.

use std::sync::Arc;

use crate::{
    config::Config,
    inference_pools::{DiscoveryGates, Known, Wanted},
    live::Live,
    panics::PanicWatch,
    tried::Trial,
};

/// Never exists.
pub enum KubernetesDiscovery {}

impl KubernetesDiscovery {
    pub fn start(_: &Arc<Live>, _: Wanted, _: DiscoveryGates, _: &PanicWatch) -> anyhow::Result<Self> {
        anyhow::bail!("this build of penstock lacks the feature kubernetes")
    }

    pub fn follow(&self, _: Wanted) {
        match *self {}
    }
}

/// Nothing is known.
pub fn last_known(_: &Config) -> Known {
    Known::default()
}

/// There is nothing to try.
pub async fn try_pools(_: &Config) -> (Known, Vec<Trial>) {
    (Known::default(), Vec::new())
}
