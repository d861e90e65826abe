//! Makes the client of the API server from the settings.

use std::time::Duration;

use anyhow::{Context as _, Result};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::config::Kubernetes;

const CONNECT: Duration = Duration::from_secs(5);

/// Reads the kubeconfig, or the ServiceAccount of the Pod. Connects to nothing.
pub(super) async fn client(settings: &Kubernetes) -> Result<Client> {
    let mut config = match &settings.kubeconfig {
        Some(file) => {
            let read = || format!("cannot use the kubeconfig {}", file.display());
            let kubeconfig = Kubeconfig::read_from(file).with_context(read)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.with_context(read)?
        }
        None => Config::incluster()
            .context("kubernetes.kubeconfig is not set, and the agent runs in no Pod with a ServiceAccount token")?,
    };
    config.connect_timeout = Some(CONNECT);
    // A watch is silent while nothing changes; `watch` limits the silence itself.
    config.read_timeout = None;
    // So is the pause after a failure.
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}
