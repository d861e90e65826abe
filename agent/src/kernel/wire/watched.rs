//! One flow of path `wire`, from before its request is sent to its end.

use std::{
    future::poll_fn,
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
};

use penstock_common::{
    framing::Framing,
    wire::flow::{CLIENT, ENDPOINT, Facts, Flow, state},
};
use thiserror::Error;

use super::{
    FlowStop, LastBytes, Seen, TcpConnection, Wire, WireError, agree, inject::reset, registry::Registered,
    seen::state_of,
};
use crate::kernel::socket;

/// The record of a flow. Dropping it makes the programs forget the flow, after a time if the client has all of the stream.
pub struct Watched {
    index: u32,
    wire: Arc<Wire>,
    /// The next agent takes the flow over.
    is_left: AtomicBool,
    registered: Registered,
}

impl Watched {
    /// Makes two connections known to the programs.
    pub(super) fn begin(wire: &Arc<Wire>, client: TcpConnection, endpoint: TcpConnection) -> Result<Self, WireError> {
        agree(&client, &endpoint)?;
        let index = wire.records.take().ok_or(WireError::Full)?;
        // SAFETY: no key leads to the record, so no program uses it; zero is a valid value.
        unsafe { wire.records.table.flow(index).as_ptr().write_bytes(0, 1) };
        let registered = wire.registry.enter(&wire.records.table, index, &wire.interfaces, false);
        let watched = Self { index, wire: Arc::clone(wire), is_left: AtomicBool::new(false), registered };
        for (leg, connection) in [client, endpoint].into_iter().enumerate() {
            watched.set_facts(leg, connection.facts);
        }
        wire.records.table.make_ring(index)?;
        watched.flow().state.atomic().store(state::WATCHED, Ordering::Release);
        for (leg, connection) in [client, endpoint].into_iter().enumerate() {
            wire.records.table.announce(index, leg, connection.facts.ends)?;
        }
        Ok(watched)
    }

    /// Lets the flow begin at the endpoint's next packet. Returns false if a byte waits to be read on either socket. Until
    /// [`disarm`](Self::disarm), or until a byte can be read, nothing may be written to either socket. An error of a connection is
    /// cleared by being returned: a later read would find an orderly end.
    pub fn arm(&self, client: impl AsFd, endpoint: impl AsFd) -> Result<bool, BrokenLeg> {
        let word = self.flow().state.atomic().load(Ordering::Acquire);
        if state::of(word) != state::WATCHED && !self.disarm() {
            return Ok(true);
        }
        let on = |leg| move |error| BrokenLeg { leg, error };
        let read = [read_everything(&client).map_err(on(CLIENT))?, read_everything(&endpoint).map_err(on(ENDPOINT))?];
        let [Some(client_read), Some(endpoint_read)] = read else { return Ok(false) };
        let written = [
            socket::bytes_written(&client).map_err(on(CLIENT))?,
            socket::bytes_written(&endpoint).map_err(on(ENDPOINT))?,
        ];
        for (leg, (received, largest)) in [(CLIENT, client_read), (ENDPOINT, endpoint_read)] {
            self.set_facts(leg, Facts { received, acked: written[leg], largest, ..self.facts(leg) });
        }
        let next = (word & !state::MASK).wrapping_add(state::MASK + 1) | state::ARMED;
        self.flow().state.atomic().store(next, Ordering::Release);
        Ok(true)
    }

    /// Takes the flow back before it has begun. Returns false if it has begun.
    pub fn disarm(&self) -> bool {
        let state = self.flow().state.atomic();
        loop {
            let word = state.load(Ordering::Acquire);
            match state::of(word) {
                state::WATCHED => return true,
                state::ARMED => {
                    let watched = state::with(word, state::WATCHED);
                    if state.compare_exchange(word, watched, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                        return true;
                    }
                }
                // A program on another CPU decides within microseconds.
                state::BEGINNING => std::thread::yield_now(),
                _ => return false,
            }
        }
    }

    /// Whether the programs carry the flow, or have carried it to its end.
    pub fn has_begun(&self) -> bool {
        self.state() >= state::ACTIVE
    }

    /// Whether the programs have missed packets that must have passed by the end of a response: another tuple than the sockets' is on the
    /// wire, or another interface is used. Such a flow never begins.
    pub fn is_unseen(&self) -> bool {
        let [client, endpoint] = &self.flow().legs;
        [&client.leaves_on, &endpoint.leaves_on, &endpoint.arrives_on].iter().any(|seen| seen.get() == 0)
    }

    /// Whether both peers have closed, one has reset, or another connection has taken the addresses.
    pub fn has_ended(&self) -> bool {
        self.state() >= state::ENDED
    }

    /// Resolves when [`has_begun`](Self::has_begun). Cancel-safe.
    pub async fn begun(&self) {
        self.changed(Self::has_begun).await;
    }

