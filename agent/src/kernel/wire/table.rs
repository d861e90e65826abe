//! The maps of one set of programs: the records of flows, the addresses by which the programs find them, and the last bytes that they
//! have carried.

use std::{os::fd::AsFd as _, path::Path, ptr::NonNull};

use aya::maps::{HashMap, Map, MapData, MapError};
use parking_lot::Mutex;
use penstock_common::{
    tail,
    wire::flow::{ENDPOINT, Ends, Flow},
};

use super::WireError;
use crate::kernel::{Ring, slots::Mapping};

/// Names of the maps' pins.
pub(super) const FLOWS: &str = "flows";
pub(super) const LEGS: &str = "legs";
pub(super) const RINGS: &str = "rings";

/// The key of a leg: `Ends` as words.
type LegKey = [u32; size_of::<Ends>() / size_of::<u32>()];

pub(super) struct Table {
    flows: Mapping<Flow>,
    legs: Mutex<HashMap<MapData, LegKey, u32>>,
    rings: Mutex<HashMap<MapData, u32, Ring>>,
    count: u32,
}

/// The last bytes that a flow has carried to the client.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct LastBytes {
    /// The bytes, in order.
    pub bytes: Vec<u8>,
    /// The flow has carried no others.
    pub are_all: bool,
}

impl Table {
    pub(super) fn new(flows: &MapData, legs: MapData, rings: MapData) -> Result<Self, WireError> {
        let info = flows.info()?;
        if info.value_size() as usize != size_of::<Flow>() {
            return Err(WireError::Foreign);
        }
        let count = info.max_entries();
        let flows = Mapping::new(flows.fd().as_fd(), count)?;
        let (legs, rings) = (Map::HashMap(legs).try_into()?, Map::HashMap(rings).try_into()?);
        Ok(Self { flows, legs: Mutex::new(legs), rings: Mutex::new(rings), count })
    }

    /// The table whose maps are pinned in this folder.
    pub(super) fn pinned(folder: &Path) -> Result<Self, WireError> {
        let map = |name| MapData::from_pin(folder.join(name));
        Self::new(&map(FLOWS)?, map(LEGS)?, map(RINGS)?)
    }

    pub(super) fn len(&self) -> u32 {
        self.count
    }

    pub(super) fn flow(&self, index: u32) -> NonNull<Flow> {
        self.flows.at(index)
    }

    /// Lets the programs know a leg of the flow.
    pub(super) fn announce(&self, index: u32, leg: usize, ends: Ends) -> Result<(), MapError> {
        self.legs.lock().insert(key(ends), index * 2 + leg as u32, 0)
    }

    /// Makes the programs forget the flow with these legs. Leaves alone what another flow has announced since.
    pub(super) fn forget(&self, index: u32, ends: [Ends; 2]) {
        let mut legs = self.legs.lock();
        for key in ends.map(key) {
            if legs.get(&key, 0).is_ok_and(|value| value >> 1 == index) {
                let _ = legs.remove(&key);
            }
        }
    }

    /// Allocates the ring of a flow's last bytes. Fails if kernel memory is exhausted.
    pub(super) fn make_ring(&self, index: u32) -> Result<(), MapError> {
        self.rings.lock().insert(index, [0; size_of::<Ring>()], 0)
    }

    /// Frees it. No program may use the record any more, because the kernel gives the memory to another ring at once.
    pub(super) fn remove_ring(&self, index: u32) {
        // Fails if the ring could not be allocated.
        let _ = self.rings.lock().remove(&index);
    }

    /// The last bytes that a flow has carried. Only after its end.
    pub(super) fn last_bytes(&self, index: u32) -> Result<LastBytes, MapError> {
        let leg = &self.words(index).legs[ENDPOINT];
        let (end, kept) = (leg.highest.get() as u32, leg.kept());
        let ring = self.rings.lock().get(&index, 0)?;
        let (older, newer) = tail::last(&ring, end, kept);
        Ok(LastBytes { bytes: [older, newer].concat(), are_all: u64::from(kept) == leg.bytes.get() })
    }

    /// Whether a leg of the flow is known to the programs.
    pub(super) fn is_known(&self, index: u32) -> bool {
        let legs = self.legs.lock();
        self.ends(index).map(key).iter().any(|key| legs.get(key, 0).is_ok_and(|value| value >> 1 == index))
    }

    /// The addresses of a flow's legs.
    pub(super) fn ends(&self, index: u32) -> [Ends; 2] {
        let flow = self.flow(index).as_ptr();
        // SAFETY: fields of a live record, which only its owner writes, before the programs know it.
        [0, 1].map(|leg| unsafe { (&raw const (*flow).legs[leg].facts.ends).read_volatile() })
    }

    /// The record of a flow, without the facts that its owner may write.
    pub(super) fn words(&self, index: u32) -> &Flow {
        // SAFETY: inside the mapping, which lives as long as `self`. Fields that change while a program knows the record are words;
        // others are written only while the flow is not armed, and not read through this reference.
        unsafe { self.flow(index).as_ref() }
    }
}

fn key(ends: Ends) -> LegKey {
    zerocopy::transmute!(ends)
}
