//! Which path carries a response body: one pure rule, and the reason it gives.

use penstock_common::framing::{Framing, state};

use crate::{
    config::{Steering, SteeringMode},
    kernel::slots::Lane,
};

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
    pub barrier: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// The endpoint's `sendmsg` puts the bytes into the client's send queue.
    Local,
    /// The kernel moves the bytes from the endpoint's connection, where they have arrived, to the client's.
    Ingress,
    /// User space does.
    Relay,
}

impl Path {
    /// Who in the kernel carries it.
    pub fn lane(self) -> Option<Lane> {
        match self {
            Self::Local => Some(Lane::Local),
            Self::Ingress => Some(Lane::Ingress),
            Self::Relay => None,
        }
    }

    pub fn label(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Ingress => "ingress",
            Self::Relay => "relay",
        }
    }
}

/// The path, and why: a metric label.
pub fn choose(config: &Steering, response: &Response) -> (Path, &'static str) {
    let relay = |reason| (Path::Relay, reason);
    let framing = &response.framing;
    if framing.is_done() {
        return relay("complete");
    }
    if config.mode == SteeringMode::Off {
        return relay("off");
    }
    if let Some(barrier) = response.barrier {
        return relay(barrier);
    }
    if !response.registered {
        return relay("unavailable");
    }
    match config.mode {
        SteeringMode::Ingress => return (Path::Ingress, "forced"),
        SteeringMode::Local if response.local_socket => return (Path::Local, "forced"),
        SteeringMode::Local => return relay("not_local"),
        SteeringMode::Auto | SteeringMode::Off => {}
    }
    // What an endpoint on this machine sends goes from memory to memory, in whatever pieces.
    let (path, near) = match response.local_socket {
        true => (Path::Local, true),
        false => (Path::Ingress, response.local_endpoint),
    };
    match framing.state {
        state::LENGTH if framing.left < config.min_bytes => relay("small"),
        state::LENGTH if !near && framing.left > config.max_remote_bytes => relay("large_remote"),
        state::LENGTH => (path, "length"),
        _ if response.event_stream => (path, "event_stream"),
        _ if !near => relay("unsized_remote"),
        state::UNTIL_CLOSE => (path, "until_close"),
        _ => (path, "chunked"),
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
            (Auto, base, (Ingress, "chunked")),
            (Auto, Response { framing: Framing::none(), ..base }, (Relay, "complete")),
            (Off, base, (Relay, "off")),
            (Auto, Response { registered: false, ..base }, (Relay, "unavailable")),
            (Auto, Response { barrier: Some("http10"), ..base }, (Relay, "http10")),
            (Forced, Response { barrier: Some("http10"), ..base }, (Relay, "http10")),
            (Off, Response { barrier: Some("tls"), ..base }, (Relay, "off")),
            (Auto, Response { barrier: Some("tls"), registered: false, ..base }, (Relay, "tls")),
            (Forced, length(1), (Ingress, "forced")),
            (Forced, own(base), (Ingress, "forced")),
            (ForcedLocal, own(length(1)), (Local, "forced")),
            (ForcedLocal, base, (Relay, "not_local")),
            (Auto, own(base), (Local, "chunked")),
            (Auto, own(Response { event_stream: true, ..base }), (Local, "event_stream")),
            (Auto, own(remote(base)), (Local, "chunked")),
            (Auto, own(remote(length(1 << 40))), (Local, "length")),
            (Auto, own(length(999)), (Relay, "small")),
            (Off, own(base), (Relay, "off")),
            (Auto, Response { barrier: Some("tls"), ..own(base) }, (Relay, "tls")),
            (Auto, length(999), (Relay, "small")),
            (Auto, length(1000), (Ingress, "length")),
            (Auto, length(1 << 40), (Ingress, "length")),
            (Auto, remote(length(5000)), (Ingress, "length")),
            (Auto, remote(length(5001)), (Relay, "large_remote")),
            (Auto, remote(base), (Relay, "unsized_remote")),
            (Auto, remote(Response { event_stream: true, ..base }), (Ingress, "event_stream")),
            (Auto, Response { framing: Framing::until_close(), ..base }, (Ingress, "until_close")),
        ];
        for (mode, response, expected) in rows {
            assert_eq!(choose(&config(mode), &response), expected, "{mode:?} {response:?}");
        }
    }
}
