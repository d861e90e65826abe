//! What a running agent can take from another configuration, and what only a start can.
//!
//! Pools, routes, timeouts, limits and all else that a request looks up apply to the requests that come after. What is bound,
//! sized or started once is compared here.

use crate::config::{Config, Listen};

#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    #[error("{} cannot change while the agent runs: restart it", .0.join(", "))]
    NeedsRestart(Vec<&'static str>),
    #[error("{0:#}")]
    Pools(anyhow::Error),
    #[error("what goes on beside requests has ended, and the agent is to be started again: {0:#}")]
    Beside(anyhow::Error),
}

/// The settings that differ and cannot be taken, as they are named in the file.
pub fn needs_restart(before: &Config, after: &Config) -> Vec<&'static str> {
    // Every field is named, so that a new one is decided on.
    let Listen {
        address,
        workers,
        max_connections,
        http2_max_streams: _,
        upgrades: _,
        tls,
        http2_resets: _,
        http2_control_frames: _,
        half_close: _,
        tls_handshakes,
    } = &before.listen;
    let Config {
        listen: _,
        admin,
        limits: _,
        timeouts: _,
        headers: _,
        errors: _,
        bbr: _,
        steering,
        tracing,
        process,
        node: _,
        dns: _,
        pools: _,
        routes: _,
    } = before;
    [
        ("listen.address", *address != after.listen.address),
        ("listen.workers", *workers != after.listen.workers),
        ("listen.max_connections", *max_connections != after.listen.max_connections),
        ("listen.tls", *tls != after.listen.tls),
        ("listen.tls_handshakes", *tls_handshakes != after.listen.tls_handshakes),
        ("admin", *admin != after.admin),
        ("steering", *steering != after.steering),
        ("tracing", *tracing != after.tracing),
        ("process", *process != after.process),
    ]
    .into_iter()
    .filter_map(|(setting, differs)| differs.then_some(setting))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Pool, Route};

    #[test]
    fn what_requests_look_up_can_change_and_what_is_bound_cannot() {
        let before = Config::new(vec![Pool::new("a", vec![])]);
        let mut after = Config::new(vec![Pool::new("b", vec![])]);
        after.routes = vec![Route::to("b")];
        after.timeouts.idle = None;
        after.limits.body_bytes = 1;
        after.listen.upgrades = vec![];
        assert!(needs_restart(&before, &after).is_empty());
        after.listen.address.set_port(1);
        after.admin.address.set_port(2);
        after.steering.max_flows += 1;
        let refused = ReloadError::NeedsRestart(needs_restart(&before, &after)).to_string();
        assert_eq!(refused, "listen.address, admin, steering cannot change while the agent runs: restart it");
    }
}
