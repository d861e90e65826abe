//! Rewrites the headers of a packet: addresses, ports, sequence numbers, window, timestamps and SACK blocks, and reports how its
//! checksums change.
//!
//! A change of a checksum is a ones' complement sum of what was removed and added (RFC 1624), because only the kernel knows whether
//! a packet's checksum is complete, partial or verified. Positions are bytes from the start of the TCP header.

/// Size of the memory for one TCP header. Twice the largest header, so that an option at any position can be accessed.
pub const MEMORY: usize = 128;
/// Size of a TCP header without options.
pub const MIN_LEN: u32 = 20;
/// Size of a TCP header with the most options.
pub const MAX_LEN: u32 = 60;
/// The part of the header before the checksum, which holds every field that changes, except options.
pub const FIELDS: usize = 16;

/// The sender has no more payload (RFC 9293 §3.1, as the other flags).
pub const FIN: u8 = 1;
/// A connection begins.
pub const SYN: u8 = 2;
/// The connection is reset.
pub const RST: u8 = 4;
/// The acknowledgement number counts.
pub const ACK: u8 = 16;

const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;

/// What is added to the numbers of packets that arrive on one connection, so that they fit the other connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shift {
    /// Added to the sequence number.
    pub seq: u32,
    /// Added to the acknowledgement number, and to both edges of SACK blocks.
    pub ack: u32,
    /// Added to TSval (RFC 7323).
    pub tsval: u32,
    /// Added to TSecr.
    pub tsecr: u32,
    /// The scale of the window field as it arrives, at most 14.
    pub scale_in: u8,
    /// The scale of the window field that the receiver expects, at most 14.
    pub scale_out: u8,
}

impl Shift {
    /// As three words of shared memory.
    #[inline(always)]
    pub const fn pack(self) -> [u64; 3] {
        [
            self.seq as u64 | (self.ack as u64) << 32,
            self.tsval as u64 | (self.tsecr as u64) << 32,
            self.scale_in as u64 | (self.scale_out as u64) << 8,
        ]
    }

    /// From the words of [`pack`](Self::pack).
    #[inline(always)]
    pub const fn unpack(words: [u64; 3]) -> Self {
        Self {
            seq: words[0] as u32,
            ack: (words[0] >> 32) as u32,
            tsval: words[1] as u32,
            tsecr: (words[1] >> 32) as u32,
            scale_in: words[2] as u8 & 15,
            scale_out: (words[2] >> 8) as u8 & 15,
        }
    }
}

/// A TCP header, and the sum of its changes.
#[repr(C)]
pub struct Header {
    /// The header, in packet order.
    pub bytes: [u8; MEMORY],
    /// How the sum of the header's 16-bit words has changed, see [`fold`].
    pub sum: u32,
    /// Bytes of the header with its options.
    pub len: u32,
}

impl Header {
    /// No header: memory to read one into.
    pub const EMPTY: Self = Self { bytes: [0; MEMORY], sum: 0, len: 0 };

    /// Reads the header's length from its first [`MIN_LEN`] bytes. `None`: it is not from 20 to 60.
    #[inline(always)]
    pub fn begin(&mut self) -> Option<u32> {
        let len = u32::from(self.bytes[12] >> 4) * 4;
        self.sum = 0;
        self.len = len;
        if len < MIN_LEN { None } else { Some(len) }
    }

    /// The sequence number.
    #[inline(always)]
    pub fn seq(&self) -> u32 {
        self.word(4)
    }

    /// The acknowledgement number, which counts with [`ACK`].
    #[inline(always)]
    pub fn ack(&self) -> u32 {
        self.word(8)
    }

    /// [`FIN`], [`SYN`], [`RST`], [`ACK`] and others.
    #[inline(always)]
    pub fn flags(&self) -> u8 {
        self.bytes[13]
    }

    /// The window field as it is, not scaled.
    #[inline(always)]
    pub fn window(&self) -> u16 {
        u16::from_be_bytes([self.bytes[14], self.bytes[15]])
    }

    /// The source and destination port as one word in packet order.
    #[inline(always)]
    pub fn ports(&self) -> u32 {
        u32::from_ne_bytes([self.bytes[0], self.bytes[1], self.bytes[2], self.bytes[3]])
    }

    /// Rewrites the fields before the checksum.
    #[inline(always)]
    pub fn shift(&mut self, ports: u32, shift: &Shift) {
        self.put(0, u32::from_be(ports));
        self.put(4, self.seq().wrapping_add(shift.seq));
        if self.flags() & ACK != 0 {
            self.put(8, self.ack().wrapping_add(shift.ack));
        }
        let window = window(self.window(), shift.scale_in, shift.scale_out);
        self.put(12, self.word(12) & 0xffff_0000 | u32::from(window));
    }

