//! Compares two configurations: which settings a running agent can change, and which need a restart.
//!
//! Pools, routes, timeouts, limits and everything else that a request looks up apply to later requests. What is bound,
//! sized or started once is compared here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::{Config, Listen, ListenTls, Steering, SteeringMode};

#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    #[error("{} cannot change at run time: restart the agent", .0.join(", "))]
    NeedsRestart(Vec<&'static str>),
    #[error("{0:#}")]
    Listen(anyhow::Error),
    #[error("{0:#}")]
    Pools(anyhow::Error),
    #[error("background tasks stopped; restart the agent: {0:#}")]
    Background(anyhow::Error),
}

/// The names of the settings that differ and need a restart. `started`: the steering mode that the agent was started with.
pub fn needs_restart(started: SteeringMode, before: &Config, after: &Config) -> Vec<&'static str> {
    // Every field is named, so that a decision has to be made for each new one.
    let Config {
        listen: _,
        admin,
        limits: _,
        timeouts: _,
        headers: _,
        errors: _,
        bbr: _,
        models: _,
        steering: _,
        tracing,
        process,
        node: _,
        dns: _,
        kubernetes,
        pools: _,
        routes: _,
        warnings: _,
    } = before;
    let rest = [
        ("admin", *admin != after.admin),
        ("tracing", *tracing != after.tracing),
        ("process.user", process.user != after.process.user),
        ("process.groups", process.groups != after.process.groups),
        ("process.upgrade_socket", process.upgrade_socket != after.process.upgrade_socket),
        ("kubernetes", *kubernetes != after.kubernetes),
    ];
    let listen = listen(&before.listen, &after.listen);
    let changed = listen.into_iter().chain(steering(started, &before.steering, &after.steering)).chain(rest);
    changed.filter_map(|(setting, differs)| differs.then_some(setting)).collect()
}

type ChangedSetting = (&'static str, bool);

const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

fn listen(before: &Listen, after: &Listen) -> [ChangedSetting; 3] {
    let Listen {
        address: _,
        workers: _,
        max_connections: _,
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
    } = before;
    // Its address can change.
    let fixed = |tls: &Option<ListenTls>| tls.clone().map(|tls| ListenTls { address: NOWHERE, ..tls });
    [
        // Whether HTTP/2 is offered in the TLS handshake is fixed at the start.
        (
            "listen.http2_max_streams (from or to 0)",
            tls.is_some() && (*http2_max_streams == 0) != (after.http2_max_streams == 0),
        ),
        ("listen.tls (other than its address)", fixed(tls) != fixed(&after.tls)),
        ("listen.tls_handshakes", *tls_handshakes != after.tls_handshakes),
    ]
}

fn steering(started: SteeringMode, before: &Steering, after: &Steering) -> [ChangedSetting; 9] {
    let Steering {
        mode,
        cgroup,
        min_bytes: _,
        max_remote_bytes: _,
        client_send_buffer,
        endpoint_receive_buffer,
        max_flows,
        interfaces,
        bpffs,
        at_stop,
        force,
    } = before;
    [
        ("steering.mode", *mode != after.mode && !is_loaded(started, after.mode)),
        ("steering.cgroup", *cgroup != after.cgroup),
        ("steering.client_send_buffer", *client_send_buffer != after.client_send_buffer),
        ("steering.endpoint_receive_buffer", *endpoint_receive_buffer != after.endpoint_receive_buffer),
        ("steering.max_flows", *max_flows != after.max_flows),
        ("steering.interfaces", *interfaces != after.interfaces),
        ("steering.bpffs", *bpffs != after.bpffs),
        ("steering.at_stop", *at_stop != after.at_stop),
        ("steering.force", *force != after.force),
    ]
}

/// Whether an agent that was started in mode `started` has the kernel programs of `mode`.
fn is_loaded(started: SteeringMode, mode: SteeringMode) -> bool {
    use SteeringMode::{Auto, Ingress, Local, Off, Wire};
    match (started, mode) {
        (Auto, Auto | Ingress | Off) | (Ingress, Ingress | Off) | (Local, Local | Off) => true,
        // Mode `local` also admits endpoints with blocking sockets, which is set when the programs are loaded.
        (Auto, Local) | (Ingress | Local, Auto) | (Ingress, Local) | (Local, Ingress) => false,
        // Path `wire` watches connections from their start.
        (Wire, _) | (_, Wire) | (Off, _) => started == mode,
    }
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
        after.listen.address.set_port(1);
        (after.listen.workers, after.listen.max_connections) = (7, 8);
        after.process.upgrade_drain = None;
        (after.steering.min_bytes, after.steering.max_remote_bytes) = (1, 2);
        let needed = |after: &Config| needs_restart(SteeringMode::Auto, &before, after);
        assert_eq!(needed(&after), [""; 0]);
        after.admin.address.set_port(2);
        after.steering.max_flows += 1;
        after.listen.tls_handshakes += 1;
        let refused = ReloadError::NeedsRestart(needed(&after)).to_string();
        assert_eq!(
            refused,
            "listen.tls_handshakes, steering.max_flows, admin cannot change at run time: restart the agent"
        );
    }

    #[test]
    fn steering_mode_can_change_to_what_was_loaded() {
        use SteeringMode::{Auto, Ingress, Local, Off, Wire};
        let allowed = [
            (Auto, vec![Auto, Ingress, Off]),
            (Ingress, vec![Ingress, Off]),
            (Local, vec![Local, Off]),
            (Off, vec![Off]),
            (Wire, vec![Wire]),
        ];
        for (started, allowed) in allowed {
            for mode in [Auto, Ingress, Local, Off, Wire] {
                let mut before = Config::new(vec![Pool::new("a", vec![])]);
                before.steering.mode = started;
                let mut after = before.clone();
                after.steering.mode = mode;
                let expected: &[&str] = if allowed.contains(&mode) { &[] } else { &["steering.mode"] };
                assert_eq!(needs_restart(started, &before, &after), expected, "{started:?} {mode:?}");
                // Back to what it was started with.
                assert_eq!(needs_restart(started, &after, &before), [""; 0]);
            }
        }
    }
}
