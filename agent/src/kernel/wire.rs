//! Path `wire` in the kernel: loads its programs, attaches them to interfaces, and keeps the records of its flows.
//!
//! A flow is watched from before its request is sent, so that the programs have seen both connections in both directions under their
//! own addresses before it can begin; where an address is translated inside this network namespace they see nothing, and it never
//! begins. The agent arms it whenever it has read everything and written its last byte. When the flow has begun, the agent's sockets
//! are silent: the program at egress drops what they send.
//!
//! Needs CAP_BPF and CAP_NET_ADMIN, no type information of the kernel, and nothing of the host.

mod connection;
mod inject;
mod interface;
mod records;
#[cfg(test)]
mod tests;
mod watched;

use std::{io, os::fd::AsFd as _, path::Path, sync::Arc};

use aya::{
    Ebpf, EbpfLoader,
    maps::Map,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{NlOptions, SchedClassifierLinkId, TcAttachOptions, TcError, qdisc_add_clsact},
    },
};
use thiserror::Error;

pub use connection::{Connection, Unfit, agree};
pub use interface::all as interfaces;
pub use watched::{Seen, Watched};

use self::records::{Events, Records};
use super::{LoadError, object, slots::Mapping};
use crate::panics::Watch;

const WIRE_PROGRAM: &str = "penstock_wire";
const GUARD_PROGRAM: &str = "penstock_guard";
const INJECT_PROGRAM: &str = "penstock_inject";

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

impl WireError {
    /// The error and its root cause in one line, without the verifier's output.
    pub fn reason(&self) -> String {
        match self {
            Self::Load(error) => error.reason(),
            other => other.to_string(),
        }
    }
}

/// The loaded programs. Unless they were pinned, they and all flows end when this is dropped.
pub struct Wire {
    records: Arc<Records>,
    _events: Events,
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
        for name in [WIRE_PROGRAM, GUARD_PROGRAM, INJECT_PROGRAM] {
            program(&mut ebpf, name)?.load().map_err(LoadError::from)?;
        }
        let flows = match ebpf.map("FLOWS") {
            Some(Map::Array(flows)) => Mapping::new(flows.fd().as_fd(), max_flows)?,
            _ => return Err(LoadError::Missing("map FLOWS").into()),
        };
        let mut take = |name| ebpf.take_map(name).ok_or(LoadError::Missing(name));
        let (legs, ring, missed) = (take("LEGS")?, take("WIRE_EVENTS")?, take("WIRE_MISSED")?);
        let records = Arc::new(Records::new(flows, legs.try_into()?, max_flows)?);
        let events = Events::start(ring.try_into()?, missed.try_into()?, Arc::clone(&records))?;
        Ok(Self { records, _events: events, links: Vec::new(), ebpf })
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
    pub fn watch(self: &Arc<Self>, client: Connection, endpoint: Connection) -> Result<Watched, WireError> {
        Watched::begin(self, client, endpoint)
    }

    /// Notifies `watch` if the thread that waits for events ends.
    pub fn supervise(&self, watch: Watch) {
        self.records.watch(watch);
    }

    /// Events that found no room, since the last call.
    pub fn take_missed_events(&self) -> u64 {
        self.records.take_missed()
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
