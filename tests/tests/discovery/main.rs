//! Pools that are InferencePools: a whole agent against an API server over HTTP, with steering off.

mod api;
mod changes;
mod doctor;
mod epp;
mod gateway;
mod outage;
mod pods;
mod pools;
mod scene;
mod selection;

use std::time::Duration;

/// Upper bound for events expected soon, with room for a busy machine.
const SOON: Duration = Duration::from_secs(20);
