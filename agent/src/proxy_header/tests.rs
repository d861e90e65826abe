//! Tests headers whole, in every part, and damaged.

use super::{ProxyHeaderError::*, *};

/// A header of version 2 with these addresses and TLVs.
fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
    [&SIGNATURE[..], &[0x20 | command, family], &length, rest].concat()
}

fn inet() -> Vec<u8> {
    [&[192, 0, 2, 7, 10, 0, 0, 1][..], &4660_u16.to_be_bytes(), &443_u16.to_be_bytes()].concat()
}

fn inet6() -> Vec<u8> {
    let octets = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
    [&octets("2001:db8::7")[..], &octets("::1"), &4660_u16.to_be_bytes(), &443_u16.to_be_bytes()].concat()
}

fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    [&[kind][..], &u16::try_from(value.len()).unwrap().to_be_bytes(), value].concat()
}

/// A header with the right checksum, `wrong` added to it.
fn summed(wrong: u32) -> Vec<u8> {
    let rest = |sum: u32| [inet(), tlv(4, b"noop"), tlv(CRC32C, &sum.to_be_bytes()), tlv(2, b"name")].concat();
    let sum = crc32c(v2(1, 0x11, &rest(0)).iter());
    v2(1, 0x11, &rest(sum.wrapping_add(wrong)))
}

type Row = (Vec<u8>, Result<Option<&'static str>, ProxyHeaderError>);

fn rows() -> Vec<Row> {
    let v1 = |line: &str| format!("PROXY {line}\r\n").into_bytes();
    let (address, six) = (Ok(Some("192.0.2.7:4660")), Ok(Some("[2001:db8::7]:4660")));
    vec![
        (v1("TCP4 192.0.2.7 10.0.0.1 4660 443"), address),
        (v1("TCP6 2001:db8::7 ::1 4660 443"), six),
        (v1("TCP4 192.0.2.7 10.0.0.1 0 65535"), Ok(Some("192.0.2.7:0"))),
        (v1("UNKNOWN"), Ok(None)),
        (v1("UNKNOWN whatever it says"), Ok(None)),
        (v1("UNKNOWNS"), Err(Invalid("not six words"))),
        (v1("TCP4 192.0.2.7 10.0.0.1 4660"), Err(Invalid("not six words"))),
        (v1("TCP4 192.0.2.7 10.0.0.1 4660 443 "), Err(Invalid("not six words"))),
        (v1("TCP4  192.0.2.7 10.0.0.1 4660 443"), Err(Invalid("not six words"))),
        (v1("TCP4 2001:db8::7 ::1 4660 443"), Err(Invalid("an address is not IPv4"))),
        (v1("TCP6 192.0.2.7 10.0.0.1 4660 443"), Err(Invalid("an address is not IPv6"))),
        (v1("TCP4 192.0.2.7 10.0.0.256 4660 443"), Err(Invalid("an address is not IPv4"))),
        (v1("UDP4 192.0.2.7 10.0.0.1 4660 443"), Err(Invalid("its family is not TCP4, TCP6 or UNKNOWN"))),
        (v1("TCP4 192.0.2.7 10.0.0.1 65536 443"), Err(Invalid("a port is not a number"))),
        (v1("TCP4 192.0.2.7 10.0.0.1 4660 0443"), Err(Invalid("a port is not a number"))),
        (v1("TCP4 192.0.2.7 10.0.0.1 +466 443"), Err(Invalid("a port is not a number"))),
        (v2(1, 0x11, &inet()), address),
        (v2(1, 0x21, &inet6()), six),
        (v2(1, 0x11, &[inet(), tlv(0x20, &[7; 300]), tlv(4, b"")].concat()), address),
        (summed(0), address),
        (summed(1), Err(Checksum)),
        (v2(1, 0x11, &[inet(), tlv(CRC32C, &[0; 3])].concat()), Err(Invalid("its checksum is not four bytes"))),
        (v2(1, 0x11, &[inet(), vec![4]].concat()), Err(Invalid("a TLV is cut"))),
        (v2(1, 0x11, &[inet(), vec![4, 0, 9, 1]].concat()), Err(Invalid("a TLV is cut"))),
        (v2(1, 0x11, &inet()[..11]), Err(Invalid("its addresses are cut"))),
        (v2(1, 0x21, &inet()), Err(Invalid("its addresses are cut"))),
        (v2(0, 0x11, &[]), Ok(None)),
        (v2(0, 0xff, b"anything"), Ok(None)),
        (v2(1, 0x00, b""), Ok(None)),
        (v2(1, 0x31, &[0; 216]), Ok(None)),
        (v2(1, 0x12, &inet()), Err(Invalid("it announces datagrams"))),
        (v2(1, 0x13, &inet()), Err(Invalid("its transport protocol is unknown"))),
        (v2(1, 0x41, &inet()), Err(Invalid("its address family is unknown"))),
        (v2(2, 0x11, &inet()), Err(Invalid("its command is neither LOCAL nor PROXY"))),
        ([&SIGNATURE[..], &[0x11, 0x11, 0, 0]].concat(), Err(Invalid("its version is not 2"))),
    ]
}

#[test]
fn headers_are_read_or_refused() {
    for (header, expected) in rows() {
        assert_eq!(extent(&header), Ok(Extent::Whole(header.len())), "{header:x?}");
        let expected = expected.map(|address| address.map(|address| address.parse().unwrap()));
        assert_eq!(parse(&header), expected, "{}", String::from_utf8_lossy(&header));
    }
}

/// Whatever follows, the extent is that of the header; of every part of it, everything belongs to the header.
#[test]
fn extent_ends_with_the_header() {
    for (header, _) in rows() {
        for length in 0..header.len() {
            assert_eq!(extent(&header[..length]), Ok(Extent::Unfinished), "{length} of {header:x?}");
        }
        for after in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\r\n", &header] {
            let all = [&header, after].concat();
            assert_eq!(extent(&all), Ok(Extent::Whole(header.len())), "{header:x?}");
        }
    }
}

#[test]
fn other_beginnings_are_refused_at_the_first_wrong_byte() {
    for other in
        [&b"GET / HTTP/1.1\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01", b"proxy TCP4", b"PROXY\t"]
    {
        assert_eq!(extent(other), Err(Absent), "{other:x?}");
    }
    let mut signature = SIGNATURE.to_vec();
    signature[11] = b'\r';
    assert_eq!(extent(&signature), Err(Absent));
    assert_eq!(extent(b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\n"), Err(Invalid("its line ends without CR")));
}

#[test]
fn headers_are_bounded() {
    let line = |length: usize| [&b"PROXY UNKNOWN "[..], &vec![b'x'; length - 16], b"\r\n"].concat();
    assert_eq!(extent(&line(LONGEST_V1)), Ok(Extent::Whole(LONGEST_V1)));
    assert_eq!(extent(&line(LONGEST_V1 + 1)), Err(TooLong(LONGEST_V1)));
    let whole = v2(0, 0, &vec![0; LONGEST - FIXED]);
    assert_eq!(extent(&whole), Ok(Extent::Whole(LONGEST)));
    // Refused before its bytes have arrived.
    let longer = v2(0, 0, &vec![0; LONGEST - FIXED + 1]);
    assert_eq!(extent(&longer[..FIXED]), Err(TooLong(LONGEST)));
}

/// RFC 3720, appendix B.4.
#[test]
fn checksum_is_castagnolis() {
    assert_eq!(crc32c([0; 32].iter()), 0x8a91_36aa);
    assert_eq!(crc32c((0..32).collect::<Vec<u8>>().iter()), 0x46dd_794e);
}
