//! Compares two configurations: which settings a running agent can change, and which need a restart.
//!
//! Pools, routes, timeouts, limits and everything else that a request looks up apply to later requests. What is bound,
//! sized or started once is compared here.

use crate::config::{Config, Listen};

#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    #[error("{} cannot change at run time: restart the agent", .0.join(", "))]
    NeedsRestart(Vec<&'static str>),
    #[error("{0:#}")]
    Pools(anyhow::Error),
    #[error("background tasks stopped; restart the agent: {0:#}")]
    Background(anyhow::Error),
}

/// The names of the settings that differ and need a restart.
pub fn needs_restart(before: &Config, after: &Config) -> Vec<&'static str> {
    // Every field is named, so that a decision has to be made for each new one.
    let Listen {
        address,
        workers,
        max_connections,
        http2_max_streams,
        upgrades: _,
        tls,
        http2_resets: _,
        http2_control_frames: _,
        half_close: _,
        proxy_protocol: _,
        cors: _,
        max_connection_age: _,
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
        models: _,
        steering,
        tracing,
        process,
        node: _,
        dns: _,
        kubernetes,
        pools: _,
        routes: _,
        warnings: _,
    } = before;
    [
        ("listen.address", *address != after.listen.address),
        ("listen.workers", *workers != after.listen.workers),
        ("listen.max_connections", *max_connections != after.listen.max_connections),
        // Whether HTTP/2 is offered in the TLS handshake is fixed at the start.
        (
            "listen.http2_max_streams (from or to 0)",
            tls.is_some() && (*http2_max_streams == 0) != (after.listen.http2_max_streams == 0),
        ),
        ("listen.tls", *tls != after.listen.tls),
        ("listen.tls_handshakes", *tls_handshakes != after.listen.tls_handshakes),
        ("admin", *admin != after.admin),
        ("steering", *steering != after.steering),
        ("tracing", *tracing != after.tracing),
        ("process.user", process.user != after.process.user),
        ("process.groups", process.groups != after.process.groups),
        ("process.upgrade_socket", process.upgrade_socket != after.process.upgrade_socket),
        ("kubernetes", *kubernetes != after.kubernetes),
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
    fn settings_of_bound_resources_need_a_restart() {
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
        assert_eq!(refused, "listen.address, admin, steering cannot change at run time: restart the agent");
    }
}
