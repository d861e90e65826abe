//! Chooses the path of a flow, by one pure rule that also gives the reason, and opens a session on it.
//!
//! [`ResponseFacts`] are the facts about a response, [`choose`] is the rule, [`Eligibility`] applies it to a response or a tunnel. Two
//! things are decided elsewhere: path `wire` in [`wire`](super::wire), and that a client of HTTP/2, a renamed model or an EPP that
//! answers for the body leaves nothing to steer, in `carry` of `proxy/respond/carry.rs`.

use std::{os::fd::AsFd, rc::Rc};

use http::Version;
use penstock_common::{
    framing::{Framing, state},
    path::Path,
};

use super::{
    RegisterError, WorkerSteering,
    reason::SteerReason,
    session::{Session, Target},
    source::Source,
};
use crate::{
    config::{Steering, SteeringMode},
    http::{media, response::ResponseHead},
    tee::Tee,
};

/// The facts about a response after its head was read.
#[derive(Debug, Clone, Copy)]
pub struct ResponseFacts {
    /// The part of the body that is still to come.
    pub framing: Framing,
    /// `Content-Type: text/event-stream`.
    pub event_stream: bool,
    /// The endpoint's address is on this machine.
    pub local_endpoint: bool,
    /// The client speaks TLS.
    pub tls: bool,
    /// The endpoint speaks TLS.
    pub endpoint_tls: bool,
    /// The client has closed its sending side.
    pub half_closed: bool,
    /// The agent decodes chunked for the client.
    pub decoded: bool,
    /// Which part of the body the EPP gets, if any.
    pub to_picker: Option<ToPicker>,
}

/// The part of a body that the EPP gets a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToPicker {
    All,
    /// Its last bytes, which the kernel can keep.
    End,
}

/// What counts of the two connections that a response passes.
#[derive(Debug, Clone, Copy)]
pub struct BothEnds {
    pub local_endpoint: bool,
    pub tls: bool,
    pub endpoint_tls: bool,
    pub half_closed: bool,
    /// The client's version of HTTP.
    pub client: Version,
}

impl ResponseFacts {
    /// The facts about the response `head`, of whose body `pending` has been read. `tee`: what keeps the body for the EPP.
    pub fn new(head: &ResponseHead, pending: &[u8], both: BothEnds, tee: Option<&Tee>) -> Self {
        let BothEnds { local_endpoint, tls, endpoint_tls, half_closed, client } = both;
        let mut framing = head.framing;
        framing.feed(pending);
        Self {
            framing,
            event_stream: media::is_events(&head.headers),
            local_endpoint,
            tls,
            endpoint_tls,
            half_closed,
            decoded: head.needs_dechunk(client),
            to_picker: tee.and_then(|tee| match () {
                () if tee.wants_all() => Some(ToPicker::All),
                () if tee.wants_end() => Some(ToPicker::End),
                () => None,
            }),
        }
    }
}

/// What the kernel knows of the connection to the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelView {
    Nothing,
    /// The agent's socket.
    Connection,
    /// Also the endpoint's own socket, which can reach the client's.
    OwnSocket,
}

/// The path, and why.
pub fn choose(config: &Steering, response: &ResponseFacts, known: KernelView) -> (Path, SteerReason) {
    let relay = |reason| (Path::Relay, reason);
    let framing = &response.framing;
    match () {
        () if framing.is_done() => return relay(SteerReason::Complete),
        // Path `wire` has rules of its own, see `wire`.
        () if matches!(config.mode, SteeringMode::Off | SteeringMode::Wire) => return relay(SteerReason::Off),
        () if response.tls => return relay(SteerReason::Tls),
        () if response.endpoint_tls => return relay(SteerReason::EndpointTls),
        () if response.half_closed => return relay(SteerReason::HalfClose),
        () if response.decoded => return relay(SteerReason::Http10),
        () if response.to_picker == Some(ToPicker::All) => return relay(SteerReason::ResponseToPicker),
        () if known == KernelView::Nothing => return relay(SteerReason::Unavailable),
        () => {}
    }
    let own_socket = known == KernelView::OwnSocket;
    match config.mode {
        SteeringMode::Ingress => return (Path::Ingress, SteerReason::Forced),
        SteeringMode::Local if own_socket => return (Path::Local, SteerReason::Forced),
        SteeringMode::Local => return relay(SteerReason::NotLocal),
        SteeringMode::Auto | SteeringMode::Wire | SteeringMode::Off => {}
    }
    // Bytes of an endpoint on this machine are not cut into small fragments.
    let path = if own_socket { Path::Local } else { Path::Ingress };
    let near = own_socket || response.local_endpoint;
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

/// The connection to an endpoint, and what steering it depends on.
pub struct Eligibility<'a> {
    pub config: &'a Steering,
    pub steering: Option<&'a Rc<WorkerSteering>>,
    pub source: Option<&'a Source>,
    /// The whole request has been sent.
    pub is_sent: bool,
    /// The client's key that was announced before the request was sent.
    pub announced: Option<u64>,
}

