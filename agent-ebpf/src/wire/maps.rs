//! The maps of the programs. The agent inserts flows; the programs keep their state.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use penstock_atomics::{compare_exchange, fetch_add, load_acquire, ring, store_release};
use penstock_common::{
    slot::Word,
    tail,
    wire::{
        flow::{Ends, Flow, state},
        header::{Header, Shift},
        judge::Socket,
    },
};

use crate::packet::{load, look_up};

/// The flow and leg of a connection: twice the index of the flow, plus the leg.
#[map]
pub(crate) static LEGS: HashMap<Ends, u32> = HashMap::with_max_entries(8192, 0);
#[map]
pub(crate) static FLOWS: Array<Flow> = Array::with_max_entries(4096, BPF_F_MMAPABLE);
/// Rings of the last bytes of what endpoints send, by the index of the flow.
#[map]
pub(crate) static RINGS: HashMap<u32, [u8; tail::MEMORY]> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// Indices of flows whose state or marks have changed.
#[map]
pub(crate) static WIRE_EVENTS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);
/// Number of events for which `WIRE_EVENTS` was full.
#[map]
pub(crate) static WIRE_MISSED: Array<u64> = Array::with_max_entries(1, 0);
/// Memory for one packet.
#[map]
pub(crate) static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

#[repr(C)]
pub(crate) struct Scratch {
    pub(crate) header: Header,
    pub(crate) ip: [u8; 40],
    pub(crate) shift: Shift,
    /// Position of the next option.
    pub(crate) at: u32,
    pub(crate) timestamped: u32,
    pub(crate) tsval: u32,
}

pub(crate) fn scratch<'a>() -> Option<&'a mut Scratch> {
    // SAFETY: only the program that runs on this CPU uses its value, and a program at ingress is not interrupted by another.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// The flow with this index.
#[inline(always)]
pub(crate) fn flow<'a>(index: u32) -> Option<&'a Flow> {
    // SAFETY: a map's value, of which all fields that change are words.
    FLOWS.get_ptr(index).map(|flow| unsafe { &*flow })
}

/// Removes the flow's addresses from the map, because another connection uses them.
#[inline(always)]
pub(crate) fn forget(flow: &Flow, programs: &mut Programs) {
    let word = flow.state.get();
    store_release(&flow.state, state::with(word, state::REPLACED));
    for leg in &flow.legs {
        let _ = LEGS.remove(leg.facts.ends);
    }
    penstock_common::wire::judge::WireKernel::event(programs);
}

/// The helpers of the rule.
pub(crate) struct Programs {
    pub(crate) skb: *mut aya_ebpf::bindings::__sk_buff,
    pub(crate) index: u32,
    /// Position of the packet's payload.
    pub(crate) payload: u32,
}

impl penstock_common::wire::judge::WireKernel for Programs {
    #[inline(always)]
    fn socket(&mut self, flow: &Flow, leg: usize) -> Option<Socket> {
        look_up(self.skb, &flow.legs[leg & 1].facts.ends)
    }

    #[inline(always)]
    fn load_acquire(&mut self, word: &Word) -> u64 {
        load_acquire(word)
    }

    #[inline(always)]
    fn store_release(&mut self, word: &Word, value: u64) {
        store_release(word, value);
    }

    #[inline(always)]
    fn compare_exchange(&mut self, word: &Word, old: u64, new: u64) -> bool {
        compare_exchange(word, old, new)
    }

    #[inline(always)]
    fn add(&mut self, word: &Word, n: u64) {
        fetch_add(word.as_ptr(), n);
    }

    #[inline(always)]
    fn keep(&mut self, position: u32, skip: u32, len: u32) {
        let Some(ring) = RINGS.get_ptr_mut(self.index) else { return };
        ring::copy(ring.cast(), position, len, |place, to, len| {
            // What cannot be read stays as it was.
            let _ = load(self.skb, self.payload + skip + place, to, len);
        });
    }

    #[inline(always)]
    fn event(&mut self) {
        if WIRE_EVENTS.output::<u64>(u64::from(self.index), 0).is_err()
            && let Some(missed) = WIRE_MISSED.get_ptr_mut(0)
        {
            fetch_add(missed, 1);
        }
    }
}
