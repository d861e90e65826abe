//! One endpoint of a pool: what its source says about it, and the state that it keeps across snapshots.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{health::Health, in_flight::Counter};
use crate::{
    config::{self, HealthCheck},
    metrics::EndpointState,
};

/// One endpoint of a snapshot.
#[derive(Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub node: Option<String>,
    pub zone: Option<String>,
    pub draining: bool,
    pub(super) state: Arc<KeptState>,
}

/// The state that an endpoint keeps across snapshots.
#[derive(Debug)]
pub(super) struct KeptState {
    id: u32,
    pub(super) in_flight: Counter,
    pub(super) health: Health,
}

impl KeptState {
    pub(super) fn new(id: u32) -> Self {
        Self { id, in_flight: Counter::default(), health: Health::default() }
    }
}

impl Endpoint {
    pub(super) fn new(listed: config::ListedEndpoint, state: Arc<KeptState>) -> Self {
        let config::ListedEndpoint { address, node, zone, draining } = listed;
        Self { address, node, zone, draining, state }
    }

    /// An id that no other endpoint of the set has ever had.
    pub fn id(&self) -> u32 {
        self.state.id
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.state.in_flight.now()
    }

    /// Whether requests go to other endpoints if there are any.
    pub fn is_avoided(&self, now: Instant) -> bool {
        self.state.health.is_avoided(now)
    }

    /// The time until a probe may be sent. Returns `None` if the endpoint is not ejected.
    pub fn ejected_for(&self, now: Instant) -> Option<Duration> {
        self.state.health.ejected_until().map(|until| until.saturating_duration_since(now))
    }

    /// A health check ended. Returns true if the endpoint went up or down.
    pub fn checked(&self, healthy: bool, rules: &HealthCheck) -> bool {
        self.state.health.checked(healthy, rules)
    }

    /// The state for the metrics. Draining comes before unhealthy, and unhealthy before ejected.
    pub fn state(&self) -> EndpointState {
        if self.draining {
            EndpointState::Draining
        } else if self.state.health.is_down() {
            EndpointState::Unhealthy
        } else if self.state.health.is_ejected() {
            EndpointState::Ejected
        } else {
            EndpointState::Ready
        }
    }
}
