//! Path `wire`: the rewriting of headers, compared with a recomputation of checksums and with the way back, and the rule for packets of
//! both peers in any order.

use penstock_common::{
    slot::Word,
    tail::TAIL,
    wire::{
        after,
        flow::{CLIENT, ENDPOINT, Facts, Flow, state},
        header::{Header, MAX_LEN, MIN_LEN, Shift, changed, fold},
        judge::{Packet, Socket, Verdict, WireKernel, arrive},
    },
};

use crate::input::{self, Choices};

/// Bytes that choose the shift, before the header; after it come packets.
const CHOICES: usize = 22;
const LONGEST: usize = MAX_LEN as usize;
const CHECKSUM: usize = 16;

pub fn run(data: &[u8]) {
    let (mut choices, rest) = input::split(data, CHOICES);
    let [seq, ack, tsval, tsecr, ports] = [(); 5].map(|()| word(&mut choices));
    let [scale_in, scale_out] = [choices.byte() % 15, choices.byte() % 15];
    let mut bytes = [0; LONGEST];
    let len = rest.len().min(LONGEST);
    bytes[..len].copy_from_slice(&rest[..len]);
    rewrite(&bytes, ports, Shift { seq, ack, tsval, tsecr, scale_in, scale_out });
    judge(&mut Choices::new(rest));
}

fn word(choices: &mut Choices<'_>) -> u32 {
    u32::from_be_bytes([(); 4].map(|()| choices.byte()))
}

/// One's complement sum of big-endian words (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u64 =
        bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn rewrite(bytes: &[u8; LONGEST], ports: u32, shift: Shift) {
    let mut header = Header::EMPTY;
    header.bytes[..LONGEST].copy_from_slice(bytes);
    let Some(len) = header.begin() else {
        return assert!(bytes[12] >> 4 < 5, "a header of a legal length is refused");
    };
    let own = header.ports();
    apply(&mut header, ports, &shift);
    assert_eq!(header.bytes[len as usize..LONGEST], bytes[len as usize..], "a byte after the header has changed");
    assert_eq!(header.bytes[CHECKSUM..MIN_LEN as usize], bytes[CHECKSUM..MIN_LEN as usize]);
    // A packet whose checksum was right before is right after.
    let whole = |bytes: &[u8]| checksum(&[&bytes[..CHECKSUM], &[0, 0], &bytes[CHECKSUM + 2..LONGEST]].concat());
    let (new, recomputed) = (changed(whole(bytes), header.sum), whole(&header.bytes[..LONGEST]));
    let zero = |checksum: u16| checksum.is_multiple_of(0xffff);
    assert!(new == recomputed || zero(new) && zero(recomputed), "{new:04x} instead of {recomputed:04x}");

    let one_scale = Shift { scale_out: shift.scale_in, ..shift };
    let back = Shift {
        seq: shift.seq.wrapping_neg(),
        ack: shift.ack.wrapping_neg(),
        tsval: shift.tsval.wrapping_neg(),
        tsecr: shift.tsecr.wrapping_neg(),
        ..one_scale
    };
    header.bytes[..LONGEST].copy_from_slice(bytes);
    header.begin();
    apply(&mut header, ports, &one_scale);
    apply(&mut header, own, &back);
    assert_eq!(header.bytes[..LONGEST], bytes[..], "there and back is something else");
    assert!(zero(fold(header.sum)));
}

/// As the program does.
fn apply(header: &mut Header, ports: u32, shift: &Shift) {
    header.shift(ports, shift);
    let mut at = MIN_LEN;
    while at < header.len {
        let next = header.shift_option(at, shift);
        assert!(next > at && next <= header.len, "an option does not end");
        at = next;
    }
}

/// The agent's sockets, which have read and sent everything, and the packet in question.
struct Sockets([Socket; 2], Packet);

