//! Path `wire` in the kernel: loads its programs, attaches them to interfaces, and keeps the records of its flows.
//!
//! A flow is watched from before its request is sent, so that the programs have seen both connections in both directions under their
//! own addresses before it can begin; where an address is translated inside this network namespace they see nothing, and it never
//! begins. The agent arms it whenever it has read everything and written its last byte. When the flow has begun, the agent's sockets
//! are silent: the program at egress drops what they send.
//!
//! Needs CAP_BPF and CAP_NET_ADMIN, no type information of the kernel, and nothing of the host.

mod adopted;
mod attach;
mod connection;
mod inject;
mod interface;
mod inventory;
mod netlink;
mod netns;
mod pins;
mod qdisc;
mod records;
mod registry;
mod routes;
mod seen;
mod table;
#[cfg(test)]
mod tests;
mod trial_net;
mod watched;

use std::{
    io,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, RingBuf},
};
use nix::net::if_::if_nametoindex;
use penstock_common::wire::flow::state;
use thiserror::Error;

pub use adopted::{Adopted, AdoptedFlow, Adoption, Story, silence};
pub use connection::{TcpConnection, Unfit, agree};
pub use interface::all as interfaces;
pub use inventory::{Pinned, detach, pinned};
pub use netns::is_initial as is_initial_namespace;
pub use pins::{Namespace, PinError, prepare};
pub use registry::{FlowStop, ListedFlow, Registry};
pub use seen::Seen;
pub use table::LastBytes;
pub use trial_net::TrialNet;
pub use watched::Watched;

use self::{
    attach::{Attached, program},
    pins::Instance,
    records::{RecordEvents, Records},
    seen::state_of,
    table::{FLOWS, LEGS, RINGS, Table},
};
use super::{LoadError, object};
use crate::panics::PanicWatch;

const WIRE_PROGRAM: &str = "penstock_wire";
const GUARD_PROGRAM: &str = "penstock_guard";
const INJECT_PROGRAM: &str = "penstock_inject";
/// How long the programs know a flow that has ended, for what its peers repeat.
const LINGER: Duration = Duration::from_secs(10);

