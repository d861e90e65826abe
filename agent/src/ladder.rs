//! The ladder of steering paths: which of them have proven themselves on this kernel, best first, and why the others
//! have not.
//!
//! Takes the settings, loads the kernel programs and runs each path's self-test. User space carries whatever no path
//! carries, so nothing here fails the start: a path that is missing or fails is off, with a reason.

use std::{sync::Arc, time::Instant};

use caps::Capability;
use penstock_common::path::Path;

use crate::{
    capability,
    config::{self, Interfaces, SteeringMode},
    kernel::{
        Kernel, LoadError, socket, version,
        wire::{Adoption, Namespace, Wire, WireError, interfaces},
    },
    metrics::Metrics,
    selftest::{self, Case, Check, WIRE_CASES, WireCase},
    steer::SteeringSupport,
};

/// A path and its self-test.
struct PathTest {
    path: Path,
    cases: &'static [Case],
}

/// Best first. Path `local` falls back on path `ingress`, which therefore has to work without it.
const LOCAL: PathTest = PathTest { path: Path::Local, cases: selftest::CASES };
const INGRESS: PathTest = PathTest { path: Path::Ingress, cases: selftest::CASES };
const PATHS: [PathTest; 2] = [LOCAL, INGRESS];

/// What the start has found out about the paths.
pub struct Ladder {
    /// The kernel programs, which serve the ready paths.
    pub program: Program,
    /// One per path, best first.
    pub rungs: Vec<Rung>,
    /// The kernel release, if steering was forced on a kernel that would have been refused.
    pub forced: Option<String>,
    /// Whether clients' send buffers exceed `net.core.wmem_max`, which needs a capability that only the start has.
    pub forces_buffers: bool,
    /// Flows of agents that are gone.
    pub adoption: Option<Adoption>,
    /// What else `/readyz?verbose` says about the paths.
    pub notes: Vec<String>,
}

/// The state of the kernel programs.
pub enum Program {
    /// Those of the paths `local` and `ingress`, of which one is ready.
    Loaded(Arc<Kernel>),
    /// The programs of path `wire` alone.
    Wire(Arc<Wire>),
    /// Loaded, and unloaded again because no path is ready.
    Unproven,
    /// Not requested: the settings turn steering off.
    Off,
    /// Not tried on this kernel.
    Refused(Arc<str>),
    /// They could not be loaded, for this reason.
    Failed(Arc<str>),
}

/// One path, and what its self-test has shown.
pub struct Rung {
    /// The path that was tried.
    pub path: Path,
    /// The checks that ran; empty if none did.
    pub checks: Vec<Check>,
    /// Whether flows can take the path.
    pub state: RungState,
    /// Why no self-test has run, although the path is ready.
    pub unproven: Option<Arc<str>>,
    /// How an endpoint can observe that its socket is in a map while bytes for it wait there. If it can, upgraded and
    /// pinned connections do not use the path unless the settings demand it.
    pub endpoint_visible: Option<Arc<str>>,
}

/// Whether flows can take a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RungState {
    /// It has passed every case of its self-test.
    Ready,
    /// The settings do not ask for it.
    Unasked,
    /// It is not used, for this reason.
    Off(Arc<str>),
}

impl Ladder {
    /// Loads the programs and runs the self-tests. Blocks, on a runtime of its own, so it must not be called from
    /// within a runtime.
    pub fn climb(config: &config::Steering) -> Self {
        Self::climb_on(&version::release(), config)
    }

