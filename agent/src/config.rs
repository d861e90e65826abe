//! The configuration: one TOML file, read and checked completely before the first socket is bound.
//!
//! Each section has a file here that declares its settings: names, defaults, documentation and accepted values. The sections are
//! read, flags and environment variables override them, and then the rules that concern several settings are checked. All errors
//! are reported together, with file, line, column, key, what was found and what was expected. Only [`Config::load`] and
//! [`Config::load_with`] open the files that settings name.

mod admin;
mod bbr;
mod changes;
mod cors;
mod default_file;
mod dns;
mod document;
mod ejection;
mod endpoints;
mod epp;
mod error;
mod errors;
mod files;
mod headers;
mod health;
mod kubernetes;
mod limits;
mod listen;
mod metadata;
mod models;
mod node;
mod overrides;
mod passthrough;
mod paths;
mod picker;
mod pools;
mod process;
mod reference;
mod retry;
mod routes;
mod schema;
mod server_tls;
mod settings;
mod shown;
mod steering;
mod subset;
#[cfg(test)]
mod tests;
mod timeouts;
mod tracing;
mod value;

use std::path::Path;

pub use admin::Admin;
pub use bbr::{Bbr, MissingModel};
pub(crate) use changes::is_target_path;
pub use changes::{FieldChanges, PathChange, Redirect, RedirectScheme, RedirectStatus, Rewrite, SetField};
pub use cors::{AllowedHeader, Cors, OriginPattern};
pub use default_file::default_toml;
pub use dns::Dns;
pub use ejection::Ejection;
pub use endpoints::{EndpointsError, EndpointsFormat, ListedEndpoint, NamedEndpoints, is_own, parse_endpoints};
pub use epp::{BodyToPicker, Epp, EppLimits, ResponseToPicker};
pub use error::{ConfigError, ConfigErrors, ConfigWarning, Position};
pub use errors::{ErrorFormat, Errors};
pub(crate) use headers::ALL_HINTS;
pub use headers::{ClientHint, Forwarding, Headers};
pub use health::HealthCheck;
pub use kubernetes::{GatewayRef, InferencePoolRef, InferencePoolVersion, InferencePools, Kubernetes, PoolSource};
pub use limits::Limits;
pub use listen::{ClientCertificates, HalfClose, Listen, ListenTls};
pub use metadata::{Attribute, EppMetadata};
pub use models::{ModelList, ModelListing};
pub use node::Node;
pub use overrides::Overrides;
pub use passthrough::{Network, Passthrough};
pub use picker::Picker;
pub use pools::{AppProtocol, FailureMode, LeaseLimits, PickPer, PinLimits, Pool, UnusablePool};
pub use process::{Process, User, parse_user};
pub use reference::reference;
pub use retry::Retry;
pub use routes::{
    HeaderCondition, HostPattern, ModelPattern, PathPattern, QueryCondition, RefusedRoute, Route, WeightedPool,
};
pub use schema::json_schema;
pub use server_tls::{ClientCertificate, KeyPin, PoolTls, ServerTls};
pub use steering::{AtStop, Bpffs, Interfaces, Steering, SteeringMode};
pub use subset::{EmptySubset, Locality, Subset};
pub use timeouts::{TimeoutOverrides, Timeouts};
pub use tracing::{Ratio, Tracing};
pub(crate) use value::may_be_changed;

use document::Section;
use settings::{Elsewhere, Settings as _, section, sections, settings};

use crate::listeners::Listeners;

