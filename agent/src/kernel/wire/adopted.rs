//! Flows of an agent that has died or left: the programs still carry them, and this agent counts, ends and forgets them.
//!
//! The dead agent's programs and maps stay as they are until its last flow has ended. Only one living agent has an instance, because
//! it holds the lock on its folder.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use penstock_common::wire::flow::{CLIENT, ENDPOINT, Ends, state};

use super::{
    FlowStop, LINGER, LastBytes, Seen, Wire, WireError, attach, inject,
    pins::{FoundFolder, Instance, Namespace},
    registry::{AttachedTo, Registered},
    seen::state_of,
    table::Table,
};

/// The instances of a network namespace, of which this agent takes those without an owner.
pub struct Adoption {
    namespace: Namespace,
    wire: Arc<Wire>,
    /// Instances of other versions, whose locks this agent holds; and what was said about others.
    reported: Vec<String>,
    foreign: Vec<Instance>,
}

/// One instance without an owner.
pub struct Adopted {
    instance: Instance,
    table: Arc<Table>,
    wire: Arc<Wire>,
    flows: Vec<AdoptedFlow>,
    /// Flows that have been counted, and when.
    lingering: Vec<(Instant, AdoptedFlow)>,
}

/// A flow that nobody has counted yet.
pub struct AdoptedFlow {
    index: u32,
    pub client: SocketAddr,
    pub endpoint: SocketAddr,
    /// Keeps the port towards the endpoint, so that no new connection from it ends the flow.
    _port: Option<socket2::Socket>,
    registered: Registered,
}

/// What the dead agent has left about the response.
#[derive(Debug, Clone, Copy)]
pub struct Story {
    pub started_ns: u64,
    pub status: u16,
    /// Bytes that it has relayed.
    pub relayed: u64,
    /// State and rest of the body's framing when the flow began.
    pub framing: u32,
    pub left: u64,
}

impl Adoption {
    pub(super) fn new(namespace: Namespace, wire: Arc<Wire>) -> Self {
        Self { namespace, wire, reported: Vec::new(), foreign: Vec::new() }
    }

    /// Adopts the instances that have no owner. Returns them, and what was found and not adopted for the first time.
    pub fn scan(&mut self) -> (Vec<Adopted>, Vec<String>) {
        let (mut adopted, mut notes) = (Vec::new(), Vec::new());
        match self.namespace.instances() {
            Ok(found) => {
                let dead = found.into_iter().filter_map(|one| match one {
                    FoundFolder::Dead(instance) => Some(instance),
                    FoundFolder::Alive(_) => None,
                });
                dead.for_each(|instance| self.take(instance, &mut adopted, &mut notes));
            }
            Err(error) => notes.push(format!("flows of other agents cannot be adopted: {error}")),
        }
        notes.retain(|note| !self.reported.contains(note));
        self.reported.extend(notes.iter().cloned());
        (adopted, notes)
    }

    fn take(&mut self, instance: Instance, adopted: &mut Vec<Adopted>, notes: &mut Vec<String>) {
        let name = instance.describe();
        if !instance.is_of_this_version() {
            let version = instance.version;
            notes
                .push(format!("flows of another version ({version}) not adopted: {name}; `penstock detach` ends them"));
            self.foreign.push(instance);
            return;
        }
        match Adopted::open(instance, &self.wire) {
            Ok(one) if one.flows.is_empty() && one.lingering.is_empty() => one.remove(),
            Ok(one) => adopted.push(one),
            Err(error) => notes.push(format!("flows not adopted: {name}: {}", error.reason())),
        }
    }

    /// Removes what agents of network namespaces that are gone have left.
    pub fn sweep(&self) {
        for instance in self.namespace.elsewhere().unwrap_or_default() {
            if attach::is_defunct(&instance)
                && let Err(error) = attach::remove(&instance, None)
            {
                tracing::debug!(folder = instance.describe(), %error, "could not remove the folder of a dead agent");
            }
        }
    }
}

