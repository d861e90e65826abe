//! Takes the place of `kubernetes` in a build without that feature, whose configuration accepts no `inference_pool`.

use std::sync::Arc;

use crate::{
    config::{Config, InferencePoolRef},
    inference_pools::KnownPools,
    live::Live,
    panics::PanicWatch,
    readiness::Gate,
    tried::Trial,
};

/// Never exists.
pub enum KubernetesDiscovery {}

impl KubernetesDiscovery {
    pub fn start(_: &Arc<Live>, _: Vec<InferencePoolRef>, _: Vec<Gate>, _: &PanicWatch) -> anyhow::Result<Self> {
        anyhow::bail!("this build of penstock lacks the feature kubernetes")
    }

    pub fn follow(&self, _: Vec<InferencePoolRef>) {
        match *self {}
    }
}

/// Nothing is known.
pub fn last_known(_: &Config) -> KnownPools {
    KnownPools::new()
}

/// There is nothing to try.
pub async fn try_pools(_: &Config) -> (KnownPools, Vec<Trial>) {
    (KnownPools::new(), Vec::new())
}