#[derive(Debug, Error)]
pub enum WireError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("cannot attach to interface {0}: {1}")]
    Attach(String, String),
    #[error("cannot pin: {0}")]
    Pin(String),
    #[error(transparent)]
    Place(#[from] PinError),
    #[error("the maps are of another version")]
    Foreign,
    #[error("no record is free")]
    Full,
    #[error("the connections cannot be joined: {0}")]
    Unfit(#[from] Unfit),
    #[error("cannot use the maps of path wire: {0}")]
    Map(#[from] aya::maps::MapError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl WireError {
    /// The error and its root cause in one line, without the verifier's output.
    pub fn reason(&self) -> String {
        match self {
            Self::Load(error) => error.reason(),
            other => other.to_string(),
        }
    }
}

/// The loaded programs. Dropping this detaches them, except those that have an instance and flows of which this agent has not seen
/// the end.
pub struct Wire {
    records: Arc<Records>,
    registry: Arc<Registry>,
    _events: RecordEvents,
    attached: Attached,
    /// Where the programs are attached.
    interfaces: registry::AttachedTo,
    flows: MapData,
    legs: MapData,
    rings: MapData,
    /// Where programs and maps are pinned.
    instance: Option<Instance>,
    /// This agent stops, and leaves its flows to the next one.
    is_leaving: AtomicBool,
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
        loader.map_max_entries("RINGS", max_flows);
        let mut ebpf = loader.load(object).map_err(LoadError::from)?;
        for name in [WIRE_PROGRAM, GUARD_PROGRAM, INJECT_PROGRAM] {
            program(&mut ebpf, name)?.load().map_err(LoadError::from)?;
        }
        let mut take = |name| ebpf.take_map(name).ok_or(LoadError::Missing(name));
        let (flows, legs, rings) = (data(take("FLOWS")?)?, data(take("LEGS")?)?, data(take("RINGS")?)?);
        let (ring, missed): (RingBuf<_>, _) = (take("WIRE_EVENTS")?.try_into()?, take("WIRE_MISSED")?.try_into()?);
        let again =
            |map: &MapData| -> Result<_, WireError> { Ok(MapData::from_fd(map.fd().as_fd().try_clone_to_owned()?)?) };
        let records = Arc::new(Records::new(Arc::new(Table::new(&flows, again(&legs)?, again(&rings)?)?))?);
        let registry = Arc::new(Registry::default());
        let events = RecordEvents::start(ring, missed, Arc::clone(&records), Arc::clone(&registry))?;
        let (attached, is_leaving) = (Attached::none(), AtomicBool::new(false));
        let interfaces = registry::AttachedTo::default();
        Ok(Self {
            records,
            registry,
            _events: events,
            attached,
            interfaces,
            flows,
            legs,
            rings,
            instance: None,
            is_leaving,
            ebpf,
        })
    }

    /// Lets maps, and programs that are attached from now on, outlive the process.
    pub fn pin(&mut self, namespace: &Namespace) -> Result<(), WireError> {
        let instance = namespace.claim()?;
        let pin =
            |map: &MapData, name| map.pin(instance.folder.at(name)).map_err(|error| WireError::Pin(error.to_string()));
        let maps = [(&self.flows, FLOWS), (&self.legs, LEGS), (&self.rings, RINGS)];
        let pinned = maps.into_iter().try_for_each(|(map, name)| pin(map, name));
        if pinned.is_err() {
            let _ = attach::remove(&instance, None);
        }
        pinned.map(|()| self.instance = Some(instance))
    }

    /// Attaches to an interface of this thread's network namespace: before other programs at ingress, after them at egress.
    pub fn attach(&mut self, name: &str) -> Result<(), WireError> {
        self.attached.attach(&mut self.ebpf, name, self.instance.as_ref())?;
        self.interfaces.lock().push(if_nametoindex(name).map_err(io::Error::from)?);
        Ok(())
    }

    fn instance(&self) -> Option<&Instance> {
        self.instance.as_ref()
    }

    /// Whether flows outlive the process.
    pub fn is_pinned(&self) -> bool {
        self.instance.is_some()
    }

    /// Tells every task to leave its flow to the next agent.
    pub fn leave(&self) {
        self.is_leaving.store(true, Ordering::Release);
        self.records.wake_all();
    }

    fn is_leaving(&self) -> bool {
        self.is_leaving.load(Ordering::Acquire)
    }

    /// Adopts flows of other agents in the namespace.
    pub fn adoption(self: &Arc<Self>, namespace: Namespace) -> Adoption {
        Adoption::new(namespace, Arc::clone(self))
    }

    /// Watches two connections of the agent, before the request is sent to the endpoint.
    pub fn watch(self: &Arc<Self>, client: TcpConnection, endpoint: TcpConnection) -> Result<Watched, WireError> {
        Watched::begin(self, client, endpoint)
    }

    /// The flows that have begun.
    pub fn flows(&self) -> Arc<Registry> {
        Arc::clone(&self.registry)
    }

    /// Notifies `watch` if the thread that waits for events ends.
    pub(crate) fn supervise(&self, watch: PanicWatch) {
        self.records.watch.set(watch);
    }

    /// Events that found no room, since the last call.
    pub fn take_missed_events(&self) -> u64 {
        self.records.take_missed()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let table = &self.records.table;
        let is_running = |&index: &u32| state_of(table.words(index)) == state::ACTIVE && table.is_known(index);
        if let Some(instance) = self.instance.take() {
            let running = (0..table.len()).filter(is_running).count();
            if running > 0 {
                tracing::info!(flows = running, folder = instance.describe(), "flows left to the next agent");
            } else if let Err(error) = attach::remove(&instance, None) {
                tracing::warn!(folder = instance.describe(), %error, "could not remove the pins of path wire");
            }
        }
        self.attached.detach(&mut self.ebpf);
    }
}

fn data(map: Map) -> Result<MapData, LoadError> {
    match map {
        Map::Array(data) | Map::HashMap(data) => Ok(data),
        _ => Err(LoadError::Missing("a map")),
    }
}
