//! The addresses at which this process accepts connections; no request is forwarded to one of them.
//!
//! Takes the bound addresses and tells whether connecting to another address reaches one of them. A wildcard listener
//! is reached at every local address with its port. Another port, or another address than that of a specific listener,
//! is not this process.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

#[derive(Debug, Default, Clone)]
pub struct Listeners(Vec<SocketAddr>);

impl Listeners {
    pub fn new(bound: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self(bound.into_iter().collect())
    }

    pub fn accept(&self, address: SocketAddr) -> bool {
        self.0.iter().any(|&listener| accepts(listener, address))
    }
}

/// Whether connecting to `address` reaches `listener`.
pub fn accepts(listener: SocketAddr, address: SocketAddr) -> bool {
    if listener.port() != address.port() {
        return false;
    }
    let ip = address.ip().to_canonical();
    match listener.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => ip.is_ipv4() && is_local(ip),
        // Both families, which is Linux's default.
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => is_local(ip),
        bound => bound.to_canonical() == ip,
    }
}

/// Whether `ip` is an address of this machine.
fn is_local(ip: IpAddr) -> bool {
    if ip.is_loopback() || ip.is_unspecified() {
        return true;
    }
    // The source address equals the destination only if that is local.
    source(ip).is_ok_and(|source| source == ip)
}

/// The address of this machine that a connection to `ip` begins at.
pub fn source(ip: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    // Sends nothing.
    socket.connect((ip, 9))?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reached(listener: &str, address: &str) -> bool {
        accepts(listener.parse().unwrap(), address.parse().unwrap())
    }

    #[test]
    fn specific_listener_is_reached_at_its_address_only() {
        assert!(reached("127.0.0.1:80", "127.0.0.1:80"));
        assert!(reached("127.0.0.1:80", "[::ffff:127.0.0.1]:80"));
        assert!(reached("[::ffff:127.0.0.1]:80", "127.0.0.1:80"));
        for other in ["127.0.0.1:81", "127.0.0.2:80", "[::1]:80", "192.0.2.1:80"] {
            assert!(!reached("127.0.0.1:80", other), "{other}");
        }
    }

    #[test]
    fn wildcard_listener_is_reached_at_every_local_address() {
        for own in ["127.0.0.1:80", "127.9.9.9:80", "[::ffff:127.0.0.1]:80", "0.0.0.0:80"] {
            assert!(reached("0.0.0.0:80", own) && reached("[::]:80", own), "{own}");
        }
        assert!(reached("[::]:80", "[::1]:80") && !reached("0.0.0.0:80", "[::1]:80"));
        for other in ["127.0.0.1:81", "192.0.2.1:80", "[2001:db8::1]:80"] {
            assert!(!reached("0.0.0.0:80", other) && !reached("[::]:80", other), "{other}");
        }
    }
}
