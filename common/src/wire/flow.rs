//! The memory that the agent and the kernel program share about one flow of path `wire`: 568 bytes in an array map.
//!
//! The agent fills in a record before it makes both connections' addresses known to the program, and stores [`Flow::state`] last.
//! From then on fields change by whole words. Numbers of a leg are those that the peer of this leg uses.

use super::{after, header::Shift};
use crate::{tail::TAIL, word::Word};

/// Version of what agents leave to each other: the layout of [`Flow`], and the keys and values of the maps. Increase it with every
/// change, so that no agent reads a record as what it is not.
pub const VERSION: u32 = 4;

/// The index of the leg to the client.
pub const CLIENT: usize = 0;
/// The index of the leg to the endpoint.
pub const ENDPOINT: usize = 1;

/// The low byte of [`Flow::state`]; above it is the number of the arming.
pub mod state {
    /// No flow.
    pub const FREE: u64 = 0;
    /// The program watches packets, and passes them all.
    pub const WATCHED: u64 = 1;
    /// The agent waits: at a packet that fits, the program begins to carry the flow.
    pub const ARMED: u64 = 2;
    /// A program on some CPU is about to begin.
    pub const BEGINNING: u64 = 3;
    /// Packets are rewritten; the agent's sockets are silent.
    pub const ACTIVE: u64 = 4;
    /// Both peers have closed, or one has reset. Late packets are still rewritten.
    pub const ENDED: u64 = 5;
    /// Addresses are in use by another connection; the program has forgotten the flow.
    pub const REPLACED: u64 = 6;

    /// The bits of the state.
    pub const MASK: u64 = 0xff;

    /// The state in this word, without the arming.
    #[inline(always)]
    pub const fn of(word: u64) -> u64 {
        word & MASK
    }

    /// The same arming in another state.
    #[inline(always)]
    pub const fn with(word: u64, state: u64) -> u64 {
        word & !MASK | state
    }
}

/// Bits of [`Flow::marks`].
pub mod mark {
    /// The client sent payload after the flow began. It was dropped.
    pub const CLIENT_SENT: u64 = 1;
    /// The flow ended by a reset of the client.
    pub const CLIENT_RESET: u64 = 2;
    /// The flow ended by a reset of the endpoint.
    pub const ENDPOINT_RESET: u64 = 4;
    /// The client's FIN arrived before the endpoint's.
    pub const CLIENT_CLOSED_FIRST: u64 = 8;
}

/// Both ends of one of the agent's connections. IPv4 addresses are mapped (RFC 4291 §2.5.5.2); words are in packet order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::Immutable))]
pub struct Ends {
    /// The address of the client or the endpoint.
    pub peer: [u32; 4],
    /// The agent's address.
    pub own: [u32; 4],
    /// The peer's port, then the own port.
    pub ports: u32,
}

impl Ends {
    /// The first words of an IPv4-mapped address.
    pub const MAPPED: [u32; 3] = [0, 0, 0xffff_u32.to_be()];

    /// Whether the addresses are mapped ones, so that the packets are those of IPv4.
    #[inline(always)]
    pub fn is_ipv4(&self) -> bool {
        self.peer[0] == 0 && self.peer[1] == 0 && self.peer[2] == Self::MAPPED[2]
    }
}

/// What user space knows about one connection, and the agent's condition for the beginning.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes))]
pub struct Facts {
    /// Cookie of the agent's socket.
    pub cookie: u64,
    /// Value that the socket's `bytes_received` must have: the agent has read everything.
    pub received: u64,
    /// Value that the socket's `bytes_acked` must have: all that the agent wrote is acknowledged.
    pub acked: u64,
    /// Its addresses and ports.
    pub ends: Ends,
    /// The agent's TCP timestamp clock minus CLOCK_MONOTONIC in ms, at most one too low.
    pub clock: u32,
    /// Window scale that the peer announced.
    pub peer_scale: u32,
    /// Window scale that the agent announced to the peer.
    pub own_scale: u32,
    /// Not 0: both connections use timestamps.
    pub timestamps: u32,
    /// Largest payload of a segment that the peer accepts.
    pub largest: u32,
    /// Fills up the last word.
    pub unused: [u32; 2],
}