/// Steers what a client sends through a tunnel.
pub struct Upstream {
    pub steering: Rc<WorkerSteering>,
    send_buffer: u32,
}

impl Eligibility<'_> {
    /// Opens the session of a response with the body `framing`: chooses the path and prepares both sockets for it.
    pub fn response<'t>(
        &self,
        response: &ResponseFacts,
        framing: Framing,
        make_target: impl FnOnce(&WorkerSteering, u32) -> Result<u64, RegisterError>,
    ) -> (Session<'t>, SteerReason) {
        let known = match self.source {
            None => KernelView::Nothing,
            Some(source) if self.announced.is_some_and(|key| source.is_local_to(key)) => KernelView::OwnSocket,
            Some(_) => KernelView::Connection,
        };
        let (mut path, mut reason) = choose(self.config, response, known);
        if path == Path::Local && !self.admit() {
            (path, reason) = choose(self.config, response, KernelView::Connection);
        }
        let relay = |reason| (Session::relayed(framing), reason);
        let (Path::Local | Path::Ingress, Some(steering), Some(source)) = (path, self.steering, self.source) else {
            return relay(reason);
        };
        if response.to_picker.is_some()
            && let Err(error) = source.make_ring()
        {
            tracing::debug!(%error, "kernel cannot keep the end of the response, relaying it");
            return relay(SteerReason::ResponseToPicker);
        }
        let send_buffer = self.config.client_send_buffer;
        match make_target(steering, send_buffer) {
            Ok(key) => (Session::new(path, Target { key, send_buffer }, framing, Some(source)), reason),
            Err(error) => {
                tracing::debug!(%error, "client socket cannot become a target, relaying the response");
                relay(SteerReason::TargetRefused)
            }
        }
    }

    /// Opens the session of what the endpoint sends through a tunnel to a client without TLS. Returns `Some` if the kernel may
    /// carry the other direction too.
    pub fn tunnel(
        &self,
        make_target: impl FnOnce(&WorkerSteering, u32) -> Result<u64, RegisterError>,
    ) -> (Session<'static>, Option<Upstream>) {
        let (framing, mode, send_buffer) = (Framing::until_close(), self.config.mode, self.config.client_send_buffer);
        let relay = (Session::relayed(framing), None);
        let (Some(steering), Some(source)) = (self.steering, self.source) else { return relay };
        if matches!(mode, SteeringMode::Off | SteeringMode::Wire) {
            return relay;
        }
        let Ok(key) = make_target(steering, send_buffer) else { return relay };
        // In a tunnel the client may send while the endpoint's socket is in the map.
        let transparent = mode == SteeringMode::Local || !steering.is_endpoint_visible();
        let is_local = transparent && self.announced == Some(key) && source.is_local_to(key) && self.admit();
        let path = match mode {
            SteeringMode::Auto | SteeringMode::Local if is_local => Path::Local,
            SteeringMode::Auto | SteeringMode::Ingress => Path::Ingress,
            SteeringMode::Local | SteeringMode::Wire | SteeringMode::Off => Path::Relay,
        };
        // Mode `local` steers only what the endpoint's own `sendmsg` sends.
        let up = (mode != SteeringMode::Local).then(|| Upstream { steering: Rc::clone(steering), send_buffer });
        (Session::new(path, Target { key, send_buffer }, framing, Some(source)), up)
    }

    /// Puts the endpoint's own socket into the map.
    fn admit(&self) -> bool {
        self.is_sent && self.source.is_some_and(Source::admit)
    }
}

