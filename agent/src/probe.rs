//! Places at which a test can make the agent fail. A process that is not a test has no way to set a probe.

use std::{fmt, sync::Arc};

use http::request;

/// Where the agent is.
#[derive(Debug, Clone, Copy)]
pub enum Point<'p> {
    /// At the beginning of a thread of this name.
    Thread(&'p str),
    /// In a worker's own work, about once a second.
    Worker,
    /// In the thread of the kernel's events, about once a second.
    Events,
    /// With a request whose body and pool are not known yet.
    Request(&'p request::Parts),
    /// With a request that an endpoint has begun to answer, before anything of the answer is sent.
    Response(&'p request::Parts),
    /// With a request whose answer has been sent.
    Answered(&'p request::Parts),
}

type Call = dyn Fn(Point<'_>) + Send + Sync;

/// Called at each [`Point`].
#[derive(Clone, Default)]
pub struct Probe(Option<Arc<Call>>);

impl Probe {
    pub fn new(call: impl Fn(Point<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(call)))
    }

    pub fn at(&self, point: Point<'_>) {
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
