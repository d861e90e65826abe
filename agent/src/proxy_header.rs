//! The header of the PROXY protocol, versions 1 and 2: where a connection comes from, in the words of the load balancer that made it.
//!
//! [`extent`] tells which of the bytes that have arrived belong to the header, so that none beyond it is taken from the socket.
//! [`parse`] reads a whole header. Both are pure; section numbers are those of HAProxy's proxy-protocol.txt.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use thiserror::Error;

/// Begins a header of version 2 (section 2.2).
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Begins a header of version 1 (section 2.1).
const WORD: &[u8; 6] = b"PROXY ";
/// The longest header of version 1, with CR LF.
const LONGEST_V1: usize = 107;
/// Bytes of version 2 before the addresses.
const FIXED: usize = 16;
/// The longest header of version 2 that is read. Those of load balancers have some hundred bytes.
pub const LONGEST: usize = 4096;
/// The type of the TLV with the checksum (section 2.2.3).
const CRC32C: u8 = 3;

/// Why a connection is closed. The label is that of the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ProxyHeaderError {
    #[error("the connection does not begin with a PROXY header")]
    Absent,
    #[error("the PROXY header is longer than {0} bytes")]
    TooLong(usize),
    #[error("the PROXY header is invalid: {0}")]
    Invalid(&'static str),
    #[error("the checksum of the PROXY header is wrong")]
    Checksum,
    #[error("the connection ended inside the PROXY header")]
    Cut,
    #[error("the PROXY header did not arrive within timeouts.head")]
    Timeout,
}

impl ProxyHeaderError {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::TooLong(_) => "too_long",
            Self::Invalid(_) => "invalid",
            Self::Checksum => "checksum",
            Self::Cut => "cut",
            Self::Timeout => "timeout",
        }
    }
}

/// How much of the beginning of a connection is its header.
#[derive(Debug, PartialEq, Eq)]
pub enum Extent {
    /// So many bytes, all of which are there.
    Whole(usize),
    /// Everything that is there, and more.
    Unfinished,
}

/// Looks at the first bytes of a connection.
pub fn extent(bytes: &[u8]) -> Result<Extent, ProxyHeaderError> {
    let begins = |with: &[u8]| bytes.iter().zip(with).all(|(a, b)| a == b);
    if begins(SIGNATURE) {
        let Some(length) = bytes.get(FIXED - 2..FIXED) else { return Ok(Extent::Unfinished) };
        let whole = FIXED + usize::from(u16::from_be_bytes([length[0], length[1]]));
        return match () {
            () if whole > LONGEST => Err(ProxyHeaderError::TooLong(LONGEST)),
            () if bytes.len() < whole => Ok(Extent::Unfinished),
            () => Ok(Extent::Whole(whole)),
        };
    }
    if !begins(WORD) {
        return Err(ProxyHeaderError::Absent);
    }
    match bytes.iter().take(LONGEST_V1).position(|&byte| byte == b'\n') {
        Some(end) if bytes[end - 1] == b'\r' => Ok(Extent::Whole(end + 1)),
        Some(_) => Err(ProxyHeaderError::Invalid("its line ends without CR")),
        None if bytes.len() >= LONGEST_V1 => Err(ProxyHeaderError::TooLong(LONGEST_V1)),
        None => Ok(Extent::Unfinished),
    }
}

/// Reads a whole header. Returns `None` if the connection speaks for itself, as a health check of the load balancer does, or if the
/// load balancer does not know where it comes from.
pub fn parse(header: &[u8]) -> Result<Option<SocketAddr>, ProxyHeaderError> {
    if header.starts_with(SIGNATURE) { parse_v2(header) } else { parse_v1(header) }
}

