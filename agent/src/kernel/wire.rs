//! Path `wire` in the kernel: loads its programs, attaches them to interfaces, and keeps the records of its flows.
//!
//! A flow is watched from before its request is sent, so that the programs have seen both connections in both directions under their
//! own addresses before it can begin; where an address is translated inside this network namespace they see nothing, and it never
//! begins. The agent arms it whenever it has read everything and written its last byte. When the flow has begun, the agent's sockets
//! are silent: the program at egress drops what they send, so they are closed by reset while the flow's record still exists.
//!
//! Needs CAP_BPF and CAP_NET_ADMIN, no type information of the kernel, and nothing of the host.

mod connection;
mod interface;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::AsFd,
    path::Path,
    ptr::NonNull,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, RingBuf},
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{NlOptions, SchedClassifierLinkId, TcAttachOptions, TcError, qdisc_add_clsact},
    },
};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use parking_lot::Mutex;
use penstock_common::{
    slot::Word,
    wire::flow::{CLIENT, ENDPOINT, Ends, Facts, Flow, Leg, state},
};
use thiserror::Error;

pub use connection::{Connection, Unfit, agree};

use super::{LoadError, grace::Grace, object, slots::Mapping, socket};

const WIRE_PROGRAM: &str = "penstock_wire";
const GUARD_PROGRAM: &str = "penstock_guard";
/// An IPv4 or IPv6 address takes five or more words; see `Ends`.
type Key = [u32; size_of::<Ends>() / size_of::<u32>()];

