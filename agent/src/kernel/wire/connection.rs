//! What user space knows about a connection of path `wire`, and whether two connections can become one.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd as _},
};

use penstock_common::wire::flow::{Ends, Facts};
use thiserror::Error;

use crate::kernel::socket;

/// Bits of `tcpi_options` (linux/tcp.h).
const TIMESTAMPS: u8 = 1;
const SACK: u8 = 2;
const SCALES: u8 = 4;
const ECN: u8 = 8;
const MICROSECONDS: u8 = 64;
/// Bytes that timestamps take from each segment.
const TIMESTAMP_LEN: u32 = 12;

/// One established TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpConnection {
    pub facts: Facts,
    options: u8,
    /// The largest segment, without options, that the agent has announced to the peer.
    announced: u32,
}

/// Why two connections cannot become one.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    #[error("one is IPv4, the other IPv6")]
    Family,
    #[error("only one has timestamps")]
    Timestamps,
    #[error("timestamps in microseconds")]
    Microseconds,
    #[error("only one has selective acknowledgements")]
    Sack,
    #[error("only one has ECN")]
    Ecn,
    #[error("the client accepts segments of {client} bytes, the endpoint may send {endpoint}")]
    Segments { client: u32, endpoint: u32 },
    #[error("it does not leave this machine")]
    Loopback,
}

/// Whether packets of the endpoint's connection can be rewritten into packets of the client's, and the reverse.
pub fn agree(client: &TcpConnection, endpoint: &TcpConnection) -> Result<(), Unfit> {
    let differ = |option: u8| (client.options ^ endpoint.options) & option != 0;
    let loopback = |connection: &TcpConnection| connection.facts.ends.peer == connection.facts.ends.own;
    let is_timestamped = client.options & TIMESTAMPS != 0;
    let most = endpoint.announced.saturating_sub(if is_timestamped { TIMESTAMP_LEN } else { 0 });
    match () {
        () if client.facts.ends.is_ipv4() != endpoint.facts.ends.is_ipv4() => Err(Unfit::Family),
        () if loopback(client) || loopback(endpoint) => Err(Unfit::Loopback),
        () if differ(TIMESTAMPS) => Err(Unfit::Timestamps),
        () if (client.options | endpoint.options) & MICROSECONDS != 0 => Err(Unfit::Microseconds),
        () if differ(SACK) => Err(Unfit::Sack),
        () if differ(ECN) => Err(Unfit::Ecn),
        () if most > client.facts.largest => Err(Unfit::Segments { client: client.facts.largest, endpoint: most }),
        () => Ok(()),
    }
}

impl TcpConnection {
    /// Reads a connection's numbers.
    pub fn of(connection: impl AsFd) -> io::Result<Self> {
        let fd = connection.as_fd();
        let info = socket::tcp_info(fd)?;
        let address = socket2::SockRef::from(&fd);
        let part = |address: socket2::SockAddr| address.as_socket().ok_or(io::ErrorKind::Unsupported);
        let ends = ends(part(address.peer_addr()?)?, part(address.local_addr()?)?);
        let is_timestamped = info.tcpi_options & TIMESTAMPS != 0;
        let scales = if info.tcpi_options & SCALES != 0 { info.tcpi_snd_rcv_wscale } else { 0 };
        let facts = Facts {
            cookie: socket::cookie(fd)?,
            received: 0,
            acked: 0,
            ends,
            clock: if is_timestamped { clock(fd)? } else { 0 },
            peer_scale: u32::from(scales & 15),
            own_scale: u32::from(scales >> 4),
            timestamps: u32::from(is_timestamped),
            largest: info.tcpi_snd_mss,
            unused: [0; 2],
        };
        Ok(Self { facts, options: info.tcpi_options, announced: info.tcpi_advmss })
    }
}

fn ends(peer: SocketAddr, own: SocketAddr) -> Ends {
    let ports = [peer.port().to_be_bytes(), own.port().to_be_bytes()];
    Ends {
        peer: words(peer.ip()),
        own: words(own.ip()),
        ports: u32::from_ne_bytes([ports[0][0], ports[0][1], ports[1][0], ports[1][1]]),
    }
}

/// An address as four words in packet order; IPv4 is mapped.
fn words(address: IpAddr) -> [u32; 4] {
    let bytes = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    zerocopy::transmute!(bytes.octets())
}

/// The timestamp clock of a connection minus CLOCK_MONOTONIC in ms (TCP_TIMESTAMP). Since Linux 6.7 the lowest bit of the kernel's
/// answer has another meaning, so the difference may be one too low.
fn clock(connection: impl AsFd) -> io::Result<u32> {
    let ms = || (socket::monotonic_ns() / 1_000_000) as u32;
    loop {
        let before = ms();
        let stamp = timestamp(&connection)?;
        if ms() == before {
            return Ok((stamp & !1).wrapping_sub(before));
        }
    }
}

fn timestamp(connection: impl AsFd) -> io::Result<u32> {
    let (mut value, mut len) = (0u32, size_of::<u32>() as libc::socklen_t);
    // SAFETY: pointers to locals of the given sizes.
    let result = unsafe {
        libc::getsockopt(
            connection.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_TIMESTAMP,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Whether CLOCK_MONOTONIC of this process is not the kernel's (time_namespaces(7)).
pub(super) fn has_own_clock() -> io::Result<bool> {
    match std::fs::read_to_string("/proc/self/timens_offsets") {
        Ok(offsets) => Ok(offsets
            .lines()
            .filter(|line| line.starts_with("monotonic"))
            .any(|line| line.split_whitespace().skip(1).any(|part| part != "0"))),
        // The kernel has no such namespaces.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(peer: &str, own: &str) -> TcpConnection {
        let facts =
            Facts { ends: ends(peer.parse().unwrap(), own.parse().unwrap()), largest: 1448, ..Facts::default() };
        TcpConnection { facts, options: TIMESTAMPS | SACK | SCALES, announced: 1460 }
    }

    #[test]
    fn each_difference_has_its_reason() {
        let four = connection("192.0.2.1:4000", "192.0.2.2:80");
        let six = connection("[2001:db8::1]:4000", "[2001:db8::2]:80");
        let with = |options| TcpConnection { options, ..four };
        let largest = |largest| TcpConnection { facts: Facts { largest, ..four.facts }, ..four };
        let rows = [
            (four, four, Ok(())),
            (six, six, Ok(())),
            (connection("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2"), four, Ok(())),
            (four, six, Err(Unfit::Family)),
            (four, connection("127.0.0.1:1", "127.0.0.1:2"), Err(Unfit::Loopback)),
            (four, with(SACK | SCALES), Err(Unfit::Timestamps)),
            (with(TIMESTAMPS | SACK | MICROSECONDS), four, Err(Unfit::Microseconds)),
            (with(TIMESTAMPS), four, Err(Unfit::Sack)),
            (four, with(TIMESTAMPS | SACK | ECN), Err(Unfit::Ecn)),
            (with(TIMESTAMPS | SACK), four, Ok(())),
            (largest(1400), four, Err(Unfit::Segments { client: 1400, endpoint: 1448 })),
            (largest(1448), four, Ok(())),
        ];
        for (client, endpoint, expected) in rows {
            assert_eq!(agree(&client, &endpoint), expected, "{client:?} {endpoint:?}");
        }
    }
}
