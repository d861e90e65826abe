//! The timeouts of a request: from its route, else its pool, else `[timeouts]`.

use std::time::Duration;

use crate::config::{TimeoutOverrides, Timeouts};

/// Timeouts of one request. `None` means no timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestTimeouts {
    pub body: Option<Duration>,
    pub first_byte: Option<Duration>,
    pub idle: Option<Duration>,
    pub request: Option<Duration>,
    pub dispatch: Option<Duration>,
}

impl From<&Timeouts> for RequestTimeouts {
    fn from(timeouts: &Timeouts) -> Self {
        let &Timeouts { body, first_byte, idle, request, dispatch, .. } = timeouts;
        Self { body, first_byte, idle, request, dispatch }
    }
}

impl RequestTimeouts {
    /// Returns these timeouts with `overrides` applied.
    #[must_use]
    pub fn with(self, overrides: &TimeoutOverrides) -> Self {
        Self {
            body: overrides.body.unwrap_or(self.body),
            first_byte: overrides.first_byte.unwrap_or(self.first_byte),
            idle: overrides.idle.unwrap_or(self.idle),
            request: overrides.request.unwrap_or(self.request),
            dispatch: overrides.dispatch.unwrap_or(self.dispatch),
        }
    }
}