settings! {
    /// The whole file.
    pub struct Config {
        /// Where clients connect.
        pub listen: Listen = Listen::default() => section(),
        /// Where probes and metrics are served.
        pub admin: Admin = Admin::default() => section(),
        /// Limits of single messages and of all messages together. Sizes are in bytes.
        pub limits: Limits = Limits::default() => section(),
        /// Timeouts of requests and connections.
        pub timeouts: Timeouts = Timeouts::default() => section(),
        /// Header fields that describe this hop to endpoints and clients.
        pub headers: Headers = Headers::default() => section(),
        /// Responses that the agent generates itself.
        pub errors: Errors = Errors::default() => section(),
        /// Reading the model from request bodies (body-based routing).
        pub bbr: Bbr = Bbr::default() => section(),
        /// The list of models, `GET /v1/models`.
        pub models: ModelListing = ModelListing::default() => section(),
        /// Which response bodies the kernel moves, and how.
        pub steering: Steering = Steering::default() => section(),
        /// Export of spans to an OpenTelemetry collector. The trace context is forwarded even if this is off.
        pub tracing: Tracing = Tracing::default() => section(),
        /// The user that the agent runs as if it is started as root, and how the next agent takes over.
        pub process: Process = Process::default() => section(),
        /// Where this agent runs. `pools.subset.prefer` compares it with the node and zone of the endpoints.
        pub node: Node = Node::default() => section(),
        /// How names are resolved.
        pub dns: Dns = Dns::default() => section(),
        /// The Kubernetes API server, which tells the endpoints and the EPP of pools with `inference_pool`. See docs/kubernetes.md.
        pub kubernetes: Kubernetes = Kubernetes::default() => section(),
        /// The pools: at least one without `kubernetes.gateway`, each with a unique name.
        pub pools: Vec<Pool> = Vec::new() => sections(),
        /// The first route whose conditions all match is used. Without routes, every request goes to the first pool. `host`,
        /// `method`, `model` and `base_model` take one value or an array, of which one must match.
        pub routes: Vec<Route> = Vec::new() => sections().commented(),
        /// Settings that have their names from the previous version.
        pub warnings: Vec<ConfigWarning> = Vec::new() => Elsewhere(|_| None),
    }
}

impl Config {
    /// The default configuration with these pools.
    pub fn new(pools: Vec<Pool>) -> Self {
        Self { pools, ..Self::default() }
    }

    /// Reads and checks the file at `path`, and the certificates and keys that it names. Fails with all errors.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigErrors> {
        Self::load_with(path, &Overrides::default())
    }

    /// As [`Config::load`], with flags and environment variables applied before the checks.
    pub fn load_with(path: impl AsRef<Path>, overrides: &Overrides) -> Result<Self, ConfigErrors> {
        let path = path.as_ref();
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            ConfigErrors::from(ConfigError::Unreadable { file: file.clone(), reason: error.to_string() })
        })?;
        Self::read_all(&text, &file, |root| {
            let config = Self::of(root, overrides);
            config.check_files(root);
            config
        })
    }

    /// Reads and checks `text` without opening other files. `file_name` appears in errors, and relative paths in the text are
    /// resolved against its folder.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, ConfigErrors> {
        Self::parse_with(text, file_name, &Overrides::default())
    }

    /// As [`Config::parse`], with flags and environment variables applied before the checks.
    pub fn parse_with(text: &str, file_name: &str, overrides: &Overrides) -> Result<Self, ConfigErrors> {
        Self::read_all(text, file_name, |root| Self::of(root, overrides))
    }

    fn read_all(
        text: &str,
        file_name: &str,
        read: impl FnOnce(&mut Section<'_>) -> Self,
    ) -> Result<Self, ConfigErrors> {
        let (config, warnings) = document::read(text, file_name, &Self::describe(), read)?;
        Ok(Self { warnings, ..config })
    }

    /// Logs a warning for each setting with an old name.
    pub fn log_warnings(&self) {
        for ConfigWarning { file, position, old_key, key } in &self.warnings {
            ::tracing::warn!(
                file,
                line = position.line,
                old_key,
                key,
                "setting has an old name, which the next version rejects"
            );
        }
    }

    fn of(root: &mut Section<'_>, overrides: &Overrides) -> Self {
        let mut config = Self::read(root);
        overrides.apply(&mut config);
        config.check(root);
        config
    }

    /// Checks rules that concern several settings.
    fn check(&self, root: &Section<'_>) {
        self.listen.check(&root.at("listen"));
        self.admin.check(&root.at("admin"), &self.listen);
        self.limits.check(&root.at("limits"));
        self.bbr.check(&root.at("bbr"));
        self.steering.check(&root.at("steering"));
        self.process.check(&root.at("process"));
        self.dns.check(&root.at("dns"));
        self.kubernetes.check(&root.at("kubernetes"));
        let tls = self.listen.tls.as_ref().map(|tls| tls.address);
        let own = Listeners::new([self.listen.address, self.admin.address].into_iter().chain(tls));
        pools::check(&self.pools, root, self.listen.address, &own, &self.node, &self.kubernetes);
        routes::check(&self.routes, root, &self.pools, &self.bbr);
    }

    /// Checks the contents of the files that settings name.
    fn check_files(&self, root: &Section<'_>) {
        self.listen.check_files(&root.at("listen"));
        self.kubernetes.check_files(&root.at("kubernetes"));
        pools::check_files(&self.pools, root);
    }
}
