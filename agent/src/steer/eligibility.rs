//! Which path carries a response body: one pure rule, which also gives the reason.

use penstock_common::{
    framing::{Framing, state},
    path::Path,
};

use super::reason::SteerReason;
use crate::config::{Steering, SteeringMode};

/// What is known of a response when its head has been read.
#[derive(Debug, Clone, Copy)]
pub struct Response {
    /// The kernel program is loaded and has proven itself, and the endpoint's connection has a slot.
    pub registered: bool,
    /// The body still to come.
    pub framing: Framing,
    /// `Content-Type: text/event-stream`.
    pub event_stream: bool,
    /// The endpoint's address is on this machine.
    pub local_endpoint: bool,
    /// The endpoint's own socket has been recognised, and can reach the client's.
    pub local_socket: bool,
    /// Why only user space can carry it, whatever the settings.
    pub barrier: Option<SteerReason>,
}

/// The path, and why.
pub fn choose(config: &Steering, response: &Response) -> (Path, SteerReason) {
    let relay = |reason| (Path::Relay, reason);
    let framing = &response.framing;
    if framing.is_done() {
        return relay(SteerReason::Complete);
    }
    if config.mode == SteeringMode::Off {
        return relay(SteerReason::Off);
    }
    if let Some(barrier) = response.barrier {
        return relay(barrier);
    }
    if !response.registered {
        return relay(SteerReason::Unavailable);
    }
    match config.mode {
        SteeringMode::Ingress => return (Path::Ingress, SteerReason::Forced),
        SteeringMode::Local if response.local_socket => return (Path::Local, SteerReason::Forced),
        SteeringMode::Local => return relay(SteerReason::NotLocal),
        SteeringMode::Auto | SteeringMode::Off => {}
    }
    // What an endpoint on this machine sends goes from memory to memory, in whatever pieces.
    let (path, near) = match response.local_socket {
        true => (Path::Local, true),
        false => (Path::Ingress, response.local_endpoint),
    };
    match framing.state {
        state::LENGTH if framing.left < config.min_bytes => relay(SteerReason::Small),
        state::LENGTH if !near && framing.left > config.max_remote_bytes => relay(SteerReason::LargeRemote),
        state::LENGTH => (path, SteerReason::Length),
        _ if response.event_stream => (path, SteerReason::EventStream),
        _ if !near => relay(SteerReason::UnsizedRemote),
        state::UNTIL_CLOSE => (path, SteerReason::UntilClose),
        _ => (path, SteerReason::Chunked),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(mode: SteeringMode) -> Steering {
        Steering {
            mode,
            cgroup: None,
            min_bytes: 1000,
            max_remote_bytes: 5000,
            client_send_buffer: 1,
            endpoint_receive_buffer: 1,
            max_flows: 1,
            force: false,
        }
    }

    #[test]
    fn each_reason_has_its_case() {
        let base = Response {
            registered: true,
            framing: Framing::chunked(),
            event_stream: false,
            local_endpoint: true,
            local_socket: false,
            barrier: None,
        };
        let length = |n| Response { framing: Framing::length(n), ..base };
        let remote = |r: Response| Response { local_endpoint: false, ..r };
        let own = |r: Response| Response { local_socket: true, ..r };
        use Path::{Ingress, Local, Relay};
        use SteeringMode::{Auto, Ingress as Forced, Local as ForcedLocal, Off};
        let rows = [
            (Auto, base, (Ingress, SteerReason::Chunked)),
            (Auto, Response { framing: Framing::none(), ..base }, (Relay, SteerReason::Complete)),
            (Off, base, (Relay, SteerReason::Off)),
            (Auto, Response { registered: false, ..base }, (Relay, SteerReason::Unavailable)),
            (Auto, Response { barrier: Some(SteerReason::Http10), ..base }, (Relay, SteerReason::Http10)),
            (Forced, Response { barrier: Some(SteerReason::Http10), ..base }, (Relay, SteerReason::Http10)),
            (Off, Response { barrier: Some(SteerReason::Tls), ..base }, (Relay, SteerReason::Off)),
            (Auto, Response { barrier: Some(SteerReason::Tls), registered: false, ..base }, (Relay, SteerReason::Tls)),
            (Forced, length(1), (Ingress, SteerReason::Forced)),
            (Forced, own(base), (Ingress, SteerReason::Forced)),
            (ForcedLocal, own(length(1)), (Local, SteerReason::Forced)),
            (ForcedLocal, base, (Relay, SteerReason::NotLocal)),
            (Auto, own(base), (Local, SteerReason::Chunked)),
            (Auto, own(Response { event_stream: true, ..base }), (Local, SteerReason::EventStream)),
            (Auto, own(remote(base)), (Local, SteerReason::Chunked)),
            (Auto, own(remote(length(1 << 40))), (Local, SteerReason::Length)),
            (Auto, own(length(999)), (Relay, SteerReason::Small)),
            (Off, own(base), (Relay, SteerReason::Off)),
            (Auto, Response { barrier: Some(SteerReason::Tls), ..own(base) }, (Relay, SteerReason::Tls)),
            (Auto, length(999), (Relay, SteerReason::Small)),
            (Auto, length(1000), (Ingress, SteerReason::Length)),
            (Auto, length(1 << 40), (Ingress, SteerReason::Length)),
            (Auto, remote(length(5000)), (Ingress, SteerReason::Length)),
            (Auto, remote(length(5001)), (Relay, SteerReason::LargeRemote)),
            (Auto, remote(base), (Relay, SteerReason::UnsizedRemote)),
            (Auto, remote(Response { event_stream: true, ..base }), (Ingress, SteerReason::EventStream)),
            (Auto, Response { framing: Framing::until_close(), ..base }, (Ingress, SteerReason::UntilClose)),
        ];
        for (mode, response, expected) in rows {
            assert_eq!(choose(&config(mode), &response), expected, "{mode:?} {response:?}");
        }
    }
}
