//! The rule of path `wire`: when a flow begins, what happens to each packet, and when the flow ends.
//!
//! A flow begins at a packet of the endpoint that is exactly the next one, when the agent has read everything and every byte that
//! it wrote is acknowledged. Then nothing is in transit that only the agent's sockets could deliver. A FIN counts after the other
//! peer has acknowledged it, and a reset only with a sequence number that the other peer accepts (RFC 5961 §3.2); anything else
//! passes and changes nothing.

use super::{
    after,
    flow::{CLIENT, ENDPOINT, Flow, Leg, mark, state},
    header::{ACK, FIN, RST, SYN, Shift},
};
use crate::{
    tail::{RING, TAIL},
    word::Word,
};

/// Added to the agent's timestamp clock, which user space knows to within a millisecond, so that no value is older than the last one
/// that the agent's socket sent (PAWS, RFC 7323 §5).
const CLOCK_MARGIN: u32 = 2;
const KNOWN: u64 = 1 << 32;

/// Why a flow did not begin at a packet.
pub mod refusal {
    /// It began, or no packet was considered.
    pub const NONE: u64 = 0;
    /// Not both directions of both connections were seen under the registered addresses.
    pub const UNSEEN: u64 = 1;
    /// The packet is not the next one that the agent's socket expects.
    pub const NOT_NEXT: u64 = 2;
    /// The agent has not read everything.
    pub const UNREAD: u64 = 3;
    /// A peer has not acknowledged everything.
    pub const UNACKNOWLEDGED: u64 = 4;
    /// The packet does not have the options that the connections agreed on.
    pub const OPTIONS: u64 = 5;
    /// The segment is larger than the client accepts.
    pub const LARGE: u64 = 6;
    /// A socket of the agent does not exist under its addresses.
    pub const SOCKET: u64 = 7;
    /// How many values there are.
    pub const COUNT: usize = 8;

    /// The name in logs.
    pub const fn label(refusal: u64) -> &'static str {
        match refusal {
            UNSEEN => "unseen",
            NOT_NEXT => "not_next",
            UNREAD => "unread",
            UNACKNOWLEDGED => "unacknowledged",
            OPTIONS => "options",
            LARGE => "large",
            SOCKET => "socket",
            _ => "none",
        }
    }
}

/// A packet as it arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Its sequence number.
    pub seq: u32,
    /// Its acknowledgement number, which counts with [`ACK`].
    pub ack: u32,
    /// The window field, not scaled.
    pub window: u16,
    /// [`FIN`], [`SYN`], [`RST`], [`ACK`] and others.
    pub flags: u8,
    /// Bytes of payload.
    pub payload: u32,
    /// Bytes of payload of the largest segment that the packet stands for.
    pub largest: u32,
    /// Not 0: it has a timestamp.
    pub timestamped: u32,
    /// Its TSval (RFC 7323), if it has a timestamp.
    pub tsval: u32,
    /// The interface on which it arrived.
    pub interface: u32,
    /// CLOCK_MONOTONIC.
    pub now_ns: u64,
}

/// What to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leave it to the kernel's own TCP.
    Pass,
    /// Discard it. If it matters, its sender repeats it.
    Drop,
    /// Rewrite it and send it to the other peer.
    Forward,
    /// Forward it with the last sequence number of the client that the endpoint knows.
    Acknowledge,
    /// Forward it so, as a reset.
    Reset,
    /// Another connection uses the addresses: forget the flow, and pass the packet.
    Forget,
}

/// The kernel's view of one of the agent's sockets (`struct bpf_tcp_sock`).
#[derive(Clone, Copy, Debug, Default)]
pub struct Socket {
    /// The sequence number that it expects next.
    pub rcv_nxt: u32,
    /// The sequence number that it sends next.
    pub snd_nxt: u32,
    /// The first sequence number that is not acknowledged.
    pub snd_una: u32,
    /// `bytes_received`: bytes that arrived in sequence, read or not.
    pub received: u64,
    /// `bytes_acked`: bytes that the peer has acknowledged.
    pub acked: u64,
}

