//! The ring of last payload bytes compared with a copy of the whole stream: runs of any length and number, including runs that were
//! copied but not redirected.

#[path = "support/random.rs"]
mod random;

use penstock_common::tail::{MEMORY, RING, TAIL, last, place};
use random::Random;

/// Copies a run as the kernel program does.
fn write(ring: &mut [u8; MEMORY], position: u32, run: &[u8]) {
    let copies = place(position, run.len() as u32);
    let (skip, first, offset) = (copies.skip as usize, copies.first as usize, copies.offset as usize);
    ring[offset..offset + first].copy_from_slice(&run[skip..skip + first]);
    let second = copies.second as usize;
    ring[..second].copy_from_slice(&run[skip + first..skip + first + second]);
    assert_eq!(skip + first + second, run.len());
}

fn bytes(random: &mut Random, n: usize) -> Vec<u8> {
    (0..n).map(|_| random.next() as u8).collect()
}

fn read(ring: &[u8; MEMORY], position: u32, n: u32) -> Vec<u8> {
    let (older, newer) = last(ring, position, n);
    [older, newer].concat()
}

/// The agent's state of one message: its own copy of the last bytes, and how much the kernel has carried since arming.
struct Agent {
    tail: Vec<u8>,
    steered: u32,
}

impl Agent {
    fn reclaim(&mut self, ring: &[u8; MEMORY], position: u32) {
        self.append(&read(ring, position, self.steered));
        self.steered = 0;
    }

    fn append(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL as usize));
    }
}

#[test]
fn last_bytes_are_kept_on_every_path() {
    for seed in 0..500 {
        let mut random = Random::new(seed);
        let mut ring = [0; MEMORY];
        // Numbers wrap after 4 GiB of payload.
        let start = random.pick(&[0, u32::MAX - 10_000]);
        let mut stream: Vec<u8> = Vec::new();
        let mut agent = Agent { tail: Vec::new(), steered: 0 };
        for _ in 0..random.within(1, 40) {
            let longest = random.pick(&[3, 200, 2 * RING as usize]);
            let n = random.within(1, longest);
            let run = bytes(&mut random, n);
            let position = start.wrapping_add(stream.len() as u32);
            stream.extend_from_slice(&run);
            if random.one_in(4) {
                // Copied as far as it was parsed, then passed: user space forwards all of it.
                write(&mut ring, position, &run[..random.within(0, n)]);
                agent.reclaim(&ring, position);
                agent.append(&run);
            } else {
                write(&mut ring, position, &run);
                agent.steered += n as u32;
            }
        }
        agent.reclaim(&ring, start.wrapping_add(stream.len() as u32));
        let expected = &stream[stream.len().saturating_sub(TAIL as usize)..];
        assert!(agent.tail == expected, "seed {seed}");
    }
}

#[test]
fn last_bytes_of_long_run_are_kept() {
    let run = bytes(&mut Random::new(1), 70_000);
    let mut ring = [0; MEMORY];
    write(&mut ring, 5, &run);
    assert!(read(&ring, 70_005, u32::MAX) == run[run.len() - TAIL as usize..]);
}
