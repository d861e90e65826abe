//! Changes the numbers of TCP connections as they pass, as if their ends had chosen others: sequence numbers that wrap within the stream,
//! and timestamp clocks that wrap and jump. Each end sees its own numbers in what comes back.

use std::collections::{BTreeSet, HashMap};

use super::frame::Segment;
use crate::Random;

/// Sequence numbers wrap within so many bytes of a direction, timestamps within so many milliseconds.
const BYTES_TO_WRAP: u64 = 300_000;
const MS_TO_WRAP: u64 = 3000;
/// One packet in so many is followed by a jump of its sender's clock, by up to an hour.
const ONE_IN_JUMPS: u64 = 200;
const LONGEST_JUMP: u64 = 3_600_000;

/// Which numbers change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Renumbering {
    pub sequences: bool,
    pub clocks: bool,
}

/// Addresses and ports of sender and receiver.
pub(super) type Direction = ([u8; 18], [u8; 18]);

/// What one end of a connection sends.
struct Sender {
    first: u32,
    /// Added to its sequence numbers.
    shift: u32,
    /// Added to its timestamps from the given one on; in order.
    clocks: Vec<(u32, u32)>,
    /// Its connection was reset.
    is_reset: bool,
}

impl Sender {
    fn clock(&self, stamp: u32) -> u32 {
        let fits = self.clocks.iter().rev().find(|(from, _)| !is_before(stamp, *from));
        fits.or(self.clocks.first()).map_or(stamp, |(_, shift)| stamp.wrapping_add(*shift))
    }

    fn own_clock(&self, stamp: u32) -> u32 {
        let fits = self.clocks.iter().rev().find(|(from, shift)| !is_before(stamp, from.wrapping_add(*shift)));
        fits.or(self.clocks.first()).map_or(stamp, |(_, shift)| stamp.wrapping_sub(*shift))
    }
}

fn is_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// The connections of one cable.
pub(super) struct Numbers {
    wanted: Renumbering,
    senders: HashMap<Direction, Sender>,
    /// Segments whose bytes cross 0, timestamps that jumped, and the window scales of all SYNs.
    pub(super) wraps: u64,
    pub(super) jumps: u64,
    pub(super) scales: BTreeSet<u8>,
}

impl Numbers {
    pub(super) fn new(wanted: Renumbering) -> Self {
        Self { wanted, senders: HashMap::new(), wraps: 0, jumps: 0, scales: BTreeSet::new() }
    }

    /// Rewrites a segment. Returns whether its connection was reset.
    pub(super) fn pass(&mut self, segment: &mut Segment<'_>, random: &mut Random) -> bool {
        let (from, to) = segment.ends();
        if segment.is_syn() {
            self.begin(segment, (from, to), random);
        }
        let Some(mine) = self.senders.get_mut(&(from, to)) else { return false };
        mine.is_reset |= segment.is_reset();
        let mut is_reset = mine.is_reset;
        let (seq, stamp) = (segment.seq(), segment.timestamps().map(|(stamp, _)| stamp));
        let moved = seq.wrapping_add(mine.shift);
        self.wraps += u64::from(moved.checked_add(segment.payload).is_none());
        segment.set_seq(moved);
        let clock = stamp.map(|stamp| mine.clock(stamp));
        if let Some(stamp) = stamp
            && self.wanted.clocks
            && !segment.is_syn()
            && random.one_in(ONE_IN_JUMPS)
        {
            let next = stamp.wrapping_add(1);
            let (last, shift) = *mine.clocks.last().expect("it has begun");
            if is_before(last, next) {
                mine.clocks.push((next, shift.wrapping_add(random.below(LONGEST_JUMP) as u32)));
                self.jumps += 1;
            }
        }
        let other = self.senders.get(&(to, from));
        is_reset |= other.is_some_and(|other| other.is_reset);
        if let Some(other) = other
            && segment.has_ack()
        {
            segment.set_ack(segment.ack().wrapping_sub(other.shift));
            segment.change_blocks(|edge| edge.wrapping_sub(other.shift));
        }
        if let (Some(clock), Some((_, echo))) = (clock, segment.timestamps()) {
            let echo = match other {
                Some(other) if segment.has_ack() => other.own_clock(echo),
                _ => echo,
            };
            segment.set_timestamps(clock, echo);
        }
        is_reset
    }

    /// Chooses the numbers of a sender at its first connection. Later ones under the same addresses follow in time, as TCP wants them to
    /// (RFC 9293 §3.4.1, RFC 6191): otherwise a peer in TIME-WAIT takes the SYN for an old one.
    fn begin(&mut self, segment: &Segment<'_>, (from, to): Direction, random: &mut Random) {
        self.scales.extend(segment.scale());
        let first = segment.seq();
        if let Some(sender) = self.senders.get_mut(&(from, to)) {
            if std::mem::replace(&mut sender.first, first) != first {
                sender.is_reset = false;
                if !segment.has_ack()
                    && let Some(other) = self.senders.get_mut(&(to, from))
                {
                    other.is_reset = false;
                }
            }
            return;
        }
        let below =
            |most, now: u32, random: &mut Random| 0u32.wrapping_sub(random.below(most) as u32).wrapping_sub(now);
        let shift = if self.wanted.sequences { below(BYTES_TO_WRAP, first, random) } else { 0 };
        let clocks = match segment.timestamps() {
            Some((stamp, _)) if self.wanted.clocks => vec![(stamp, below(MS_TO_WRAP, stamp, random))],
            Some((stamp, _)) => vec![(stamp, 0)],
            None => Vec::new(),
        };
        self.senders.insert((from, to), Sender { first, shift, clocks, is_reset: false });
    }
}