/// What the rule needs from the program.
pub trait WireKernel {
    /// The agent's socket of a leg; `None` if there is none.
    fn socket(&mut self, flow: &Flow, leg: usize) -> Option<Socket>;
    /// Loads with acquire order.
    fn load_acquire(&mut self, word: &Word) -> u64;
    /// Stores with release order.
    fn store_release(&mut self, word: &Word, value: u64);
    /// Stores `new` if the word is `old`; fully ordered. Whether it was.
    fn compare_exchange(&mut self, word: &Word, old: u64, new: u64) -> bool;
    /// Adds to a word that other CPUs may change, too.
    fn add(&mut self, word: &Word, n: u64);
    /// Copies `len` bytes of the packet's payload, from its byte number `skip` on, to the flow's ring ([`crate::tail`]). `position` is
    /// the sequence number of the first of them.
    fn keep(&mut self, position: u32, skip: u32, len: u32);
    /// Tells the agent that the flow's state or marks have changed.
    fn event(&mut self);
}

/// Decides on a packet of the peer of leg `from`.
#[inline(always)]
pub fn arrive<K: WireKernel>(flow: &Flow, from: usize, packet: &Packet, kernel: &mut K) -> Verdict {
    let word = kernel.load_acquire(&flow.state);
    match state::of(word) {
        state::WATCHED => {
            watch(&flow.legs[from & 1], packet);
            Verdict::Pass
        }
        state::ARMED => {
            let verdict = if from == ENDPOINT && packet.payload > 0 && packet.flags & (FIN | RST | SYN) == 0 {
                match begin(flow, packet, word, kernel) {
                    refusal::NONE => carry(flow, from, packet, kernel),
                    why => {
                        flow.refusal.set(why);
                        Verdict::Pass
                    }
                }
            } else {
                Verdict::Pass
            };
            if let Verdict::Pass = verdict {
                watch(&flow.legs[from & 1], packet);
            }
            verdict
        }
        // Only until the program on the other CPU is done; the sender repeats what matters.
        state::BEGINNING => Verdict::Drop,
        state::ACTIVE => carry(flow, from, packet, kernel),
        state::ENDED if packet.flags & (SYN | ACK) == SYN => Verdict::Forget,
        state::ENDED => carry(flow, from, packet, kernel),
        _ => Verdict::Pass,
    }
}

/// What happens to a packet that leaves on a leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// Let it out.
    Pass,
    /// Discard it: the peers talk to each other, so the agent's socket has to be silent.
    Drop,
    /// Another connection uses the addresses: forget the flow, and let the packet out.
    Forget,
}

/// A packet of this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnPacket {
    /// Cookie of the socket that sends it.
    pub cookie: u64,
    /// Its acknowledgement number, which counts with [`ACK`].
    pub ack: u32,
    /// The window field, not scaled.
    pub window: u16,
    /// [`FIN`], [`SYN`], [`RST`], [`ACK`] and others.
    pub flags: u8,
    /// The interface by which it leaves.
    pub interface: u32,
}

/// Decides on a packet that leaves under a leg's addresses. Rewritten packets are not asked about.
#[inline(always)]
pub fn leave<K: WireKernel>(flow: &Flow, leg: usize, packet: &OwnPacket, kernel: &mut K) -> Leaving {
    let word = kernel.load_acquire(&flow.state);
    let leg = &flow.legs[leg & 1];
    let own = packet.cookie == leg.facts.cookie;
    let flags = packet.flags;
    match state::of(word) {
        state::WATCHED | state::ARMED => {
            if own {
                // A packet passes an upper device, such as a bond or a VLAN, before the one below it, and routes name the upper one.
                if leg.leaves_on.get() == 0 {
                    leg.leaves_on.set(u64::from(packet.interface));
                }
                if flags & ACK != 0 {
                    raise(&leg.granted, edge(packet.ack, packet.window, leg.facts.own_scale as u8));
                }
            }
            Leaving::Pass
        }
        state::BEGINNING | state::ACTIVE | state::ENDED if own => {
            leg.silenced.set(leg.silenced.get() + 1);
            Leaving::Drop
        }
        state::ACTIVE | state::ENDED if flags & (SYN | ACK) == SYN => Leaving::Forget,
        _ => Leaving::Pass,
    }
}