    /// Sets the sequence number, as the sender would write it: before [`shift`](Self::shift).
    #[inline(always)]
    pub fn set_seq(&mut self, seq: u32) {
        self.put(4, seq);
    }

    /// Turns the packet into a reset: clears FIN and PSH, and sets RST.
    #[inline(always)]
    pub fn make_reset(&mut self) {
        const PSH: u8 = 8;
        let flags = self.flags() & !(FIN | PSH) | RST;
        self.put(12, self.word(12) & 0xff00_ffff | u32::from(flags) << 16);
    }

    /// TSval, if the option at `at` is a timestamp.
    #[inline(always)]
    pub fn timestamp(&self, at: u32) -> Option<u32> {
        let place = (at & 63) as usize;
        let whole = at + 10 <= self.len;
        if whole && self.bytes[place] == TIMESTAMPS && self.bytes[place + 1] == 10 {
            Some(self.word(place + 2))
        } else {
            None
        }
    }

    /// Position of the option after the one at `at`. Without a further option, or if the option is malformed, the header's length.
    #[inline(always)]
    pub fn next_option(&self, at: u32) -> u32 {
        if at >= self.len {
            return self.len;
        }
        let place = (at & 63) as usize;
        match self.bytes[place] {
            END_OF_OPTIONS => self.len,
            NO_OPERATION => at + 1,
            _ => {
                let len = u32::from(self.bytes[place + 1]);
                if len < 2 || at + len > self.len { self.len } else { at + len }
            }
        }
    }

    /// Rewrites the option at `at` and returns the position of the next one. Ends at the header's length.
    #[inline(always)]
    pub fn shift_option(&mut self, at: u32, shift: &Shift) -> u32 {
        let next = self.next_option(at);
        let place = (at & 63) as usize;
        let kind = self.bytes[place];
        let len = u32::from(self.bytes[place + 1]);
        if at >= self.len || kind == NO_OPERATION || kind == END_OF_OPTIONS || at + len != next {
            return next;
        }
        if kind == TIMESTAMPS && len == 10 {
            self.put(place + 2, self.word(place + 2).wrapping_add(shift.tsval));
            // Without ACK, TSecr means nothing (RFC 7323 §3.2).
            if self.flags() & ACK != 0 {
                self.put(place + 6, self.word(place + 6).wrapping_add(shift.tsecr));
            }
        }
        if kind == SACK {
            // At most four blocks of two edges fit into the options.
            for edge in 0..8 {
                if 2 + edge * 4 + 4 <= len as usize {
                    let edge = place + 2 + edge * 4;
                    self.put(edge, self.word(edge).wrapping_add(shift.ack));
                }
            }
        }
        next
    }

    #[inline(always)]
    fn word(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }

    #[inline(always)]
    fn put(&mut self, at: usize, value: u32) {
        let old = self.word(at);
        self.sum += removed_and_added(old, value, at & 1 != 0);
        [self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]] = value.to_be_bytes();
    }
}

/// Converts a window field between scales (RFC 7323 §2.2). Never more than the field can say, and never 0 for a window that is open.
#[inline(always)]
pub const fn window(field: u16, scale_in: u8, scale_out: u8) -> u16 {
    let window = ((field as u64) << (scale_in & 15)) >> (scale_out & 15);
    match window {
        0 if field != 0 => 1,
        1..=0xffff => window as u16,
        0 => 0,
        _ => 0xffff,
    }
}

/// How a sum of 16-bit words changes if a word is replaced. `odd`: the word begins at an odd position.
#[inline(always)]
pub const fn removed_and_added(old: u32, new: u32, odd: bool) -> u32 {
    words(!old, odd) + words(new, odd)
}

#[inline(always)]
const fn words(word: u32, odd: bool) -> u32 {
    if odd { (word >> 24) + (word >> 8 & 0xffff) + ((word & 0xff) << 8) } else { (word >> 16) + (word & 0xffff) }
}

/// A sum of changes as one 16-bit word in packet order, for the kernel's helpers.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The checksum after a change (RFC 1624 §3).
pub const fn changed(checksum: u16, sum: u32) -> u16 {
    !fold(!checksum as u32 + fold(sum) as u32)
}

/// The sums of changes when both addresses are replaced; words are in packet order.
#[inline(always)]
pub fn address_sum(old: &[u32; 4], new: &[u32; 4]) -> u32 {
    let mut sum = 0;
    for (old, new) in old.iter().zip(new) {
        sum += removed_and_added(u32::from_be(*old), u32::from_be(*new), false);
    }
    sum
}

/// How the IPv4 header changes when a router takes one from the time to live, the first byte of a word.
#[inline(always)]
pub const fn hop_sum(ttl: u8) -> u32 {
    removed_and_added((ttl as u32) << 24, (ttl as u32 - 1) << 24, false)
}