    fn climb_on(release: &str, config: &config::Steering) -> Self {
        if config.mode == SteeringMode::Off {
            return Self::without(Program::Off, &RungState::Unasked);
        }
        if config.mode == SteeringMode::Wire {
            return Self::wire(config);
        }
        let sound = version::is_sound(release);
        if !sound && !config.force {
            let why: Arc<str> =
                format!("kernel {release} may lose or repeat bytes in sockmap; use --force to steer anyway").into();
            return Self::without(Program::Refused(Arc::clone(&why)), &RungState::Off(why));
        }
        if let Err(error) = selftest::check_loopback() {
            let why: Arc<str> = format!("the self-test needs loopback connections: {error:#}").into();
            return Self::without(Program::Failed(Arc::clone(&why)), &RungState::Off(why));
        }
        match Self::load(config, &PATHS) {
            Ok(ladder) => Self { forced: (!sound).then(|| release.to_owned()), ..ladder },
            Err(error) => {
                tracing::debug!("{error}");
                let why: Arc<str> = failure(&error, &capability::missing()).into();
                Self::without(Program::Failed(Arc::clone(&why)), &RungState::Off(why))
            }
        }
    }

    /// Loads the programs and runs the self-tests of both paths.
    fn load(config: &config::Steering, [local, ingress]: &[PathTest; 2]) -> Result<Self, LoadError> {
        let mut kernel = Kernel::load(config.max_flows)?;
        let asked = config.mode != SteeringMode::Ingress;
        if asked {
            kernel.try_local(config.cgroup.as_deref());
        }
        if kernel.local().is_ok() {
            match selftest::how_visible(&mut kernel) {
                Ok(how) => kernel.set_endpoint_visible(how),
                Err(error) => kernel.set_endpoint_visible(Some(format!("cannot test its calls: {error:#}").into())),
            }
        }
        let mut kernel = Arc::new(kernel);
        let mut first = match kernel.local() {
            Ok(()) => Rung::prove(local, &kernel),
            Err(why) => Rung {
                path: local.path,
                checks: Vec::new(),
                state: RungState::Off(why),
                unproven: None,
                endpoint_visible: None,
            },
        };
        match &first.state {
            _ if !asked => first.state = RungState::Unasked,
            RungState::Off(why) if kernel.local().is_ok() => {
                // Reload without the programs of path `local`, which would inspect every endpoint's messages for
                // nothing.
                drop(kernel);
                let mut without = Kernel::load(config.max_flows)?;
                without.without_local(why);
                kernel = Arc::new(without);
            }
            _ => {}
        }
        let second = Rung::prove(ingress, &kernel);
        first.endpoint_visible = kernel.endpoint_visible();
        if let (SteeringMode::Local, Some(how)) = (config.mode, &first.endpoint_visible) {
            tracing::warn!(
                %how,
                "mode local also carries upgraded and pinned connections and endpoints with blocking sockets, whose calls may then hang or fail"
            );
        }
        if first.state == RungState::Ready && second.state != RungState::Ready {
            first.state = RungState::Off("it needs path ingress as fallback, which is off".into());
        }
        // After the self-tests, whose sockets block.
        kernel.set_admits_blocking(config.mode == SteeringMode::Local);
        // If nothing is steered, no program may run and no client gets a larger buffer.
        let (program, forces_buffers) = match second.state {
            RungState::Ready => (Program::Loaded(kernel), forces(config.client_send_buffer)),
            _ => (Program::Unproven, false),
        };
        let rungs = vec![first, second];
        Ok(Self { program, rungs, forced: None, forces_buffers, adoption: None, notes: Vec::new() })
    }

    /// Loads the programs of path `wire` alone, pins and attaches them.
    fn wire(config: &config::Steering) -> Self {
        let mut rung = Rung::prove_wire(WIRE_CASES);
        let mut notes = Vec::new();
        let attached = match &rung.state {
            RungState::Ready => Self::attach_wire(config, &mut notes).map_err(|error| {
                tracing::debug!("{error}");
                error.reason().into()
            }),
            RungState::Off(why) => Err(Arc::clone(why)),
            RungState::Unasked => Err("not requested".into()),
        };
        let (program, adoption) = match attached {
            Ok((wire, adoption)) => (Program::Wire(wire), adoption),
            Err(why) => {
                rung.state = RungState::Off(Arc::clone(&why));
                (Program::Failed(why), None)
            }
        };
        let others = PATHS.iter().map(|entry| Rung::new(entry.path, RungState::Unasked));
        let rungs = others.chain([rung]).collect();
        Self { program, rungs, forced: None, forces_buffers: false, adoption, notes }
    }

