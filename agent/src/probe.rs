//! Points at which a test can make the agent fail. Outside of tests no probe can be set.

use std::{fmt, sync::Arc};

use http::request;

/// A point in the agent's execution.
#[derive(Debug, Clone, Copy)]
pub enum Point<'p> {
    /// At the start of the thread with this name.
    Thread(&'p str),
    /// In a worker's own loop, about once a second.
    Worker,
    /// In the thread with this name that waits for events of kernel programs, at least once a second.
    Events(&'p str),
    /// Before a health check of an EPP replica.
    HealthCheck,
    /// Before a request's body and pool are known.
    Request(&'p request::Parts),
    /// When an endpoint has begun to answer, before any of the answer is sent.
    Response(&'p request::Parts),
    /// While an answer is being sent, whenever the delivery waits.
    Body(&'p request::Parts),
}

type ProbeCall = dyn Fn(Point<'_>) + Send + Sync;

/// Called at each [`Point`].
#[derive(Clone, Default)]
pub struct Probe(Option<Arc<ProbeCall>>);

impl Probe {
    /// A probe that calls `call`, from whichever thread reaches a point.
    pub fn new(call: impl Fn(Point<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(call)))
    }

    /// Calls the probe, if one is set.
    pub(crate) fn at(&self, point: Point<'_>) {
        if let Some(call) = &self.0 {
            call(point);
        }
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Probe").field(&self.0.is_some()).finish()
    }
}
