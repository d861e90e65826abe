//! A TCP segment in an Ethernet frame: reads and changes the fields that a cable changes.

use std::ops::Range;

use crate::tap::HEADER;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum covers only addresses, and whoever sends the frame on completes it.
const PARTIAL: u8 = 1;
const ETHERNET: usize = 14;
const TCP: u8 = 6;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const SCALE: u8 = 3;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;

/// A segment within its frame. [`finish`](Self::finish) corrects the checksum after changes.
pub(super) struct Segment<'a> {
    frame: &'a mut [u8],
    /// Where the addresses are.
    addresses: Range<usize>,
    /// Where the TCP header is.
    header: Range<usize>,
    /// Bytes of payload, at most 64 KiB.
    pub(super) payload: u32,
    /// The sum of the header as it came.
    sum: u32,
}

impl<'a> Segment<'a> {
    /// The segment in a frame as it is read from a TAP interface, or `None`.
    pub(super) fn find(frame: &'a mut [u8]) -> Option<Self> {
        let ip = HEADER + ETHERNET;
        let byte = |at: usize| frame.get(at).copied();
        let (tcp, addresses) = match [byte(ip - 2)?, byte(ip - 1)?] {
            [0x08, 0x00] if byte(ip + 9)? == TCP => (ip + usize::from(byte(ip)? & 15) * 4, ip + 12..ip + 20),
            [0x86, 0xdd] if byte(ip + 6)? == TCP => (ip + 40, ip + 8..ip + 40),
            _ => return None,
        };
        let end = tcp + usize::from(byte(tcp + 12)? >> 4) * 4;
        if end < tcp + 20 || end > frame.len() {
            return None;
        }
        // Short frames are padded, so the length is IP's, which is 0 in a large unsegmented packet.
        let length = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
        let ip_end = if addresses.len() == 8 { ip + length(ip + 2) } else { ip + 40 + length(ip + 4) };
        let last = if (end..=frame.len()).contains(&ip_end) { ip_end } else { frame.len() };
        let sum = sum(&frame[tcp..end]);
        Some(Self { frame, addresses, header: tcp..end, payload: (last - end) as u32, sum })
    }

    /// Address and port of sender and receiver.
    pub(super) fn ends(&self) -> ([u8; 18], [u8; 18]) {
        let (addresses, ports) = (&self.frame[self.addresses.clone()], self.header.start);
        let half = addresses.len() / 2;
        let end = |address: &[u8], port: usize| {
            let mut end = [0; 18];
            end[..half].copy_from_slice(address);
            end[16..].copy_from_slice(&self.frame[port..port + 2]);
            end
        };
        (end(&addresses[..half], ports), end(&addresses[half..], ports + 2))
    }

    fn flags(&self) -> u8 {
        self.frame[self.header.start + 13]
    }

    pub(super) fn is_syn(&self) -> bool {
        self.flags() & SYN != 0
    }

    pub(super) fn is_reset(&self) -> bool {
        self.flags() & RST != 0
    }

    pub(super) fn has_ack(&self) -> bool {
        self.flags() & ACK != 0
    }

    pub(super) fn seq(&self) -> u32 {
        self.word(self.header.start + 4)
    }

    pub(super) fn set_seq(&mut self, seq: u32) {
        self.put(self.header.start + 4, seq);
    }

    pub(super) fn ack(&self) -> u32 {
        self.word(self.header.start + 8)
    }

    pub(super) fn set_ack(&mut self, ack: u32) {
        self.put(self.header.start + 8, ack);
    }

    /// The window scale that a SYN announces.
    pub(super) fn scale(&self) -> Option<u8> {
        self.option(SCALE).map(|option| self.frame[option.start + 2])
    }

    /// TSval and TSecr.
    pub(super) fn timestamps(&self) -> Option<(u32, u32)> {
        self.option(TIMESTAMPS).map(|option| (self.word(option.start + 2), self.word(option.start + 6)))
    }

    pub(super) fn set_timestamps(&mut self, value: u32, echo: u32) {
        if let Some(option) = self.option(TIMESTAMPS) {
            self.put(option.start + 2, value);
            self.put(option.start + 6, echo);
        }
    }

    /// Changes the edges of SACK blocks.
    pub(super) fn change_blocks(&mut self, change: impl Fn(u32) -> u32) {
        if let Some(option) = self.option(SACK) {
            for at in (option.start + 2..option.end).step_by(4) {
                self.put(at, change(self.word(at)));
            }
        }
    }

