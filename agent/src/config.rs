//! The configuration: one TOML file, read and checked as a whole before the first socket is bound.
//!
//! Each section has a file here that declares its settings: names, defaults, documentation and what they take. Reading goes in
//! three steps: the sections are read, flags and environment are put on top, and what concerns several settings is checked. What
//! is wrong is reported all at once, with file, line, column, key, what was found and what was expected. Only [`Config::load`]
//! and its like open the files that settings name.

mod admin;
mod bbr;
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
mod limits;
mod listen;
mod node;
mod overrides;
mod passthrough;
mod picker;
mod pools;
mod process;
mod reference;
mod retry;
mod routes;
mod schema;
mod settings;
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
pub use default_file::default_toml;
pub use dns::Dns;
pub use ejection::Ejection;
pub use endpoints::{Endpoint, EndpointsError, EndpointsFormat, NamedEndpoints, is_own, parse_endpoints};
pub use epp::{ClientCertificate, Epp, EppLimits, EppTls, Pin, ResponseToPicker};
pub use error::{ConfigError, ConfigErrors, ConfigWarning, Position};
pub use errors::{ErrorFormat, Errors};
pub use headers::{Forwarding, Headers};
pub use health::HealthCheck;
pub use limits::Limits;
pub use listen::{HalfClose, Listen, ListenTls};
pub use node::Node;
pub use overrides::Overrides;
pub use passthrough::{Network, Passthrough};
pub use picker::Picker;
pub use pools::{AppProtocol, FailureMode, LeaseLimits, PickPer, PinLimits, Pool};
pub use process::{Process, User, parse_user};
pub use reference::reference;
pub use retry::Retry;
pub use routes::{HeaderCondition, HostPattern, ModelPattern, PathPattern, Route, WeightedPool};
pub use schema::json_schema;
pub use steering::{Steering, SteeringMode};
pub use subset::{EmptySubset, Locality, Subset};
pub use timeouts::{TimeoutOverrides, Timeouts};
pub use tracing::{Ratio, Tracing};

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
        /// How large a message may be, and what all messages together may take. Sizes are bytes.
        pub limits: Limits = Limits::default() => section(),
        /// How long things may take.
        pub timeouts: Timeouts = Timeouts::default() => section(),
        /// What requests and responses are told about this hop.
        pub headers: Headers = Headers::default() => section(),
        /// The agent's own answers.
        pub errors: Errors = Errors::default() => section(),
        /// The model, read from request bodies.
        pub bbr: Bbr = Bbr::default() => section(),
        /// Which response bodies the kernel moves, and with what.
        pub steering: Steering = Steering::default() => section(),
        /// Spans to an OpenTelemetry collector. Trace context is passed on whether this is on or off.
        pub tracing: Tracing = Tracing::default() => section(),
        /// Who an agent is that was started as root.
        pub process: Process = Process::default() => section(),
        /// Where this agent runs, in the words that endpoints use; `prefer` of a pool's subset compares the two.
        pub node: Node = Node::default() => section(),
        /// How names become addresses.
        pub dns: Dns = Dns::default() => section(),
        /// At least one; names are unique.
        pub pools: Vec<Pool> = Vec::new() => sections(),
        /// The first route whose conditions all hold wins. No routes: everything goes to the first pool. `host`, `method`, `model` and
        /// `base_model` take one value or an array, of which one must hold.
        pub routes: Vec<Route> = Vec::new() => sections().commented(),
        /// Settings under names that they had in the version before.
        pub warnings: Vec<ConfigWarning> = Vec::new() => Elsewhere(|_| None),
    }
}

impl Config {
    /// The defaults around these pools.
    pub fn new(pools: Vec<Pool>) -> Self {
        Self { pools, ..Self::default() }
    }

    /// Reads and checks the file at `path`, and the certificates and keys that it names.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigErrors> {
        Self::load_with(path, &Overrides::default())
    }

    /// As [`Config::load`], with flags and environment on top, so that the result is checked as it will run.
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

    /// Checks `text` and opens no other file; `file_name` appears in errors, and relative paths in the text start at its folder.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, ConfigErrors> {
        Self::parse_with(text, file_name, &Overrides::default())
    }

    /// As [`Config::parse`], with flags and environment on top.
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

    /// Logs what the file should say otherwise.
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

    /// What concerns several settings.
    fn check(&self, root: &Section<'_>) {
        self.listen.check(&root.at("listen"));
        self.admin.check(&root.at("admin"), &self.listen);
        self.limits.check(&root.at("limits"));
        self.bbr.check(&root.at("bbr"));
        self.steering.check(&root.at("steering"));
        self.dns.check(&root.at("dns"));
        let tls = self.listen.tls.as_ref().map(|tls| tls.address);
        let own = Listeners::new([self.listen.address, self.admin.address].into_iter().chain(tls));
        pools::check(&self.pools, root, self.listen.address, &own, &self.node);
        routes::check(&self.routes, root, &self.pools, &self.bbr);
    }

    /// What stands in the files that settings name.
    fn check_files(&self, root: &Section<'_>) {
        self.listen.check_files(&root.at("listen"));
        pools::check_files(&self.pools, root);
    }
}
