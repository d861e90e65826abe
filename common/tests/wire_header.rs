//! The rewriting of TCP headers: checksums compared with a recomputation, and the way there and back.

use penstock_common::wire::{
    after,
    flow::Ends,
    header::{ACK, FIN, Header, MAX_LEN, RST, Shift, address_sum, changed, fold, hop_sum, window},
    inject::{MAX_LEN as MAX_FRAME, acknowledgement},
};
use proptest::{collection::vec, prelude::*};

/// One's complement sum of big-endian words, the reference (RFC 1071 §4.1).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// 0 and 0xffff are the same number in one's complement.
fn same(a: u16, b: u16) -> bool {
    a == b || a.is_multiple_of(0xffff) && b.is_multiple_of(0xffff)
}

fn options() -> impl Strategy<Value = Vec<u8>> {
    let stamp = any::<(u32, u32)>()
        .prop_map(|(value, echo)| [&[8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat());
    let sack = vec(any::<[u8; 8]>(), 1..4)
        .prop_map(|blocks| [&[5, 2 + 8 * blocks.len() as u8][..], &blocks.concat()].concat());
    let other = vec(any::<u8>(), 0..6).prop_map(|data| [&[30, 2 + data.len() as u8][..], &data].concat());
    let one = prop_oneof![Just(vec![1]), stamp, sack, other];
    vec(one, 0..8).prop_map(|all| {
        let mut bytes = Vec::new();
        for option in all {
            if bytes.len() + option.len() <= 40 {
                bytes.extend(option);
            }
        }
        // The end of the list is padding.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    })
}

prop_compose! {
    fn headers()(fields in any::<[u8; 20]>(), options in options()) -> Vec<u8> {
        let mut bytes = [&fields[..], &options].concat();
        bytes[12] = (bytes.len() as u8 / 4) << 4;
        bytes
    }
}

prop_compose! {
    fn shifts()(words in any::<[u32; 4]>(), scale_in in 0u8..15, scale_out in 0u8..15) -> Shift {
        Shift { seq: words[0], ack: words[1], tsval: words[2], tsecr: words[3], scale_in, scale_out }
    }
}

fn load(bytes: &[u8]) -> Header {
    let mut header = Header::EMPTY;
    header.bytes[..bytes.len()].copy_from_slice(bytes);
    assert_eq!(header.begin(), Some(bytes.len() as u32));
    header
}

fn shift(header: &mut Header, ports: u32, shift: &Shift) {
    header.shift(ports, shift);
    let mut at = 20;
    while at < header.len {
        let next = header.shift_option(at, shift);
        assert!(next > at, "no progress");
        at = next;
    }
}

/// The position of each option with its kind.
fn walk(header: &Header) -> Vec<(u32, u8)> {
    let mut found = Vec::new();
    let mut at = 20;
    while at < header.len {
        found.push((at, header.bytes[at as usize]));
        at = header.next_option(at);
    }
    found
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn checksum_after_a_shift_equals_a_recomputation(bytes in headers(), by in shifts(), ports: u32, reset: bool) {
        let mut header = load(&bytes);
        let mut before = bytes.clone();
        before[16..18].fill(0);
        let old = checksum(&before);
        if reset {
            header.set_seq(by.ack);
            header.make_reset();
        }
        shift(&mut header, ports, &by);
        let mut now = header.bytes[..bytes.len()].to_vec();
        prop_assert_eq!(&now[16..20], &bytes[16..20], "the checksum or the urgent pointer was changed");
        now[16..18].fill(0);
        prop_assert!(same(changed(old, header.sum), checksum(&now)));
    }

    #[test]
    fn shift_and_its_inverse_are_the_identity(bytes in headers(), by in shifts(), ports: u32) {
        let by = Shift { scale_out: by.scale_in, ..by };
        let back = Shift {
            seq: by.seq.wrapping_neg(),
            ack: by.ack.wrapping_neg(),
            tsval: by.tsval.wrapping_neg(),
            tsecr: by.tsecr.wrapping_neg(),
            ..by
        };
        let mut header = load(&bytes);
        let own = header.ports();
        shift(&mut header, ports, &by);
        prop_assert_eq!(header.ports(), ports);
        shift(&mut header, own, &back);
        prop_assert_eq!(&header.bytes[..bytes.len()], &bytes[..]);
        prop_assert!(fold(header.sum).is_multiple_of(0xffff));
    }

    #[test]
    fn only_numbers_of_timestamps_and_blocks_change_in_options(bytes in headers(), by in shifts(), ports: u32) {
        let mut header = load(&bytes);
        let found = walk(&header);
        shift(&mut header, ports, &by);
        let mut expected = bytes.clone();
        let has_ack = bytes[13] & ACK != 0;
        let mut add = |at: usize, n: u32| {
            let sum = word(&expected, at).wrapping_add(n);
            expected[at..at + 4].copy_from_slice(&sum.to_be_bytes());
        };
        for (at, kind) in found {
            let at = at as usize;
            match kind {
                8 if bytes[at + 1] == 10 && at + 10 <= bytes.len() => {
                    add(at + 2, by.tsval);
                    add(at + 6, if has_ack { by.tsecr } else { 0 });
                }
                5 => (at + 2..at + usize::from(bytes[at + 1])).step_by(4).for_each(|edge| add(edge, by.ack)),
                _ => {}
            }
        }
        prop_assert_eq!(&header.bytes[20..bytes.len()], &expected[20..]);
        prop_assert_eq!(header.seq(), word(&bytes, 4).wrapping_add(by.seq));
        prop_assert_eq!(header.ack(), word(&bytes, 8).wrapping_add(if has_ack { by.ack } else { 0 }));
        prop_assert_eq!(header.bytes[12..14].to_vec(), bytes[12..14].to_vec());
    }

    /// Any bytes: nothing panics, nothing outside of the header changes, and every walk ends.
    #[test]
    fn malformed_options_are_left_alone(mut bytes in vec(any::<u8>(), 60), by in shifts(), len in 5u8..16) {
        bytes[12] = len << 4;
        let mut header = Header::EMPTY;
        header.bytes[..60].copy_from_slice(&bytes);
        prop_assert_eq!(header.begin(), Some(u32::from(len) * 4));
        let mut before = bytes.clone();
        before[16..18].fill(0);
        shift(&mut header, 7, &by);
        prop_assert_eq!(&header.bytes[usize::from(len) * 4..60], &bytes[usize::from(len) * 4..]);
        let mut now = header.bytes[..60].to_vec();
        now[16..18].fill(0);
        prop_assert!(same(changed(checksum(&before), header.sum), checksum(&now)));
    }

    #[test]
    fn shift_survives_shared_memory(by in shifts()) {
        prop_assert_eq!(Shift::unpack(by.pack()), by);
    }

    #[test]
    fn ipv4_header_checksum_equals_a_recomputation(mut ip in any::<[u8; 20]>(), new in any::<[u32; 2]>(), ttl in 2u8..) {
        ip[8] = ttl;
        ip[10..12].fill(0);
        let at = |ip: &[u8; 20], from: usize| u32::from_ne_bytes(ip[from..from + 4].try_into().unwrap());
        let (old, before) = (checksum(&ip), [at(&ip, 12), at(&ip, 16), 0, 0]);
        let sum = address_sum(&before, &[new[0], new[1], 0, 0]) + hop_sum(ttl);
        ip[8] -= 1;
        ip[12..16].copy_from_slice(&new[0].to_ne_bytes());
        ip[16..20].copy_from_slice(&new[1].to_ne_bytes());
        prop_assert!(same(changed(old, sum), checksum(&ip)));
    }

    #[test]
    fn window_keeps_its_size_between_scales(field: u16, from in 0u8..15, to in 0u8..15) {
        let (meant, got) = (u64::from(field) << from, u64::from(window(field, from, to)));
        prop_assert_eq!(got == 0, field == 0);
        prop_assert!(got << to <= meant || got == 1, "grew from {} to {}", meant, got << to);
        // Less than one step is lost, unless the field has no room.
        prop_assert!(got == 0xffff || meant - (got << to).min(meant) < 1 << to);
    }

    #[test]
    fn order_of_sequence_numbers_wraps(a: u32, step in 1..1u32 << 31) {
        prop_assert!(after(a.wrapping_add(step), a));
        prop_assert!(!after(a, a.wrapping_add(step)) && !after(a, a));
    }
}

#[test]
fn reset_keeps_the_acknowledgement_and_loses_fin() {
    let mut bytes = [0u8; 20];
    bytes[12] = 5 << 4;
    bytes[13] = FIN | ACK | 8;
    let mut header = load(&bytes);
    header.make_reset();
    assert_eq!(header.flags(), RST | ACK);
}

#[test]
fn length_outside_of_the_range_is_refused() {
    for words in 0..5u8 {
        let mut header = Header::EMPTY;
        header.bytes[12] = words << 4;
        assert_eq!(header.begin(), None);
    }
    let mut header = Header::EMPTY;
    header.bytes[12] = 0xf0;
    assert_eq!(header.begin(), Some(MAX_LEN));
}

/// The sum over a whole packet with its pseudo-header, or over an IPv4 header, is 0 if the checksum is right (RFC 1071 §1).
fn is_right(parts: &[&[u8]]) -> bool {
    same(checksum(&parts.concat()), 0)
}

#[test]
fn injected_packet_has_right_checksums() {
    let words = |address: [u8; 16]| -> [u32; 4] {
        std::array::from_fn(|word| u32::from_ne_bytes(address[word * 4..][..4].try_into().unwrap()))
    };
    let mapped = |last: [u8; 4]| words([[0; 10].as_slice(), &[0xff; 2], &last].concat().try_into().unwrap());
    let ports = u32::from_ne_bytes([0x1f, 0x90, 0xc3, 0x50]);
    let four = Ends { peer: mapped([10, 1, 0, 2]), own: mapped([10, 1, 0, 1]), ports };
    let six = Ends { peer: words([0xfd; 16]), own: words([0xab; 16]), ports };
    for (ends, ip, addresses) in [(four, 20, 26..34), (six, 40, 22..54)] {
        let mut frame = [0xee; MAX_FRAME];
        let len = acknowledgement(&mut frame, [1, 2, 3, 4, 5, 6], 7, &ends, 0xfedc_ba98, 0x1234_5678);
        assert_eq!((len, &frame[..6], &frame[8..12]), (14 + ip + 20, &[1, 2, 3, 4, 5, 6][..], &7u32.to_ne_bytes()[..]));
        let tcp = &frame[14 + ip..len];
        assert!(is_right(&[&frame[addresses], &[0, 6, 0, 20], tcp]), "{frame:02x?}");
        assert!(ip == 40 || is_right(&[&frame[14..34]]));
        assert_eq!((&tcp[..4], word(tcp, 4), word(tcp, 8)), (&[0x1f, 0x90, 0xc3, 0x50][..], 0xfedc_ba98, 0x1234_5678));
    }
}