    /// Resolves when what the programs have seen fulfils the condition. It is checked at every event of the flow: when it begins or
    /// ends, when either side has closed, and at the first payload of the client. Cancel-safe.
    pub async fn changed(&self, is: impl Fn(&Self) -> bool) {
        poll_fn(|cx| {
            // Register before the check; otherwise an event between the two would be lost.
            self.wire.records.register(self.index, cx);
            if is(self) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Stops keepalive probes of the sockets of a flow that has begun. Nobody would answer them, and a socket that they end gives its
    /// port away. If the agent dies, the sockets are closed by a reset, so that the kernel keeps none of them.
    pub fn freeze(&self, client: impl AsFd, endpoint: impl AsFd) {
        for fd in [client.as_fd(), endpoint.as_fd()] {
            let _ = socket2::SockRef::from(&fd).set_keepalive(false);
            socket::set_reset_on_close(fd, true);
        }
    }

    /// Ends the agent's part of a flow that has begun, at once: the sockets' resets are dropped at egress. They end the
    /// connections' entries in this namespace's conntrack, too.
    pub fn close(&self, client: impl AsFd, endpoint: impl AsFd) {
        for fd in [client.as_fd(), endpoint.as_fd()] {
            // A socket that is closed already has nothing to say.
            let _ = socket::disconnect(fd);
        }
    }

    /// Ends the flow itself after [`close`](Self::close): both peers get a reset.
    pub fn reset(&self) {
        reset(&self.wire, &self.wire.records.table, self.index);
    }

    /// Leaves the flow to the next agent, after [`close`](Self::close).
    pub fn leave(&self) {
        // This agent counts what it has relayed.
        self.flow().response.relayed.set(0);
        self.is_left.store(true, Ordering::Relaxed);
    }

    /// Whether this agent stops, and leaves its flows to the next one.
    pub fn is_to_be_left(&self) -> bool {
        self.wire.is_leaving()
    }

    /// Resolves when something outside of the flow wants it ended. Cancel-safe.
    pub async fn stopped(&self) -> FlowStop {
        self.registered.stopped().await
    }

    /// Stores what another agent has to know if this one dies.
    pub fn describe(&self, started_ns: u64, status: u16) {
        let response = &self.flow().response;
        response.started_ns.set(started_ns);
        response.status.set(status.into());
    }

    /// Stores how far user space has come with the body, before the flow is armed.
    pub fn advance(&self, relayed: u64, framing: &Framing) {
        let response = &self.flow().response;
        response.relayed.set(relayed);
        response.framing.set(framing.state.into());
        response.left.set(framing.left);
    }

    /// The agent has counted the flow, so that no other agent does.
    pub fn counted(&self) {
        self.flow().response.counted.set(1);
    }

    pub fn seen(&self) -> Seen {
        Seen::of(self.flow())
    }

    /// The last bytes that the flow has carried. Only after its end.
    pub fn last_bytes(&self) -> LastBytes {
        self.wire.records.table.last_bytes(self.index).unwrap_or_else(|error| {
            tracing::warn!(%error, "could not read the last bytes of a flow");
            LastBytes::default()
        })
    }

    fn state(&self) -> u64 {
        state_of(self.flow())
    }

    fn flow(&self) -> &Flow {
        self.wire.records.table.words(self.index)
    }

    fn facts(&self, leg: usize) -> Facts {
        // SAFETY: a field of a live record, which only this handle writes.
        unsafe { (&raw const (*self.wire.records.table.flow(self.index).as_ptr()).legs[leg].facts).read_volatile() }
    }

    /// Only while no program reads them: before the record is known, or while the flow is not armed.
    fn set_facts(&self, leg: usize, facts: Facts) {
        // SAFETY: a field of a live record.
        unsafe { (&raw mut (*self.wire.records.table.flow(self.index).as_ptr()).legs[leg].facts).write_volatile(facts) }
    }
}

/// A connection broke before its flow began.
#[derive(Debug, Error)]
#[error("the {} connection broke: {error}", if *.leg == CLIENT { "client's" } else { "endpoint's" })]
pub struct BrokenLeg {
    leg: usize,
    error: io::Error,
}

impl BrokenLeg {
    pub fn is_client(&self) -> bool {
        self.leg == CLIENT
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let records = &self.wire.records;
        if self.is_left.load(Ordering::Relaxed) {
            return;
        }
        if self.state() == state::ENDED || self.seen().finished {
            records.linger(self.index);
        } else {
            records.table.forget(self.index, records.table.ends(self.index));
            records.retire(self.index);
        }
    }
}

/// Bytes that have arrived, if the owner of the socket has read all of them, and the largest segment that its peer accepts, which the
/// kernel may have learned meanwhile. The count is taken first, so that a byte that arrives
/// in between is either in neither or is found waiting.
fn read_everything(socket: impl AsFd) -> io::Result<Option<(u64, u32)>> {
    let info = socket::tcp_info(socket.as_fd())?;
    Ok((!socket::has_more(&socket)?).then_some((info.tcpi_bytes_received, info.tcpi_snd_mss)))
}