impl WireKernel for Sockets {
    fn socket(&mut self, _: &Flow, leg: usize) -> Option<Socket> {
        Some(self.0[leg])
    }

    fn load_acquire(&mut self, word: &Word) -> u64 {
        word.get()
    }

    fn store_release(&mut self, word: &Word, value: u64) {
        word.set(value);
    }

    fn compare_exchange(&mut self, word: &Word, old: u64, new: u64) -> bool {
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
        assert!(len > 0 && len <= TAIL, "{len} bytes are kept");
        assert_eq!(position, self.1.seq.wrapping_add(skip));
        assert!(skip + len == self.1.payload, "what is kept is not the packet's end");
    }

    fn event(&mut self) {}
}

/// Packets of both peers whose numbers are near those of the connections.
fn judge(choices: &mut Choices<'_>) {
    let base = [word(choices), word(choices)];
    let numbers = |leg: usize| Socket {
        rcv_nxt: base[leg],
        snd_nxt: base[leg] ^ 0x55aa_0000,
        snd_una: base[leg] ^ 0x55aa_0000,
        received: 10,
        acked: 10,
    };
    let mut kernel = Sockets([numbers(CLIENT), numbers(ENDPOINT)], Packet::default());
    let mut flow = Flow::default();
    for (leg, cookie) in [(CLIENT, 1), (ENDPOINT, 2)] {
        flow.legs[leg].facts = Facts {
            cookie,
            received: 10,
            acked: 10,
            peer_scale: 7,
            own_scale: 7,
            largest: 1 << 16,
            ..Facts::default()
        };
        flow.legs[leg].arrives_on.set(3);
        flow.legs[leg].leaves_on.set(3);
    }
    flow.state.set(state::ARMED);
    loop {
        let kind = choices.byte();
        let (seq, ack, payload) = (choices.byte(), choices.byte(), choices.byte());
        if [kind, seq, ack, payload] == [0; 4] {
            return;
        }
        let from = usize::from(kind & 1);
        let near = |base: u32, by: u8| base.wrapping_add((i32::from(by as i8) * 100) as u32);
        let packet = Packet {
            seq: near(kernel.0[from].rcv_nxt, seq),
            ack: near(kernel.0[from].snd_nxt, ack),
            window: u16::from(choices.byte()) << 4,
            flags: kind >> 1 & 0x17,
            payload: u32::from(payload) * 50,
            largest: u32::from(payload) * 50,
            interface: 3,
            now_ns: 1,
            ..Packet::default()
        };
        let before = state::of(flow.state.get());
        kernel.1 = packet;
        let verdict = arrive(&flow, from, &packet, &mut kernel);
        check(&flow, from, &packet, (before, verdict), &kernel);
    }
}

fn check(flow: &Flow, from: usize, packet: &Packet, (before, verdict): (u64, Verdict), kernel: &Sockets) {
    let now = state::of(flow.state.get());
    assert!(now >= before && now != state::BEGINNING && now != state::WATCHED, "{before} became {now}");
    let end = packet.seq.wrapping_add(packet.payload);
    match verdict {
        Verdict::Pass => assert!(now <= state::ARMED, "a packet of a flow reached the agent's socket"),
        Verdict::Forward if from == CLIENT && packet.payload > 0 => {
            let received = kernel.0[CLIENT].rcv_nxt;
            assert!(!after(end, received), "bytes that nobody routed passed: {packet:?}");
        }
        Verdict::Acknowledge | Verdict::Reset => assert!(from == CLIENT && now >= state::ACTIVE),
        _ => {}
    }
    if now >= state::ACTIVE {
        let leg = &flow.legs[ENDPOINT];
        let passed = (leg.highest.get() as u32).wrapping_sub(kernel.0[ENDPOINT].rcv_nxt);
        assert_eq!(leg.bytes.get(), u64::from(passed), "bytes were counted twice or not at all");
        assert_eq!(flow.legs[CLIENT].bytes.get(), 0);
    }
}
