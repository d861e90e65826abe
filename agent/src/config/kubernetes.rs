//! `[kubernetes]`, the API server that describes pools, and `[pools.inference_pool]`, which names such a pool.

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    document::Section,
    settings::{choice, optional_section, settings},
    value::{self, Value, duration, duration_or_off, string},
};

settings! {
    /// The Kubernetes API server, which tells the endpoints and the EPP of pools with `inference_pool`. See docs/kubernetes.md.
    pub struct Kubernetes {
        /// The kubeconfig whose current context names the API server. Unset: the ServiceAccount of the Pod that the agent runs in.
        /// A relative path is resolved against the folder of this file.
        pub kubeconfig: Option<PathBuf> = None => value::file().example("kubeconfig"),
        /// Folder in which the agent keeps what it last knew about its pools, for a start without the API server. It must exist, and
        /// the agent's user must be able to write into it. Unset: nothing is kept. A relative path is resolved against the folder
        /// of this file.
        pub state_dir: Option<PathBuf> = None => value::folder().example("/var/lib/penstock"),
        /// How long `/readyz` waits after the start for the API server, if `state_dir` has the last known state of the pool. After
        /// that the agent counts as ready with that state. A pool without a known state always waits.
        pub start_wait: Option<Duration> = Some(Duration::from_secs(10)) => duration_or_off(),
        /// The Gateway whose HTTPRoutes become routes, if the section is present. They come after `[[routes]]`, and a request that
        /// neither takes gets 404.
        pub gateway: Option<GatewayRef> = None => optional_section(),
        /// How long changes are collected, to be applied together.
        pub coalesce: Duration = Duration::from_millis(100) => duration(),
        /// How long one watch request lasts, in whole seconds. A watch whose connection died without a sign is noticed five seconds
        /// later.
        pub watch_timeout: Duration = Duration::from_secs(120) => duration(),
    }
}

settings! {
    /// A Gateway of the Gateway API.
    pub struct GatewayRef {
        /// Namespace of the Gateway.
        pub namespace: String = String::new() => object_name().required("the namespace of the Gateway", "infra"),
        /// Name of the Gateway.
        pub name: String = String::new() => object_name().required("the name of the Gateway", "inference"),
        /// Port of the listeners that this agent serves. Unset: that of the first HTTP listener.
        pub port: Option<u16> = None => value::integer(1..=u16::MAX).optional(80),
    }
}

settings! {
    /// The InferencePools that have the settings of this section. Each becomes a pool with the name `NAMESPACE/NAME`, which routes may
    /// use. An InferencePool that `inference_pool` names, or an earlier section selects, has the settings of that one.
    #[derive(PartialOrd, Ord, Serialize, Deserialize)]
    pub struct InferencePools {
        /// Which InferencePools these are.
        pub from: PoolSource = PoolSource::Gateway => value::choice(),
        /// With `from = "labels"`: namespace of the InferencePools. Unset: all namespaces.
        pub namespace: Option<String> = None => object_name().optional("models"),
        /// With `from = "labels"`: label selector of Kubernetes. Unset: all InferencePools.
        pub labels: Option<String> = None
            => value::non_empty().optional("team=red,tier in (gpu, tpu)"),
        /// With `from = "labels"`: version of the InferencePools' API.
        pub version: InferencePoolVersion = InferencePoolVersion::V1 => value::choice(),
    }
}

choice! {
    /// Which InferencePools have the settings of a section.
    #[derive(PartialOrd, Ord, Serialize, Deserialize)]
    pub enum PoolSource {
        /// Those to which the HTTPRoutes of `kubernetes.gateway` refer.
        Gateway = "gateway",
        /// Those with the labels of `labels`, in `namespace`.
        Labels = "labels",
    }
}

settings! {
    /// The InferencePool that a pool is.
    #[derive(PartialOrd, Ord, Serialize, Deserialize)]
    pub struct InferencePoolRef {
        /// Namespace of the InferencePool, of its Pods and of its EPP.
        pub namespace: String = String::new() => object_name().required("the namespace of the InferencePool", "default"),
        /// Name of the InferencePool.
        pub name: String = String::new() => object_name().required("the name of the InferencePool", "llama"),
        /// Version of the InferencePool's API.
        pub version: InferencePoolVersion = InferencePoolVersion::V1 => value::choice(),
    }
}

choice! {
    /// Version of the InferencePool's API.
    #[derive(PartialOrd, Ord, Serialize, Deserialize)]
    pub enum InferencePoolVersion {
        /// `inference.networking.k8s.io/v1`.
        V1 = "v1",
        /// `inference.networking.x-k8s.io/v1alpha2`.
        V1Alpha2 = "v1alpha2",
    }
}

impl fmt::Display for InferencePoolRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl InferencePools {
    pub(super) fn check(&self, section: &Section<'_>, gateway: Option<&GatewayRef>) {
        match self.from {
            PoolSource::Gateway => {
                if gateway.is_none() {
                    section.reject("from", "no Gateway to take them from", "kubernetes.gateway");
                }
                for key in ["namespace", "labels", "version"].into_iter().filter(|key| section.has(key)) {
                    section.reject(key, "a setting of from = \"labels\"", "from = \"labels\"");
                }
            }
            PoolSource::Labels => {}
        }
    }
}

impl fmt::Display for InferencePools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.labels.as_deref().unwrap_or("all"))?;
        self.namespace.iter().try_for_each(|namespace| write!(f, " in {namespace}"))
    }
}

impl fmt::Display for GatewayRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The name of a namespace or an object, which becomes a part of paths.
fn object_name() -> Value<String> {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    let is_edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    string("the name of a Kubernetes object: lower-case letters, digits, - and .", move |text: &str| {
        let bytes = text.as_bytes();
        bytes.len() <= 253 && bytes.iter().copied().all(is_allowed) && is_edge(bytes.first()) && is_edge(bytes.last())
    })
}

impl Kubernetes {
    pub(super) fn check(&self, section: &Section<'_>) {
        if cfg!(not(feature = "kubernetes")) && self.gateway.is_some() {
            let found = "a setting of the feature `kubernetes`, which this build lacks";
            section.reject("gateway", found, "a build with that feature");
        }
    }

    pub(super) fn check_files(&self, section: &Section<'_>) {
        if let Some(file) = &self.kubeconfig
            && let Err(error) = std::fs::File::open(file)
        {
            section.reject("kubeconfig", format_args!("{}: {error}", file.display()), "a file that can be read");
        }
        if let Some(folder) = self.state_dir.as_ref().filter(|folder| !folder.is_dir()) {
            section.reject("state_dir", format_args!("{}", folder.display()), "a folder that exists");
        }
    }
}