/// One connection of a flow.
#[repr(C)]
#[derive(Default)]
pub struct Leg {
    /// Set by the agent before the connection is announced, and before each arming.
    pub facts: Facts,
    /// [`Shift::pack`]: changes of packets that arrive on this leg.
    pub shift: [Word; 3],
    /// Interface on which a packet of the peer arrived; 0: none yet.
    pub arrives_on: Word,
    /// Interface by which a packet of the agent's own left; 0: none yet.
    pub leaves_on: Word,
    /// The peer's latest TSval.
    pub tsval: Word,
    /// `1 << 32 |` the sequence number after the last payload byte that arrived.
    pub highest: Word,
    /// `1 << 32 |` the highest sequence number that the peer has acknowledged.
    pub told: Word,
    /// The end of the window that this peer's sender has been told, as a sequence number of what the peer receives: by the peer, and
    /// of the client's also by the agent before the flow began.
    pub offered: Word,
    /// `1 << 32 |` the end of the window that the agent has offered to the peer, as a sequence number of what the peer sends; 0: none
    /// seen. Counts on the leg to the endpoint.
    pub granted: Word,
    /// `1 << 32 |` the sequence number after the peer's FIN; 0: none arrived.
    pub fin: Word,
    /// Not 0: the other peer has acknowledged that FIN.
    pub closed: Word,
    /// Payload bytes passed on, each counted once.
    pub bytes: Word,
    /// Segments with new payload that were passed on.
    pub segments: Word,
    /// All packets that were passed on.
    pub packets: Word,
    /// `1 << 32 |` the sequence number before which bytes in the flow's ring may be wrong, because programs on two CPUs wrote to the
    /// same places; 0: none.
    pub torn: Word,
    /// Packets with payload that were dropped, because nobody routed it.
    pub refused: Word,
    /// Packets of the agent's own socket that were not let out.
    pub silenced: Word,
}

/// What another agent has to know about a flow if this one dies.
#[repr(C)]
#[derive(Default)]
pub struct Response {
    /// When the request began; CLOCK_MONOTONIC ns.
    pub started_ns: Word,
    /// HTTP status of the response.
    pub status: Word,
    /// Bytes of the body that user space has carried before the flow began.
    pub relayed: Word,
    /// `state` of the body's [`Framing`](crate::framing::Framing) when the flow began.
    pub framing: Word,
    /// `left` of it.
    pub left: Word,
    /// Not 0: an agent has counted the flow.
    pub counted: Word,
}

/// One flow.
#[repr(C)]
#[derive(Default)]
pub struct Flow {
    /// One of [`state`], and above it the number of the arming.
    pub state: Word,
    /// Bits of [`mark`].
    pub marks: Word,
    /// Time of the first segment with payload for the client; CLOCK_MONOTONIC ns.
    pub first_ns: Word,
    /// Time of the last segment with payload for the client.
    pub last_ns: Word,
    /// Time of the last packet of either peer.
    pub packet_ns: Word,
    /// Why the flow did not begin at a packet that the program considered: [`judge::refusal`](super::judge::refusal).
    pub refusal: Word,
    /// ICMP errors of the client's side that were passed on to the endpoint.
    pub too_big: Word,
    /// Written by the agent; the program does not read it.
    pub response: Response,
    /// By [`CLIENT`] and [`ENDPOINT`].
    pub legs: [Leg; 2],
}

const _: () = assert!(size_of::<Ends>() == 36 && size_of::<Facts>() == 88);
const _: () = assert!(size_of::<Leg>() == 88 + 18 * 8 && size_of::<Flow>() == 568);

impl Leg {
    /// The sequence number after everything that the peer has sent, with its FIN.
    #[inline(always)]
    pub fn sent(&self) -> u32 {
        let fin = self.fin.get();
        if fin != 0 { fin as u32 } else { self.highest.get() as u32 }
    }

    /// How many of the last payload bytes are in the flow's ring.
    pub fn kept(&self) -> u32 {
        let (end, torn) = (self.highest.get() as u32, self.torn.get());
        let kept = self.bytes.get().min(u64::from(TAIL)) as u32;
        match torn as u32 {
            _ if torn == 0 => kept,
            torn if !after(end, torn) => 0,
            torn => kept.min(end.wrapping_sub(torn)),
        }
    }

    /// The changes of packets that arrive on this leg.
    #[inline(always)]
    pub fn shift(&self) -> Shift {
        Shift::unpack([self.shift[0].get(), self.shift[1].get(), self.shift[2].get()])
    }

    /// Sets them, word by word: only while no program reads them.
    #[inline(always)]
    pub fn set_shift(&self, shift: Shift) {
        let [first, second, third] = shift.pack();
        self.shift[0].set(first);
        self.shift[1].set(second);
        self.shift[2].set(third);
    }
}