impl Upstream {
    /// Opens the session of what a client sends. `source` is `Some` if the kernel sees what arrives from the client.
    pub fn open(&self, source: Option<&Source>, endpoint: impl AsFd) -> Session<'static> {
        let (framing, send_buffer) = (Framing::until_close(), self.send_buffer);
        let Some(source) = source else { return Session::relayed(framing) };
        match self.steering.register_target(endpoint, send_buffer) {
            Ok(key) => Session::new(Path::Ingress, Target { key, send_buffer }, framing, Some(source)),
            Err(error) => {
                tracing::debug!(%error, "endpoint socket cannot become a target, relaying what the client sends");
                Session::relayed(framing)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{AtStop, Bpffs, Interfaces};

    fn config(mode: SteeringMode) -> Steering {
        Steering {
            mode,
            cgroup: None,
            min_bytes: 1000,
            max_remote_bytes: 5000,
            client_send_buffer: 1,
            endpoint_receive_buffer: 1,
            max_flows: 1,
            interfaces: Interfaces::Auto,
            bpffs: Bpffs::Off,
            at_stop: AtStop::Auto,
            force: false,
        }
    }

    #[test]
    fn each_reason_has_its_case() {
        use KernelView::{Connection, Nothing, OwnSocket};
        use Path::{Ingress, Local, Relay};
        use SteerReason as R;
        use SteeringMode::{Auto, Ingress as Forced, Local as ForcedLocal, Off};
        let base = ResponseFacts {
            framing: Framing::chunked(),
            event_stream: false,
            local_endpoint: true,
            tls: false,
            endpoint_tls: false,
            half_closed: false,
            decoded: false,
            to_picker: None,
        };
        let length = |n| ResponseFacts { framing: Framing::length(n), ..base };
        let remote = |r: ResponseFacts| ResponseFacts { local_endpoint: false, ..r };
        let events = ResponseFacts { event_stream: true, ..base };
        let (tls, decoded) = (ResponseFacts { tls: true, ..base }, ResponseFacts { decoded: true, ..base });
        let rows = [
            (Auto, base, Connection, (Ingress, R::Chunked)),
            (Auto, ResponseFacts { framing: Framing::none(), ..base }, Connection, (Relay, R::Complete)),
            (Off, base, Connection, (Relay, R::Off)),
            (Auto, base, Nothing, (Relay, R::Unavailable)),
            (Auto, decoded, Connection, (Relay, R::Http10)),
            (Forced, decoded, Connection, (Relay, R::Http10)),
            (Off, tls, Connection, (Relay, R::Off)),
            (Auto, tls, Nothing, (Relay, R::Tls)),
            (Auto, ResponseFacts { endpoint_tls: true, ..base }, Nothing, (Relay, R::EndpointTls)),
            (Forced, ResponseFacts { endpoint_tls: true, ..tls }, Nothing, (Relay, R::Tls)),
            (Auto, ResponseFacts { half_closed: true, ..base }, OwnSocket, (Relay, R::HalfClose)),
            (Auto, ResponseFacts { to_picker: Some(ToPicker::All), ..base }, Connection, (Relay, R::ResponseToPicker)),
            (Auto, ResponseFacts { to_picker: Some(ToPicker::End), ..base }, Connection, (Ingress, R::Chunked)),
            (Auto, ResponseFacts { to_picker: Some(ToPicker::End), ..base }, OwnSocket, (Local, R::Chunked)),
            (Forced, length(1), Connection, (Ingress, R::Forced)),
            (Forced, base, OwnSocket, (Ingress, R::Forced)),
            (ForcedLocal, length(1), OwnSocket, (Local, R::Forced)),
            (ForcedLocal, base, Connection, (Relay, R::NotLocal)),
            (Auto, base, OwnSocket, (Local, R::Chunked)),
            (Auto, events, OwnSocket, (Local, R::EventStream)),
            (Auto, remote(base), OwnSocket, (Local, R::Chunked)),
            (Auto, remote(length(1 << 40)), OwnSocket, (Local, R::Length)),
            (Auto, length(999), OwnSocket, (Relay, R::Small)),
            (Off, base, OwnSocket, (Relay, R::Off)),
            (Auto, tls, OwnSocket, (Relay, R::Tls)),
            (Auto, length(999), Connection, (Relay, R::Small)),
            (Auto, length(1000), Connection, (Ingress, R::Length)),
            (Auto, length(1 << 40), Connection, (Ingress, R::Length)),
            (Auto, remote(length(5000)), Connection, (Ingress, R::Length)),
            (Auto, remote(length(5001)), Connection, (Relay, R::LargeRemote)),
            (Auto, remote(base), Connection, (Relay, R::UnsizedRemote)),
            (Auto, remote(events), Connection, (Ingress, R::EventStream)),
            (Auto, ResponseFacts { framing: Framing::until_close(), ..base }, Connection, (Ingress, R::UntilClose)),
        ];
        for (mode, response, known, expected) in rows {
            assert_eq!(choose(&config(mode), &response, known), expected, "{mode:?} {response:?} {known:?}");
        }
    }
}