/// Learns from a packet that passes.
#[inline(always)]
fn watch(leg: &Leg, packet: &Packet) {
    leg.arrives_on.set(u64::from(packet.interface));
    if packet.timestamped != 0 {
        leg.tsval.set(u64::from(packet.tsval));
    }
    let end = packet.seq.wrapping_add(packet.payload);
    raise(&leg.highest, end);
    if packet.flags & ACK != 0 {
        raise(&leg.told, packet.ack);
        raise(&leg.offered, edge(packet.ack, packet.window, leg.facts.peer_scale as u8));
    }
}

/// The end of the window that a packet offers.
#[inline(always)]
fn edge(ack: u32, window: u16, scale: u8) -> u32 {
    ack.wrapping_add(u32::from(window) << (scale & 15))
}

/// Sets a sequence number unless the word has a later one.
#[inline(always)]
fn raise(word: &Word, seq: u32) {
    let old = word.get();
    if old & KNOWN == 0 || after(seq, old as u32) {
        word.set(KNOWN | u64::from(seq));
    }
}

/// Begins the flow at this packet. Returns a [`refusal`].
#[inline(always)]
fn begin<K: WireKernel>(flow: &Flow, packet: &Packet, word: u64, kernel: &mut K) -> u64 {
    let [client, endpoint] = &flow.legs;
    // The endpoint's packet is the one that its leg still has to see.
    if client.arrives_on.get() == 0 || client.leaves_on.get() == 0 || endpoint.leaves_on.get() == 0 {
        return refusal::UNSEEN;
    }
    let highest = endpoint.highest.get();
    if highest & KNOWN != 0 && after(highest as u32, packet.seq) {
        return refusal::NOT_NEXT;
    }
    if packet.timestamped != endpoint.facts.timestamps {
        return refusal::OPTIONS;
    }
    if packet.largest > client.facts.largest {
        return refusal::LARGE;
    }
    // From here on the program on every other CPU drops the flow's packets.
    if !kernel.compare_exchange(&flow.state, word, state::with(word, state::BEGINNING)) {
        return refusal::NOT_NEXT;
    }
    let why = agree(flow, packet, kernel);
    if why == refusal::NONE {
        kernel.store_release(&flow.state, state::with(word, state::ACTIVE));
        kernel.event();
    } else {
        kernel.store_release(&flow.state, word);
    }
    why
}

/// Checks the sockets, and fixes how the numbers of the two connections differ.
#[inline(always)]
fn agree<K: WireKernel>(flow: &Flow, packet: &Packet, kernel: &mut K) -> u64 {
    let [client, endpoint] = &flow.legs;
    let Some(to_endpoint) = kernel.socket(flow, ENDPOINT) else { return refusal::SOCKET };
    let Some(to_client) = kernel.socket(flow, CLIENT) else { return refusal::SOCKET };
    if to_endpoint.rcv_nxt != packet.seq {
        return refusal::NOT_NEXT;
    }
    if to_endpoint.received != endpoint.facts.received || to_client.received != client.facts.received {
        return refusal::UNREAD;
    }
    let silent = |socket: &Socket, leg: &Leg| socket.snd_una == socket.snd_nxt && socket.acked == leg.facts.acked;
    if !silent(&to_endpoint, endpoint) || !silent(&to_client, client) {
        return refusal::UNACKNOWLEDGED;
    }
    let now = (packet.now_ns / 1_000_000) as u32;
    let clock = |leg: &Leg| now.wrapping_add(leg.facts.clock).wrapping_add(CLOCK_MARGIN);
    let client_clock = clock(endpoint).wrapping_sub(client.tsval.get() as u32);
    let endpoint_clock = clock(client).wrapping_sub(packet.tsval);
    client.set_shift(Shift {
        seq: to_endpoint.snd_nxt.wrapping_sub(to_client.rcv_nxt),
        ack: to_endpoint.rcv_nxt.wrapping_sub(to_client.snd_nxt),
        tsval: client_clock,
        tsecr: endpoint_clock.wrapping_neg(),
        scale_in: client.facts.peer_scale as u8,
        scale_out: endpoint.facts.own_scale as u8,
    });
    endpoint.set_shift(Shift {
        seq: to_client.snd_nxt.wrapping_sub(to_endpoint.rcv_nxt),
        ack: to_client.rcv_nxt.wrapping_sub(to_endpoint.snd_nxt),
        tsval: endpoint_clock,
        tsecr: client_clock.wrapping_neg(),
        scale_in: endpoint.facts.peer_scale as u8,
        scale_out: client.facts.own_scale as u8,
    });
    for (leg, socket) in [(client, &to_client), (endpoint, &to_endpoint)] {
        leg.highest.set(KNOWN | u64::from(socket.rcv_nxt));
        leg.told.set(KNOWN | u64::from(socket.snd_nxt));
    }
    // What the endpoint has sent in the agent's larger window may find the client's opened so far, and be accepted. The client sends
    // nothing that counts.
    let granted = endpoint.granted.get();
    if granted & KNOWN != 0 {
        raise(&client.offered, (granted as u32).wrapping_add(endpoint.shift().seq));
    }
    refusal::NONE
}

