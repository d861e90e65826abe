//! What the programs have seen of a flow.

use std::sync::atomic::Ordering;

use penstock_common::{
    slot::Word,
    wire::{
        after,
        flow::{CLIENT, ENDPOINT, Flow, Leg, mark, state},
    },
};

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// One of `penstock_common::wire::flow::state`, and bits of `mark`.
    pub state: u64,
    pub marks: u64,
    /// Why the flow has not begun at the last packet that the program considered (`judge::refusal`).
    pub refusal: u64,
    /// The client has acknowledged the endpoint's FIN, and with it the whole stream.
    pub finished: bool,
    /// The client has acknowledged every byte that has passed.
    pub told_all: bool,
    /// Payload bytes to the client, and the segments that they came in.
    pub bytes: u64,
    pub segments: u64,
    /// All packets, in both directions.
    pub packets: u64,
    /// Packets with payload of the client that were dropped, and packets of the agent's sockets.
    pub refused: u64,
    pub silenced: u64,
    /// ICMP errors of the client's side that were passed on to the endpoint.
    pub too_big: u64,
    /// CLOCK_MONOTONIC ns of the first and last payload, and of the last packet; 0: none.
    pub first_ns: u64,
    pub last_ns: u64,
    pub packet_ns: u64,
}

impl Seen {
    pub(super) fn of(flow: &Flow) -> Self {
        let sum = |word: fn(&Leg) -> &Word| word(&flow.legs[CLIENT]).get() + word(&flow.legs[ENDPOINT]).get();
        let told = (flow.legs[CLIENT].told.get() as u32).wrapping_add(flow.legs[CLIENT].shift().ack);
        Self {
            state: state_of(flow),
            marks: flow.marks.get(),
            refusal: flow.refusal.get(),
            finished: flow.legs[ENDPOINT].closed.get() != 0,
            told_all: !after(flow.legs[ENDPOINT].highest.get() as u32, told),
            bytes: flow.legs[ENDPOINT].bytes.get(),
            segments: flow.legs[ENDPOINT].segments.get(),
            packets: sum(|leg| &leg.packets),
            refused: flow.legs[CLIENT].refused.get(),
            too_big: flow.too_big.get(),
            silenced: sum(|leg| &leg.silenced),
            first_ns: flow.first_ns.get(),
            last_ns: flow.last_ns.get(),
            packet_ns: flow.packet_ns.get(),
        }
    }

    /// Whether both peers have closed, one has reset, the client has the whole stream, or another connection has the addresses.
    pub fn has_ended(&self) -> bool {
        self.state >= state::ENDED || self.finished
    }

    /// Whether the peers have come to an end between themselves.
    pub fn is_orderly(&self) -> bool {
        // A client that has sent what nobody routed gets no orderly close.
        self.state == state::ENDED || self.finished && self.marks & mark::CLIENT_SENT == 0
    }
}

pub(super) fn state_of(flow: &Flow) -> u64 {
    state::of(flow.state.atomic().load(Ordering::Acquire))
}