fn parse_v1(header: &[u8]) -> Result<Option<SocketAddr>, ProxyHeaderError> {
    let invalid = ProxyHeaderError::Invalid;
    let line = header.strip_prefix(WORD).and_then(|rest| rest.strip_suffix(b"\r\n")).ok_or(invalid("no line"))?;
    let line = std::str::from_utf8(line).map_err(|_| invalid("its line is not ASCII"))?;
    // What follows on UNKNOWN is ignored.
    if line == "UNKNOWN" || line.starts_with("UNKNOWN ") {
        return Ok(None);
    }
    let words: Vec<&str> = line.split(' ').collect();
    let [family, source, destination, port, to_port] = words[..] else { return Err(invalid("not six words")) };
    let address = |text: &str| match family {
        "TCP4" => text.parse().map(IpAddr::V4).map_err(|_| invalid("an address is not IPv4")),
        "TCP6" => text.parse().map(IpAddr::V6).map_err(|_| invalid("an address is not IPv6")),
        _ => Err(invalid("its family is not TCP4, TCP6 or UNKNOWN")),
    };
    let is_number =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    let number =
        |text: &str| text.parse::<u16>().ok().filter(|_| is_number(text)).ok_or(invalid("a port is not a number"));
    let (source, _) = (address(source)?, address(destination)?);
    let (port, _) = (number(port)?, number(to_port)?);
    Ok(Some(SocketAddr::new(source, port)))
}

fn parse_v2(header: &[u8]) -> Result<Option<SocketAddr>, ProxyHeaderError> {
    let invalid = ProxyHeaderError::Invalid;
    let (fixed, rest) = header.split_at_checked(FIXED).ok_or(ProxyHeaderError::Cut)?;
    let (command, family) = (fixed[12], fixed[13]);
    if command >> 4 != 2 {
        return Err(invalid("its version is not 2"));
    }
    match command & 15 {
        // LOCAL: the connection is the load balancer's own, and the rest is ignored.
        0 => return Ok(None),
        1 => {}
        _ => return Err(invalid("its command is neither LOCAL nor PROXY")),
    }
    let length = match family >> 4 {
        0 => 0,
        1 => 12,
        2 => 36,
        3 => 216,
        _ => return Err(invalid("its address family is unknown")),
    };
    match family & 15 {
        0 | 1 => {}
        2 => return Err(invalid("it announces datagrams")),
        _ => return Err(invalid("its transport protocol is unknown")),
    }
    let (addresses, tlvs) = rest.split_at_checked(length).ok_or(invalid("its addresses are cut"))?;
    check_tlvs(header, header.len() - tlvs.len())?;
    let port = |at: usize| u16::from_be_bytes([addresses[at], addresses[at + 1]]);
    Ok(match (family >> 4, family & 15) {
        (1, 1) => {
            let [a, b, c, d] = [0, 1, 2, 3].map(|at| addresses[at]);
            Some(SocketAddr::from((Ipv4Addr::new(a, b, c, d), port(8))))
        }
        (2, 1) => {
            let mut octets = [0; 16];
            octets.copy_from_slice(&addresses[..16]);
            Some(SocketAddr::from((Ipv6Addr::from(octets), port(32))))
        }
        // Of an unknown or a local kind: the connection's own address counts.
        _ => None,
    })
}

/// Checks the form of the TLVs, which begin at `begin`, and the checksum if there is one. The others are ignored.
fn check_tlvs(header: &[u8], begin: usize) -> Result<(), ProxyHeaderError> {
    let cut = ProxyHeaderError::Invalid("a TLV is cut");
    let mut at = begin;
    while at < header.len() {
        let value = at + 3;
        let length = header.get(at + 1..value).ok_or(cut)?;
        let end = value + usize::from(u16::from_be_bytes([length[0], length[1]]));
        let found = header.get(value..end).ok_or(cut)?;
        if header[at] == CRC32C {
            let sum =
                <[u8; 4]>::try_from(found).map_err(|_| ProxyHeaderError::Invalid("its checksum is not four bytes"))?;
            let without = header[..value].iter().chain(&[0; 4]).chain(&header[end..]);
            if crc32c(without) != u32::from_be_bytes(sum) {
                return Err(ProxyHeaderError::Checksum);
            }
        }
        at = end;
    }
    Ok(())
}

/// CRC-32C (Castagnoli), reflected, as in RFC 4960 appendix B.
fn crc32c<'a>(bytes: impl Iterator<Item = &'a u8>) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1));
    !bytes.fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), step))
}

#[cfg(test)]
mod tests;