/// Decides on a packet of a flow that the program carries.
#[inline(always)]
fn carry<K: WireKernel>(flow: &Flow, from: usize, packet: &Packet, kernel: &mut K) -> Verdict {
    let (mine, other) = (&flow.legs[from & 1], &flow.legs[from & 1 ^ 1]);
    let shift = mine.shift();
    add(&mine.packets, 1);
    flow.packet_ns.set(packet.now_ns);
    let end = packet.seq.wrapping_add(packet.payload);
    // A receiver takes a segment that begins in its window (RFC 9293 §3.10.7.4), Linux also what of it is beyond, and a FIN directly
    // after it.
    let (begins, offered) = (packet.seq.wrapping_add(shift.seq), other.offered.get() as u32);
    let is_next = from == ENDPOINT && packet.seq == mine.highest.get() as u32;
    let acceptable = is_next || offered.wrapping_sub(begins) as i32 >= i32::from(packet.payload > 0);
    // A FIN has a number, but it is not a byte's.
    let known = if packet.payload > 0 { mine.highest.get() as u32 } else { mine.sent() };
    let is_beyond = from == CLIENT && after(end, known);
    // Also if it has overtaken a FIN. Of a packet that the endpoint does not get or take, nothing counts.
    if packet.flags & ACK != 0 && (!is_beyond || acceptable && packet.payload == 0) {
        acknowledge(flow, mine, other, packet, &shift, kernel);
    }
    if is_beyond {
        return beyond(flow, packet, acceptable, kernel);
    }
    if packet.payload > 0 && acceptable {
        if let Some(before) = advance(&mine.highest, end, kernel) {
            kernel.add(&mine.bytes, u64::from(end.wrapping_sub(before)));
            kernel.add(&mine.segments, 1);
            if flow.first_ns.get() == 0 {
                flow.first_ns.set(packet.now_ns);
            }
            flow.last_ns.set(packet.now_ns);
        }
        if from == ENDPOINT {
            keep(mine, packet, kernel);
        }
    }
    // A FIN before bytes that have passed is forged.
    if packet.flags & FIN != 0 && acceptable && !after(mine.highest.get() as u32, end) {
        mine.fin.set(KNOWN | u64::from(end.wrapping_add(1)));
        if from == CLIENT && other.fin.get() == 0 {
            flow.marks.set(flow.marks.get() | mark::CLIENT_CLOSED_FIRST);
        }
    }
    if packet.flags & RST != 0 {
        let at_receiver = packet.seq.wrapping_add(shift.seq) == other.told.get() as u32;
        // A closed socket answers bytes that crossed with its FIN by a reset with the FIN's own number, and Linux takes it
        // (`tcp_reset_check`).
        let is_after_all = mine.highest.get() as u32 == packet.seq;
        let at_fin = is_after_all && mine.fin.get() != 0 && packet.seq.wrapping_add(1) == mine.fin.get() as u32;
        if at_receiver || at_fin || packet.seq == mine.sent() {
            reset(flow, from, kernel);
        }
    }
    Verdict::Forward
}