    fn attach_wire(
        config: &config::Steering,
        notes: &mut Vec<String>,
    ) -> Result<(Arc<Wire>, Option<Adoption>), WireError> {
        let mut wire = Wire::load(config.max_flows)?;
        let mut pinned = None;
        match Namespace::open(&config.bpffs).map_err(WireError::from) {
            Ok(None) => {}
            Ok(Some(namespace)) => match wire.pin(&namespace) {
                Ok(()) => pinned = Some(namespace),
                Err(error) => notes.push(format!("flows end with the agent: {}", error.reason())),
            },
            Err(error) => notes.push(format!("flows end with the agent: {}", error.reason())),
        }
        let names = match &config.interfaces {
            Interfaces::Named(names) => names.clone(),
            Interfaces::Auto => interfaces()?,
        };
        if names.is_empty() {
            return Err(WireError::Attach("auto".to_owned(), "found no Ethernet interface".to_owned()));
        }
        names.iter().try_for_each(|name| wire.attach(name))?;
        let wire = Arc::new(wire);
        let adoption = pinned.map(|namespace| wire.adoption(namespace));
        Ok((wire, adoption))
    }

    /// A ladder with every path off for the same reason.
    fn without(program: Program, state: &RungState) -> Self {
        let off = |entry: &PathTest| Rung::new(entry.path, state.clone());
        let rungs = PATHS.iter().map(off).collect();
        Self { program, rungs, forced: None, forces_buffers: false, adoption: None, notes: Vec::new() }
    }

    /// Whether flows can take this path.
    pub fn is_ready(&self, path: Path) -> bool {
        self.rungs.iter().any(|rung| rung.path == path && rung.state == RungState::Ready)
    }

    /// The steering that workers use.
    pub fn steering(&self) -> SteeringSupport {
        match &self.program {
            Program::Off => SteeringSupport::Off,
            Program::Loaded(kernel) => SteeringSupport::Active(Arc::clone(kernel)),
            Program::Wire(wire) => SteeringSupport::Wire(Arc::clone(wire)),
            _ => SteeringSupport::Unavailable(self.why().into()),
        }
    }

    /// Why no path is ready.
    fn why(&self) -> String {
        if let Program::Refused(why) | Program::Failed(why) = &self.program {
            return why.to_string();
        }
        self.rungs.iter().map(Rung::describe).collect::<Vec<_>>().join("; ")
    }

    /// One line for logs.
    pub fn describe(&self) -> String {
        if let Program::Off = self.program {
            return "steering: off (configured)".to_owned();
        }
        let ready = self.rungs.iter().filter(|rung| rung.state == RungState::Ready).map(|rung| rung.path.label());
        let ready = ready.collect::<Vec<_>>().join(", ");
        match &self.forced {
            _ if ready.is_empty() => format!("steering: unavailable: {}", self.why()),
            None => format!("steering: active ({ready})"),
            Some(release) => {
                format!("steering: active ({ready}), forced on kernel {release}, which may lose or repeat bytes")
            }
        }
    }

    /// The lines of `/readyz?verbose`: the summary, then each path.
    pub fn lines(&self) -> Vec<String> {
        let paths = self.rungs.iter().map(|rung| format!("path {}", rung.describe()));
        let notes = self.notes.iter().map(|note| format!("path wire: {note}"));
        std::iter::once(self.describe()).chain(paths).chain(notes).collect()
    }