    /// Where the first option of this kind is.
    fn option(&self, kind: u8) -> Option<Range<usize>> {
        let mut at = self.header.start + 20;
        while at + 1 < self.header.end {
            let len = match self.frame[at] {
                0 => return None,
                1 => 1,
                _ => usize::from(self.frame[at + 1]).max(2),
            };
            if at + len > self.header.end {
                return None;
            }
            if self.frame[at] == kind {
                return Some(at..at + len);
            }
            at += len;
        }
        None
    }

    /// Corrects the checksum (RFC 1624), if it covers the header.
    pub(super) fn finish(self) {
        if self.frame[0] & PARTIAL != 0 {
            return;
        }
        let at = self.header.start + 16;
        let old = u16::from_be_bytes([self.frame[at], self.frame[at + 1]]);
        let now =
            fold(u32::from(!old) + u32::from(!fold(self.sum)) + u32::from(fold(sum(&self.frame[self.header.clone()]))));
        self.frame[at..at + 2].copy_from_slice(&(!now).to_be_bytes());
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.frame[at], self.frame[at + 1], self.frame[at + 2], self.frame[at + 3]])
    }

    fn put(&mut self, at: usize, value: u32) {
        self.frame[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
}

fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A segment over IPv4 in a frame.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Packet {
        pub(crate) is_back: bool,
        pub(crate) seq: u32,
        pub(crate) ack: u32,
        pub(crate) flags: u8,
        pub(crate) stamps: Option<(u32, u32)>,
        pub(crate) block: Option<[u32; 2]>,
        pub(crate) payload: usize,
    }

    impl Packet {
        /// A packet of the other end.
        pub(crate) fn back(self) -> Self {
            Self { is_back: !self.is_back, ..self }
        }

        pub(crate) fn frame(&self) -> Vec<u8> {
            let mut ends = [[10, 0, 0, 1, 7, 7], [10, 0, 0, 2, 8, 8]];
            if self.is_back {
                ends.swap(0, 1);
            }
            let mut options = vec![3, 3, 7, 1];
            if let Some((value, echo)) = self.stamps {
                options.extend([1, 1, 8, 10]);
                options.extend([value, echo].iter().flat_map(|word| word.to_be_bytes()));
            }
            if let Some(block) = self.block {
                options.extend([1, 1, 5, 10]);
                options.extend(block.iter().flat_map(|word| word.to_be_bytes()));
            }
            let mut tcp = [&ends[0][4..], &ends[1][4..], &self.seq.to_be_bytes(), &self.ack.to_be_bytes()].concat();
            tcp.extend([(5 + options.len() as u8 / 4) << 4, self.flags, 1, 0, 0, 0, 0, 0]);
            tcp.extend(options);
            tcp.extend(vec![9; self.payload]);
            let pseudo = sum(&ends[0][..4]) + sum(&ends[1][..4]) + 6 + tcp.len() as u32;
            let checksum = !fold(pseudo + sum(&tcp));
            tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
            let mut ip = [0x45, 0, 0, 0, 0, 0, 0, 0, 9, 6, 0, 0].to_vec();
            ip[2..4].copy_from_slice(&(20 + tcp.len() as u16).to_be_bytes());
            ip.extend([&ends[0][..4], &ends[1][..4]].concat());
            [&[0; HEADER + 12][..], &[8, 0], &ip, &tcp].concat()
        }

        pub(crate) fn read(frame: &[u8]) -> Self {
            let mut frame = frame.to_vec();
            let segment = Segment::find(&mut frame).expect("TCP");
            let block = segment.option(SACK).map(|at| [segment.word(at.start + 2), segment.word(at.start + 6)]);
            let packet = Self {
                is_back: segment.ends().0[3] == 2,
                seq: segment.seq(),
                ack: segment.ack(),
                flags: segment.flags(),
                stamps: segment.timestamps(),
                block,
                payload: segment.payload as usize,
            };
            assert_eq!(segment.scale(), Some(7));
            // The checksum is what a recomputation yields.
            assert_eq!(packet.frame(), frame);
            packet
        }
    }

    #[test]
    fn fields_are_read_where_they_are_written() {
        let all = Packet {
            is_back: true,
            seq: 0xfedc_ba98,
            ack: 0x1234_5678,
            flags: 16,
            stamps: Some((1, u32::MAX)),
            block: Some([3, 4]),
            payload: 6,
        };
        for packet in [all, all.back(), Packet { stamps: None, ..all }, Packet { block: None, payload: 0, ..all }] {
            assert_eq!(Packet::read(&packet.frame()), packet);
        }
        let mut frame = all.frame();
        frame[HEADER + ETHERNET + 9] = 17;
        assert!(Segment::find(&mut frame).is_none());
        assert!(Segment::find(&mut [0; 40]).is_none());
    }
}