#[derive(Debug, Error)]
pub enum WireError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("cannot attach to interface {0}: {1}")]
    Attach(String, String),
    #[error("cannot pin a link: {0}")]
    Pin(String),
    #[error("no record is free")]
    Full,
    #[error("the connections cannot be joined: {0}")]
    Unfit(#[from] Unfit),
    #[error("cannot use the maps of path wire: {0}")]
    Map(#[from] aya::maps::MapError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The loaded programs. Unless they were pinned, they and all flows end when this is dropped.
pub struct Wire {
    flows: Mapping<Flow>,
    legs: Mutex<HashMap<MapData, Key, u32>>,
    events: Mutex<RingBuf<MapData>>,
    missed: Array<MapData, u64>,
    free: Mutex<Vec<u32>>,
    /// Records that a running program may still use.
    retired: Mutex<Vec<u32>>,
    grace: Grace,
    links: Vec<(&'static str, SchedClassifierLinkId)>,
    ebpf: Ebpf,
}

impl Wire {
    /// Loads the programs, with room for this many flows.
    pub fn load(max_flows: u32) -> Result<Self, WireError> {
        let object = object::wire_bytes().ok_or(LoadError::NotBuilt)?;
        if connection::has_own_clock()? {
            let why = "the clock of this time namespace differs from the kernel's";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why).into());
        }
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("FLOWS", max_flows).map_max_entries("LEGS", max_flows.saturating_mul(2));
        let mut ebpf = loader.load(object).map_err(LoadError::from)?;
        for name in [WIRE_PROGRAM, GUARD_PROGRAM] {
            program(&mut ebpf, name)?.load().map_err(LoadError::from)?;
        }
        let flows = match ebpf.map("FLOWS") {
            Some(Map::Array(flows)) => Mapping::new(flows.fd().as_fd(), max_flows)?,
            _ => return Err(LoadError::Missing("map FLOWS").into()),
        };
        let mut take = |name| ebpf.take_map(name).ok_or(LoadError::Missing(name));
        let (legs, events, missed) = (take("LEGS")?, take("WIRE_EVENTS")?, take("WIRE_MISSED")?);
        Ok(Self {
            flows,
            legs: Mutex::new(legs.try_into()?),
            events: Mutex::new(events.try_into()?),
            missed: missed.try_into()?,
            free: Mutex::new((0..max_flows).rev().collect()),
            retired: Mutex::default(),
            grace: Grace::new()?,
            links: Vec::new(),
            ebpf,
        })
    }

    /// Attaches to an interface of this thread's network namespace: before other programs at ingress, after them at egress. Uses TCX
    /// if the kernel has it (Linux 6.6), otherwise the clsact qdisc, which is created if it is missing.
    pub fn attach(&mut self, name: &str) -> Result<(), WireError> {
        let failed = |why: &dyn std::fmt::Display| WireError::Attach(name.to_owned(), why.to_string());
        if !interface::is_ethernet(name).map_err(|error| failed(&error))? {
            return Err(failed(&"its packets have no Ethernet header"));
        }
        let places = [
            // At egress first: a flow must not begin while its sockets can still be heard.
            (GUARD_PROGRAM, TcAttachType::Egress, LinkOrder::last(), u16::MAX),
            (WIRE_PROGRAM, TcAttachType::Ingress, LinkOrder::first(), 1),
        ];
        for (which, place, order, priority) in places {
            let classifier = program(&mut self.ebpf, which)?;
            let link = match classifier.attach_with_options(name, place, TcAttachOptions::TcxOrder(order)) {
                Err(ProgramError::SyscallError(_)) => attach_to_qdisc(classifier, name, place, priority),
                attached => attached,
            };
            self.links.push((which, link.map_err(|error| failed(&error))?));
        }
        Ok(())
    }

    /// Lets programs and flows outlive this process: pins the links of TCX into a folder of a bpffs. Programs in a clsact qdisc stay
    /// by themselves.
    pub fn pin(&mut self, folder: &Path) -> Result<(), WireError> {
        for (number, (which, link)) in self.links.drain(..).enumerate() {
            let pin = |error: &dyn std::fmt::Display| WireError::Pin(error.to_string());
            let link = program(&mut self.ebpf, which)?.take_link(link).map_err(|error| pin(&error))?;
            if <&FdLink>::try_from(&link).is_err() {
                // Dropping it would detach the program.
                std::mem::forget(link);
                continue;
            }
            let link = FdLink::try_from(link).map_err(|error| pin(&error))?;
            link.pin(folder.join(format!("{which}_{number}"))).map_err(|error| pin(&error))?;
        }
        Ok(())
    }

    /// Watches two connections of the agent, before the request is sent to the endpoint.
    pub fn watch(self: &Arc<Self>, client: impl AsFd, endpoint: impl AsFd) -> Result<Watched, WireError> {
        let connections = [Connection::of(client)?, Connection::of(endpoint)?];
        agree(&connections[CLIENT], &connections[ENDPOINT])?;
        let index = self.take().ok_or(WireError::Full)?;
        let watched = Watched { index, wire: Arc::clone(self) };
        let record = self.flows.at(index);
        // SAFETY: no key leads to the record, so no program uses it; zero is a valid value.
        unsafe { record.as_ptr().write_bytes(0, 1) };
        for (leg, connection) in connections.iter().enumerate() {
            watched.set_facts(leg, connection.facts);
        }
        watched.flow().state.atomic().store(state::WATCHED, Ordering::Release);
        for (leg, connection) in connections.iter().enumerate() {
            let key: Key = zerocopy::transmute!(connection.facts.ends);
            self.legs.lock().insert(key, index * 2 + leg as u32, 0)?;
        }
        Ok(watched)
    }

    /// Waits until the state of a flow changes, and returns the indices of flows that did; empty after the time.
    pub fn events(&self, wait: Duration) -> io::Result<Vec<u32>> {
        let mut events = self.events.lock();
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let ring = socket::borrow(&*events);
        nix::poll::poll(&mut [PollFd::new(ring, PollFlags::POLLIN)], timeout)?;
        let mut changed = Vec::new();
        while let Some(event) = events.next() {
            if let Ok(index) = <[u8; 8]>::try_from(&*event) {
                changed.push(u64::from_ne_bytes(index) as u32);
            }
        }
        Ok(changed)
    }

    /// Events that found no room.
    pub fn missed(&self) -> u64 {
        self.missed.get(&0, 0).unwrap_or(0)
    }

    fn take(&self) -> Option<u32> {
        if let Some(index) = self.free.lock().pop() {
            return Some(index);
        }
        let mut retired = self.retired.lock();
        if retired.is_empty() || self.grace.wait().is_err() {
            return None;
        }
        let mut free = self.free.lock();
        free.append(&mut retired);
        free.pop()
    }

    fn flow(&self, index: u32) -> NonNull<Flow> {
        self.flows.at(index)
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, LoadError> {
    Ok(ebpf.program_mut(name).ok_or(LoadError::Missing(name))?.try_into()?)
}

fn attach_to_qdisc(
    program: &mut SchedClassifier,
    name: &str,
    place: TcAttachType,
    priority: u16,
) -> Result<SchedClassifierLinkId, ProgramError> {
    match qdisc_add_clsact(name) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        // The kernel says so with EEXIST; any other failure shows when the program is attached.
        Err(error) => tracing::debug!(interface = name, %error, "clsact qdisc not created"),
    }
    let options = NlOptions { priority, ..NlOptions::default() };
    program.attach_with_options(name, place, TcAttachOptions::Netlink(options))
}

/// The record of a flow. Dropping it makes the programs forget the flow: the agent's sockets must be closed before.
pub struct Watched {
    index: u32,
    wire: Arc<Wire>,
}

/// What the programs have seen of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// One of `penstock_common::wire::flow::state`, and bits of `mark`.
    pub state: u64,
    pub marks: u64,
    /// Why the flow has not begun at the last packet that the program considered (`judge::refusal`).
    pub refusal: u64,
    /// Payload bytes to the client, and the segments that they came in.
    pub bytes: u64,
    pub segments: u64,
    /// All packets, in both directions.
    pub packets: u64,
    /// Packets with payload of the client that were dropped, and packets of the agent's sockets.
    pub refused: u64,
    pub silenced: u64,
    /// CLOCK_MONOTONIC ns of the first and last payload, and of the last packet; 0: none.
    pub first_ns: u64,
    pub last_ns: u64,
    pub packet_ns: u64,
}

impl Watched {
    /// Lets the flow begin at the endpoint's next packet. Returns false if a byte waits to be read on either socket. Until
    /// [`disarm`](Self::disarm), or until a byte can be read, nothing may be written to either socket.
    pub fn arm(&self, client: impl AsFd, endpoint: impl AsFd) -> io::Result<bool> {
        let word = self.flow().state.atomic().load(Ordering::Acquire);
        if state::of(word) != state::WATCHED && !self.disarm() {
            return Ok(true);
        }
        let read = [read_everything(&client)?, read_everything(&endpoint)?];
        let [Some(from_client), Some(from_endpoint)] = read else { return Ok(false) };
        let written = [socket::bytes_written(&client)?, socket::bytes_written(&endpoint)?];
        for (leg, received) in [(CLIENT, from_client), (ENDPOINT, from_endpoint)] {
            self.set_facts(leg, Facts { received, acked: written[leg], ..self.facts(leg) });
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
        state::of(self.flow().state.atomic().load(Ordering::Acquire)) >= state::ACTIVE
    }

    /// Whether both peers have closed, one has reset, or another connection has taken the addresses.
    pub fn has_ended(&self) -> bool {
        state::of(self.flow().state.atomic().load(Ordering::Acquire)) >= state::ENDED
    }

    pub fn seen(&self) -> Seen {
        let flow = self.flow();
        let sum = |word: fn(&Leg) -> &Word| word(&flow.legs[CLIENT]).get() + word(&flow.legs[ENDPOINT]).get();
        Seen {
            state: state::of(flow.state.atomic().load(Ordering::Acquire)),
            marks: flow.marks.get(),
            refusal: flow.refusal.get(),
            bytes: flow.legs[ENDPOINT].bytes.get(),
            segments: flow.legs[ENDPOINT].segments.get(),
            packets: sum(|leg| &leg.packets),
            refused: flow.legs[CLIENT].refused.get(),
            silenced: sum(|leg| &leg.silenced),
            first_ns: flow.first_ns.get(),
            last_ns: flow.last_ns.get(),
            packet_ns: flow.packet_ns.get(),
        }
    }

    /// The index that [`Wire::events`] names.
    pub fn index(&self) -> u32 {
        self.index
    }

    fn flow(&self) -> &Flow {
        // SAFETY: inside the mapping, which `wire` keeps. Fields that change while a program knows the record are words; only
        // `set_facts` writes others, and only while no program reads them.
        unsafe { self.wire.flow(self.index).as_ref() }
    }

    fn facts(&self, leg: usize) -> Facts {
        // SAFETY: a field of a live record, which only this handle writes.
        unsafe { (&raw const (*self.wire.flow(self.index).as_ptr()).legs[leg].facts).read_volatile() }
    }

    /// Only while no program reads them: before the record is known, or while the flow is not armed.
    fn set_facts(&self, leg: usize, facts: Facts) {
        // SAFETY: a field of a live record.
        unsafe { (&raw mut (*self.wire.flow(self.index).as_ptr()).legs[leg].facts).write_volatile(facts) }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let replaced = state::of(self.flow().state.get()) == state::REPLACED;
        for leg in [CLIENT, ENDPOINT] {
            let key: Key = zerocopy::transmute!(self.facts(leg).ends);
            let mut legs = self.wire.legs.lock();
            // Another flow may have the addresses of one that was replaced.
            if !replaced || legs.get(&key, 0).is_ok_and(|value| value >> 1 == self.index) {
                let _ = legs.remove(&key);
            }
        }
        self.wire.retired.lock().push(self.index);
    }
}

/// Bytes that have arrived, if the owner of the socket has read all of them. The count is taken first, so that a byte that arrives
/// in between is either in neither or is found waiting.
fn read_everything(socket: impl AsFd) -> io::Result<Option<u64>> {
    let received = socket::tcp_info(socket.as_fd())?.tcpi_bytes_received;
    Ok((!socket::has_more(&socket)?).then_some(received))
}

/// Closes a socket of a flow that has begun, at once and unheard: its reset is dropped at egress. It ends the connection's entry in
/// this namespace's conntrack, too. The flow's record must still exist.
pub fn close_unheard(socket: impl AsFd + Into<std::os::fd::OwnedFd>) {
    socket::set_reset_on_close(&socket, true);
    drop(socket.into());
}
