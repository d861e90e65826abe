//! What the programs and the agent share. Which map belongs to whom stands at each; those that a program writes and the agent
//! reads are slots and events.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, LruHashMap, RingBuf, SockHash},
};
use penstock_common::{
    slot::{LocalSlot, Offsets, Slot},
    tail,
};

use crate::memory::fetch_add;

/// Connections whose arriving bytes are looked at, by cookie: the verdict runs on these.
#[map]
pub(crate) static SOURCES: SockHash<u64> = SockHash::with_max_entries(16384, 0);
/// Connections that bytes are redirected to, by cookie; no program runs on these.
#[map]
pub(crate) static TARGETS: SockHash<u64> = SockHash::with_max_entries(16384, 0);
/// Cookie of a source to the index of its slots.
#[map]
pub(crate) static INDEX: HashMap<u64, u32> = HashMap::with_max_entries(16384, 0);
#[map]
pub(crate) static SLOTS: Array<Slot> = Array::with_max_entries(16384, BPF_F_MMAPABLE);
/// Indices of slots that have something for the agent.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// Rings of last payload bytes, by the index of the slot; the agent makes one where an EPP wants to know how responses end.
#[map]
pub(crate) static TAILS: HashMap<u32, [u8; tail::MEMORY]> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
/// Events that found `EVENTS` full.
#[map]
pub(crate) static MISSED: Array<u64> = Array::with_max_entries(1, 0);

/// Sockets of endpoints on this machine, by cookie: the message program runs on these. Each is in it while a response of its
/// connection may be redirected.
#[map]
pub(crate) static LOCALS: SockHash<u64> = SockHash::with_max_entries(16384, 0);
/// Cookie of such a socket to the index of its connection's slots.
#[map]
pub(crate) static LOCAL_INDEX: HashMap<u64, u32> = HashMap::with_max_entries(16384, 0);
#[map]
pub(crate) static LOCAL_SLOTS: Array<LocalSlot> = Array::with_max_entries(16384, BPF_F_MMAPABLE);
/// Connections of the agent that are being made. Entries are taken out when the other side is seen, which for most never
/// happens, so that old ones have to give way.
#[map]
pub(crate) static PEERS: LruHashMap<Ends, Peer> = LruHashMap::with_max_entries(16384, 0);
/// How the endpoints' sockets are found again, by the index of the slots.
#[map]
pub(crate) static NEIGHBOURS: Array<Neighbour> = Array::with_max_entries(16384, 0);
/// Cookie of a network namespace to its id in the agent's namespace.
#[map]
pub(crate) static NAMESPACES: LruHashMap<u64, i64> = LruHashMap::with_max_entries(4096, 0);
/// The clients' sockets, by the index of the slots: a message program cannot look one up, as it cannot give it back. Not
/// among the slots, because addresses are nothing that user space should see or write.
#[map]
pub(crate) static FOUND: Array<Found> = Array::with_max_entries(16384, 0);

#[unsafe(no_mangle)]
pub(crate) static OFFSETS: Global<Offsets> = Global::new(Offsets {
    sk_wmem_queued: 0,
    sk_sndbuf: 0,
    write_seq: 0,
    max_window: 0,
    mss_cache: 0,
    skb_cb: 0,
    msg_sk: 0,
    msg_data: 0,
    msg_data_end: 0,
    ops_sk: 0,
    skc_cookie: 0,
    skc_flags: 0,
    accounts: 0,
    copied_seq: 0,
    sk_user_data: 0,
    sk_tsflags: 0,
    skb_head: 0,
    skb_end: 0,
    shared_flags: 0,
    shared_nr_frags: 0,
    shared_frag_list: 0,
    shared_frags: 0,
    page_compound_head: 0,
    page_mapping: 0,
});

/// Both ends of a connection, the agent's first; IPv4 addresses are mapped (RFC 4291 §2.5.5.2), words as in the packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ends {
    pub(crate) agent: End,
    pub(crate) endpoint: End,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct End {
    pub(crate) address: [u32; 4],
    pub(crate) port: u32,
}

/// A connection of the agent's, and how it will be known again: two sockets that have chosen the same initial sequence
/// numbers are the two ends of one connection, whatever namespaces they live in and whoever else uses their addresses.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Peer {
    /// Of the agent's socket, by which is seen whether the connection is still its own, and the slots are.
    pub(crate) cookie: u64,
    pub(crate) index: u32,
    pub(crate) unused: u32,
    /// The agent's next sequence number, and the endpoint's.
    pub(crate) sends: u32,
    pub(crate) receives: u32,
}

/// An endpoint's own socket.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Neighbour {
    pub(crate) ends: Ends,
    /// Cookie of its network namespace.
    pub(crate) namespace: u64,
    /// Not 0: that namespace has been looked for among all ids.
    pub(crate) searched: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Found {
    /// Address of the client's `struct tcp_sock`; it is read with a helper that minds no address.
    pub(crate) socket: u64,
    /// Its cookie, by which is seen whether that is still it.
    pub(crate) cookie: u64,
}

/// Tells the agent that the slot at `index` has something for it.
#[inline(always)]
pub(crate) fn event(index: u32) {
    if EVENTS.output::<u64>(u64::from(index), 0).is_err()
        && let Some(missed) = MISSED.get_ptr_mut(0)
    {
        fetch_add(missed, 1);
    }
}
