//! Requests through an agent with an EPP, in this process and with steering off: routing, the picker's messages and changes, and
//! its failures.

mod abridged;
mod abrupt;
mod away;
mod bodies;
mod changes;
mod coded;
mod connected;
mod conversation;
mod crossed;
mod early;
mod endpoints;
mod excess;
mod failure;
mod flow_control;
mod gone;
mod headers;
mod health;
mod immediate;
mod isolation;
mod leases;
mod leaving;
mod listed;
mod local_faults;
mod loops;
mod measured;
mod metadata;
mod model;
mod mutations;
mod named;
mod names;
mod parity;
mod patience;
mod pins;
mod retries;
mod renamed;
mod replicas;
mod routes;
mod routing;
mod seen;
mod session;
mod silent;
mod stalls;
mod sources;
mod subset;
mod times;
mod tls;
mod tracing;
mod unclean;
mod vanished;

use std::time::Duration;

/// Upper bound for events expected soon, with room for a busy machine.
const SOON: Duration = Duration::from_secs(10);
