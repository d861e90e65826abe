//! The maps of the programs, and their layouts. The agent inserts sockets and indices; slots and events carry results to the agent.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, LruHashMap, RingBuf, SockHash},
};
use penstock_atomics::fetch_add;
use penstock_common::{
    slot::{LocalSlot, Offsets, Slot},
    tail,
};

/// Connections on which the verdict runs, by cookie.
#[map]
pub(crate) static SOURCES: SockHash<u64> = SockHash::with_max_entries(16384, 0);
/// Connections that bytes are redirected to, by cookie. No program runs on these.
#[map]
pub(crate) static TARGETS: SockHash<u64> = SockHash::with_max_entries(16384, 0);
/// Index of the slots of a source, by its cookie.
#[map]
pub(crate) static INDEX: HashMap<u64, u32> = HashMap::with_max_entries(16384, 0);
#[map]
pub(crate) static SLOTS: Array<Slot> = Array::with_max_entries(16384, BPF_F_MMAPABLE);
/// Indices of slots with an event for the agent.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// Rings of last payload bytes, by the index of the slot. The agent makes one if an EPP wants to know how responses end.
#[map]
pub(crate) static TAILS: HashMap<u32, [u8; tail::MEMORY]> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
/// Number of events for which `EVENTS` was full.
#[map]
pub(crate) static MISSED: Array<u64> = Array::with_max_entries(1, 0);

/// Sockets of endpoints on this machine, by cookie. The message program runs on these. A socket is in the map only while a response
/// of its connection may be redirected.
#[map]
pub(crate) static LOCALS: SockHash<u64> = SockHash::with_max_entries(16384, 0);
/// Index of the slots of such a socket's connection, by its cookie.
#[map]
pub(crate) static LOCAL_INDEX: HashMap<u64, u32> = HashMap::with_max_entries(16384, 0);
#[map]
pub(crate) static LOCAL_SLOTS: Array<LocalSlot> = Array::with_max_entries(16384, BPF_F_MMAPABLE);
/// Connections that the agent is making. An entry is removed when the other side is seen. For most connections that never happens,
/// so the oldest entries are evicted.
#[map]
pub(crate) static PEERS: LruHashMap<Ends, Peer> = LruHashMap::with_max_entries(16384, 0);
/// How to find the endpoints' sockets, by the index of the slots.
#[map]
pub(crate) static NEIGHBOURS: Array<Neighbour> = Array::with_max_entries(16384, 0);
/// Id of a network namespace in the agent's namespace, by its cookie.
#[map]
pub(crate) static NAMESPACES: LruHashMap<u64, i64> = LruHashMap::with_max_entries(4096, 0);
/// The clients' sockets, by the index of the slots, because a message program cannot look a socket up (it could not release it).
/// Not part of the slots, because user space must not see or write kernel addresses.
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
    sk_socket: 0,
    socket_file: 0,
    file_flags: 0,
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

/// Both ends of a connection. IPv4 addresses are mapped (RFC 4291 §2.5.5.2); words are in packet order.
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

/// A connection that the agent makes. Two sockets with the same pair of initial sequence numbers are the two ends of one
/// connection, in any namespaces, even if other sockets use the same addresses.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Peer {
    /// Cookie of the agent's socket. It tells whether the connection and its slots still belong to the agent.
    pub(crate) cookie: u64,
    pub(crate) index: u32,
    pub(crate) unused: u32,
    /// The next sequence numbers of the agent and of the endpoint.
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
    /// Not 0: all namespace ids were searched for that namespace.
    pub(crate) searched: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Found {
    /// Address of the client's `struct tcp_sock`. Read with `bpf_probe_read_kernel`, which tolerates bad addresses.
    pub(crate) socket: u64,
    /// The client's cookie. It tells whether the address is still that of the client.
    pub(crate) cookie: u64,
}

/// The memory of the connection's ring; null if nothing is to be kept.
#[inline(always)]
pub(crate) fn ring_of(index: u32, keep: bool) -> *mut u8 {
    if keep {
        TAILS.get_ptr_mut(index).map_or(core::ptr::null_mut(), |ring| ring.cast())
    } else {
        core::ptr::null_mut()
    }
}

/// Sends the agent an event for the slot at `index`.
#[inline(always)]
pub(crate) fn event(index: u32) {
    if EVENTS.output::<u64>(u64::from(index), 0).is_err()
        && let Some(missed) = MISSED.get_ptr_mut(0)
    {
        fetch_add(missed, 1);
    }
}
