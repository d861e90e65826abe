//! A flow whose packets a test makes up, and what the rule needs of the kernel.

use penstock_common::{
    slot::Word,
    tail::{MEMORY, RING},
    wire::{
        flow::{CLIENT, ENDPOINT, Facts, Flow, state},
        header::ACK,
        judge::{Leaving, OwnPacket, Packet, Socket, Verdict, WireKernel, arrive, leave},
    },
};

pub(crate) const MS: u64 = 1_000_000;

/// The agent's two sockets, and what the rule told it.
pub(crate) struct Sockets {
    pub(crate) sockets: [Option<Socket>; 2],
    pub(crate) events: u32,
    /// What the program on another CPU stores before the next exchanges, the last first.
    pub(crate) meanwhile: Vec<Option<u64>>,
    /// The same before the next loads.
    pub(crate) before_load: Vec<Option<u64>>,
    /// The sequence number of the packet's payload, and the flow's ring.
    pub(crate) seq: u32,
    pub(crate) ring: Box<[u8; MEMORY]>,
}

/// The byte of the stream with this sequence number.
pub(crate) fn byte(seq: u32) -> u8 {
    (seq.wrapping_mul(2_654_435_761) >> 24) as u8
}

impl Sockets {
    fn new(sockets: [Option<Socket>; 2]) -> Self {
        let ring = Box::new([0; MEMORY]);
        Self { sockets, events: 0, meanwhile: Vec::new(), before_load: Vec::new(), seq: 0, ring }
    }
}

impl WireKernel for Sockets {
    fn socket(&mut self, _: &Flow, leg: usize) -> Option<Socket> {
        self.sockets[leg]
    }

    fn load_acquire(&mut self, word: &Word) -> u64 {
        if let Some(value) = self.before_load.pop().flatten() {
            word.set(value);
        }
        word.get()
    }

    fn store_release(&mut self, word: &Word, value: u64) {
        word.set(value);
    }

    fn compare_exchange(&mut self, word: &Word, old: u64, new: u64) -> bool {
        if let Some(value) = self.meanwhile.pop().flatten() {
            word.set(value);
        }
        let same = word.get() == old;
        if same {
            word.set(new);
        }
        same
    }

    fn add(&mut self, word: &Word, n: u64) {
        word.set(word.get() + n);
    }

    fn keep(&mut self, position: u32, skip: u32, len: u32) {
        assert_eq!(self.seq.wrapping_add(skip), position);
        for at in (0..len).map(|at| position.wrapping_add(at)) {
            self.ring[(at % RING) as usize] = byte(at);
        }
    }

    fn event(&mut self) {
        self.events += 1;
    }
}

/// The numbers at which a flow begins: what each peer sends next, and what the agent sends next to each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbers {
    pub(crate) client: u32,
    pub(crate) to_client: u32,
    pub(crate) endpoint: u32,
    pub(crate) to_endpoint: u32,
}

pub(crate) const NUMBERS: Numbers = Numbers { client: 1000, to_client: 2000, endpoint: 5000, to_endpoint: 7000 };

pub(crate) struct Scene {
    pub(crate) flow: Flow,
    pub(crate) kernel: Sockets,
    pub(crate) numbers: Numbers,
}

impl Scene {
    /// An armed flow that has seen every direction.
    pub(crate) fn armed(numbers: Numbers) -> Self {
        let mut flow = Flow::default();
        flow.legs[CLIENT].facts = Facts {
            cookie: 1,
            received: 100,
            acked: 50,
            timestamps: 1,
            peer_scale: 7,
            own_scale: 3,
            largest: 1448,
            clock: 10,
            ..Facts::default()
        };
        flow.legs[ENDPOINT].facts = Facts {
            cookie: 2,
            received: 50,
            acked: 100,
            timestamps: 1,
            peer_scale: 2,
            own_scale: 9,
            clock: 77,
            ..Facts::default()
        };
        let Numbers { client, to_client, endpoint, to_endpoint } = numbers;
        let socket =
            |rcv_nxt, snd_nxt, received, acked| Some(Socket { rcv_nxt, snd_nxt, snd_una: snd_nxt, received, acked });
        let sockets = [socket(client, to_client, 100, 50), socket(endpoint, to_endpoint, 50, 100)];
        let mut scene = Self { flow, kernel: Sockets::new(sockets), numbers };
        scene.flow.state.set(state::WATCHED);
        assert_eq!(scene.leave(CLIENT, 1, ACK), Leaving::Pass);
        assert_eq!(scene.leave(ENDPOINT, 2, ACK), Leaving::Pass);
        assert_eq!(scene.client_sends(scene.ack(0, 0)), Verdict::Pass);
        scene.flow.state.set(1 << 8 | state::ARMED);
        scene
    }

    pub(crate) fn begun(numbers: Numbers) -> Self {
        let mut scene = Self::armed(numbers);
        assert_eq!(scene.endpoint_sends(scene.data(0, 10)), Verdict::Forward);
        assert_eq!((state::of(scene.flow.state.get()), scene.kernel.events), (state::ACTIVE, 1));
        scene
    }

    pub(crate) fn packet(seq: u32, ack: u32, flags: u8, payload: u32) -> Packet {
        Packet {
            seq,
            ack,
            window: 1000,
            flags,
            payload,
            largest: payload,
            timestamped: 1,
            tsval: 123,
            interface: 4,
            now_ns: 500 * MS,
        }
    }

    /// A packet of the endpoint's with payload; `at` counts from where the flow begins.
    pub(crate) fn data(&self, at: u32, payload: u32) -> Packet {
        Self::packet(self.numbers.endpoint.wrapping_add(at), self.numbers.to_endpoint, ACK, payload)
    }

    /// An acknowledgement by the client of what the endpoint sent up to `up_to`; the client has sent `sent` bytes since.
    pub(crate) fn ack(&self, sent: u32, up_to: u32) -> Packet {
        Self::packet(self.numbers.client.wrapping_add(sent), self.numbers.to_client.wrapping_add(up_to), ACK, 0)
    }

    pub(crate) fn client_sends(&mut self, packet: Packet) -> Verdict {
        arrive(&self.flow, CLIENT, &packet, &mut self.kernel)
    }

    pub(crate) fn endpoint_sends(&mut self, packet: Packet) -> Verdict {
        self.kernel.seq = packet.seq;
        arrive(&self.flow, ENDPOINT, &packet, &mut self.kernel)
    }

    pub(crate) fn leave(&mut self, leg: usize, cookie: u64, flags: u8) -> Leaving {
        self.leaves(leg, &OwnPacket { cookie, flags, interface: 9, ..self.own_ack(leg) })
    }

    pub(crate) fn leaves(&mut self, leg: usize, packet: &OwnPacket) -> Leaving {
        leave(&self.flow, leg, packet, &mut self.kernel)
    }

    /// What the agent's socket acknowledges when the flow begins, with a window of no bytes.
    pub(crate) fn own_ack(&self, leg: usize) -> OwnPacket {
        let ack = if leg == CLIENT { self.numbers.client } else { self.numbers.endpoint };
        OwnPacket { cookie: leg as u64 + 1, ack, window: 0, flags: ACK, interface: 9 }
    }

    pub(crate) fn state(&self) -> u64 {
        state::of(self.flow.state.get())
    }
}
