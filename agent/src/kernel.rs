//! The only module that knows aya, and the only one of the agent with `unsafe`: loading the kernel program, its maps, the
//! slots that it shares with us, its events, and the socket calls that have no safe wrapper.
//!
//! Given sockets and indices, it does what it is told; when to insert, arm or take back is `steer`'s business.

mod btf;
pub mod events;
mod object;
pub mod slots;
pub mod socket;
#[cfg(test)]
pub mod tun;
pub mod version;

use std::{os::fd::AsFd, sync::Arc};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, RingBuf, SockHash},
    programs::SkSkb,
};
use penstock_common::slot::Slot;
use thiserror::Error;
use zerocopy::IntoBytes as _;

use self::{events::Events, slots::Slots};

/// Name of the kernel program, as `BPF_OBJ_GET_INFO_BY_FD` shows it (cut to 15 bytes there).
pub const PROGRAM: &str = "penstock_verdict";

#[derive(Debug, Error)]
pub enum LoadError {
    #[error(
        "this binary was built without the kernel program; `cargo xtask setup` installs what builds it, `cargo xtask \
         build-ebpf` builds it, then build the agent again"
    )]
    NotBuilt,
    #[error("the kernel's type information: {0}")]
    Btf(#[from] btf::BtfError),
    #[error("loading the kernel program (it takes CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON): {0}")]
    Load(#[from] aya::EbpfError),
    #[error("the kernel program is refused: {0}")]
    Program(#[from] aya::programs::ProgramError),
    #[error("the kernel program's maps: {0}")]
    Map(#[from] MapError),
    #[error("the kernel program has no {0}")]
    Missing(&'static str),
    #[error("the kernel program's memory and events: {0}")]
    Io(#[from] std::io::Error),
}

/// The loaded program. While it lives, sockets in its maps are looked after by the kernel; when the last handle goes,
/// kernel and program let go of everything.
pub struct Kernel {
    slots: Arc<Slots>,
    events: Events,
    sources: MapData,
    targets: MapData,
    index: MapData,
    tails: MapData,
    _ebpf: Ebpf,
}

impl Kernel {
    /// Loads and attaches the program, with room for `max_flows` endpoint connections and as many clients.
    pub fn load(max_flows: u32) -> Result<Self, LoadError> {
        let object = object::bytes().ok_or(LoadError::NotBuilt)?;
        let offsets = btf::offsets()?;
        let words: [u32; 4] = zerocopy::transmute!(offsets);
        debug_assert_eq!(words.as_bytes(), offsets.as_bytes());
        let mut loader = EbpfLoader::new();
        loader.override_global("OFFSETS", &words, true);
        for map in ["SOURCES", "TARGETS", "INDEX", "SLOTS", "TAILS"] {
            loader.map_max_entries(map, max_flows);
        }
        let mut ebpf = loader.load(object)?;

        let program = ebpf.program_mut(PROGRAM).ok_or(LoadError::Missing("verdict program"))?;
        let program: &mut SkSkb = program.try_into()?;
        program.load()?;
        let sources: SockHash<_, u64> = ebpf.map("SOURCES").ok_or(LoadError::Missing("map SOURCES"))?.try_into()?;
        let sources_fd = sources.fd().try_clone()?;
        // Attached before any socket is inserted: a socket keeps the programs its map had at insertion (sock_map_link).
        let program: &mut SkSkb = ebpf.program_mut(PROGRAM).ok_or(LoadError::Missing("verdict program"))?.try_into()?;
        program.attach(&sources_fd)?;

        let ring: RingBuf<MapData> = ebpf.take_map("EVENTS").ok_or(LoadError::Missing("map EVENTS"))?.try_into()?;
        let missed: Array<MapData, u64> =
            ebpf.take_map("MISSED").ok_or(LoadError::Missing("map MISSED"))?.try_into()?;
        let slots = match ebpf.take_map("SLOTS") {
            Some(Map::Array(data)) => Arc::new(Slots::map(data.fd().as_fd(), max_flows)?),
            _ => return Err(LoadError::Missing("map SLOTS")),
        };
        let events = Events::start(ring, missed, max_flows)?;
        let mut take = |name: &'static str| match ebpf.take_map(name) {
            Some(Map::SockHash(data) | Map::HashMap(data)) => Ok(data),
            _ => Err(LoadError::Missing(name)),
        };
        let (sources, targets) = (take("SOURCES")?, take("TARGETS")?);
        let (index, tails) = (take("INDEX")?, take("TAILS")?);
        Ok(Self { slots, events, sources, targets, index, tails, _ebpf: ebpf })
    }

    /// Handles of the maps for one worker; they share the kernel's maps, not a lock.
    pub fn maps(&self) -> Result<Maps, LoadError> {
        let again = |data: &MapData| -> Result<MapData, LoadError> {
            Ok(MapData::from_fd(data.fd().as_fd().try_clone_to_owned()?)?)
        };
        Ok(Maps {
            sources: Map::SockHash(again(&self.sources)?).try_into()?,
            targets: Map::SockHash(again(&self.targets)?).try_into()?,
            index: Map::HashMap(again(&self.index)?).try_into()?,
            tails: Map::HashMap(again(&self.tails)?).try_into()?,
        })
    }

    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    pub fn events(&self) -> &Events {
        &self.events
    }
}

/// One worker's handles of the program's maps. Keys are socket cookies, that of `tails` is the index of the slot.
pub struct Maps {
    pub sources: SockHash<MapData, u64>,
    pub targets: SockHash<MapData, u64>,
    pub index: HashMap<MapData, u64, u32>,
    pub tails: HashMap<MapData, u32, Ring>,
}

/// The memory of a ring of last payload bytes (`penstock_common::tail`).
pub type Ring = [u8; penstock_common::tail::MEMORY];

const _: () = assert!(size_of::<Slot>() == 128);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifier_accepts_the_program() {
        let kernel = Kernel::load(64).expect("load");
        kernel.maps().expect("maps");
        assert_eq!(kernel.slots().len(), 64);
    }
}
