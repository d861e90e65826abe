//! Runs the agent inside the test process on its own ports.
//!
//! A test that asks for steering requires it: on a machine that cannot steer, the test fails with the reason.

use std::{net::SocketAddr, sync::Once, time::Duration};

use anyhow::{Context as _, Result, bail};
use penstock_agent::{
    Agent,
    config::{Bpffs, Config, Epp, FailureMode, Picker, Pool, SteeringMode},
    parts::Probe,
};
use penstock_common::path::Path;
use tracing_subscriber::EnvFilter;

/// An agent that stops when dropped.
pub struct TestAgent {
    pub agent: Agent,
    pub addr: SocketAddr,
    config: Config,
}

/// One pool over `endpoints` with the built-in picker.
pub fn builtin_pool(endpoints: &[SocketAddr]) -> Pool {
    Pool::new("default", endpoints.to_vec())
}

/// One pool over `endpoints`, picked by the EPP at `epp`.
pub fn epp_pool(endpoints: &[SocketAddr], epp: SocketAddr, failure_mode: FailureMode) -> Pool {
    epps_pool(endpoints, &[epp], failure_mode)
}

/// Like [`epp_pool`], with several replicas. Without health checks, so that a picker sees only streams of requests; and no request
/// waits for an unreachable picker.
pub fn epps_pool(endpoints: &[SocketAddr], epps: &[SocketAddr], failure_mode: FailureMode) -> Pool {
    let addresses = epps.iter().map(ToString::to_string).collect();
    // On a busy machine a picker may take longer than the default to say that it serves HTTP/2.
    let connect_timeout = Duration::from_secs(10);
    let epp = Epp { addresses, health_interval: None, connect_timeout, unreachable_wait: Some(None), ..Epp::new("") };
    Pool { picker: Picker::Epp(epp), failure_mode, ..builtin_pool(endpoints) }
}

impl TestAgent {
    /// Starts with one pool; `adjust` changes the configuration for the test.
    pub fn start(pool: Pool, steering: SteeringMode, adjust: impl FnOnce(&mut Config)) -> Self {
        Self::try_start(pool, steering, adjust).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Like [`Self::start`], with a probe that makes the agent fail.
    pub fn start_with(pool: Pool, steering: SteeringMode, probe: Probe, adjust: impl FnOnce(&mut Config)) -> Self {
        Self::begin(pool, steering, probe, adjust).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Like [`Self::start`]; returns an error if the agent does not start or cannot steer as configured.
    pub fn try_start(pool: Pool, steering: SteeringMode, adjust: impl FnOnce(&mut Config)) -> Result<Self> {
        Self::begin(pool, steering, Probe::default(), adjust)
    }

    fn begin(pool: Pool, steering: SteeringMode, probe: Probe, adjust: impl FnOnce(&mut Config)) -> Result<Self> {
        trace();
        let mut config = Config::new(vec![pool]);
        config.listen.address = SocketAddr::from(([127, 0, 0, 1], 0));
        config.listen.workers = 2;
        config.admin.address = SocketAddr::from(([127, 0, 0, 1], 0));
        config.steering.mode = steering;
        config.steering.max_flows = 4096;
        // Tests do not find what others have left.
        config.steering.bpffs = Bpffs::Off;
        config.timeouts.drain = Duration::from_secs(5);
        adjust(&mut config);
        let wanted = match config.steering.mode {
            SteeringMode::Off => None,
            SteeringMode::Local => Some(Path::Local),
            SteeringMode::Auto | SteeringMode::Ingress => Some(Path::Ingress),
            SteeringMode::Wire => Some(Path::Wire),
        };
        // The self-test starts its own runtime, which cannot be nested in the test's.
        let begun = config.clone();
        let start = std::thread::spawn(|| Agent::start_with(begun, probe));
        let agent = start.join().expect("the agent's start panicked").context("could not start the agent")?;
        if wanted.is_some_and(|path| !agent.ladder().is_ready(path)) {
            bail!("this test needs steering: {:#?}", agent.ladder().lines());
        }
        Ok(Self { addr: agent.address(), agent, config })
    }

    /// The configuration it was started with.
    pub fn config(&self) -> Config {
        self.config.clone()
    }

    /// Sum of the samples of a metric whose labels contain all of `labels` (`path="ingress"`); 0 without samples.
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        sum(&self.agent.metrics().encode(), name, labels)
    }

    /// Steered body bytes on any path.
    pub fn steered(&self) -> u64 {
        ["ingress", "local", "wire"]
            .map(|path| self.count("penstock_body_bytes_total", &[&format!("path=\"{path}\"")]))
            .iter()
            .sum()
    }

    /// Steered bytes from clients, after a protocol switch or on a pinned connection.
    pub fn steered_up(&self) -> u64 {
        self.count("penstock_upstream_bytes_total", &[r#"path="ingress""#])
    }

    /// Whether an endpoint could notice that its socket is in a map, so that mode `auto` keeps tunnels and pinned connections off the
    /// path `local`.
    pub fn is_endpoint_visible(&self) -> bool {
        self.agent.ladder().lines().iter().any(|line| line.contains("endpoint_visible"))
    }

    /// Whether the path `local` carries tunnels and pinned connections in this mode, if both ends are on this machine.
    pub fn carries_tunnels_locally(&self) -> bool {
        match self.config.steering.mode {
            SteeringMode::Local => true,
            SteeringMode::Auto => !self.is_endpoint_visible(),
            SteeringMode::Off | SteeringMode::Ingress | SteeringMode::Wire => false,
        }
    }

    /// Like [`Self::metric`], for a counter.
    pub fn count(&self, name: &str, labels: &[&str]) -> u64 {
        self.metric(name, labels) as u64
    }
}

/// Sum of the samples of a metric in `text` whose labels contain all of `labels`.
pub fn sum(text: &str, name: &str, labels: &[&str]) -> f64 {
    let samples = text.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Sends the agent's log to the test's output, which a failure prints. `PENSTOCK_LOG` filters.
fn trace() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let filter = EnvFilter::try_from_env("PENSTOCK_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
        tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().init();
    });
}