#[cfg(test)]
mod tests {
    use super::{super::frame::tests::Packet, *};

    const BOTH: Renumbering = Renumbering { sequences: true, clocks: true };

    /// What arrives; checksums are compared with a recomputation.
    fn pass(numbers: &mut Numbers, packet: &Packet, random: &mut Random) -> (Packet, bool) {
        let mut frame = packet.frame();
        let mut segment = Segment::find(&mut frame).expect("TCP");
        let is_reset = numbers.pass(&mut segment, random);
        segment.finish();
        (Packet::read(&frame), is_reset)
    }

    #[test]
    fn each_end_gets_its_own_numbers_back() {
        let (mut numbers, mut random) = (Numbers::new(BOTH), Random::new(3));
        let syn = Packet { seq: 77, flags: 2, stamps: Some((1000, 0)), ..Packet::default() };
        let (first, _) = pass(&mut numbers, &syn, &mut random);
        assert!(first.seq > u32::MAX - 300_000);
        assert_eq!(pass(&mut numbers, &syn, &mut random).0, first, "a repeated SYN has other numbers");
        let answer = Packet { seq: 5, ack: first.seq.wrapping_add(1), flags: 18, ..syn.back() };
        let answer = Packet { stamps: Some((9, first.stamps.unwrap().0)), ..answer };
        let (second, _) = pass(&mut numbers, &answer, &mut random);
        assert_eq!((second.ack, second.stamps.unwrap().1), (78, 1000));
        for step in 1..2000u32 {
            let sent = Packet {
                seq: 78u32.wrapping_add(step * 1000),
                ack: second.seq.wrapping_add(1),
                flags: 16,
                stamps: Some((1000 + step, second.stamps.unwrap().0)),
                payload: 1000,
                ..syn
            };
            let (got, _) = pass(&mut numbers, &sent, &mut random);
            assert_eq!((got.ack, got.stamps.unwrap().1), (6, 9));
            let (seq, stamp) = (got.seq.wrapping_add(1000), got.stamps.unwrap().0);
            let reply = Packet {
                seq: 6,
                ack: seq,
                flags: 16,
                stamps: Some((9, stamp)),
                block: Some([got.seq, seq]),
                ..syn.back()
            };
            let (told, is_reset) = pass(&mut numbers, &reply, &mut random);
            assert_eq!((told.ack, told.stamps.unwrap().1), (sent.seq.wrapping_add(1000), 1000 + step));
            assert_eq!(told.block, Some([sent.seq, sent.seq.wrapping_add(1000)]));
            assert!(!is_reset);
        }
        assert!(numbers.wraps == 1 && numbers.jumps > 3, "{} {}", numbers.wraps, numbers.jumps);
    }

    /// The next connection under the same addresses: its numbers are later ones, and what the peer still says about the one before is
    /// understood.
    #[test]
    fn numbers_of_the_next_connection_are_later() {
        let (mut numbers, mut random) = (Numbers::new(BOTH), Random::new(3));
        let syn = Packet { seq: 77, flags: 2, stamps: Some((1000, 0)), ..Packet::default() };
        let (first, _) = pass(&mut numbers, &syn, &mut random);
        let answer = Packet { seq: 5, ack: first.seq.wrapping_add(1), flags: 18, ..syn.back() };
        let answer = Packet { stamps: Some((9, first.stamps.unwrap().0)), ..answer };
        pass(&mut numbers, &answer, &mut random);
        let again = Packet { seq: 70_077, stamps: Some((6000, 0)), ..syn };
        let (second, _) = pass(&mut numbers, &again, &mut random);
        assert_eq!(second.seq.wrapping_sub(first.seq), 70_000);
        assert!(!is_before(second.stamps.unwrap().0, first.stamps.unwrap().0.wrapping_add(5000)));
        let old = Packet { seq: 6, ack: first.seq.wrapping_add(500), flags: 16, ..answer };
        let (told, _) = pass(&mut numbers, &old, &mut random);
        assert_eq!(told.ack, 77 + 500);
        let reset = Packet { seq: told.ack, flags: 4, stamps: None, ..syn };
        assert_eq!(pass(&mut numbers, &reset, &mut random).0.seq, old.ack);
    }

    #[test]
    fn reset_connection_is_known_until_it_begins_again() {
        let (mut numbers, mut random) = (Numbers::new(Renumbering::default()), Random::new(3));
        let syn = Packet { seq: 77, flags: 2, ..Packet::default() };
        assert!(!pass(&mut numbers, &syn, &mut random).1);
        pass(&mut numbers, &Packet { seq: 5, ack: 78, flags: 18, ..syn.back() }, &mut random);
        assert!(pass(&mut numbers, &Packet { seq: 78, flags: 4, ..syn }, &mut random).1);
        assert!(pass(&mut numbers, &Packet { seq: 6, ack: 78, flags: 16, ..syn.back() }, &mut random).1);
        assert!(!pass(&mut numbers, &Packet { seq: 99, ..syn }, &mut random).1);
        assert_eq!(pass(&mut numbers, &Packet { seq: 100, flags: 16, ..syn }, &mut random).0.seq, 100);
    }
}