impl Adopted {
    fn open(instance: Instance, wire: &Arc<Wire>) -> Result<Self, WireError> {
        let table = Arc::new(Table::pinned(&instance.folder.at("."))?);
        let mut one = Self { instance, table, wire: Arc::clone(wire), flows: Vec::new(), lingering: Vec::new() };
        let interfaces = Arc::new(Mutex::new(attach::interfaces(&one.instance)));
        for index in 0..one.table.len() {
            let flow = one.table.words(index);
            let (state, is_counted) = (state_of(flow), flow.response.counted.get() != 0);
            let is_known = state != state::FREE && one.table.is_known(index);
            match state {
                // Its sockets are closed, and have told the peers.
                state::WATCHED | state::ARMED if is_known => one.table.forget(index, one.table.ends(index)),
                state::ACTIVE | state::ENDED if is_known && !is_counted => {
                    one.flows.push(AdoptedFlow::of(wire, &one.table, index, &interfaces));
                }
                state::REPLACED if !is_counted => one.flows.push(AdoptedFlow::of(wire, &one.table, index, &interfaces)),
                state::ACTIVE | state::ENDED if is_known => {
                    one.lingering.push((Instant::now(), AdoptedFlow::of(wire, &one.table, index, &interfaces)));
                }
                _ => {}
            }
        }
        Ok(one)
    }

    pub fn describe(&self) -> String {
        self.instance.describe()
    }

    /// Flows that have not been counted.
    pub fn flows(&self) -> &[AdoptedFlow] {
        &self.flows
    }

    pub fn seen(&self, flow: &AdoptedFlow) -> Seen {
        Seen::of(self.table.words(flow.index))
    }

    /// The last bytes that a flow has carried. Only after its end.
    pub fn last_bytes(&self, flow: &AdoptedFlow) -> LastBytes {
        self.table.last_bytes(flow.index).unwrap_or_default()
    }

    pub fn story(&self, flow: &AdoptedFlow) -> Story {
        let response = &self.table.words(flow.index).response;
        Story {
            started_ns: response.started_ns.get(),
            status: response.status.get() as u16,
            relayed: response.relayed.get(),
            framing: response.framing.get() as u32,
            left: response.left.get(),
        }
    }

    /// Resets both peers.
    pub fn reset(&self, flow: &AdoptedFlow) {
        inject::reset(&self.wire, &self.table, flow.index);
    }

    /// Passes each flow to `is_over`, which counts it if it is. Such flows are forgotten after a time.
    pub fn count(&mut self, mut is_over: impl FnMut(&Self, &AdoptedFlow) -> bool) {
        let flows = std::mem::take(&mut self.flows);
        for flow in flows {
            if is_over(self, &flow) {
                self.table.words(flow.index).response.counted.set(1);
                self.lingering.push((Instant::now(), flow));
            } else {
                self.flows.push(flow);
            }
        }
    }

    /// Forgets flows that have lingered for long enough. Whether none is left.
    pub fn tidy(&mut self) -> bool {
        let table = &self.table;
        self.lingering.retain(|(since, flow)| {
            let lingers = since.elapsed() < LINGER && table.is_known(flow.index);
            if !lingers {
                table.forget(flow.index, table.ends(flow.index));
            }
            lingers
        });
        self.flows.is_empty() && self.lingering.is_empty()
    }

    /// Detaches the dead agent's programs and removes its folder. What fails, for want of a capability, the next start does.
    pub fn remove(self) {
        if let Err(error) = attach::remove(&self.instance, self.wire.instance()) {
            tracing::debug!(folder = self.describe(), %error, "could not remove the folder of a dead agent");
        }
    }
}

impl AdoptedFlow {
    fn of(wire: &Wire, table: &Arc<Table>, index: u32, interfaces: &AttachedTo) -> Self {
        let ends = table.ends(index);
        let port = reserve(own(&ends[ENDPOINT])).ok();
        let registered = wire.registry.enter(table, index, interfaces, true);
        Self { index, client: peer(&ends[CLIENT]), endpoint: peer(&ends[ENDPOINT]), _port: port, registered }
    }

    /// Why something outside of the flow wants it ended, if it does.
    pub fn stop(&self) -> Option<FlowStop> {
        self.registered.stop()
    }
}

/// The time for which the flow's packets have carried no payload.
pub fn silence(seen: &Seen, now_ns: u64) -> Duration {
    Duration::from_nanos(now_ns.saturating_sub(seen.last_ns))
}

/// Binds a port, so that connect(2) takes another one (`__inet_hash_connect`).
fn reserve(address: SocketAddr) -> std::io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// The peer's address.
pub(super) fn peer(ends: &Ends) -> SocketAddr {
    address(ends.peer, ends.ports.to_ne_bytes()[..2].try_into().unwrap_or_default())
}

fn own(ends: &Ends) -> SocketAddr {
    address(ends.own, ends.ports.to_ne_bytes()[2..].try_into().unwrap_or_default())
}

fn address(words: [u32; 4], port: [u8; 2]) -> SocketAddr {
    let octets: [u8; 16] = zerocopy::transmute!(words);
    let address = Ipv6Addr::from(octets);
    SocketAddr::new(address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4), u16::from_be_bytes(port))
}