    /// Reports the result in the log and the metrics.
    pub fn announce(&self, metrics: &Metrics) {
        if self.forced.is_some() || matches!(self.steering(), SteeringSupport::Unavailable(_)) {
            tracing::warn!("{}", self.describe());
        } else {
            tracing::info!("{}", self.describe());
        }
        for note in &self.notes {
            tracing::warn!("path wire: {note}");
        }
        for rung in &self.rungs {
            let reason = match (&rung.state, &self.forced) {
                (RungState::Off(why), _) => why.to_string(),
                (RungState::Unasked, _) => "configured".to_owned(),
                (RungState::Ready, None) if rung.unproven.is_some() => {
                    rung.besides().trim_start_matches(", ").to_owned()
                }
                (RungState::Ready, None) => format!("passed{}", rung.besides()),
                (RungState::Ready, Some(release)) => format!("passed, forced on kernel {release}{}", rung.besides()),
            };
            // If all paths are off for the same reason, the summary includes it already.
            if matches!(rung.state, RungState::Off(_)) && matches!(self.steering(), SteeringSupport::Active(_)) {
                tracing::warn!("path {}", rung.describe());
            }
            if rung.unproven.is_some() {
                tracing::warn!("path {}", rung.describe());
            }
            metrics.set_steering_path(rung.path, rung.state == RungState::Ready, &reason);
        }
    }
}

impl Rung {
    fn new(path: Path, state: RungState) -> Self {
        Self { path, checks: Vec::new(), state, unproven: None, endpoint_visible: None }
    }

    /// Runs the self-test of path `wire` where this process may make network namespaces. Where it may not, the path is ready all the
    /// same: only settings that name it use it.
    pub fn prove_wire(cases: &[WireCase]) -> Self {
        let mut rung = Self::new(Path::Wire, RungState::Ready);
        match selftest::prove_wire(cases) {
            Ok(checks) => rung.checks = checks,
            Err(error) => rung.unproven = Some(format!("{error:#}").into()),
        }
        rung.judge();
        rung
    }

    /// Runs the self-test without capabilities, as workers run.
    fn prove(entry: &PathTest, kernel: &Arc<Kernel>) -> Self {
        let mut rung = Self::new(entry.path, RungState::Ready);
        let deadline = Instant::now() + selftest::LIMIT;
        match capability::with(&[], || selftest::prove(kernel, entry.path, entry.cases, deadline)) {
            Ok(checks) => rung.checks = checks,
            Err(error) => rung.state = RungState::Off(format!("the self-test could not run: {error:#}").into()),
        }
        rung.judge();
        rung
    }

    /// Switches the path off if a check has failed.
    fn judge(&mut self) {
        let failed = self.checks.iter().find_map(|check| Some((check.case, check.failure.as_ref()?)));
        if let Some((case, failure)) = failed {
            self.state = RungState::Off(format!("self-test: {case}: {failure}").into());
        }
    }

    /// What else there is to say of a path that is ready.
    fn besides(&self) -> String {
        let visible = |how| format!(", endpoint_visible for upgraded and pinned connections: {how}");
        let unproven = |why| format!(", without a self-test: {why}");
        let (visible, unproven) = (self.endpoint_visible.as_ref().map(visible), self.unproven.as_ref().map(unproven));
        visible.into_iter().chain(unproven).collect()
    }

    /// The path and its state, as in a line of `/readyz?verbose`.
    fn describe(&self) -> String {
        match &self.state {
            RungState::Ready => format!("{}: ready{}", self.path.label(), self.besides()),
            RungState::Unasked => format!("{}: off (configured)", self.path.label()),
            RungState::Off(why) => format!("{}: off: {why}", self.path.label()),
        }
    }
}

/// Whether a send buffer of this size needs a capability.
fn forces(send_buffer: u32) -> bool {
    !capability::with(&[], || socket::may_have_send_buffer(send_buffer)).unwrap_or(false)
}

/// Why the programs are not loaded, with the capabilities that this process lacks.
fn failure(error: &LoadError, missing: &[Capability]) -> String {
    let reason = error.reason();
    if missing.is_empty() {
        return reason;
    }
    let names: Vec<_> = missing.iter().map(ToString::to_string).collect();
    format!("this process lacks {}: {reason}", names.join(", "))
}

#[cfg(test)]
mod tests;
