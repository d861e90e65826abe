//! The messages that the endpoint sends.

use penstock_common::framing::Framing;

use super::random::Random;

/// A message at this offset of the endpoint's wire.
pub(super) struct Message {
    pub(super) start: usize,
    pub(super) framing: Framing,
}

/// One to three messages. The last one may be damaged.
pub(super) fn some_messages(random: &mut Random) -> (Vec<u8>, Vec<Message>) {
    let (mut wire, mut messages) = (Vec::new(), Vec::new());
    let count = random.within(1, 3);
    for n in 1..=count {
        let start = wire.len();
        let mut framing = append_message(&mut wire, random);
        if n == count {
            match random.within(0, 7) {
                0 => framing = Framing::until_close(),
                1 => wire.truncate(random.within(start, wire.len())),
                2 => wire.extend_from_slice(b"after the end"),
                3 => {
                    let at = random.within(start, wire.len() - 1);
                    wire[at] ^= 1 << random.within(0, 7);
                }
                _ => {}
            }
        }
        messages.push(Message { start, framing });
    }
    (wire, messages)
}

fn append_message(wire: &mut Vec<u8>, random: &mut Random) -> Framing {
    if random.one_in(3) {
        let len = random.within(1, 300);
        wire.extend((0..len).map(|_| random.next() as u8));
        return Framing::length(len as u64);
    }
    for _ in 0..random.within(0, 8) {
        let len = random.within(1, 60);
        let extension = random.pick(&["", "", ";a", " ; b=\"c\""]);
        wire.extend_from_slice(format!("{len:x}{extension}\r\n").as_bytes());
        wire.extend((0..len).map(|_| random.next() as u8));
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b"0\r\n");
    for _ in 0..random.pick(&[0, 0, 2]) {
        wire.extend_from_slice(b"x: y\r\n");
    }
    wire.extend_from_slice(b"\r\n");
    Framing::chunked()
}