/// Moves a known sequence number forward to `end`, and returns the one before. `None` if it is not before `end`: the bytes have been
/// counted. Packets of a flow may pass on several CPUs at once, and each byte is to be counted once.
#[inline(always)]
fn advance<K: WireKernel>(word: &Word, end: u32, kernel: &mut K) -> Option<u32> {
    // Another CPU has moved it each time.
    for _ in 0..4 {
        let old = word.get();
        if !after(end, old as u32) {
            return None;
        }
        if kernel.compare_exchange(word, old, KNOWN | u64::from(end)) {
            return Some(old as u32);
        }
    }
    None
}

/// Keeps what of the packet is among the last bytes of the stream. A byte's place is its sequence number modulo the ring's size, so a
/// repetition writes the same byte again, and bytes that arrive late fill their gap.
#[inline(always)]
fn keep<K: WireKernel>(leg: &Leg, packet: &Packet, kernel: &mut K) {
    let end = packet.seq.wrapping_add(packet.payload);
    let later = (leg.highest.get() as u32).wrapping_sub(end);
    if later >= TAIL {
        return;
    }
    let room = TAIL - later;
    let len = if packet.payload < room { packet.payload } else { room };
    let position = end.wrapping_sub(len);
    kernel.keep(position, packet.payload - len, len);
    // Meanwhile another CPU may have written newer bytes to the same places. It stores the new number before it writes.
    let newest = kernel.load_acquire(&leg.highest) as u32;
    if newest.wrapping_sub(position) > RING {
        raise(&leg.torn, end.wrapping_add(RING));
    }
}

/// A packet of the client at or beyond what the agent's socket had received: nobody has routed such payload.
#[inline(always)]
fn beyond<K: WireKernel>(flow: &Flow, packet: &Packet, acceptable: bool, kernel: &mut K) -> Verdict {
    let client = &flow.legs[CLIENT];
    if !acceptable {
        return if packet.payload > 0 { Verdict::Drop } else { Verdict::Forward };
    }
    let marks = flow.marks.get();
    if packet.payload > 0 {
        add(&client.refused, 1);
        if marks & mark::CLIENT_SENT == 0 {
            flow.marks.set(marks | mark::CLIENT_SENT);
            kernel.event();
        }
    } else if marks & mark::CLIENT_SENT == 0 {
        return Verdict::Forward;
    }
    if packet.flags & (FIN | RST) != 0 {
        reset(flow, CLIENT, kernel);
        return Verdict::Reset;
    }
    // What the client acknowledges passes with the last sequence number that the endpoint knows.
    if packet.payload > 0 { Verdict::Drop } else { Verdict::Acknowledge }
}

/// Learns what the peer of `mine` has acknowledged, and whether that ends the flow.
#[inline(always)]
fn acknowledge<K: WireKernel>(flow: &Flow, mine: &Leg, other: &Leg, packet: &Packet, shift: &Shift, kernel: &mut K) {
    let acked = packet.ack.wrapping_add(shift.ack);
    let highest = other.highest.get() as u32;
    let fin = other.fin.get();
    if after(acked, highest.wrapping_add(u32::from(fin != 0))) {
        return;
    }
    raise(&mine.told, packet.ack);
    raise(&mine.offered, edge(packet.ack, packet.window, shift.scale_in));
    let is_fin = fin & KNOWN != 0 && acked == fin as u32 && highest.wrapping_add(1) == fin as u32;
    if is_fin && other.closed.get() == 0 {
        other.closed.set(1);
        if mine.closed.get() != 0 {
            end(flow, kernel);
        } else {
            kernel.event();
        }
    }
}

#[inline(always)]
fn reset<K: WireKernel>(flow: &Flow, by: usize, kernel: &mut K) {
    let by = if by == CLIENT { mark::CLIENT_RESET } else { mark::ENDPOINT_RESET };
    flow.marks.set(flow.marks.get() | by);
    end(flow, kernel);
}

#[inline(always)]
fn end<K: WireKernel>(flow: &Flow, kernel: &mut K) {
    let word = flow.state.get();
    if state::of(word) == state::ACTIVE {
        kernel.store_release(&flow.state, state::with(word, state::ENDED));
        kernel.event();
    }
}

#[inline(always)]
fn add(word: &Word, n: u64) {
    word.set(word.get() + n);
}
